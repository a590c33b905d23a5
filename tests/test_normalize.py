"""The op: accuracy against float64 numpy, derivatives against the plain reference in float64."""

import functools as ft
import itertools as it

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from oracles import error, exact_norm

from eqx_norms import LayerNorm, group_norm, layer_norm, normalize_reference, rms_norm

SIZES = (1, 2, 3, 17, 127, 768, 1023, 4096)
OFFSETS = (0, 1e2, 1e4, 1e6)
SCALES = (1e-6, 1e-3, 1e3, 1e6, 1e9, 1e12, 1e15)
ROWS = 32


NORMS = {"layer_norm": layer_norm, "rms_norm": rms_norm}


@ft.partial(jax.jit, static_argnames="norm")
def value_and_vjp(x, weight, bias, g, norm="layer_norm"):
    y, vjp = jax.vjp(jax.vmap(NORMS[norm], (0, None, None)), x, weight, bias)
    return y, *vjp(g)


def draw(n, seed=0, rows=ROWS):
    """x, weight, bias, and a random cotangent: a constant one cancels in a norm."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, n))
    # LayerNorm of two entries, RMSNorm of one: far apart, so that dx all but vanishes; see the test
    # of close pairs.
    if n == 2:
        x += np.sign(x[:, :1] - x[:, 1:]) * [0.5, -0.5]
    elif n == 1:
        x += np.sign(x) * 0.5
    weight, bias = rng.normal(size=(2, n)) + 1
    return x, *(a.astype(np.float32) for a in (weight, bias, rng.normal(size=(rows, n))))


def check_float32(norm, x, weight, bias, g):
    x = x.astype(np.float32)
    got = value_and_vjp(x, weight, bias, g, norm)
    want = exact_norm(x, weight, bias, g, centre=norm == "layer_norm")
    for name, a, b in zip(want._fields, got, want, strict=True):
        assert a.dtype == jnp.float32
        # Relative to the largest entry; where dx is made of eps alone, n = 1 and 2: absolute.
        vanishes = name == "dx" and x.shape[1] <= 2
        assert error(a, b, absolute=vanishes) < 1e-6, name


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("n", SIZES)
class TestFloat32:
    @pytest.mark.parametrize("offset", OFFSETS)
    def test_offsets(self, n, norm, offset):
        x, *rest = draw(n)
        check_float32(norm, x + offset, *rest)

    # 1e9 and 1e15: mean(xc^2) - d^2 was negative there, and the layer NaN.
    @pytest.mark.parametrize("offset", (*OFFSETS, 1e9, 1e15))
    def test_constant_rows(self, n, norm, offset):
        x, *rest = draw(n)
        check_float32(norm, np.broadcast_to((x[:, :1] + 3) * (offset or 1), x.shape), *rest)

    @pytest.mark.parametrize("scale", SCALES)
    def test_scales(self, n, norm, scale):
        x, *rest = draw(n)
        check_float32(norm, x * scale, *rest)

    def test_outliers(self, n, norm):
        """One entry far away, as the massive activations of transformers: the mean is theirs."""
        x, *rest = draw(n)
        x[:, n // 2] += 1e4
        check_float32(norm, x, *rest)


def test_close_pairs():
    """At n = 2 dx is r * (gw - mean - xhat * mean): what is left when terms of size r * gw cancel.

    So its error is a few ulps of the terms, not of the difference.
    """
    _, weight, bias, g = draw(2, rows=512)
    x = np.random.default_rng(1).normal(size=(512, 2)).astype(np.float32) * 1e-2
    dx = np.asarray(value_and_vjp(x, weight, bias, g)[1], np.float64)
    half = np.diff(x.astype(np.float64)) / 2
    terms = np.abs(g * weight).max() / np.sqrt(half**2 + 1e-5)
    assert (np.abs(dx - exact_norm(x, weight, bias, g).dx) / terms).max() < 5e-7


@pytest.mark.parametrize("n", (17, 768, 4096))
@pytest.mark.parametrize("dtype", ("float16", "bfloat16"))
@pytest.mark.parametrize("offset", (0, 10, 1000))
@pytest.mark.parametrize("norm", NORMS)
def test_half_precision_is_rounded_once(n, dtype, offset, norm):
    """The result is the exact one rounded, but for the few where float32 rounded across a tie."""
    x, weight, bias, g = draw(n, rows=64)
    x, g = jnp.asarray(x + offset, dtype), jnp.asarray(g, dtype)
    y, dx, dweight, dbias = value_and_vjp(x, weight, bias, g, norm)
    want = exact_norm(x, weight, bias, g, centre=norm == "layer_norm")
    rounded_once = lambda a, b: np.mean(np.asarray(a) == b.astype(a.dtype))
    assert y.dtype == dx.dtype == dtype and dweight.dtype == dbias.dtype == jnp.float32
    assert rounded_once(y, want.y) >= 0.999
    # At 1000 a row has few different values, and dx entries that cancel as close pairs do.
    if offset < 1000:
        assert rounded_once(dx, want.dx) >= 0.999
    assert error(dweight, want.dweight) < 1e-6 and error(dbias, want.dbias) < 1e-6


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("norm", NORMS)
def test_float64_stays_float64(offset, norm):
    with jax.enable_x64(True):
        x, *rest = draw(127)
        x += offset
        got = value_and_vjp(*(jnp.asarray(a, jnp.float64) for a in (x, *rest)), norm=norm)
        want = exact_norm(x, *rest, centre=norm == "layer_norm")
        for a, b in zip(got, want, strict=True):
            assert a.dtype == jnp.float64
            # 1e-15 an operation; numpy's own plain mean loses digits in proportion to the offset.
            assert error(a, b) < 1e-14 * max(offset, 1)


@pytest.mark.parametrize("weight_dtype", ("float16", "bfloat16", "float32"))
def test_parameters_of_any_dtype_are_summed_in_float32(weight_dtype):
    """dweight of a bfloat16 weight is the float32 sum over the batch, rounded once."""
    x, weight, bias, g = draw(17, rows=4096)
    weight, bias = jnp.asarray(weight, weight_dtype), jnp.asarray(bias, weight_dtype)
    x, g = np.asarray(x, np.float32), np.asarray(g, np.float32)
    got = value_and_vjp(x, weight, bias, g)
    want = exact_norm(x, weight, bias, g)
    assert got[2].dtype == got[3].dtype == weight_dtype
    ulp = max(float(jnp.finfo(weight_dtype).eps), 2e-7)
    for a, b in zip(got, want, strict=True):
        assert error(a, b) < ulp


@pytest.mark.parametrize("bad", (np.nan, np.inf, -np.inf))
def test_nan_and_inf_propagate_within_their_example(bad):
    x, weight, bias, g = draw(17)
    x = x.astype(np.float32)
    clean = value_and_vjp(x, weight, bias, g)
    x[3, 5] = bad
    y, dx, *_ = value_and_vjp(x, weight, bias, g)
    assert np.isnan(y[3]).all() and np.isnan(dx[3]).all()
    others = np.arange(ROWS) != 3
    assert np.array_equal(y[others], clean[0][others])
    assert np.array_equal(dx[others], clean[1][others])


def test_every_layout_is_as_exact():
    """XLA sums down columns, and in unjitted code, in other orders than along rows."""
    x, weight, bias, g = draw(4096)
    x = (x + 1e6).astype(np.float32)
    want = exact_norm(x, weight, bias, g).y
    norm = lambda x: layer_norm(x, weight, bias)
    columns = jax.jit(jax.vmap(norm, in_axes=1, out_axes=1))(np.ascontiguousarray(x.T)).T
    for y in (columns, jax.vmap(norm)(x), jnp.stack([norm(row) for row in x[:4]])):
        assert error(y, want[: len(y)]) < 1e-6


# Derivatives, against the plain reference differentiated by JAX, all in float64.


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


BOTH = (True, True)
CASES = [
    *(((5,), (5,), present, 2) for present in it.product((True, False), repeat=2)),
    ((4, 3), (4, 1), BOTH, 2),
    ((2, 1, 3), (3,), BOTH, 2),
    ((1,), (1,), BOTH, 2),
    ((2, 3), (2, 3), BOTH, 3),
]


@pytest.mark.parametrize("shape, param_shape, present, order", CASES)
@pytest.mark.parametrize("norm", NORMS)
def test_derivatives_of_each_order(x64, getkey, norm, shape, param_shape, present, order):
    """d/dt^order of <y(p + t * tangent), cotangent>, in every order of forward and reverse."""
    params = [jr.normal(getkey(), shape)]
    params += [jr.normal(getkey(), param_shape) if on else None for on in present]
    tangents = [p if p is None else jr.normal(getkey(), p.shape) for p in params]
    g = jr.normal(getkey(), shape)

    def along(norm):
        def f(t):
            at = [p if p is None else p + t * dp for p, dp in zip(params, tangents, strict=True)]
            return jnp.vdot(norm(*at, eps=1e-2), g)

        return f

    def derivatives(norm):
        modes = [
            m for k in range(1, order + 1) for m in it.product((jax.grad, jax.jacfwd), repeat=k)
        ]
        fs = [ft.reduce(lambda f, mode: mode(f), m, along(norm)) for m in modes]
        return jax.jit(lambda t: [f(t) for f in fs])(0.3)

    reference = ft.partial(normalize_reference, centre=norm == "layer_norm")
    got, want = derivatives(NORMS[norm]), derivatives(reference)
    # Float64, with derivatives up to 1e3 at this eps.
    np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-9)


def test_jacobian_is_the_closed_form(x64, getkey):
    """(N * delta_ij - 1 - y_i * y_j) / (N * sigma), without eps; Ba et al. 2016, section 5."""
    n = 7
    x = jr.normal(getkey(), (n,))
    y = layer_norm(x, eps=0.0)
    want = (n * jnp.eye(n) - 1 - y[:, None] * y[None, :]) / (n * jnp.std(x))
    for jacobian in (jax.jacrev, jax.jacfwd):
        got = jacobian(ft.partial(layer_norm, eps=0.0))(x)
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-14)


def test_jacobian_rows_sum_to_zero_and_gradients_flow_all_the_same(x64, getkey):
    """Shifting x leaves y as it is, so each row of the Jacobian sums to zero.

    That says that a constant *tangent* is mapped to zero, and, the Jacobian being symmetric, a
    constant *cotangent*. It does not say that no gradient flows: any other cotangent comes back.
    """
    x = jr.normal(getkey(), (7,))
    jacobian = jax.jacrev(layer_norm)(x)
    np.testing.assert_allclose(jacobian.sum(1), 0, atol=1e-15)
    _, vjp = jax.vjp(layer_norm, x)
    np.testing.assert_allclose(vjp(jnp.ones(7))[0], 0, atol=1e-15)
    g = jr.normal(getkey(), (7,))
    (dx,) = vjp(g)
    np.testing.assert_allclose(dx, g @ jacobian, atol=1e-14)
    assert jnp.linalg.norm(dx) > 0.1 * jnp.linalg.norm(g)


def test_mean_and_sigma_are_no_constants(x64, getkey):
    """The frequent slip dx = g * rstd, with the statistics held fixed, is another vector."""
    x, g = jr.normal(getkey(), (2, 7))
    dx = jax.vjp(layer_norm, x)[1](g)[0]
    slip = g / jnp.sqrt(jnp.var(x) + 1e-5)
    y = layer_norm(x)
    assert jnp.linalg.norm(slip - dx) > 0.1 * jnp.linalg.norm(dx)
    # Right is what is left of it when its parts along 1 and along y are taken out.
    rest = slip - slip.mean() - y * (slip @ y) / 7
    np.testing.assert_allclose(dx, rest, atol=1e-14)


def test_statistics_of_constant_rows_have_their_third_derivative(x64):
    """var has its minimum on a constant row, where jnp.maximum(var, 0) would halve the slope."""
    x = jnp.full((4,), 2.0)
    third = lambda f: jax.jit(jax.jacfwd(jax.jacfwd(jax.jacrev(ft.partial(f, eps=1e-2)))))(x)
    want = third(normalize_reference)
    assert jnp.abs(want).max() > 1
    np.testing.assert_allclose(third(layer_norm), want, rtol=1e-9, atol=1e-9)


def test_biased_variance_with_eps_inside_the_root():
    x = jnp.array([1.0, 2.0, 3.0, 6.0])
    # mean 3, squares 4 1 0 9: variance 14 / 4, not 14 / 3.
    np.testing.assert_allclose(layer_norm(x, eps=0.5), (x - 3) / 2, rtol=1e-7)
    assert not np.allclose(layer_norm(x, eps=0.5), (x - 3) / (3.5**0.5 + 0.5), rtol=1e-2)
    layer = LayerNorm(4, eps=0.5)
    np.testing.assert_array_equal(layer(x), layer_norm(x, eps=0.5))


def test_reference_is_the_definition(x64, getkey):
    """The oracle itself: in float64, against numpy."""
    x, weight, bias, g = (np.asarray(jr.normal(getkey(), (7,))) for _ in range(4))
    y, vjp = jax.vjp(normalize_reference, *map(jnp.asarray, (x, weight, bias)))
    want = exact_norm(x[None], weight, bias, g[None])
    for a, b in zip((y, *vjp(jnp.asarray(g))), want, strict=True):
        np.testing.assert_allclose(a, b.reshape(7), rtol=1e-12)
    rms = normalize_reference(jnp.asarray(x), centre=False)
    np.testing.assert_allclose(rms, x / np.sqrt((x**2).mean() + 1e-5), rtol=1e-12)


def test_parameters_that_only_some_examples_share(getkey):
    """Weight and bias mapped with x, as in an ensemble, take gradients of their own."""
    x, weight, bias, g = jr.normal(getkey(), (4, 3, 5))
    got = jax.vjp(jax.vmap(layer_norm), x, weight, bias)[1](g)
    for i in range(3):
        want = jax.vjp(layer_norm, x[i], weight[i], bias[i])[1](g[i])
        for a, b in zip(got, want, strict=True):
            np.testing.assert_allclose(a[i], b, rtol=1e-6, atol=1e-6)


def test_filter_grad_of_a_frozen_layer(getkey):
    """With the parameters partitioned away nothing but x takes a gradient."""
    layer = LayerNorm(5)
    x, g = jr.normal(getkey(), (2, 5))
    dx = jax.grad(lambda x: jnp.vdot(layer(x), g))(x)
    both = eqx.filter_grad(lambda xl: jnp.vdot(xl[1](xl[0]), g))((x, layer))
    np.testing.assert_array_equal(dx, both[0])
    np.testing.assert_allclose(both[1].weight, g * layer_norm(x), rtol=1e-6)
    np.testing.assert_allclose(both[1].bias, g, rtol=1e-7)


@pytest.mark.parametrize("f", [layer_norm, rms_norm, lambda x: group_norm(x, 2)])
def test_float64_made_in_64_bit_mode_and_used_outside(f):
    """To JAX it is float32 from there on, without a warning, but for the type of its gradient."""
    with jax.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(0).normal(size=8))
    assert x.dtype == jnp.float64 and f(x).dtype == jnp.float32
    loss = lambda x: f(x)[0]
    dx, want = jax.grad(loss)(x), jax.grad(loss)(jnp.asarray(np.float32(x)))
    assert dx.dtype == jnp.float64
    np.testing.assert_array_equal(dx, want)
