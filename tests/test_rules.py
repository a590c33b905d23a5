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
    "window, left and right": (rules.window(T, (3, 1)), lambda t, j: t - 3 <= j <= t + 1),
    "window without an end": (rules.window(T, (None, 2)), lambda t, j: j <= t + 2),
    "causal of 3 and 9, from the start": (
        rules.causal(3, T, align="start"),
        lambda t, j: j <= t,
    ),
    "causal of 3 and 9, to the end": (rules.causal(3, T, align="end"), lambda t, j: j <= t + 6),
    "strict, of 3 and 9, to the end": (
        rules.causal(3, T, strict=True, align="end"),
        lambda t, j: j < t + 6,
    ),
    "causal of 12 and 9, to the end": (rules.causal(12, T, align="end"), lambda t, j: j <= t - 3),
    "causal of 12 and 9, from the start": (
        rules.causal(12, T, align="start"),
        lambda t, j: j <= t,
    ),
    "causal of as many": (rules.causal(T, T), lambda t, j: j <= t),
    "window of 3 and 9, to the end": (
        rules.window(3, (2, 0), in_length=T, align="end"),
        lambda t, j: t + 4 <= j <= t + 6,
    ),
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
    "padding let off": (
        rules.let_off(rules.causal(T) & np.array(MASK), MASK),
        lambda t, j: (j <= t and MASK[j]) or not MASK[t],
    ),
}
SHAPES = {"segments of others": (3, T), "strided": (3, T), "full patches": (2, T)}
SHAPES["unpadded, all count"] = (2, T)
SHAPES |= {name: (3, T) for name in RULES if "of 3 and 9" in name}
SHAPES |= {name: (12, T) for name in RULES if "of 12 and 9" in name}


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


def test_each_of_a_stack_is_one_rule_for_each_example():
    stack = np.random.default_rng(seed(1)).random((3, 2, 4)) < 0.5
    whole = rules.each(stack)
    assert whole.shape == (6, 12) and whole.dtype == np.bool_
    for a, b, t, j in np.ndindex(3, 3, 2, 4):
        assert whole[a * 2 + t, b * 4 + j] == (a == b and stack[a, t, j])
    assert np.array_equal(rules.each(3, stack), whole)
    assert np.array_equal(rules.each(jnp.asarray(stack)), whole)


def test_what_is_let_off_by_two_rules_is_let_off():
    """`unpadded` lets padding off, `causal` beside it does not: the trap that `let_off` is for."""
    mask, causal = np.array(MASK), rules.causal(T)
    held = causal & rules.unpadded(mask)
    assert not held[~mask].all() and np.array_equal(held[mask], (causal & mask)[mask])
    assert np.array_equal(rules.let_off(held, mask), rules.let_off(causal & mask, mask))
    heads = np.stack([causal, rules.window(T, 2)])
    masks = np.stack([mask, ~mask])
    one_by_one = [rules.let_off(causal & mask, mask) for mask in masks]
    assert np.array_equal(rules.let_off(causal & masks[:, None], masks), one_by_one)
    assert np.array_equal(rules.let_off(heads, mask)[1], rules.let_off(heads[1], mask))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64", "float8_e5m2"])
def test_an_additive_mask_is_zero_and_minus_infinity(dtype):
    rule = rules.causal(T) & rules.segments(IDS)
    mask = rules.additive(np.stack([rule, rule.T]), jnp.dtype(dtype))
    assert type(mask) is np.ndarray and mask.dtype == jnp.dtype(dtype)
    expected = [[[0 if may else -np.inf for may in row] for row in one] for one in (rule, rule.T)]
    assert np.array_equal(mask.astype(np.float64), expected)
    assert rules.additive(rule).dtype == np.float32


def test_dead_rows():
    rule = rules.causal(4, 3, strict=True, align="end")
    assert rules.unread_rows(rule).tolist() == [True, True, False, False]
    heads = np.stack([rules.causal(2), rules.causal(2, strict=True)])
    assert rules.unread_rows(jnp.asarray(heads)).tolist() == [[False, False], [True, False]]
    let_off = rules.let_off(rule, ~rules.unread_rows(rule))
    assert let_off[:2].all() and np.array_equal(let_off[2:], rule[2:])


def test_two_numbers_are_lengths_and_never_strict():
    """`causal(3, 5)` was once the strict rule of 3."""
    assert (
        rules.causal(3, 5, align="start").shape == rules.causal(3, 5, align="end").shape == (3, 5)
    )
    calls = [
        lambda: rules.causal(3, 3, True),
        lambda: rules.blocks(6, 2, True),
        lambda: rules.ordered([1, 0], True),
    ]
    for call in calls:
        with pytest.raises(TypeError, match="positional"):
            call()


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
    for pair in (np.array([2, 1]), jnp.array([2, 1])):
        assert np.array_equal(rules.window(T, pair), rules.window(T, (2, 1)))


BAD = {
    "length must be at least 1, got 0": lambda: rules.causal(0),
    "length must be an integer, got 2.5": lambda: rules.independent(2.5),
    "size must be at least 1, got 0": lambda: rules.window(T, 0),
    "size must be at least 1, got -1": lambda: rules.prefix(T, -1),
    r"with 3 outputs and 5 inputs align must say .*, as behind a cache": lambda: rules.causal(3, 5),
    r"with 9 outputs and 5 inputs align must say": lambda: rules.window(T, 2, in_length=5),
    "in_length must be a number of inputs, got True; or write strict=True": lambda: rules.causal(
        T, True
    ),
    "in_length must be at least 1, got 0": lambda: rules.causal(T, 0, align="end"),
    'align must be "start" or "end", got \'left\'': lambda: rules.causal(3, 5, align="left"),
    r"size must be one number or a pair \(left, right\), got \(1, 2, 3\)": (
        lambda: rules.window(T, (1, 2, 3))
    ),
    r"left and right must be at least 0, or None for no bound, got \(-1, 0\)": (
        lambda: rules.window(T, (-1, 0))
    ),
    r"mask must have an entry for each of the 9 outputs of rule, which is \(9, 9\), got \(3,\)": (
        lambda: rules.let_off(rules.causal(T), [True, False, True])
    ),
    r"mask must have an entry .*, which is \(3, 9, 9\), got \(2, 9\)": (
        lambda: rules.let_off(np.ones((3, T, T), bool), np.ones((2, T), bool))
    ),
    r"mask must be one row, got shape \(2, 9\); .* write each\(let_off\(rule": (
        lambda: rules.unpadded(np.ones((2, T), bool))
    ),
    "a side of size must be an integer, got 1.5": lambda: rules.window(T, (1.5, 0)),
    "size must be an integer, got True": lambda: rules.window(T, True),
    "length must be an integer, got True": lambda: rules.causal(True),
    "start must be an integer, got True": lambda: rules.strided(T, 2, True),
    r"rule must be a boolean array \(T_out, T_in\), got bool \(9,\)": (
        lambda: rules.unread_rows(np.array(MASK))
    ),
    r"rule must be .*, or a stack of one for each of the 2 examples, got \(3, 2, 2\)": (
        lambda: rules.each(2, np.ones((3, 2, 2), bool))
    ),
    r"batch, where rule is left out, must be .* \(B, T_out, T_in\), got bool \(9, 9\)": (
        lambda: rules.each(rules.causal(T))
    ),
    "dtype must be of floats, and have an infinity, got int32": (
        lambda: rules.additive(rules.causal(T), np.int32)
    ),
    "dtype must be of floats, and have an infinity, got float8_e4m3fn": (
        lambda: rules.additive(rules.causal(T), jnp.float8_e4m3fn)
    ),
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
