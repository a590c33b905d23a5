"""The rules against a loop over all pairs that says in one line who may read whom."""

import jax.numpy as jnp
import numpy as np
import pytest
from draws import seed
from refused import refused

from eqx_norms.causality import rules

T = 9
IDS = [0, 0, 3, 3, 3, 0, 7, 7, 7]
ORDER = [4, 1, 8, 0, 2, 6, 3, 7, 5]
MASK = [True, False, True, True, True, True, False, False, True]

RULES = {
    "causal": (rules.causal(T), lambda t, j: j <= t),
    "strict": (rules.causal(T, strict=True), lambda t, j: j < t),
    "independent": (rules.independent(T), lambda t, j: j == t),
    "segments": (rules.segments(IDS), lambda t, j: IDS[j] == IDS[t]),
    "segments of others": (rules.segments(IDS, [7, 1, 0]), lambda t, j: IDS[j] == (7, 1, 0)[t]),
    "window": (rules.window(T, 3), lambda t, j: t - 3 < j < t + 3),
    "window of one": (rules.window(T, 1), lambda t, j: j == t),
    "prefix": (rules.prefix(T, 4), lambda t, j: j <= t or max(t, j) < 4),
    "blocks": (rules.blocks(T, 4), lambda t, j: j // 4 <= t // 4),
    "strict blocks": (rules.blocks(T, 4, strict=True), lambda t, j: j // 4 < t // 4),
    "strided": (rules.strided(T, 4), lambda i, j: j <= 4 * i),
    "full patches": (rules.strided(T, 4, start=3), lambda i, j: j < 4 * (i + 1)),
    "dilated": (rules.dilated(T, 3), lambda t, j: t % 3 == j % 3),
    "ordered": (rules.ordered(ORDER), lambda t, j: ORDER.index(j) <= ORDER.index(t)),
    "strictly": (rules.ordered(ORDER, strict=True), lambda t, j: ORDER.index(j) < ORDER.index(t)),
    "unpadded": (rules.unpadded(MASK), lambda t, j: MASK[j] or not MASK[t]),
    "unpadded, all count": (rules.unpadded(MASK, [True] * 2), lambda t, j: MASK[j]),
}
SHAPES = {"segments of others": (3, T), "strided": (3, T), "full patches": (2, T)}
SHAPES["unpadded, all count"] = (2, T)


def brute_force(shape, may):
    return np.array([[bool(may(t, j)) for j in range(shape[1])] for t in range(shape[0])])


@pytest.mark.parametrize("name", RULES)
def test_every_pair(name):
    rule, may = RULES[name]
    assert type(rule) is np.ndarray and rule.dtype == np.bool_
    assert np.array_equal(rule, brute_force(SHAPES.get(name, (T, T)), may))


def test_blocks_of_an_image_are_patches_row_by_row():
    places = [(y, x) for y in range(5) for x in range(4)]
    number = [(y // 2) * 2 + x // 3 for y, x in places]  # 3 x 2 patches, those at the edge cut off
    expected = [[number[j] <= number[t] for j in range(20)] for t in range(20)]
    assert np.array_equal(rules.blocks((5, 4), (2, 3)), expected)


def test_each_is_the_rule_within_an_example_and_nothing_across():
    rule = rules.strided(5, 2)
    whole = rules.each(3, rule)
    assert whole.shape == (9, 15)
    for a, b, t, j in np.ndindex(3, 3, 3, 5):
        assert whole[a * 3 + t, b * 5 + j] == (a == b and rule[t, j])


def test_rules_combine_as_arrays():
    packed = rules.causal(T) & rules.segments(IDS)
    assert np.array_equal(packed, brute_force((T, T), lambda t, j: j <= t and IDS[j] == IDS[t]))
    taps = rules.causal(T) & rules.dilated(T, 2) & rules.window(T, 5)
    assert np.array_equal(taps, brute_force((T, T), lambda t, j: t - j in (0, 2, 4)))
    assert np.array_equal(~rules.causal(T, strict=True), rules.causal(T).T)
    assert np.array_equal(rules.prefix(T, T), np.ones((T, T), bool))
    assert np.array_equal(rules.ordered(range(T)), rules.causal(T))
    assert np.array_equal(rules.blocks(T, 1), rules.causal(T))
    assert np.array_equal(rules.strided(T, 1), rules.causal(T))


def test_jax_arrays_are_taken():
    rng = np.random.default_rng(seed(0))
    ids, mask = rng.integers(0, 3, T), rng.random(T) < 0.5
    assert np.array_equal(rules.segments(jnp.asarray(ids)), rules.segments(ids))
    assert np.array_equal(rules.unpadded(jnp.asarray(mask)), rules.unpadded(mask))
    order = rng.permutation(T)
    assert np.array_equal(rules.ordered(jnp.asarray(order)), rules.ordered(order.tolist()))
    causal = rules.causal(T)
    assert np.array_equal(rules.each(2, jnp.asarray(causal)), rules.each(2, causal))


BAD = {
    "length must be at least 1, got 0": lambda: rules.causal(0),
    "length must be an integer, got 2.5": lambda: rules.independent(2.5),
    "size must be at least 1, got 0": lambda: rules.window(T, 0),
    "size must be at least 1, got -1": lambda: rules.prefix(T, -1),
    r"size must have as many axes as shape, \(4, 4\), got \(2,\)": lambda: rules.blocks((4, 4), 2),
    r"shape must have at least one axis, got \(\)": lambda: rules.blocks((), ()),
    "stride must be at least 1, got 0": lambda: rules.strided(T, 0),
    "start must be from 0 to 8, the last input, got 9": lambda: rules.strided(T, 2, start=9),
    "step must be at least 1, got 0": lambda: rules.dilated(T, 0),
    r"order must list every position from 0 to 2 once, got \[0, 1, 1\]": lambda: rules.ordered(
        [0, 1, 1]
    ),
    r"ids must be a row of integers, one for each position, got int64 of shape \(1, 3\)": (
        lambda: rules.segments([[0, 0, 1]])
    ),
    "out_ids must be a row of integers, one for each position, got float64": (
        lambda: rules.segments([0, 1], [0.5, 1])
    ),
    "mask must be a row of bools, True where there is no padding, got int64": (
        lambda: rules.unpadded([1, 1, 0])
    ),
    r"rule must be a boolean array \(T_out, T_in\), got float64 \(3, 3\)": (
        lambda: rules.each(2, np.tri(3))
    ),
    "batch must be at least 1, got 0": lambda: rules.each(0, rules.causal(3)),
}


@pytest.mark.parametrize("text", BAD)
def test_bad_arguments_are_refused(text):
    with refused((ValueError, TypeError), text):
        BAD[text]()
