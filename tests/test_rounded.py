"""`rounded`, and layers that round before the weight, as published models do.

Oracle: the formulas operation by operation in NumPy, which rounds each result to its dtype, and
float64 for derivatives.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from draws import seed
from oracles import exact_norm, terms, ulps
from refused import refused
from slow import slow

import eqx_norms
from eqx_norms import LayerNorm, RMSNorm, plain, replace_norms, rms_norm, rounded

HALF = ml_dtypes.bfloat16, np.float16
N = 96


def drawn(*shape, dtype=np.float32, scale=1.0, offset=0.0, number=0):
    rng = np.random.default_rng(seed(number))
    return (offset + scale * rng.normal(size=shape)).astype(dtype)


# rounded


@pytest.mark.parametrize("dtype", HALF)
def test_what_feeds_a_norm_is_rounded_under_jit_too(dtype):
    x, y = (jnp.asarray(drawn(32, N, dtype=dtype, number=i)) for i in range(2))
    # The cast to float32, by which a norm begins, is where XLA leaves out a rounding.
    wide = jax.jit(jax.vmap(lambda x, y: rounded(x + y).astype(jnp.float32)))
    in_numpy = (np.asarray(x) + np.asarray(y)).astype(np.float32)
    assert np.array_equal(wide(x, y), in_numpy)


def test_subnormals_of_float16_are_kept():
    x = np.asarray([2.0**-24, 2.0**-20 + 2.0**-24, -(2.0**-15), 65504, 0, np.inf], np.float16)
    assert np.array_equal(rounded(jnp.asarray(x)), x)
    assert np.array_equal(jax.jit(lambda x: rounded(x + x))(jnp.asarray(x[:3])), x[:3] + x[:3])


@pytest.mark.parametrize("dtype", (*HALF, np.float32, np.float64))
def test_its_derivative_is_the_identity(dtype, x64):
    x, t = (jnp.asarray(drawn(5, dtype=dtype, scale=1e-6, number=i)) for i in range(2))
    y, dy = jax.jvp(rounded, (x,), (t,))
    (dx,) = jax.vjp(rounded, x)[1](t)
    assert y.dtype == dy.dtype == dx.dtype == dtype
    assert np.array_equal(y, x) and np.array_equal(dy, t) and np.array_equal(dx, t)


def test_wider_dtypes_are_left_alone(x64):
    for dtype in jnp.float32, jnp.float64:
        assert not jax.make_jaxpr(rounded)(jnp.ones(3, dtype)).eqns
    assert np.isnan(rounded(jnp.asarray(np.nan, jnp.bfloat16)))


@pytest.mark.parametrize("x", (3.0, jnp.arange(3), None, jnp.ones(3, jnp.complex64)))
def test_rounded_refuses_what_is_no_floating_point_array(x):
    with refused(TypeError, "`rounded` normalises real floating-point arrays|got"):
        rounded(x)


# The layers


def published(x, weight, bias, *, eps, centre, unit_offset=False):
    """In float32 up to the normalised x; what follows is operation by operation, in its dtype."""
    wide = x.astype(np.float64)
    xc = wide - wide.mean(-1, keepdims=True) if centre else wide
    y = (xc / np.sqrt((xc**2).mean(-1, keepdims=True) + eps)).astype(np.float32).astype(x.dtype)
    if weight is not None:
        weight = weight + np.ones((), weight.dtype) if unit_offset else weight
        y = y.astype(promoted(y, weight)) * weight.astype(promoted(y, weight))
    if bias is not None:
        y = y.astype(promoted(y, bias)) + bias.astype(promoted(y, bias))
    return y


def promoted(a, b):
    if a.dtype == b.dtype:
        return a.dtype
    return np.float64 if 8 in (a.dtype.itemsize, b.dtype.itemsize) else np.float32


def layer_of(cls, weight, bias, **options):
    options |= {"use_weight": weight is not None, "use_bias": bias is not None, "eps": 1e-6}
    layer = cls(N, round_before_weight=True, **options)
    params = (p if p is None else jnp.asarray(p) for p in (weight, bias))
    return eqx.tree_at(lambda m: (m.weight, m.bias), layer, [*params], is_leaf=lambda m: m is None)


CASES = [
    (cls, dtype, bias, unit_offset)
    for cls in (RMSNorm, LayerNorm)
    for dtype in HALF
    for bias in (False, True)
    for unit_offset in (False, True)
]
QUICK = (RMSNorm, ml_dtypes.bfloat16, False, False), (LayerNorm, np.float16, True, True)


@pytest.mark.parametrize(
    "cls, dtype, bias, unit_offset",
    [case if case in QUICK else slow(*case) for case in CASES],
)
def test_bits_of_the_published_formula(cls, dtype, bias, unit_offset):
    x = np.concatenate([drawn(256, N, dtype=dtype, scale=s) for s in (1e-3, 1, 300)])
    weight = drawn(N, dtype=dtype, scale=0.3, offset=0 if unit_offset else 1, number=1)
    bias = drawn(N, dtype=dtype, scale=0.3, number=2) if bias else None
    layer = layer_of(cls, weight, bias, unit_offset=unit_offset)
    got = np.asarray(jax.jit(jax.vmap(layer))(jnp.asarray(x)))
    want = published(x, weight, bias, eps=1e-6, centre=cls is LayerNorm, unit_offset=unit_offset)
    assert got.dtype == want.dtype == dtype
    # float32 falls on the other side of a tie in one entry of 2^16 / 3 per ulp that it is off, or
    # of 2^13 / 3 in float16. Then xhat is an ulp off, and so are the terms of what follows.
    assert np.mean(got == want) > 0.999
    eps = float(ml_dtypes.finfo(dtype).eps)
    factor = np.abs(weight.astype(np.float64)) + unit_offset
    xhat = np.abs(published(x, None, None, eps=1e-6, centre=cls is LayerNorm).astype(np.float64))
    size = xhat * factor + (0 if bias is None else np.abs(bias.astype(np.float64)))
    off = np.abs(got.astype(np.float64) - want.astype(np.float64))
    assert (off <= 2 * eps * size).all()
    # And without the flag a quarter of the entries are others.
    once = eqx.tree_at(lambda m: m.weight, cls(N, 1e-6, use_bias=False), layer.weight)
    assert np.mean(np.asarray(jax.jit(jax.vmap(once))(jnp.asarray(x))) == want) < 0.9


@pytest.mark.parametrize(
    "of_x, of_weight, of_y",
    [
        (jnp.bfloat16, jnp.float32, jnp.float32),
        slow(jnp.float32, jnp.bfloat16, jnp.float32),
        slow(jnp.bfloat16, jnp.float16, jnp.float32),
        (jnp.float32, jnp.float64, jnp.float64),
        slow(jnp.float64, jnp.bfloat16, jnp.float64),
    ],
)
def test_the_promoted_dtype_comes_back(of_x, of_weight, of_y, x64):
    x, weight = drawn(8, N, dtype=of_x), drawn(N, dtype=of_weight, offset=1, scale=0.3, number=1)
    layer = layer_of(RMSNorm, weight, None)
    got = jax.vmap(layer)(jnp.asarray(x))
    assert got.dtype == of_y and published(x, weight, None, eps=1e-6, centre=False).dtype == of_y
    want = np.float64(jax.vmap(lambda x: rms_norm(x, eps=1e-6))(jnp.asarray(x)))
    want = want * weight.astype(np.float64)
    # Of x in bfloat16 the normalised entries are the same, but for ties; else float32 rounds both.
    eps = 16 * (2.0**-52 if of_x == jnp.float64 else 2.0**-23)
    off = np.abs(np.float64(got) - want) > eps * np.abs(want)
    assert off.mean() < (0.01 if of_x == jnp.bfloat16 else 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("cls", [RMSNorm, LayerNorm])
def test_derivatives_are_those_of_the_formula_without_roundings(cls):
    """Each rounded once: a norm's terms cancel, and one that was rounded before leaves nothing."""
    dtype = ml_dtypes.bfloat16
    x = drawn(4, N, dtype=dtype)
    g = drawn(4, N, dtype=dtype, offset=100 if cls is LayerNorm else 0, number=3)
    weight = (
        np.ones(N, np.float32).astype(dtype)
        if cls is LayerNorm
        else drawn(N, dtype=dtype, offset=1, scale=0.3, number=1)
    )
    bias = drawn(N, dtype=dtype, number=2)
    layer = layer_of(cls, weight, bias)
    eps = 2.0**-8

    def of(how, layer):
        f = lambda layer, x: how(layer)(x)
        layer, x_grad = jax.vjp(f, layer, jnp.asarray(x))[1](jnp.asarray(g))
        return x_grad, layer.weight, layer.bias

    exact = exact_norm(x, weight, bias, g, eps=1e-6, centre=cls is LayerNorm)[1:]
    size = terms(x, weight, bias, g, eps=1e-6, centre=cls is LayerNorm)[1:]
    got = jax.jit(lambda layer: of(jax.vmap, layer))(layer)
    for a, want, scale in zip(got, exact, size, strict=True):
        assert a.dtype == dtype
        bound = eps * np.abs(want) + ulps(N) * 2.0**-23 * scale
        assert (np.abs(np.float64(a) - want) <= bound).all()
    # Forward mode is the same linear map.
    t = drawn(4, N, dtype=dtype, number=4)
    dy = jax.jvp(jax.vmap(layer), (jnp.asarray(x),), (jnp.asarray(t),))[1]
    want = np.sum(exact[0] * t.astype(np.float64))
    size = np.sum(np.abs(np.float64(dy) * g.astype(np.float64)))
    assert abs(np.sum(np.float64(dy) * g.astype(np.float64)) - want) <= eps * size


@pytest.mark.slow
def test_masks_plain_and_kernels_give_the_same():
    x = jnp.asarray(drawn(N, dtype=ml_dtypes.bfloat16))
    weight, bias = (drawn(N, dtype=ml_dtypes.bfloat16, number=i) for i in (1, 2))
    where = jnp.arange(N) % 3 > 0
    layer = layer_of(RMSNorm, weight, bias)
    y = layer(x, where=where)
    assert not y[~where].any()
    short = published(np.asarray(x)[where], weight[where], bias[where], eps=1e-6, centre=False)
    assert np.mean(np.asarray(y)[where] == short) > 0.9
    with plain():
        assert np.array_equal(layer(x, where=where), y)
    pallas = layer_of(RMSNorm, weight, bias, implementation="pallas")
    assert "eqx_norms_forward" not in str(jax.make_jaxpr(pallas)(x))
    assert np.array_equal(pallas(x), layer(x))


def test_parameters_of_numpy_are_what_jax_makes_of_them():
    weight = drawn(N, dtype=np.float64, offset=1, scale=0.3)
    layer = RMSNorm(N, use_bias=False, round_before_weight=True)
    layer = eqx.tree_at(lambda m: m.weight, layer, weight)
    assert layer(jnp.ones(N, jnp.bfloat16)).dtype == jnp.float32


def test_it_is_one_static_field(tmp_path):
    layer, before = RMSNorm(4, round_before_weight=True), RMSNorm(4)
    assert len(jax.tree.leaves(layer)) == len(jax.tree.leaves(before))
    eqx.tree_serialise_leaves(tmp_path / "norm.eqx", before)
    assert eqx.tree_deserialise_leaves(tmp_path / "norm.eqx", layer).round_before_weight
    theirs = [eqx.nn.RMSNorm(4), eqx.nn.LayerNorm(4), eqx.nn.GroupNorm(2, 4)]
    ours = replace_norms(theirs, round_before_weight=True)
    assert [getattr(m, "round_before_weight", None) for m in ours] == [True, True, None]
    assert not any(getattr(m, "round_before_weight", False) for m in replace_norms(theirs))
    assert all(map(eqx_norms.is_norm, ours))


@pytest.mark.slow
def test_split_over_a_mapped_axis_and_differentiated():
    """Where JAX differentiates the forward itself, a rounding has the derivative 1 as well."""
    x, g = (jnp.asarray(drawn(N, dtype=ml_dtypes.bfloat16, number=i)) for i in (0, 3))
    weight, bias = (jnp.asarray(drawn(N, dtype=ml_dtypes.bfloat16, number=i)) for i in (1, 2))
    whole = layer_of(LayerNorm, weight, bias)

    def split(x):
        def part(x, weight, bias):
            layer = LayerNorm(N // 4, eps=1e-6, axis_name="parts", round_before_weight=True)
            return eqx.tree_at(lambda m: (m.weight, m.bias), layer, (weight, bias))(x)

        parts = (a.reshape(4, -1) for a in (x, weight, bias))
        return jax.vmap(part, axis_name="parts")(*parts).reshape(-1)

    y, vjp = jax.vjp(split, x)
    want, want_vjp = jax.vjp(whole, x)
    # The mean of four means: float32 rounds it otherwise, and a tie may fall to the other side.
    assert np.mean(np.asarray(y == want)) > 0.9
    (dx,), (want,) = vjp(g), want_vjp(g)
    largest = np.abs(np.float64(want)).max()
    assert np.abs(np.float64(dx) - np.float64(want)).max() <= 2.0**-7 * largest
