"""Leak or rounding, where the two are hard to tell apart: what must never pass, what never fail.

The oracle for a causal function is the same function in float64, or the algebra in its comment;
for a leak, the way it is made.
"""

import dataclasses

import causality_zoo as zoo
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import normal, seed
from slow import slow

from eqx_norms.causality import (
    CausalityError,
    _judge as judging,
    assert_causal,
    check_causal,
    check_independent,
    dependency_matrix,
)

T, D, CHUNK = 16, 8, 4


def words(report):
    """The text of a report on one line."""
    return " ".join(str(report).split())


# Causal but for rounding. Edits of size 100 leave absolute rounding in the past, and a norm
# divides it by what is small there.


def fft_convolution_then_norm(x):
    return zoo.norm(zoo.fft_convolution(x), 1)


def chunked_linear_attention_then_norm(x):
    """Linear attention in chunks: a masked product inside each, a running sum of those before."""
    q, k, v = (x @ zoo.weights(x.dtype, D, D, seed=i) for i in range(3))
    q, k, v = (part.reshape(-1, CHUNK, D) for part in (q, k, v))
    state = jnp.einsum("ctk,ctv->ckv", k, v)
    before = state.cumsum(0) - state
    inside = jnp.tril(jnp.einsum("ctk,csk->cts", q, k))
    mixed = jnp.einsum("cts,csv->ctv", inside, v) + jnp.einsum("ctk,ckv->ctv", q, before)
    return zoo.norm(mixed.reshape(-1, D), 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "fn, dtype",
    [
        (fft_convolution_then_norm, "float32"),
        slow(chunked_linear_attention_then_norm, "float64"),
        slow(fft_convolution_then_norm, "float64"),
        slow(chunked_linear_attention_then_norm, "float32"),
    ],
)
def test_rounding_that_a_norm_enlarges_is_no_leak(fn, dtype, getkey):
    with jax.enable_x64(dtype == "float64"):
        report = check_causal(fn, normal(getkey(), (T, D), dtype))
    assert report.status == "clear (float noise)", str(report)
    assert "does not shrink" not in words(report)


# A callback in the way


def leaky_mean(x):
    return x + x.mean(0, keepdims=True)


def printed(x):
    jax.debug.callback(lambda v: None, x[0, 0])
    return x


def checked(x):
    return eqx.error_if(x, x.max() > 1e30, "too large")


def measured_on_the_host(x):
    jax.pure_callback(lambda v: v, jax.ShapeDtypeStruct((), x.dtype), x[0, 0])
    return x


def printed_in_a_loop(x):
    def step(carry, row):
        jax.debug.callback(lambda v: None, row[0])
        return carry, row

    return jax.lax.scan(step, 0, x)[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "watch", [printed, checked, slow(measured_on_the_host), slow(printed_in_a_loop)]
)
def test_what_cannot_reach_the_output_leaves_the_verdict_alone(watch, getkey):
    x = normal(getkey(), (T, D), jnp.bfloat16)
    assert check_causal(lambda x: leaky_mean(watch(x)), x).leak
    noisy = lambda x: zoo.noisy_sum_in_float32_inside(watch(x))
    assert check_causal(noisy, x).status.startswith("clear")


# Coarse casts


def quantised(x, axis):
    """Scaled into the range of float8 by the largest value along `axis`, and back."""
    scale = (jnp.abs(x).max(axis, keepdims=True) / 448).astype(x.dtype)
    return (x / scale).astype(jnp.float8_e4m3fn).astype(x.dtype) * scale


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_dynamic_quantisation_over_time_is_a_leak(dtype, getkey):
    x = normal(getkey(), (T, D), dtype)
    assert check_causal(lambda x: quantised(x, (0, 1)), x).leak
    assert check_causal(lambda x: quantised(x, 1), x, pointwise=True).status == "clear"


@pytest.mark.slow
def test_dynamic_quantisation_over_a_batch_is_a_leak(getkey):
    x = normal(getkey(), (4, T, D))
    assert check_independent(lambda x: quantised(x, (0, 2)), x).leak
    assert check_independent(lambda x: quantised(x, (1, 2)), x).status == "clear"


# Where nothing can tell


def on_the_host(x):
    """A prefix sum as the total minus the rest, computed outside JAX in the dtype of `x`."""

    def host(x):
        return x.sum(0, keepdims=True) - x[::-1].cumsum(0)[::-1] + x

    return jax.pure_callback(host, jax.ShapeDtypeStruct(x.shape, x.dtype), x)


@pytest.mark.slow
def test_rounding_behind_a_callback_is_undecided(getkey):
    x = normal(getkey(), (T, D))
    with pytest.raises(CausalityError, match=r"^undecided: .* nothing tells which\.") as caught:
        assert_causal(on_the_host, x)
    report = caught.value.report
    assert (report.leak, report.status, report.pairs()) == (False, "undecided", [])
    # Outputs that moved are open, not 0: T - 1 of them, as the last has nothing after it.
    assert np.isnan(report.matrix[report.matrix.shape[0] // 2]).all()
    text = words(report)
    assert "not conclusive: pure_callback has no such form" in text
    assert "confirm_x64=False, which takes changes below the noise level for rounding," in text
    # As the message says.
    assert check_causal(on_the_host, x, confirm_x64=False).status == "clear (float noise)"
    assert "undecided" in report.plot().get_title()


def test_a_large_leak_behind_a_callback_is_a_leak(getkey):
    x = normal(getkey(), (T, D))
    assert check_causal(lambda x: leaky_mean(on_the_host(x)), x).leak


@pytest.mark.slow
def test_a_leak_behind_a_callback_in_bfloat16_does_not_pass(getkey):
    # The very change that may be a leak: below half of the output, which is 64 ulps of bfloat16.
    x = normal(getkey(), (T, D), jnp.bfloat16)
    faint = lambda x: x + 0.01 * jnp.tanh(on_the_host(x).mean(0, keepdims=True))
    with pytest.raises(CausalityError):
        assert_causal(faint, x)


@pytest.mark.slow
def test_a_failed_re_run_is_undecided(getkey, monkeypatch):
    def refuse(closed, to):
        raise NotImplementedError("no such thing in float64")

    monkeypatch.setattr(judging, "widen", refuse)
    x = normal(getkey(), (T, D))
    report = check_causal(zoo.prefix_sum_as_total_minus_suffix, x)
    assert report.status == "undecided"
    told = "The float64 re-run failed (NotImplementedError: no such thing in float64)."
    assert told in report.notes
    assert check_causal(zoo.target_not_shifted, x).leak


@pytest.mark.slow
def test_a_float64_function_that_overflows_in_float32_is_undecided(getkey):
    with jax.enable_x64(True):
        x = normal(getkey(), (T, D), jnp.float64)
        huge = lambda x: fft_convolution_then_norm(x) + 1e300 * jnp.tanh(x) * 1e-300
        report = check_causal(huge, x)
    assert report.status == "undecided", str(report)
    assert "The float32 re-run failed (FloatingPointError" in words(report)


def test_rounding_of_large_edits_is_judged_by_their_size(getkey):
    # Without float64 nothing tells the rounding of edits of size 100 from a leak, but it is known
    # not to be larger than 100 times the noise level: neither "leak" nor "clear".
    x = normal(getkey(), (T, D))
    report = check_causal(fft_convolution_then_norm, x, confirm_x64=False)
    assert report.status == "undecided"
    one = check_causal(fft_convolution_then_norm, x, confirm_x64=False, scales=(1.0,))
    assert one.status == "clear (float noise)"


# Lost precision, ties and chaos


def overflowing_gate(x):
    """Whether the sum of all squares is infinite."""
    return jnp.tanh(x) + jnp.isinf((x * x).sum()).astype(x.dtype)


def large_gates(x):
    """An average up to each position, whose sums are the total minus the rest: exact, but..."""
    gate = jnp.exp(3 * jnp.clip(x, -5, 5))
    before = lambda v: v.sum(0, keepdims=True) - v[::-1].cumsum(0)[::-1] + v
    return before(x * gate) / (jnp.abs(before(gate)) + 1e-3)


def sum_of_gated(x):
    """Of numbers that edits make 1e12 times as large as those that they leave alone."""
    gated = x * jnp.exp(3 * jnp.clip(x, -9, 9))
    return gated.sum(0, keepdims=True) - gated[::-1].cumsum(0)[::-1] + gated


@pytest.mark.parametrize(
    "fn, dtype",
    [
        (overflowing_gate, "float16"),
        slow(large_gates, "float32"),
        slow(sum_of_gated, "float32"),
    ],
)
def test_a_change_of_the_size_of_the_outputs_is_not_noise(fn, dtype, getkey):
    x = normal(getkey(), (T, D), dtype)
    with pytest.raises(CausalityError, match=r"^undecided: ") as caught:
        assert_causal(fn, x)
    text = words(caught.value)
    assert f"In {dtype} outputs change by" in text and "in float64 they do not" in text
    passing = int(text.split("noise_ulps=")[1].split()[0])
    assert check_causal(fn, x, noise_ulps=passing).status == "clear (float noise)"


# Causal sums of numbers that edits make so large that float64 rounds them visibly too.


def up_to(x):
    """The sum up to each position: the total minus the rest."""
    return x.sum(0, keepdims=True) - x[::-1].cumsum(0)[::-1] + x


def up_to_in_a_tree(x):
    return x.sum(0, keepdims=True) - jax.lax.associative_scan(jnp.add, x, reverse=True) + x


def up_to_by_fft(x):
    ones = jnp.ones_like(x)
    n = 2 * len(x)
    return jnp.fft.irfft(jnp.fft.rfft(x, n, 0) * jnp.fft.rfft(ones, n, 0), n, 0)[: len(x)]


def gated(x, total):
    """A gated average; gates of up to 5e11."""
    gate = jnp.exp(3 * jnp.clip(x, -9, 9))
    return total(x * gate) / (jnp.abs(total(gate)) + 1e-3)


def standardised(x, total):
    """By mean and variance in one pass, far from zero."""
    x = x + 1e5
    count = jnp.arange(1, len(x) + 1, dtype=x.dtype)[:, None]
    mean = total(x) / count
    return (x - mean) / jnp.sqrt(jnp.abs(total(x * x) / count - mean**2) + 1e-5)


def overwhelmed(x, total):
    """Sums of up to 1e19 beside others of 1e3."""
    return total(x * jnp.exp(3 * jnp.clip(x, -14, 14)))


def left_of_nothing(x, total):
    """What is 0 but for rounding."""
    return zoo.norm(total(x), 1).sum(1, keepdims=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "fn, total, dtype",
    [
        (gated, up_to, "float64"),
        (gated, up_to, "float32"),
        (gated, up_to_in_a_tree, "float32"),
        (gated, up_to_by_fft, "float32"),
        (standardised, up_to, "float32"),
        (standardised, up_to, "float64"),
        (overwhelmed, up_to, "float64"),
        (standardised, up_to_by_fft, "float32"),
        (left_of_nothing, up_to, "float32"),
    ],
)
def test_rounding_that_float64_shows_is_no_leak(fn, total, dtype, getkey):
    with jax.enable_x64(dtype == "float64"):
        x = normal(getkey(), (8, 3), dtype)
        later = lambda x: jnp.tanh(x[::-1].cumsum(0)[::-1])
        assert check_causal(lambda x: fn(x, total), x).status == "undecided"
        assert check_causal(lambda x: fn(x, total) + 0.05 * later(x), x).leak


TABLE = np.random.default_rng(seed(3)).standard_normal((20, 3)).astype(np.float32)


@pytest.mark.parametrize("fn, total", [slow(gated, up_to_in_a_tree), (standardised, up_to)])
@pytest.mark.parametrize("of_text", [True, slow(False)])
def test_rounding_of_tokens_that_float64_shows_is_no_leak(fn, total, of_text):
    """Tokens have no neighbours to draw rounding anew at: what the function makes of them has."""
    ids = np.random.default_rng(seed(4)).integers(0, 20, 8).astype(np.int32)
    waves = lambda ids: 2 * jnp.sin(ids[:, None].astype(jnp.float32) * jnp.arange(1.0, 4.0)[None])
    read = (lambda ids: 4 * jnp.asarray(TABLE)[ids]) if of_text else waves
    assert not check_causal(lambda ids: fn(read(ids), total), ids).leak
    later = lambda x: jnp.tanh(x[::-1].cumsum(0)[::-1])
    assert check_causal(lambda ids: fn(read(ids), total) + 0.05 * later(read(ids)), ids).leak


# A branch on what an output may read, which x takes in one way.


def opened(takes, leaks):
    """Prefix sums; where `takes` says so of the own input, an output reads `leaks` as well."""

    def fn(x):
        row = lambda t, own: jax.lax.switch(
            takes(own).any().astype(jnp.int32),
            [lambda: x.cumsum(0)[t], lambda: x.cumsum(0)[t] + leaks(x, t)],
        )
        return jax.vmap(row)(jnp.arange(len(x)), x)

    return fn


WHOLE = lambda x, t: x.sum(0)
EARLIER = lambda x, t: x[t] * x[0]


@pytest.mark.parametrize("above", [3.0, slow(5.0), slow(7.0)])
def test_a_leak_behind_a_branch_that_x_does_not_take(above, getkey):
    x = jnp.clip(normal(getkey(), (8, 2)), -2.5, 2.5)
    takes = lambda own: own > above
    report = check_causal(opened(takes, WHOLE), x)
    assert report.leak and "not seen at x, and is at another input" in words(report)
    assert check_causal(opened(takes, EARLIER), x).status == "clear"


@pytest.mark.slow
def test_a_leak_behind_a_branch_on_other_inputs(getkey):
    table = normal(getkey(), (10, 2))
    rare = lambda ids: table[ids].cumsum(0) + jnp.where((ids == 7)[:, None], table[ids].sum(0), 0)
    report = check_causal(rare, jnp.arange(8) % 4)  # random tokens are no text
    assert report.status == "clear" and "a branch on it was taken in that way alone" in words(
        report
    )
    batch = jnp.clip(normal(getkey(), (3, 8, 2)), -2.5, 2.5)
    report = check_causal(jax.vmap(opened(lambda own: own > 4, WHOLE)), batch, axis=1)
    assert report.leak and all(pair.input > pair.output for pair in report.pairs())
    assert check_independent(lambda x: jnp.where(x > 4, x.sum(0), x), batch).leak
    logarithms = lambda x: jnp.cumsum(jnp.log(x), 0)  # other inputs keep the sign
    assert check_causal(logarithms, jnp.abs(batch[0])).status.startswith("clear")
    only_x = lambda x: jnp.cumsum(jnp.sqrt(9 - x**2), 0)  # NaN at larger ones
    assert check_causal(only_x, batch[0], scales=(0.1, 1.0)).status.startswith("clear")


def fft_then_chaos(x):
    step = lambda _, v: 3.99 * v * (1 - v)
    return jax.lax.fori_loop(0, 30, step, jax.nn.sigmoid(zoo.fft_convolution(x)))


def halves(x):
    """A convolution with powers of two, by way of an FFT, rounded to integers."""
    kernel = 0.5 ** jnp.arange(len(x))[:, None].astype(x.dtype)
    n = 2 * len(x)
    mixed = jnp.fft.irfft(jnp.fft.rfft(x, n, 0) * jnp.fft.rfft(kernel, n, 0), n, 0)[: len(x)]
    return jnp.round(mixed * 4).astype(jnp.int8)


@pytest.mark.slow
@pytest.mark.parametrize("fn", [halves, fft_then_chaos])
def test_ties_and_chaos_are_no_leak(fn, getkey):
    # Quarters: many a sum of halves of these lies in the middle between two integers.
    x = jnp.round(normal(getkey(), (T, D)) * 4) / 4
    report = check_causal(fn, x)
    assert report.status == "undecided", str(report)
    assert ("values tie" in words(report)) == (fn is halves)
    assert check_causal(lambda x: fn(leaky_mean(x)), x).leak


@pytest.mark.slow
def test_a_leak_that_looks_for_equal_or_special_numbers_is_kept(getkey):
    """At an input beside this one equal numbers are still equal, and zero is zero."""
    x = normal(getkey(), (T, D)).at[2].set(0.0).at[5].set(0.25).at[6].set(0.25)
    later = lambda x: x[::-1].cumsum(0)[::-1]
    same = lambda x: (x == jnp.roll(x, 1, 0)).astype(x.dtype)
    assert check_causal(lambda x: x + same(x) * later(x), x).leak
    assert check_causal(lambda x: x + jnp.where(x == 0, later(x), 0), x).leak


# Discrete outputs


@pytest.mark.slow
def test_a_rank_that_rounding_changes_is_no_leak(getkey):
    # The sum of all features of a norm is 0 but for rounding, in one precision or the other.
    x = normal(getkey(), (T, D))
    best = lambda x: fft_convolution_then_norm(x).argmax(1)
    assert not check_causal(best, x).leak
    assert check_causal(lambda x: fft_convolution_then_norm(leaky_mean(x)).argmax(1), x).leak


# The matrix


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_dependency_matrix_draws_no_rounding(dtype, getkey):
    with jax.enable_x64(dtype == "float64"):
        x = normal(getkey(), (T, D), dtype)
        report = check_causal(fft_convolution_then_norm, x)
        matrix = dependency_matrix(fft_convolution_then_norm, x)
    assert (matrix[~report.allowed] == 0).all()
    assert (matrix[report.allowed] > 0).all()
    assert "X" not in dataclasses.replace(report, matrix=matrix).heatmap().split("\n", 1)[1]


@pytest.mark.slow
def test_dependency_matrix_keeps_what_is_small_but_read(getkey):
    # One hundred millionth of an input 4 back, far below one eps of the output's size.
    fn = lambda x: x + jnp.where(jnp.abs(x) < 1e-3, 1e-8 * jnp.tanh(jnp.roll(x, 4, 0)), 0)
    x = normal(getkey(), (T, 1)).at[9].set(0.0)
    matrix = dependency_matrix(fn, x)
    assert matrix[9, 5] > 0
    assert matrix[9, :5].max() == 0 == matrix[9, 6:9].max()


def test_dependency_matrix_keeps_what_it_cannot_judge(getkey):
    x = normal(getkey(), (T, D))
    matrix = dependency_matrix(on_the_host, x)
    assert (matrix[np.tri(T, dtype=bool)] > 0).all()


def test_dependency_matrix_refuses_a_function_that_is_not_finite(getkey):
    x = normal(getkey(), (T, D))
    with pytest.raises(ValueError, match=r"must return finite numbers .* output 2 holds NaN"):
        dependency_matrix(lambda x: x.at[2].set(jnp.nan), x)


@pytest.mark.parametrize("features", [3, slow(4097)])  # XLA's maximum loses NaN from 4096 on
def test_a_gradient_that_is_nan_is_not_lost(features, getkey):
    # The root of zero has no derivative: times 0, NaN.
    fn = lambda x: x + 0 * jnp.sqrt(jnp.abs(x[-1, :1] - x[-1, :1]))[None]
    matrix = dependency_matrix(fn, normal(getkey(), (3, features)), method="vjp")
    assert np.isnan(matrix[:, -1]).all() and (np.diag(matrix)[:2] > 0).all()


def test_a_mapped_function_leaves_no_mesh_behind(getkey):
    check_causal(
        jax.pmap(lambda row: row * 2, axis_name="rows"), normal(getkey(), (8, D)), pointwise=True
    )
    for dtype in (None, "float32", "int32"):
        assert not jax.typeof(jnp.full((), 1, dtype)).sharding.mesh.axis_names


@pytest.mark.slow
def test_no_features():
    x, other = jnp.ones((T, 0)), jnp.arange(1.0, T + 1)
    with pytest.raises(ValueError, match=r"x must hold numbers, got shapes \[\(16, 0\)\]"):
        assert_causal(lambda x: x, x)
    with pytest.raises(ValueError, match=r"the output must hold numbers, got shapes"):
        assert_causal(lambda x: x[:, None][:, :0], other)
    both = {"x": x, "other": other}
    assert check_causal(lambda b: b["other"].cumsum() + b["x"].sum(), both).status == "clear"
    assert check_causal(lambda b: (b["x"], b["other"][::-1]), both).leak


# What a person reads


def test_a_leak_of_the_own_input_is_not_called_off_by_0(getkey):
    text = words(check_causal(lambda x: x, normal(getkey(), (T, D)), strict=True))
    assert "off by" not in text
    assert "Every leak is of the output's own input: look for inputs that are not shifted" in text


@pytest.mark.parametrize("step, where", [(1, "1 earlier"), (-2, "2 later")])
def test_a_leak_between_neighbours_in_a_batch_is_named(step, where, getkey):
    def shifted(x):
        later = jnp.concatenate([x, jnp.zeros_like(x)])[-step if step < 0 else 0 :][: len(x)]
        earlier = jnp.concatenate([jnp.zeros_like(x), x])[len(x) - step :][: len(x)]
        return x + (later if step < 0 else earlier)

    text = words(check_independent(shifted, normal(getkey(), (8, D))))
    assert "off by" not in text
    assert f"Every leak reaches the example {where}: look for a roll or a shift" in text


NO_POSITIONS = {
    "got shapes [(16, 8), ()]; return only those that have: lambda x: fn(x)[0]": lambda x: (
        x,
        x.sum(),
    ),
    "must have positions, got shapes [()]": lambda x: x.sum(),
    "got shapes [(16, 8), (8,)]; move that axis inside fn": lambda x: (x, x.mean(0)),
    "got 8 along axis 0 of shape (8,); no axis is: cut or pad": lambda x: x.mean(0),
    "got 8 along axis 0 of shape (8, 16); name the axis as out_axis=": lambda x: x.T,
}


@pytest.mark.parametrize("text", NO_POSITIONS)
def test_outputs_without_positions_get_one_piece_of_advice(text):
    with pytest.raises(ValueError) as caught:
        assert_causal(NO_POSITIONS[text], jnp.ones((T, D)))
    assert text in str(caught.value)
    assert "by closure" not in str(caught.value)


# One head in four


def transformer(open_head, watch):
    """Two layers in bfloat16, norms and softmax in float32; the mask of one head may be open."""
    heads, width, dtype = 4, 32, jnp.bfloat16
    weights = [zoo.weights(dtype, width, width, seed=i) * 0.4 for i in range(10)]

    def norm(x):
        return zoo.norm(x.astype(jnp.float32), 1).astype(dtype)

    def layer(x, query, key, value, out, mlp, leaks):
        h = norm(x)
        q, k, v = ((h @ w).reshape(len(x), heads, -1) for w in (query, key, value))
        mask = np.tile(np.tri(len(x), dtype=bool), (heads, 1, 1))
        mask[1] |= leaks
        scores = jnp.where(mask, jnp.einsum("thd,shd->hts", q, k), -jnp.inf)
        mixed = jnp.einsum("hts,shd->thd", jax.nn.softmax(scores.astype(jnp.float32)), v)
        x = x + mixed.reshape(x.shape).astype(dtype) @ out
        return x + jax.nn.gelu(norm(x) @ mlp)

    def model(x):
        return layer(layer(watch(x), *weights[:5], open_head), *weights[5:], False)

    return model


@pytest.mark.slow
@pytest.mark.parametrize("watch", [checked, printed, lambda x: x])
def test_one_open_head_in_bfloat16_is_found(watch, getkey):
    x = normal(getkey(), (T, 32), jnp.bfloat16)
    with jax.numpy_dtype_promotion("standard"):
        assert check_causal(transformer(True, watch), x).leak
        assert check_causal(transformer(False, watch), x).status.startswith("clear")


def test_what_overflows_in_half_precision_alone_is_undecided():
    """There one output becomes NaN, which no number of ulps takes for rounding."""
    x = jnp.asarray(np.random.default_rng(seed(3)).normal(size=8), jnp.float16)
    hundred, zero = jnp.float16(100), jnp.float16(0)
    fn = lambda x: jnp.cumsum(x).at[0].add(zero * jnp.sum(x * x * hundred))
    report = check_causal(fn, x)
    text = " ".join(str(report).split())
    assert report.status == "undecided" and "noise_ulps=inf" not in text
    assert "In float16 outputs become infinite or NaN, and in float64 they do not" in text


def test_an_overflow_in_both_precisions_beside_a_leak_is_a_leak():
    prices = jnp.asarray(50_000 + 100 * np.random.default_rng(seed(4)).normal(size=8), jnp.float32)
    report = check_causal(lambda s: jnp.exp((s[::-1] - 50_000.0) / 100), prices, prove=True)
    assert report.status == "leak" and "in exact arithmetic" not in " ".join(str(report).split())
