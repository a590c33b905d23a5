"""GroupNorm: each group is one example of the op. Oracle: float64 numpy, group by group."""

import functools as ft
import itertools as it
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from draws import normal, seed
from oracles import (
    Exact,
    assert_alike,
    assert_close,
    assert_rounded_once,
    exact_norm,
    terms,
    ulps,
)
from refused import refused
from slow import few

from eqx_norms import GroupNorm, assert_causal, group_norm, layer_norm
from eqx_norms.causality import CausalityError

BATCH, CHANNELS = 5, 6


def exact_group_norm(x, weight, bias, g, groups, of=exact_norm) -> Exact:
    """Of x (batch, channels, *spatial): the entries of a group are one row."""
    per_group, space = CHANNELS // groups, x[0, 0].size
    rows = lambda a: np.reshape(a, (BATCH, groups, per_group * space))
    repeated = lambda p: np.repeat(np.reshape(p, (groups, per_group)), space, axis=1)
    parts = [
        of(rows(x)[:, i], repeated(weight)[i], repeated(bias)[i], rows(g)[:, i])
        for i in range(groups)
    ]
    y, dx, dweight, dbias = zip(*parts, strict=True)
    per_channel = lambda p: np.reshape(p, (CHANNELS, space)).sum(1)
    examples = lambda a: np.stack(a, axis=1).reshape(x.shape)
    return Exact(examples(y), examples(dx), per_channel(dweight), per_channel(dbias))


def draw(*spatial):
    rng = np.random.default_rng(seed(3))
    x, g = rng.normal(size=(2, BATCH, CHANNELS, *spatial))
    weight, bias = rng.normal(size=(2, CHANNELS)).astype(np.float32)
    return x, weight, bias, g.astype(np.float32)


@ft.partial(jax.jit, static_argnums=4)
def value_and_vjp(x, weight, bias, g, groups):
    norm = jax.vmap(lambda *args: group_norm(args[0], groups, *args[1:]), (0, None, None))
    y, vjp = jax.vjp(norm, x, weight, bias)
    return y, *vjp(g)


def check(x, weight, bias, g, groups, *, margin=1.0):
    """Against float64 numpy, in units of what each entry is the sum of; see `oracles.ulps`."""
    got = value_and_vjp(x, weight, bias, g, groups)
    assert all(a.dtype == x.dtype for a in got)
    want, size = (exact_group_norm(x, weight, bias, g, groups, of=of) for of in (exact_norm, terms))
    assert_close(got, want, size, x[:, 0].size, margin=margin)


SPATIAL = (3,), (17,), (127,), (5, 7), (32, 32), (2, 3, 4)
QUICK = {((3,), 6), ((17,), 1), ((5, 7), 2), ((2, 3, 4), 6), ((32, 32), 2)}


@pytest.mark.parametrize(
    "spatial, groups",
    [
        pytest.param(*case, marks=[] if case in QUICK else pytest.mark.slow)
        for case in it.product(SPATIAL, (1, 2, 6))
    ],
)
def test_float32(spatial, groups):
    x, *rest = draw(*spatial)
    for offset, scale in ((0, 1), (1e2, 1), (1e4, 1), (1e6, 1), (0, 1e-6), (0, 1e15)):
        check((x * scale + offset).astype(np.float32), *rest, groups)


@pytest.mark.parametrize("dtype", ("float16", "bfloat16"))
def test_half_precision_is_rounded_once(dtype):
    x, weight, bias, g = draw(32, 32)
    x, g = jnp.asarray(x + 10, dtype), jnp.asarray(g, dtype)
    y, dx, dweight, dbias = value_and_vjp(x, weight, bias, g, 2)
    want, size = (exact_group_norm(x, weight, bias, g, 2, of=of) for of in (exact_norm, terms))
    assert y.dtype == dx.dtype == dtype
    n = 3 * 32 * 32
    assert_rounded_once(y, want.y, ulps(n) * 2.0**-23 * size.y)
    assert_rounded_once(dx, want.dx, ulps(n) * 2.0**-23 * size.dx)
    for sums, exact, of in ((dweight, want.dweight, size.dweight), (dbias, want.dbias, size.dbias)):
        assert (np.abs(sums - exact) <= ulps(BATCH * 32 * 32) * 2.0**-23 * of).all()


def test_float64_stays_float64():
    with jax.enable_x64(True):
        # The oracle is in float64 as well, and may be as wrong.
        check(*(jnp.asarray(a, jnp.float64) for a in draw(17)), 3, margin=2)


@pytest.mark.slow
def test_one_group_is_layer_norm_over_the_whole_example(getkey):
    x = normal(getkey(), (CHANNELS, 4, 5))
    assert_alike(group_norm(x, 1), layer_norm(x), x.size)


@pytest.mark.slow
def test_a_group_a_channel_is_instance_norm(getkey):
    x = normal(getkey(), (CHANNELS, 4, 5))
    wide = np.float64(x)
    xc = wide - wide.mean((1, 2), keepdims=True)
    want = xc / np.sqrt(wide.var((1, 2), keepdims=True) + 1e-5)
    assert_alike(group_norm(x, CHANNELS), want, 20)


@pytest.mark.slow
def test_over_channels_and_time_it_reads_the_future(getkey):
    """As its docstring warns; mapped over time it does not."""
    x = normal(getkey(), (CHANNELS, 8))
    norm = GroupNorm(2, CHANNELS)
    with pytest.raises(CausalityError):
        assert_causal(norm, x, axis=1)
    per_step = jax.vmap(norm, in_axes=1, out_axes=1)
    assert not assert_causal(per_step, x, axis=1, pointwise=True).leak


def test_residuals_are_x_and_three_scalars_a_group():
    for dtype, size in ((jnp.float32, 4), (jnp.bfloat16, 2)):
        x = jnp.ones((BATCH, CHANNELS, 16, 16), dtype)
        _, vjp = jax.vjp(jax.jit(jax.vmap(GroupNorm(3, CHANNELS))), x)
        held = sum(leaf.nbytes for leaf in jax.tree.leaves(vjp))
        assert held <= x.size * size + BATCH * 3 * 12 + CHANNELS * 4


CURES = [
    ((2, 6, 5), "Map it over the axes before: jax.vmap(group_norm)(x)"),
    ((2, 6), "jax.vmap(group_norm)(x)"),
    ((2, 3, 6, 5), "jax.vmap(jax.vmap(group_norm))(x)"),
    ((4, 5, 6), "Bring the channels to the front: group_norm(jnp.moveaxis(x, -1, 0))"),
    ((2, 4, 5, 6), "jax.vmap(group_norm)(jnp.moveaxis(x, -1, 1))"),
]


@pytest.mark.parametrize("affine", few((True, False), (True,)))
@pytest.mark.parametrize("shape, cure", CURES)
def test_error_ends_in_the_call_that_works(shape, cure, affine):
    norm, x = GroupNorm(3, 6, channelwise_affine=affine), normal(jr.key(seed(0)), shape)
    with pytest.raises(ValueError, match="expected 6 channels, got an array of shape") as info:
        norm(x)
    assert str(info.value).endswith(cure) and str(shape) in str(info.value)
    call = cure.split(": ")[-1]
    names = {"jax": jax, "jnp": jnp, "group_norm": norm}
    y = jax.jit(lambda x: eval(call, names | {"x": x}))(x)
    assert sorted(y.shape) == sorted(shape)


@pytest.mark.parametrize("shape", ((), (5,), (5, 4)))
def test_channels_that_are_nowhere(shape):
    with refused(ValueError, "expected 6 channels") as info:
        GroupNorm(3, 6)(jnp.ones(shape))
    assert "vmap" not in str(info.value)


@pytest.mark.parametrize(
    "args, error, text",
    [
        ((4, 6), ValueError, "divides the number of channels; got 4 groups and 6 channels"),
        ((3,), ValueError, "Give it, or type `GroupNorm(groups, channelwise_affine=False)`"),
        ((0, 6), ValueError, "`GroupNorm(groups=...)` must be 1 or more; got 0"),
        ((2, -6), ValueError, "`GroupNorm(channels=...)` must be 0 or more; got -6"),
        (("2", 6), TypeError, "`GroupNorm(groups=...)` must be an int; got '2'"),
        ((2, 6, -1.0), ValueError, "`GroupNorm(eps=...)` must be a finite number"),
        ((2, 6, 1e-5, True, "int8"), TypeError, "must be floating point"),
    ],
)
def test_bad_arguments(args, error, text):
    with refused(error, re.escape(text)):
        GroupNorm(*args)


def test_bad_arguments_of_the_function():
    x = jnp.ones((6, 4))
    with refused(ValueError, "got 4 groups and 6 channels"):
        group_norm(x, 4)
    with refused(ValueError, r"expected shape \(6,\), got \(4,\)"):
        group_norm(x, 2, bias=jnp.ones(4))
    with refused(TypeError, "`group_norm` normalises real floating-point"):
        group_norm(jnp.ones((6, 4), int), 2)
    with refused(ValueError, "got a scalar"):
        group_norm(jnp.ones(()), 1)
    with refused(ValueError, "got 4 groups and 6 channels"):
        GroupNorm(4, channelwise_affine=False)(x)


@pytest.mark.parametrize("shape", few(((), (1,), (6, 1), (6, 4), (1, 4)), ((6, 1),)))
def test_parameters_that_broadcast_from_the_left(shape, getkey):
    """As those of equinox.nn do."""
    with jax.enable_x64(True):
        x, g = normal(getkey(), (2, 6, 4))
        params = tuple(normal(getkey(), (2, *shape)))
        where = lambda m: (m.weight, m.bias)
        run = eqx.filter_jit(eqx.filter_value_and_grad(lambda m, x: jnp.sum(g * jnp.sin(m(x)))))
        got, want = (
            run(eqx.tree_at(where, of(2, 6), params), x) for of in (GroupNorm, eqx.nn.GroupNorm)
        )
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-9 * np.abs(b).max())


INSIDE = {
    "jit": lambda f, x: jax.jit(f)(x),
    "checkpoint": lambda f, x: jax.checkpoint(f)(x),
    "cond": lambda f, x: jax.lax.cond(x[0, 0] < 99, f, jnp.sin, x),
    "scan": lambda f, x: jax.lax.scan(lambda c, x: (c, f(x)), 0, x[None])[1][0],
    "grad of jit": lambda f, x: jax.grad(lambda x: jnp.sum(jax.jit(f)(x) ** 3))(x),
}


@pytest.mark.parametrize("inside", few(INSIDE, ("jit",)))
def test_parameters_of_numpy(inside, getkey):
    """As `np.load` and pickle give them: JAX's custom rules stumble over those that are mapped."""
    x, (weight, bias) = normal(getkey(), (6, 4)), normal(getkey(), (2, 6))
    numpy = np.asarray(weight), np.asarray(bias)
    run = lambda *params: INSIDE[inside](lambda x: group_norm(x, 2, *params), x)
    assert_alike(run(*numpy), run(weight, bias), 24)
    constant = np.asarray(x)
    assert_alike(
        jax.jit(lambda: group_norm(constant, 2, *numpy))(), group_norm(x, 2, weight, bias), 24
    )
