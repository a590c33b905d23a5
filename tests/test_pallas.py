"""The kernels, interpreted on a CPU, against float64; `test_batched.py` has what calls them."""

import functools as ft

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import normal, seed
from oracles import assert_close, assert_rounded_once, exact_norm, terms, ulps
from slow import few

from eqx_norms._op._form import Form
from eqx_norms._op._kernels import backward, forward

EPS = 2.0**-23
PLATFORMS = ("cuda", "tpu")
# Of two rows and of more than one program; of less than a tile, and of a column beyond one.
ROWS, N = 23, 129
slow = lambda *case: pytest.param(*case, marks=pytest.mark.slow)
SIZES = (
    slow(40, 1),
    slow(2, 2),
    (5, 17),
    slow(600, 40),
    slow(9000, 3),
    slow(19, 1000),
    slow(3, 4096),
)


def draw(rows, n):
    """x, weight, bias and a random cotangent: a constant one cancels in a norm."""
    rng = np.random.default_rng(seed(0))
    x, g = rng.normal(size=(2, rows, n))
    weight, bias = rng.normal(size=(2, n)) + 1
    return x, *(a.astype(np.float32) for a in (weight, bias, g))


@ft.partial(jax.jit, static_argnames=("platform", "centre", "eps"))
def run(x, weight, bias, g, *, platform, centre, eps):
    form = Form(eps, centre, weight=weight is not None, bias=bias is not None, rank=1)
    params = [p[None] for p in (weight, bias) if p is not None]
    how = dict(form=form, platform=platform, interpret=True)
    dx, *sums = backward(g, x, *params, **how)
    return forward(x, *params, **how), dx, *(s[0] for s in sums)


def check(x, weight, bias, g, *, platform, centre, eps=1e-5):
    """Against float64 NumPy, in units of what each entry is the sum of; see `oracles.ulps`."""
    x = x.astype(np.float32)
    got = run(x, weight, bias, g, platform=platform, centre=centre, eps=eps)
    assert all(a.dtype == jnp.float32 for a in got)
    args = x, weight, bias, g
    want, size = (f(*args, centre=centre, eps=eps) for f in (exact_norm, terms))
    assert_close(got, want, size, max(x.shape))


both_kernels = pytest.mark.parametrize("platform", PLATFORMS)
each_kernel = pytest.mark.parametrize("platform", few(PLATFORMS, ("cuda",)))
each_norm = pytest.mark.parametrize("centre", (True, False), ids=("LayerNorm", "RMSNorm"))


@each_kernel
@each_norm
@pytest.mark.parametrize("rows, n", SIZES)
def test_sizes(rows, n, centre, platform):
    check(*draw(rows, n), platform=platform, centre=centre)


def each_row(values):
    """A column of these, over and over."""
    return np.resize(values, ROWS)[:, None]


@both_kernels
@each_norm
def test_offsets(centre, platform):
    x, *others = draw(ROWS, N)
    check(x + each_row((0, 1e2, 1e4, 1e6)), *others, platform=platform, centre=centre)


@each_kernel
def test_rows_that_are_constant(platform):
    """Exactly bias; and what there is of a gradient is 1 / sqrt(eps), however large the row."""
    offsets = each_row((0, 1, 1e6, 1e9, 1e15, 1e30, 3e38))
    check(np.broadcast_to(offsets, (ROWS, N)), *draw(ROWS, N)[1:], platform=platform, centre=True)


@pytest.mark.slow
@each_kernel
@each_norm
@pytest.mark.parametrize("eps", (1e-5, 0.0))
def test_scales(eps, centre, platform):
    """From the smallest numbers to the largest; with a cotangent, for dx is g / x in size."""
    x, weight, bias, g = draw(ROWS, N)
    scales = each_row((1e-37, 1e-30, 1e-12, 1, 1e12, 1e30, 1e38))
    x = (np.sign(x) + np.clip(x, -2, 2)) * scales
    g = (g * np.clip(scales, 1, 1e30)).astype(np.float32)
    check(x, weight, bias, g, platform=platform, centre=centre, eps=eps)


@each_kernel
def test_largest_numbers_of_both_signs(platform):
    x, weight, bias, g = draw(ROWS, N)
    x = np.where(x > 0, 1, -1) * np.float64(np.finfo(np.float32).max)
    check(x, weight, bias, g * np.float32(1e30), platform=platform, centre=True)


@pytest.mark.slow
@each_kernel
@pytest.mark.parametrize("present", ((True, False), (False, True), (False, False)))
def test_without_parameters(present, platform):
    x, *params, g = draw(ROWS, N)
    x = x.astype(np.float32)
    want, size = (f(x, *params_or_none(params, present), g) for f in (exact_norm, terms))
    params = [p if there else None for p, there in zip(params, present, strict=True)]
    got = run(x, *params, g, platform=platform, centre=True, eps=1e-5)
    kept = [True, True, *present]
    keep = lambda values: [v for v, there in zip(values, kept, strict=True) if there]
    for a, b, of in zip(got, keep(want), keep(size), strict=True):
        assert (np.abs(a - b) <= ulps(N) * EPS * of).all()


def params_or_none(params, present):
    """As the oracle writes it: ones and zeros."""
    (weight, bias), (has_weight, has_bias) = params, present
    return weight if has_weight else np.ones(N), bias if has_bias else np.zeros(N)


@each_kernel
@pytest.mark.parametrize("dtype", ("bfloat16", slow("float16")))
@pytest.mark.parametrize("offset", (0, 10))
def test_half_precision_is_rounded_once(dtype, offset, platform):
    x, weight, bias, g = draw(ROWS, N)
    x, g = jnp.asarray(x + offset, dtype), jnp.asarray(g, dtype)
    y, dx, *sums = run(x, weight, bias, g, platform=platform, centre=True, eps=1e-5)
    want, size = (f(x, weight, bias, g) for f in (exact_norm, terms))
    assert y.dtype == dx.dtype == dtype
    assert_rounded_once(y, want.y, ulps(N) * EPS * size.y)
    assert_rounded_once(dx, want.dx, ulps(N) * EPS * size.dx)
    for got, exact, of in zip(sums, want[2:], size[2:], strict=True):
        assert got.dtype == jnp.float32
        assert (np.abs(got - exact) <= ulps(N) * EPS * of).all()


@each_kernel
@pytest.mark.parametrize("bad", (np.nan, np.inf, -np.inf))
def test_nan_and_inf_stay_in_their_row(bad, platform):
    x, *others = draw(ROWS, N)
    x = x.astype(np.float32)
    how = dict(platform=platform, centre=True, eps=1e-5)
    clean = run(x, *others, **how)
    x[3, 5] = bad
    y, dx, *_ = run(x, *others, **how)
    assert np.isnan(y[3]).all() and np.isnan(dx[3]).all()
    rest = np.arange(ROWS) != 3
    assert np.array_equal(y[rest], clean[0][rest]) and np.array_equal(dx[rest], clean[1][rest])


@pytest.mark.slow
@each_kernel
def test_examples_of_several_axes(platform, getkey):
    """Of any batch and shape, as the primitives have them; the same numbers as of rows."""
    x, g = normal(getkey(), (2, 3, 5, 4, 6))
    weight, bias = normal(getkey(), (2, 1, 1, 4, 6))
    form = Form(1e-5, True, True, True, rank=2)
    how = dict(platform=platform, interpret=True)
    got = (
        forward(x, weight, bias, form=form, **how),
        *backward(g, x, weight, bias, form=form, **how),
    )
    assert [a.shape for a in got] == [x.shape, x.shape, weight.shape, bias.shape]
    flat = (a.reshape(-1, 24) for a in (x, weight, bias, g))
    x, (weight,), (bias,), g = flat
    want = run(x, weight, bias, g, platform=platform, centre=True, eps=1e-5)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a.reshape(b.shape), b, rtol=0, atol=1e-5)
