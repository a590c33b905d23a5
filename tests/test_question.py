"""The question that was meant: the axis, the array, the way round, and what fn has to be.

The oracle is how each function is made; for patterns in a report, a matrix that is written down.
"""

import itertools
import re
import warnings

import causality_zoo as zoo
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import normal, seed
from refused import refused
from slow import slow
from test_reads import CAUSAL, measured, words

from eqx_norms.causality import (
    CausalityWarning,
    assert_causal,
    assert_independent,
    assert_reads,
    assert_same,
    check_causal,
    check_reads,
    dependency_matrix,
    rules,
)
from eqx_norms.causality._inputs import make_problem
from eqx_norms.causality._question import likely_time
from eqx_norms.causality._trials import Rule

T, D = 8, 4


def floats(*shape, n=1):
    return normal(jax.random.key(seed(n)), shape)


# Which axis


def over_time(x):
    """A leak of an example (time, features)."""
    return x - x.mean(0, keepdims=True)


def unmasked(tokens):
    """Attention without a mask, of an example (time,)."""
    h = zoo.embed(tokens)
    return jax.nn.softmax(h @ h.T) @ h


FORGOTTEN = {
    "floats": (jax.vmap(over_time), (3, 5, 2)),
    "one feature": (jax.vmap(over_time), (3, 5)),
    "tokens": (jax.vmap(unmasked), (16, 32)),
}


@pytest.mark.parametrize(
    "name, options",
    [
        ("floats", {}),
        ("floats", {"prove": True}),
        slow("one feature", {}),
        slow("tokens", {}),
        slow("tokens", {"prove": True}),
        slow("floats", {"strict": False, "prove": True, "axis": -3}),
    ],
)
@pytest.mark.parametrize("check", [assert_causal, slow(check_causal)])
def test_a_leak_over_time_that_is_asked_along_the_batch_warns_once(check, name, options):
    fn, shape = FORGOTTEN[name]
    x = floats(*shape)
    if name == "tokens":
        x = jax.random.randint(jax.random.key(seed(2)), shape, 0, 64)
    with pytest.warns(CausalityWarning, match="pass the axis of time instead: axis=1;") as caught:
        report = check(fn, x, **options)
    assert len(caught) == 1 and caught[0].filename == __file__
    assert report.pointwise and not report.leak
    asked = f"axis {options.get('axis', 0)}, {shape[0]} positions"
    assert f"No output reads another position along {asked}" in words(report)
    assert f"Asked of {asked}." in str(report).split("\n")
    assert str(caught[0].message) in report.notes
    # A proof holds for any parameters: a branch that starts at zero is none of the causes.
    assert ("perturb_params" in str(caught[0].message)) is not options.get("prove", False)
    report = check_causal(fn, x, axis=1)
    assert report.leak and not report.pointwise
    assert report.pairs()[0].change > 0 and len(report.pairs()) == shape[1] * (shape[1] - 1) // 2


@pytest.mark.slow
def test_who_means_it_is_not_warned():
    """Warnings are errors here."""
    norm = zoo.norm_of_each_token
    report = assert_causal(norm, floats(T, D), pointwise=True)
    assert report.pointwise and "as is meant (pointwise=True)" in words(report)
    assert assert_reads(norm, floats(T, D), CAUSAL, pointwise=True).pointwise
    assert not assert_independent(norm, floats(T, D)).pointwise
    assert not assert_reads(norm, floats(T, D), rules.independent(T)).pointwise


@pytest.mark.slow
@pytest.mark.parametrize("prove", [False, True])
def test_who_asks_for_more_is_answered_and_not_warned(prove):
    fn, x = jax.vmap(over_time), floats(3, 5, 2)
    assert check_causal(fn, x, complete=True, prove=prove).status == "blind"
    assert assert_independent(fn, x, prove=prove).status == ("proved" if prove else "clear")
    # What is warned of is no leak, and a leak is not warned of.
    assert check_causal(fn, x, axis=(0, 1), prove=prove).leak


@pytest.mark.parametrize("prove", [True, slow(False)])
@pytest.mark.parametrize(
    "allowed", [rules.causal(3), slow(rules.window(3, 2)), slow(rules.segments([0, 0, 1]))]
)
def test_a_rule_that_is_asked_along_the_batch_axis_warns(allowed, prove):
    with pytest.warns(CausalityWarning, match="pass the axis of time instead: axis=1;"):
        report = assert_reads(jax.vmap(over_time), floats(3, 5, 2), allowed, prove=prove)
    assert report.pointwise and not report.leak
    causal = jax.vmap(lambda x: jnp.cumsum(x, 0))
    assert not assert_reads(causal, floats(2, 3, 2), rules.causal(3), axis=1, prove=prove).pointwise


def test_a_model_that_mixes_only_where_numbers_are_large_is_not_warned_of():
    """An edit of each kind wakes what the one that all checks of two positions make does not."""
    rare = lambda x: x + jax.nn.relu(zoo.shifted_right(x) - 30)
    # Of 8 normals times 100 all but one draw in 100,000 have one above 30 in size.
    assert not assert_causal(rare, floats(2, 8)).pointwise


def test_warnings_can_be_turned_off():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore", CausalityWarning)
        assert_causal(jnp.tanh, floats(2, 1), prove=True)
    assert not caught and issubclass(CausalityWarning, UserWarning)


LIKELY = [
    # Shapes of x, of the output, the axis that was asked, and that of time.
    ([(4, 10, 8)], (4, 10, 8), 0, 1),
    ([(10, 4, 8)], (10, 4, 8), 1, 0),
    ([(4, 10)], (4, 10), 0, 1),
    ([(4, 10)], (4, 10, 50), 0, 1),
    ([(4, 10, 8)], (4, 10, 8), -3, 1),
    ([(4, 10, 8), (4, 10)], (4, 10, 3), 0, 1),
    ([(4, 10, 8), (4, 7)], (4, 10, 3), 0, None),
    ([(4, 1, 8)], (4, 1, 8), 0, None),
    ([(4, 3, 10, 8)], (4, 3, 10, 8), 0, 1),
    ([(4, 8)], (4,), 0, None),
    ([(4,)], (4,), 0, None),
    ([(4, 10, 8)], (4, 10, 8), (0, 1), None),
]


def test_the_axis_that_is_likely_to_be_time():
    for shapes, out, axis, time in LIKELY:
        x = [np.zeros(shape, np.float32) for shape in shapes]
        assert likely_time(make_problem(lambda x, out=out: np.zeros(out), x, axis, None)) == time


@pytest.mark.slow
def test_every_report_says_what_was_asked():
    x = floats(2, 3, D)
    allowed = rules.each(2, rules.causal(3))
    how = {"axis": (0, 1), "out_axis": 0, "prove": True, "pointwise": True}
    report = check_reads(lambda x: x.reshape(6, D), x, allowed, **how)
    assert report.status == "proved"
    asked = "Asked of axes (0, 1), 2 x 3 positions; output axis 0, 6 positions."
    assert asked in str(report).split("\n")
    for status in ("leak", "blind"):
        read = CAUSAL.T if status == "leak" else ~CAUSAL & False
        assert "Asked of axis 0, 8 positions." in str(measured(read, CAUSAL, CAUSAL))


# Which array, which examples


def test_the_array_that_leaks_is_named_and_what_to_do():
    """Strictly causal in the target, but for a calendar that is known beforehand."""
    x = {"target": floats(T, D), "known": floats(T, D, n=2)}
    forecast = lambda x: zoo.shifted_right(x["target"]).cumsum(0) + x["known"]
    report = check_causal(forecast, x, strict=True)
    assert [*report.arrays] == ["known"] and report.names == ("known", "target")
    assert np.array_equal(report.arrays["known"] > 0, np.eye(T) > 0)
    text = words(report)
    assert "output 7 <- input 7 of 'known'" in text or "and 3 more" in text
    assert "Only 'known' leaks; 'target' does not." in text and "fixed='known'" in text
    assert "Every leak is of the output's own step." in text and "shifted" not in text
    assert assert_causal(forecast, x, strict=True, fixed="known").status == "clear"


@pytest.mark.slow
def test_arrays_that_all_leak_and_those_that_leak_together():
    x = {"a": floats(T, D), "b": floats(T, D, n=2), "c": floats(T, D, n=3)}
    both = lambda x: x["c"].cumsum(0) + zoo.later(x["a"]) + zoo.later(zoo.later(x["b"]))
    report = check_causal(both, x)
    assert {*report.arrays} == {"a", "b"}
    assert np.array_equal(report.arrays["a"] > 0, np.eye(T, k=1) > 0)
    assert np.array_equal(report.arrays["b"] > 0, np.eye(T, k=2) > 0)
    assert "fixed=('a', 'b')" in words(report)
    old = {name: np.asarray(value) for name, value in x.items()}
    changed = lambda x, name: (jnp.abs(x[name][5] - old[name][5]) > 1e-3).any()
    joint = lambda x: x["c"].cumsum(0).at[2].add((changed(x, "a") & changed(x, "b")).astype("f4"))
    report = check_causal(joint, x)
    assert report.leak and not report.arrays
    assert "No array leaks alone, only 'a' and 'b' and 'c' edited together." in words(report)


@pytest.mark.slow
def test_a_joint_leak_of_one_array_is_named():
    x = {"a": floats(T, D), "b": floats(T, D, n=2)}
    report = check_causal(lambda x: zoo.count_over_a_threshold(x["b"]) + x["a"], x)
    assert report.joint and [*report.arrays] == ["b"]


@pytest.mark.slow
def test_examples_and_features_that_leak_alone_are_named():
    """By a change far below the noise level, in float64."""
    faint = lambda x: jnp.cumsum(x, 1).at[2, :, 3].add(1e-7 * jnp.tanh(x[2, -1, 0]))
    report = check_causal(faint, floats(3, 5, D), axis=1)
    assert "In the output the leak was seen at 2 of axis 0 alone." in report.notes
    assert "In the output the leak was seen at 3 of axis 2 alone." in report.notes


# The way round


def turned(read, allowed):
    text = words(measured(read, allowed))
    assert "the other way" in text and "All" not in text, text


@pytest.mark.parametrize("length", [3, T])
def test_a_mask_that_is_the_other_way_round_is_named(length):
    causal = np.tri(length, dtype=bool)
    strictly_later = ~causal
    averaged = strictly_later | (np.arange(length)[:, None] == length - 1)  # all are hidden there
    for read in (causal.T, strictly_later, averaged):
        turned(read, causal)
    window = causal & rules.window(length, 3)
    turned(window.T, causal)
    turned(~(CAUSAL & PACKED), CAUSAL & PACKED)
    turned(CAUSAL.T, CAUSAL & PACKED)


@pytest.mark.parametrize("itself", [False, True])  # as through a residual stream
def test_a_mask_of_heads_or_examples_or_a_cache_that_is_the_other_way_round(itself):
    window, packed = CAUSAL & rules.window(T, 3), CAUSAL & PACKED
    own = itself & np.eye(T, dtype=bool)
    heads = np.concatenate([CAUSAL, window])
    turned(~heads | np.tile(own, (2, 1)), heads)
    turned(np.concatenate([CAUSAL, ~window | own]), heads)  # one of them
    turned(np.concatenate([CAUSAL.T, window.T]), heads)
    for batch in (np.stack([CAUSAL, window, packed]), np.stack([CAUSAL] * 3)):
        turned(rules.each(~batch | own), rules.each(batch))
        turned(rules.each(batch.transpose(0, 2, 1) | own), rules.each(batch))
    cache = rules.causal(3, T, align="end")
    turned(~cache | (itself & np.eye(3, T, T - 3, dtype=bool)), cache)
    averaged = ~cache | np.array([[False], [False], [True]])
    turned(averaged, cache)


@pytest.mark.parametrize("itself", [False, True])
def test_padding_whose_mask_is_the_other_way_round(itself):
    real = np.arange(T) >= 3
    rule = rules.let_off(CAUSAL & real, real)
    read = (CAUSAL & ~real) | (itself & np.eye(T, dtype=bool))
    assert "padding whose mask is the other way round" in words(measured(read, rule))
    assert "padding that is not masked" in words(measured(CAUSAL, rule))


PACKED = rules.segments([0, 0, 0, 1, 1, 1, 1, 1])
NOT_TURNED = {
    "everything is read": (np.ones((T, T), bool), CAUSAL),
    "one ahead": (np.eye(T, k=1, dtype=bool), CAUSAL),
    "one pair": (np.eye(T, dtype=bool) | (np.arange(T * T).reshape(T, T) == 2 * T + 7), CAUSAL),
    "both sides": (rules.window(T, 3), CAUSAL),
    "the past of one": (CAUSAL.T | (np.arange(T * T).reshape(T, T) == 4 * T + 1), CAUSAL),
    "other documents": (CAUSAL, CAUSAL & PACKED),
    "each example, everything": (np.ones((2 * T, 2 * T), bool), rules.each(2, CAUSAL)),
    "each example, no mask": (rules.each(2, np.ones((T, T), bool)), rules.each(2, CAUSAL)),
    "one ahead, in each head": (
        np.tile(np.eye(T, k=1, dtype=bool), (2, 1)),
        np.tile(CAUSAL, (2, 1)),
    ),
    "a cache, no mask": (np.ones((3, T), bool), rules.causal(3, T, align="end")),
    "a cache, one too far": (
        rules.causal(3, T + 1, align="end")[:, :T],
        rules.causal(3, T, align="end"),
    ),
    "neighbours in place of the past": (rules.window(T, 2), CAUSAL & rules.window(T, 4)),
}


@pytest.mark.parametrize("name", NOT_TURNED)
def test_what_is_not_the_other_way_round(name):
    text = words(measured(*NOT_TURNED[name]))
    assert "other way round" not in text.replace("the other way round in several layers", "")


@pytest.mark.slow
@pytest.mark.parametrize("hidden", [-np.inf, -1e9])
def test_triu_in_place_of_tril(hidden):
    mask = jnp.triu(jnp.ones((T, T), bool))
    attend = lambda x: x + jax.nn.softmax(jnp.where(mask, jnp.tanh(x @ x.T), hidden)) @ x
    assert "as triu in place of tril" in words(check_causal(attend, floats(T, D)))
    from_the_end = lambda x: jnp.flip(jnp.cumsum(jnp.flip(x, 0), 0), 0)
    assert "or a scan from the end" in words(check_causal(from_the_end, floats(T, D)))


def test_nothing_is_read_only_where_nothing_is():
    far = np.tri(T, k=-3, dtype=bool)
    text = words(measured(CAUSAL & ~far, CAUSAL, far))
    assert "Nothing that must be read is read, but other inputs are" in text
    assert "starts at zero" not in text
    assert "Nothing is read: look for a branch" in words(measured(far & False, CAUSAL, far))
    # Nor is only the diagonal read where the future is, nor an input by nobody that some may read.
    ahead = np.eye(T, dtype=bool) | np.eye(T, k=1, dtype=bool)
    assert "Only the diagonal" not in words(measured(ahead, CAUSAL, CAUSAL))
    second = CAUSAL & (np.arange(T) == 2) & (np.arange(T) < 5)[:, None]
    required = CAUSAL & (np.arange(T) >= 5)[:, None]
    text = words(measured(CAUSAL & (np.arange(T) != 2) | second, CAUSAL, required))
    assert "No output that must reads input 2: look for a mask that hides that." in text


# Where the edits look


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: x * (jnp.abs(x).sum(1) > 0).sum().astype(x.dtype),  # lengths from padding rows
        slow(lambda x: x + jnp.isinf(jnp.log(jnp.abs(x))).any().astype(x.dtype)),
        slow(lambda x: x + (~jnp.isfinite(1 / x)).any().astype(x.dtype)),
    ],
)
@pytest.mark.parametrize("length", [T, slow(200)])
def test_what_reacts_to_zero_alone_is_found(fn, length):
    assert check_causal(fn, floats(length, D) + 3).leak


@pytest.mark.slow
def test_edits_to_zero_raise_no_alarm_where_a_logarithm_has_none():
    report = check_causal(lambda p: jnp.tri(T) @ jnp.log(p), jnp.abs(floats(T, D)))
    assert report.status == "clear", str(report)


def test_splits_are_those_that_a_proof_left_open():
    length = 2048
    rule, rng = Rule("causal", rules.causal(length)), np.random.default_rng(seed(3))
    connected = rules.causal(length)
    assert rule.choose("auto", rng, connected) == ()
    borders = np.arange(192, length, 192)
    connected[borders - 1, borders] = True
    assert rule.choose("auto", rng, connected) == tuple(borders)
    many = rule.choose("auto", rng, connected | (np.arange(length) % 2 == 0)[:, None])
    assert len(many) == 68 and all(split % 2 or split in borders for split in many)
    # Outputs of one row are one split, named by the first.
    rule = Rule("reads", rules.segments(np.arange(6) // 3))
    assert rule.choose("auto", rng, rule.allowed | (np.arange(36).reshape(6, 6) == 5 * 6)) == (3,)


def read_across_chunks(chunk, x):
    """A cumulative sum, but for the last of each chunk, which also reads the next position."""
    last = (jnp.arange(len(x)) % chunk == chunk - 1)[:, None]
    return jnp.cumsum(x, 0) + jnp.where(last, zoo.later(x), 0)


@pytest.mark.slow
@pytest.mark.parametrize("length, chunk", [(1000, 77), (1000, 125), (2048, 192), (2048, 200)])
def test_reads_across_chunks_are_found_at_the_cost_of_any(length, chunk):
    x = floats(length, 1)
    report = check_causal(lambda x: read_across_chunks(chunk, x), x)
    # 68 splits, each once, and what mixes: as many as there are binary digits.
    assert report.leak and report.edits <= 68 + 11
    assert all(pair.input == pair.output + 1 for pair in report.pairs())


@pytest.mark.slow
def test_a_proof_says_where_to_look():
    x = floats(2048, 1)
    ahead = np.minimum(np.arange(2048) + (np.arange(2048) % 197 == 196), 2047)
    report = check_causal(lambda x: jnp.cumsum(x, 0) + x[ahead], x, prove=True)
    assert report.leak and report.splits == tuple(range(197, 2048, 197))
    harmless = lambda x: jnp.cumsum(x, 0) + jnp.where(x[ahead] > 1e30, x[ahead], 0)
    report = check_causal(harmless, x, prove=True)
    assert report.status == "clear" and "Tried 10 of 10 splits" in str(report)
    assert "2037 more need no edit" in words(report)
    assert (report.matrix[~report.allowed] == 0).all()  # covered by edits, or not connected


# What fn has to be


def raising(error):
    def fn(x):
        raise error

    return fn


OF_ONE_ARGUMENT = {
    "got <lambda>(x, mask); give it the others by closure: lambda x: fn(x, mask)": lambda x, mask: (
        x
    ),
    "lambda x: fn(x, mask, key=key)": lambda x, mask, *, scale=1, key: x,
    "got <lambda>(); write lambda x: ... around it": lambda: 0,
    "so that it can be traced, got TracerArrayConversionError: ": lambda x: np.tanh(x),
    "host(fn)  # of NumPy arrays, in the place of fn": lambda x: np.asarray(x) + 1,
    # In torch's words.
    "from_torch(module, call=lambda module, x: module(x)[0])": raising(
        TypeError("tanh(): argument 'input' must be Tensor, not DynamicJaxprTracer")
    ),
}


@pytest.mark.parametrize("text", OF_ONE_ARGUMENT)
def test_functions_that_cannot_be_traced_say_what_to_type(text):
    with refused(TypeError, re.escape(text)):
        assert_causal(OF_ONE_ARGUMENT[text], floats(T, D))


X, CUMSUM = np.ones((T, D), np.float32), lambda x: x.cumsum(0)


@pytest.mark.parametrize(
    "check, given, more",
    [
        (assert_causal, (X,), 1),
        (check_causal, (X,), X),
        (assert_independent, (X,), True),
        (assert_reads, (X, np.tri(T, dtype=bool)), np.tri(T, dtype=bool)),
        (dependency_matrix, (X,), "vjp"),
        (assert_same, (CUMSUM, X), {"more": X}),
    ],
)
def test_an_option_by_position_is_told_its_name(check, given, more):
    """Or where another argument of the function goes."""
    with pytest.raises(TypeError) as caught:
        check(CUMSUM, *given, more)
    text = str(caught.value)
    assert text.startswith(f"{check.__name__}(") and "takes options by name alone" in text
    assert "in front, as in axis=1" in text and "by closure, lambda x: fn(x, more)" in text


def test_a_tuple_of_all_arguments_is_noticed():
    x = floats(T, D)
    with refused(TypeError, re.escape("or, as x holds them all, lambda x: fn(*x)")):
        assert_causal(lambda x, mask: x, (x, x))
    mistaken = raising(TypeError("unsupported operand"))
    with pytest.raises(TypeError, match="unsupported operand") as caught:
        assert_causal(mistaken, x)
    assert "closure" not in str(caught.value)


def test_arrays_without_entries():
    x = floats(T, D)
    with refused(ValueError, re.escape("x must hold numbers, got shapes [(8, 0)]")):
        assert_causal(lambda x: x, x[:, :0])
    with refused(ValueError, re.escape("the output must hold numbers, got shapes [(8, 0)]")):
        assert_causal(lambda x: x[:, :0], x)


@pytest.mark.slow
def test_empty_arrays_beside_others_do_not_matter():
    x = {"x": floats(T, D), "none": floats(T, D)[:, :0], "ids": jnp.zeros((T, 0), int)}
    fn = lambda x: (x["x"].cumsum(0) + x["none"].sum(1, keepdims=True), x["ids"])
    assert check_causal(fn, x).status == "clear"
    assert check_causal(lambda x: (x["x"][::-1], x["none"]), x).leak


@pytest.mark.slow
def test_masked_logits_have_a_cure_that_works():
    x = floats(T, D)
    masked = lambda x: jnp.where(CAUSAL, jnp.tanh(x @ x.T), -jnp.inf)
    cure = "put a number there: lambda x: jnp.nan_to_num(fn(x), neginf=0.0)"
    with refused(ValueError, re.escape(cure)):
        assert_causal(masked, x)
    finite = lambda x: jnp.nan_to_num(masked(x), neginf=0.0)
    assert assert_causal(finite, x, prove=True).status == "proved"
    assert check_causal(lambda x: jnp.nan_to_num(masked(x) + x[-1, 0], neginf=0.0), x).leak


@pytest.mark.slow
def test_flax_nnx_in_training_is_told_of_clone():
    from flax import nnx

    norm = nnx.BatchNorm(D, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"lambda x: nnx\.clone\(model\)\(x\); or .* model\.eval"):
        assert_causal(norm, floats(T, D))
    assert check_causal(lambda x: nnx.clone(norm)(x), floats(T, D)).leak
    norm.eval()
    assert check_causal(norm, floats(T, D), pointwise=True).status == "clear"


def test_a_function_that_differs_from_call_to_call_is_still_refused():
    calls = itertools.count()
    with refused(ValueError, "fn gives different outputs for the same x"):
        assert_causal(lambda x: x * (1 + next(calls)), floats(T, D))
