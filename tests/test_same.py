"""Is this the same function? Pairs with a known answer, and what the report says about them.

The oracle is how a pair is made; see tests/same_zoo.py.
"""

import pytest
import same_zoo as zoo
from slow import slow

from eqx_norms.causality import DifferenceError, assert_same, check_same

# One of each kind: the others take minutes in all.
QUICK = (
    "logarithm_of_softmax",
    "bfloat16_inside",
    "cache_with_positions_off_by_one",
    "one_weight_off_by_a_ten_thousandth",
)
# In bfloat16 these are the same: there is no number between 0.9 and 0.9001, and how far the
# approximation of gelu is from gelu is less than what rounding its two constants does.
SAME_IN_BFLOAT16 = ("decay_of_another_power", "gelu_by_tanh")


def pairs(names):
    """The quick ones, and in the slow run all of them in two dtypes."""
    cases = [(name, dtype) for dtype in ("float32", "bfloat16") for name in names]
    quick = lambda name, dtype: name in QUICK and dtype == "float32"
    return [case if quick(*case) else slow(*case) for case in cases]


@pytest.mark.parametrize("name, dtype", pairs(zoo.SAME))
def test_the_same_but_for_rounding(name, dtype):
    report = assert_same(*zoo.pair(name, dtype))
    assert report.status in ("same bits", "rounding")


@pytest.mark.parametrize("name, dtype", pairs(zoo.DIFFERENT))
def test_different(name, dtype):
    if dtype == "bfloat16" and name in SAME_IN_BFLOAT16:
        assert check_same(*zoo.pair(name, dtype)).status in ("same bits", "rounding")
        return
    with pytest.raises(DifferenceError, match=r"^different: ") as caught:
        assert_same(*zoo.pair(name, dtype))
    assert caught.value.report.status == "different"
