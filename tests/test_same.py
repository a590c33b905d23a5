"""Is this the same function? Pairs with a known answer, and what the report says about them.

The oracle is how a pair is made; see tests/same_zoo.py.
"""

import functools

import pytest
import same_zoo as zoo

from eqx_norms.causality import DifferenceError, assert_same

# One of each kind: the others take minutes in all.
QUICK = (
    "logarithm_of_softmax",
    "cache_and_full",
    "bfloat16_inside",
    "batch_norm_folded_into_weights",
    "prefix_sum_as_total_minus_rest",
    "cache_with_positions_off_by_one",
    "another_eps",
    "one_weight_off_by_a_ten_thousandth",
    "second_best_expert",
)


def pairs(names):
    """The quick ones, and in the slow run all of them in two dtypes."""
    slow = functools.partial(pytest.param, marks=pytest.mark.slow)
    cases = [(name, dtype) for dtype in ("float32", "bfloat16") for name in names]
    quick = lambda name, dtype: name in QUICK and dtype == "float32"
    return [case if quick(*case) else slow(*case) for case in cases]


@pytest.mark.parametrize("name, dtype", pairs(zoo.SAME))
def test_the_same_but_for_rounding(name, dtype):
    report = assert_same(*zoo.pair(name, dtype))
    assert report.status in ("same bits", "rounding")


@pytest.mark.parametrize("name, dtype", pairs(zoo.DIFFERENT))
def test_different(name, dtype):
    with pytest.raises(DifferenceError, match=r"^different: ") as caught:
        assert_same(*zoo.pair(name, dtype))
    assert caught.value.report.status == "different"
