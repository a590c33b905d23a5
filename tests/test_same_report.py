"""What `assert_same` says: where two functions differ, what it cannot decide, and what it refuses.

The oracle is the way a pair is made.
"""

import contextlib

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from draws import normal, seed
from jax.sharding import NamedSharding, PartitionSpec as P
from refused import refused
from slow import slow

from eqx_norms import LayerNorm, RMSNorm
from eqx_norms.causality import DifferenceError, assert_same, check_same
from eqx_norms.causality._same import _compare as comparing

T, D = 6, 4


def words(report):
    """The text of a report on one line."""
    return " ".join(str(report).split())


def backwards(x):
    """The sum of each row, from its end on: another order, so another rounding."""
    return jax.lax.fori_loop(0, x.shape[1], lambda i, s: s + x[:, -1 - i], 0 * x[:, 0])


def rows(getkey, *shape):
    return normal(getkey(), shape or (T, 50))


# Where


@pytest.mark.slow
def test_leaf_index_values_and_position(getkey):
    one = lambda x: {"a": x.sum(1), "b": (x, x[0, 0])}
    two = lambda x: {"a": backwards(x), "b": (x.at[3:, 2].multiply(1.0001), x[0, 0])}
    x = rows(getkey).at[5, 2].set(9.0)
    with pytest.raises(DifferenceError) as caught:
        assert_same(one, two, x, err_msg="A test:")
    report = caught.value.report
    assert (report.leaf, report.index, report.position) == ("b.0", (5, 2), 3)
    assert report.values == (9.0, float(np.float32(9) * np.float32(1.0001)))
    np.testing.assert_allclose(report.exact, (9, 9 * float(np.float32(1.0001))), rtol=1e-15)
    assert report.seen == tuple(range(8)) and report.inputs == 8
    np.testing.assert_array_equal(report.x, x)
    assert str(caught.value) == f"A test:\n{report}"
    text = words(report)
    assert text.startswith("different: the two functions differ by more than rounding, tried on x")
    assert "Output 'b.0'[5, 2] is 9 and 9.0009. The difference is 0.0009; rounding may be" in text
    assert "The first that differ are at position 3 along axis 0." in text
    assert "Seen at x and 7 of 7 edits." in text


@pytest.mark.slow
def test_axis_is_that_of_the_report(getkey):
    off = lambda x: x.at[1, 7:].multiply(2)
    for axis, position in ((1, 7), (-1, 7), (0, 1)):
        assert check_same(lambda x: x, off, rows(getkey), axis=axis, inputs=0).position == position
    total = check_same(lambda x: x.sum(), lambda x: 2 * x.sum(), rows(getkey), inputs=0)
    assert (total.index, total.position) == ((), None)
    with pytest.raises(ValueError, match=r"axis=2 does not exist in any output"):
        assert_same(lambda x: x, off, rows(getkey), axis=2)


def test_edits_find_what_x_does_not_show(getkey):
    one, two = lambda x: x, lambda x: jnp.clip(x, max=4.0)
    x = jnp.clip(rows(getkey), -2, 2)
    report = check_same(one, two, x)
    assert report.status == "different" and 0 not in report.seen
    assert np.max(report.x) > 4
    alone = assert_same(one, two, x, inputs=0)
    assert str(alone) == "same bits: the two functions give equal values, tried on x alone."


def test_rounding_is_measured(getkey):
    report = assert_same(lambda x: jnp.exp(x).sum(1), lambda x: backwards(jnp.exp(x)), rows(getkey))
    assert report.status == "rounding"
    # Positive terms, so that each of the 50 additions rounds by at most half an eps of the sum, in
    # both; and exp may be off by 2.
    assert 0 < report.ulps <= 54 and 0 < report.ulps64 <= 54
    assert report.dtype == "float32" and report.values[0] != report.values[1]
    assert f"Largest difference: {report.ulps:.2g} eps of float32" in words(report)


def test_integers_must_be_equal():
    ids = jnp.arange(8)
    report = check_same(lambda i: i % 5, lambda i: (i % 5).at[6].add(1), ids, inputs=0)
    assert (report.status, report.index, report.values) == ("different", (6,), (1, 2))
    assert (report.ulps, report.exact) == (0, None)  # no floats, so nothing to run in float64
    assert "Output[6] is 1 and 2." in words(report)
    large = 2**24 + 1  # that and its successor are one float32
    near = check_same(lambda i: i + large, lambda i: i + large + 1, ids, inputs=0)
    assert near.status == "different"


def test_forward_passes(getkey, monkeypatch):
    """Of each function 8, in float64 8 more, and where they differ again as many."""
    runs, run = [], comparing._run
    counted = lambda fn, closed, rows, *how: runs.append(len(rows)) or run(fn, closed, rows, *how)
    monkeypatch.setattr(comparing, "_run", counted)
    plain, x = lambda x: jnp.exp(x).sum(1), rows(getkey)
    for two, passes in ((plain, 8), (lambda x: backwards(jnp.exp(x)), 16), (jnp.ravel, 24)):
        one = (lambda x: 2 * x.ravel()) if two is jnp.ravel else plain
        runs.clear()
        check_same(one, two, x)
        assert sum(runs) == 2 * passes


# Rounding that decides


@pytest.mark.slow
def test_an_argmax_that_rounding_flips_is_said_to(getkey):
    w = rows(getkey, D, 64)
    fine = lambda x: (x @ w).argmax(1)
    coarse = lambda x: (x @ w).astype(jnp.bfloat16).argmax(1)
    # Of 64 scores in bfloat16 the best two are one number in some per cent of 400 rows.
    report = check_same(fine, coarse, rows(getkey, 400, D))
    assert report.status == "imprecise"
    assert "It is the second function that is off. Integers differ where two" in words(report)
    other = check_same(fine, lambda x: (x @ w).argsort(1)[:, -2], rows(getkey, 400, D))
    assert other.status == "different"


@pytest.mark.slow
def test_nan_where_the_other_has_none(getkey):
    def naive(x):
        e = jnp.exp(60 * x)
        return e / e.sum(1, keepdims=True)

    x = jnp.clip(rows(getkey), -4, 4).at[2, 0].set(4.0)  # exp(240): too large for float32 alone
    report = check_same(lambda x: jax.nn.softmax(60 * x), naive, x, inputs=0)
    assert report.status == "imprecise" and report.index[0] <= 2
    assert np.isnan(report.values[1]) and np.isfinite(report.values[0])
    assert "It is the second function that is off. The precision is lost at `exp`" in words(report)
    assert "overflow: " in words(report) and "float32 ends at 3.4e+38" in words(report)
    both = lambda x: jnp.log(x - 100)
    assert assert_same(both, lambda x: both(x) * 1, x).status == "same bits"


# The same in exact arithmetic alone


def by_formula(h, eps=1e-5):
    return h * jax.lax.rsqrt((h * h).mean(-1, keepdims=True) + jnp.asarray(eps, h.dtype))


def one_pass(x):
    mean = x.mean(-1, keepdims=True)
    return (x - mean) * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) - mean * mean + 1e-5)


def two_passes(x):
    rest = x - x.mean(-1, keepdims=True)
    return rest * jax.lax.rsqrt((rest * rest).mean(-1, keepdims=True) + 1e-5)


def test_squares_that_overflow_in_float16(getkey):
    norm = jax.vmap(RMSNorm(16, eps=1e-5, use_weight=False, use_bias=False))
    h = 300 * normal(getkey(), (T, 16), jnp.float16)
    with pytest.raises(DifferenceError, match=r"^imprecise: .* the same in exact") as caught:
        assert_same(by_formula, norm, h, inputs=0)
    report = caught.value.report
    assert report.status == "imprecise" and 0 in report.values
    assert (
        f"It is the first function that is off. The precision is lost at `mul` in {__file__}"
        in (words(report))
    )
    assert "(by_formula): overflow: " in words(report)


@pytest.mark.slow
def test_what_is_the_same_in_exact_arithmetic_may_be_allowed(getkey):
    x = rows(getkey) + 1e4
    report = assert_same(two_passes, one_pass, x, inputs=0, allow_imprecise=True)
    assert report.status == "imprecise"
    with pytest.raises(DifferenceError, match=r"^different"):
        assert_same(two_passes, lambda x: 2 * one_pass(x), x, inputs=0, allow_imprecise=True)


@pytest.mark.slow
def test_squares_that_underflow_in_float16(getkey):
    # Of size 1e-4: their squares are below the smallest number of float16, 6e-8, and so is eps.
    norm = jax.vmap(RMSNorm(16, eps=0, use_weight=False, use_bias=False))
    h = normal(getkey(), (T, 16), jnp.float16) / 10_000 + 1e-4
    report = check_same(norm, lambda h: by_formula(h, 0), h, inputs=0)
    assert report.status == "imprecise" and "underflow" in words(report)


@pytest.mark.slow
@pytest.mark.parametrize("offset", [1e4, 1e3, 300.0])
def test_a_variance_that_cancels(offset, getkey):
    # The squares round by offset**2 * 6e-8 / 2, and that is in the variance of 1: thousands of eps.
    report = check_same(two_passes, one_pass, rows(getkey) + offset, inputs=0)
    assert report.status == "imprecise"
    assert "It is the second function that is off. The precision is lost at `sub`" in words(report)
    assert "(one_pass): cancellation" in words(report)


@pytest.mark.slow
def test_what_the_input_itself_does_not_say_is_rounding(getkey):
    """At 1e4 an ulp of x is 1e-3, and so is what a mean in float32 loses: both do what they can."""
    norm = jax.vmap(LayerNorm(50, use_weight=False, use_bias=False))
    assert check_same(two_passes, norm, rows(getkey) + 1e4, inputs=0).status == "rounding"


def attention(bias, scores, values, softmax):
    """Softmax does not see what is added to all scores alike: its derivative there is 0."""
    return jnp.sum(jnp.square(softmax(scores + bias) @ values))


def by_logarithms(scores):
    return jnp.exp(scores - jax.nn.logsumexp(scores, axis=-1, keepdims=True))


def over_another_sum(scores):
    e = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
    return e / jax.lax.cumsum(e, axis=1)[:, -1:]


@pytest.mark.parametrize("beside", [True, False])
@pytest.mark.parametrize("softmax", [slow(by_logarithms), over_another_sum])
def test_a_derivative_that_is_0_is_of_no_size(softmax, beside, getkey):
    """As of the bias of the keys. What is left of it is rounding in both, and by chance unequal."""
    scores, values = rows(getkey, T, T), rows(getkey, T, D)

    def grads(softmax):
        grad = jax.grad(lambda bias, x: attention(bias, scores * x, values, softmax), (0, 1))
        return lambda x: grad(jnp.zeros((T, 1)), x)[: 1 + beside]

    report = assert_same(grads(jax.nn.softmax), grads(softmax), jnp.ones(()), inputs=2)
    assert report.status in ("rounding", "same bits")


@pytest.mark.slow
def test_a_zero_that_one_alone_misses_is_lost(getkey):
    """The variance of equal numbers: 0 in two passes, some thousand eps of nothing in one."""
    x = jnp.full((T, 50), 1234.567) + 0 * rows(getkey)
    two = lambda x: jnp.square(x - x.mean(-1, keepdims=True)).mean(-1)
    one = lambda x: jnp.square(x).mean(-1) - jnp.square(x.mean(-1))
    report = check_same(two, one, x, inputs=0)
    assert report.status == "imprecise"
    assert "It is the second function that is off." in words(report)


@pytest.mark.slow
def test_angles_in_bfloat16(getkey):
    """Positions of some hundreds times a frequency, in eight bits."""
    at = lambda dtype: jnp.sin(
        (jnp.arange(400.0, 400 + T).astype(dtype)) * jnp.asarray(0.37, dtype)
    )
    x = rows(getkey, T)
    coarse = lambda x: x + at(jnp.bfloat16).astype(x.dtype)
    report = check_same(lambda x: x + at(x.dtype), coarse, x)
    assert report.status in ("imprecise", "different")


# What nothing can tell


@pytest.mark.slow
def test_behind_a_callback(getkey):
    def host(x):
        return jax.pure_callback(
            lambda v: np.add.accumulate(np.asarray(v)[:, ::-1], 1)[:, -1],
            jax.ShapeDtypeStruct(x.shape[:1], x.dtype),
            x,
        )

    plain, x = lambda x: x.sum(1), rows(getkey)
    with pytest.raises(DifferenceError, match=r"^undecided: the two functions differ, and nothing"):
        assert_same(plain, host, x)
    report = check_same(plain, host, x)
    assert "not conclusive: pure_callback has no such form" in words(report)
    assert assert_same(plain, host, x, confirm_x64=False).status == "rounding"
    assert check_same(lambda x: plain(x) * 1.01, host, x).status == "different"


SATURATED = {
    # In float32 none of it is left, which looks like rounding far smaller than it is.
    "1 - cos": (lambda x: 1 - jnp.cos(x), lambda x: 2 * jnp.sin(x / 2) ** 2, 1e-4),
    "log(1 + x)": (lambda x: jnp.log(1 + x), jnp.log1p, 1e-9),
    "sqrt(1 + x)": (lambda x: jnp.sqrt(1 + x) - 1, lambda x: x / (jnp.sqrt(1 + x) + 1), 1e-9),
    "sinh": (lambda x: (jnp.exp(x) - jnp.exp(-x)) / 2, jnp.sinh, 1e-9),
}


@pytest.mark.parametrize("name", ["1 - cos", *map(slow, [*SATURATED][1:])])
def test_what_float64_cancels_too_is_no_difference(name, getkey):
    one, two, size = SATURATED[name]
    x = size * normal(getkey(), (8,))
    report = check_same(one, two, x)
    assert report.status == "imprecise" and "first function that is off" in words(report)
    assert check_same(one, lambda x: 1.001 * two(x), x).status == "different"


def logistic(steps, step):
    return lambda x: jax.lax.fori_loop(0, steps, lambda _, v: step(v), jax.nn.sigmoid(x))


@pytest.mark.slow
@pytest.mark.parametrize("steps, status", [(10, "rounding"), (200, "undecided")])
def test_chaos(steps, status, getkey):
    # An error grows by a factor of 1.6 a step on average: by 1e2 in 10 steps, by 1e40 in 200.
    one, two = (
        logistic(steps, step) for step in (lambda v: 3.9 * v * (1 - v), lambda v: 3.9 * (v - v * v))
    )
    # Of large numbers a sigmoid is 1 but for rounding, which 1 - v enlarges.
    report = check_same(one, two, rows(getkey), scales=(0.01, 1.0))
    assert report.status == status
    assert ("The functions are chaotic: an eps of float64" in words(report)) == (steps == 200)


@pytest.mark.slow
def test_a_table_that_was_computed_in_float32(getkey):
    # A root is rounded, by 1e-3 when it was multiplied. That is in the table and, in float64, not
    # in what the function computes. No constant was rounded.
    table = lambda: jnp.sin(jnp.sqrt(jnp.arange(T, dtype=jnp.float32)[:, None] + 2) * 2**14)
    given = table()
    report = check_same(
        lambda x: (x + table()).sum(1), lambda x: backwards(x + given), rows(getkey)
    )
    assert report.status == "undecided"
    assert "further apart than in their own precision" in words(report)


def test_a_failed_re_run(getkey, monkeypatch):
    def refuse(*_):
        raise NotImplementedError("no such thing in float64")

    monkeypatch.setattr(comparing, "widen", refuse)
    report = check_same(lambda x: x.sum(1), backwards, rows(getkey))
    assert report.status == "undecided"
    assert "The float64 re-run failed (NotImplementedError: no such" in words(report)
    assert (
        check_same(lambda x: x.sum(1), lambda x: x.sum(1) * 2, rows(getkey)).status == "different"
    )


# Dtypes, inputs, devices


@pytest.mark.slow
def test_float64(x64, getkey):
    x = rows(getkey)
    assert assert_same(lambda x: x.sum(1), backwards, x).status == "rounding"
    # Of the size of ten thousand eps.
    assert check_same(lambda x: x, lambda x: x * (1 + 2e-12), x).status == "different"


def test_outputs_of_two_dtypes(getkey):
    coarse = lambda x: x.sum(1).astype(jnp.bfloat16)
    report = assert_same(lambda x: x.sum(1), coarse, rows(getkey))
    assert (report.status, report.dtype) == ("rounding", "bfloat16")


@pytest.mark.slow
def test_complex_numbers(getkey):
    x = jax.lax.complex(rows(getkey), rows(getkey))
    assert assert_same(lambda x: x.sum(1), backwards, x).status in ("same bits", "rounding")
    assert check_same(lambda x: x, jnp.conj, x).status == "different"


@pytest.mark.slow
def test_inputs_of_several_arrays(getkey):
    x = {"ids": jnp.arange(T), "mask": jnp.arange(T) % 2, "h": rows(getkey), "key": jr.key(0)}
    table = rows(getkey, 30, 1)
    one = lambda x: table[x["ids"]] * x["h"] + x["mask"].astype(jnp.float32)[:, None]
    two = lambda x: one(x) + (x["ids"] == 29).astype(jnp.float32)[:, None]
    with pytest.raises(TypeError, match=r"holds a PRNG key.* or name it in fixed="):
        assert_same(one, two, x)
    assert assert_same(one, two, x, fixed="key").status == "same bits"
    options = {"fixed": "key", "token_values": {"ids": (29,)}}
    report = check_same(one, two, x, **options)
    assert report.status == "different" and 0 not in report.seen
    assert set(np.unique(report.x["mask"])) <= {0, 1} and 29 in report.x["ids"]
    assert assert_same(one, two, x, fixed=("key", "ids")).status == "same bits"


@pytest.mark.slow
def test_sharded_and_not(getkey):
    mesh = jax.make_mesh((4,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    x = jax.device_put(rows(getkey, 8, 50), NamedSharding(mesh, P("batch")))
    w = rows(getkey, 50, 50)

    def sharded(x):
        h = jax.lax.with_sharding_constraint(jnp.tanh(x @ w), NamedSharding(mesh, P(None, "batch")))
        return h.sum(1)

    plain = lambda x: jnp.tanh(x @ w).sum(1)
    assert assert_same(plain, sharded, x).status in ("same bits", "rounding")
    assert check_same(plain, lambda x: sharded(x) * 1.00001, x).status == "different"


# What is refused

REFUSED = {
    "must return pytrees of the same structure": lambda x: (x, x),
    r"must have the same shape from one and two, got \(6, 50\) and \(50, 6\)": lambda x: x.T,
    "must hold the same kind of numbers, got float32 and int32": lambda x: x.astype(int),
    "must be functions of one argument, got int": 3,
    "must return an array or a pytree of arrays, got none": lambda x: None,
}


@pytest.mark.parametrize("text", REFUSED)
def test_what_cannot_be_compared(text, getkey):
    one = REFUSED[text] if "none" in text else lambda x: x
    with refused((TypeError, ValueError), text):
        assert_same(one, REFUSED[text], rows(getkey))


def test_functions_that_draw_random_numbers(getkey):
    rng = np.random.default_rng(seed(0))
    noisy = lambda x: x + rng.random(x.shape).astype(np.float32)
    with pytest.raises(ValueError, match="fn gives different outputs for the same x"):
        assert_same(lambda x: x, noisy, rows(getkey))


def test_options(getkey):
    with pytest.raises(ValueError, match="must be at least 0, got inputs=-1"):
        assert_same(jnp.sin, jnp.sin, rows(getkey), inputs=-1)
    with pytest.raises(ValueError, match=r"scales must be positive and finite, got \(0.0,\)"):
        assert_same(jnp.sin, jnp.sin, rows(getkey), scales=(0,))


# Meshes


def wrong_by(factor, fn):
    return lambda x: fn(x) * factor


@pytest.mark.slow
@pytest.mark.parametrize("within", [False, True])
def test_one_of_the_two_is_laid_over_a_mesh(within, getkey):
    mesh = jax.make_mesh((4,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    rows_of = NamedSharding(mesh, P("rows"))
    mapped = jax.shard_map(backwards, mesh=mesh, in_specs=P("rows"), out_specs=P("rows"))
    laid = lambda x: backwards(jax.lax.with_sharding_constraint(x, rows_of))
    x = rows(getkey, 8, 50)  # on one device
    with jax.set_mesh(mesh) if within else contextlib.nullcontext():
        for two in (mapped, laid):
            assert assert_same(lambda x: x.sum(1), two, x).status == "rounding"
            # A hundred eps: more than 64, which size alone would take for rounding.
            assert check_same(lambda x: x.sum(1), wrong_by(1.00001, two), x).status == "different"


@pytest.mark.slow
def test_what_a_shard_map_computes_is_run_in_float64(getkey):
    """A sum over devices, in a loop, whose carry differs by device."""
    mesh = jax.make_mesh((4,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))

    def body(x):
        here = jax.lax.fori_loop(0, len(x), lambda i, s: s + x[-1 - i], 0 * x[0])
        return x + jax.lax.psum(here, "rows")[None]

    two = jax.shard_map(body, mesh=mesh, in_specs=P("rows"), out_specs=P("rows"))
    one = lambda x: x + x.sum(0, keepdims=True)
    assert assert_same(one, two, rows(getkey, 8, 30), inputs=1).status == "rounding"
    assert check_same(one, wrong_by(1.00001, two), rows(getkey, 8, 30), inputs=1).ulps64 > 1e9


# Constants in float16


@pytest.mark.parametrize("eps", [1e-6, *map(slow, (1e-5, 1e-4, 1e-3))])
def test_a_constant_that_is_subnormal_in_float16(eps, getkey):
    """Below 6.1e-5 a constant of float16 is rounded by more than an eps of its size."""

    def by_formula(h):
        square = (h * h).mean(-1, keepdims=True)
        return h * jax.lax.rsqrt(square + jnp.asarray(eps, h.dtype))

    norm = jax.vmap(RMSNorm(16, eps=eps, use_weight=False, use_bias=False))
    h = normal(getkey(), (T, 16), jnp.float16)
    assert assert_same(norm, by_formula, h).status == "rounding"
    assert check_same(norm, lambda h: by_formula(h) * jnp.asarray(1.25, h.dtype), h).status == (
        "different"
    )


# Nothing to compare


def test_no_features():
    x = jnp.ones((T, 0))
    assert assert_same(lambda x: x, lambda x: 2 * x, x).status == "same bits"
    assert assert_same(lambda x: x.sum(1), lambda x: 0 * x.sum(1), x).status == "same bits"
