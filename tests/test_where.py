"""Masked examples: as if the entries under the mask were not there.

The oracle drops them, normalises what is left in float64 numpy, and puts zeros in their place.
"""

import functools as ft

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import normal, seed
from oracles import Exact, assert_alike, assert_close, exact_norm, terms
from refused import refused
from slow import few

from eqx_norms import (
    GroupNorm,
    LayerNorm,
    RMSNorm,
    group_norm,
    layer_norm,
    normalize_reference,
    rms_norm,
)
from eqx_norms.causality import check_reads

slow = lambda *case: pytest.param(*case, marks=pytest.mark.slow)
ROWS, N = 12, 17
LAYERS = pytest.mark.parametrize("layer", (LayerNorm, RMSNorm))


def draw(offset=0.0):
    """x, weight, bias, cotangent, mask; the first row is masked whole, the second not at all."""
    rng = np.random.default_rng(seed(1))
    x, g = rng.normal(size=(2, ROWS, N)).astype(np.float32)
    weight, bias = rng.normal(size=(2, N)).astype(np.float32) + 1
    where = rng.uniform(size=(ROWS, N)) < 0.6
    where[0], where[1], where[2] = False, True, np.arange(N) == 3
    return x + np.float32(offset), weight, bias, g, where


def exact_masked(layer, x, weight, bias, g, where, of=exact_norm):
    y, dx = np.zeros((2, ROWS, N))
    dweight, dbias = np.zeros((2, N))
    for i, mask in enumerate(where):
        if mask.any():
            some = lambda a: a[..., mask]  # noqa: B023
            one = of(
                *map(some, (x[i : i + 1], weight, bias, g[i : i + 1])), centre=layer is LayerNorm
            )
            y[i, mask], dx[i, mask] = one.y[0], one.dx[0]
            dweight[mask] += one.dweight
            dbias[mask] += one.dbias
    return Exact(y, dx, dweight, dbias)


@ft.partial(jax.jit, static_argnums=0)
def value_and_vjp(layer, x, weight, bias, g, where):
    def norm(x, weight, bias):
        module = eqx.tree_at(lambda m: (m.weight, m.bias), layer(N), (weight, bias))
        return jax.vmap(lambda x, where: module(x, where=where))(x, where)

    y, vjp = jax.vjp(norm, x, weight, bias)
    return y, *vjp(g)


@LAYERS
@pytest.mark.parametrize("offset", (0, 1e4))
@pytest.mark.parametrize("under", (0.0, 1e30, np.nan, np.inf))
def test_masked_entries_are_not_there(layer, offset, under):
    x, weight, bias, g, where = draw(offset)
    args = layer, x, weight, bias, g, where
    want, size = (exact_masked(*args, of=of) for of in (exact_norm, terms))
    x = np.where(where, x, np.float32(under))
    got = value_and_vjp(layer, x, weight, bias, g, where)
    assert_close(got, want, size, N)
    y, dx = map(np.asarray, got[:2])
    assert not y[~where].any() and not dx[~where].any()
    assert not y[0].any() and not dx[0].any()


@LAYERS
def test_cotangent_under_the_mask_is_ignored(layer):
    x, weight, bias, g, where = draw()
    want = value_and_vjp(layer, x, weight, bias, g, where)
    got = value_and_vjp(layer, x, weight, bias, np.where(where, g, np.nan).astype(g.dtype), where)
    for a, b in zip(got, want, strict=True):  # the same compiled program
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("norm", (layer_norm, pytest.param(rms_norm, marks=pytest.mark.slow)))
def test_derivatives_equal_those_of_the_entries_that_count(norm, getkey):
    """Forward mode, Hessian and third order, with NaN under the mask, against the plain reference
    of the compressed example."""
    with jax.enable_x64(True):
        where = np.arange(7) % 3 != 1
        x, weight, dx, g = normal(getkey(), (4, 7))
        reference = lambda x: normalize_reference(x, weight[where], centre=norm is layer_norm)
        theirs = lambda t: jnp.vdot(reference(x[where] + t * dx[where]), g[where])
        full = jnp.where(where, x, jnp.nan)
        ours = lambda t: jnp.vdot(norm(full + t * dx, weight, where=jnp.asarray(where)), g)
        modes = (jax.grad, jax.jacfwd, jax.hessian, lambda f: jax.jacfwd(jax.hessian(f)))
        along = lambda f: jax.jit(lambda t: [mode(f)(t) for mode in modes])(0.1)
        # Float64; five entries, and third derivatives, may magnify its rounding a thousandfold.
        got, want = along(ours), along(theirs)
        np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-9 * np.abs(want).max())


@LAYERS
def test_a_mask_that_lets_all_through_changes_nothing(layer, getkey):
    x = normal(getkey(), (N,))
    assert_alike(layer(N)(x, where=jnp.ones(N, bool)), layer(N)(x), N)


@LAYERS
def test_mask_costs_one_byte_an_element(layer):
    x, _, _, _, where = draw()
    norm = lambda x: jax.vmap(lambda x, where: layer(N)(x, where=where))(x, where)
    _, vjp = jax.vjp(jax.jit(norm), jnp.asarray(x, jnp.bfloat16))
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(vjp))
    assert held <= ROWS * (N * (2 + 1) + 12) + 4 * N


@LAYERS
def test_numpy_mask_mapped_under_jit(layer):
    """JAX's custom_jvp asserts on a NumPy constant that comes through vmap inside jit."""
    x, _, _, _, where = draw()
    norm = lambda x, where: jax.vmap(lambda x, where: layer(N)(x, where=where))(x, where)
    got = jax.jit(lambda x: norm(x, where))(x)
    assert_alike(got, jax.jit(norm)(x, where), N)


@LAYERS
def test_bad_masks(layer):
    for mask in (jnp.ones(N), jnp.ones(N, int), jnp.ones((1, N), bool), jnp.ones((), bool), True):
        with refused(ValueError, r"mask of the shape of x.*\(17,\) and bool, got"):
            layer(N)(jnp.ones(N), where=mask)


@pytest.mark.slow
@pytest.mark.parametrize("ensemble", (False, True))
@pytest.mark.parametrize("norm", (layer_norm, rms_norm))
def test_of_a_fully_masked_example_without_eps(norm, ensemble, getkey):
    """1 / sigma is not there to be had; it made dweight of the whole batch 0 * (0 * inf)."""
    with jax.enable_x64(True):
        x, dx, g = normal(getkey(), (3, 3, 5))
        weight = normal(getkey(), (3, 5) if ensemble else (5,))
        where = jnp.ones((3, 5), bool).at[1].set(False)

        def derivatives(keep):
            masked = lambda x, weight, where: norm(x, weight, where=where, eps=0.0)
            rows = jax.vmap(masked, (0, 0 if ensemble else None, 0))
            some = lambda weight: weight[keep] if ensemble else weight
            f = lambda x, weight: rows(x[keep], some(weight), where[keep])
            grad = jax.grad(lambda *args: jnp.sum(g[keep] * jnp.sin(f(*args))), (0, 1))
            return grad(x, weight), jax.jvp(grad, (x, weight), (dx, weight))

        # The loss of the others alone has the same derivatives, zero in the masked example.
        got, want = (jax.jit(derivatives)(jnp.array(keep)) for keep in ([0, 1, 2], [0, 2]))
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-9 * np.abs(b).max())


@pytest.mark.slow
@LAYERS
def test_what_is_masked_of_a_constant_example_without_eps(layer):
    """What counts has no answer there. Under the mask all is zero, in dweight too."""
    where = jnp.arange(5) < 2
    x = jnp.where(where, 0.0, 2.0) if layer is RMSNorm else jnp.full(5, 2.0)
    norm = {LayerNorm: layer_norm, RMSNorm: rms_norm}[layer]
    y, vjp = jax.vjp(lambda *args: norm(*args, where=where, eps=0.0), x, jnp.ones(5))
    for a in (y, *vjp(jnp.arange(5.0))):
        assert not a[2:].any()


# ---- GroupNorm, whose mask may be smaller than x.

CHANNELS, TIME = 4, 15
MASKS = ((CHANNELS, TIME), (1, TIME), (CHANNELS, 1))


@ft.partial(jax.jit, static_argnums=0)
def group_value_and_vjp(groups, x, weight, bias, g, where):
    norm = lambda *args: group_norm(args[0], groups, *args[1:], where=where)
    y, vjp = jax.vjp(norm, x, weight, bias)
    return y, *vjp(g)


def exact_masked_groups(groups, x, weight, bias, g, where, of):
    """Each group is one row of the entries that count."""
    where = np.broadcast_to(where, x.shape)
    y, dx, dweight, dbias = (np.zeros(x.shape) for _ in range(4))
    per = CHANNELS // groups
    for group in range(groups):
        at = np.zeros(x.shape, bool)
        at[group * per : (group + 1) * per] = where[group * per : (group + 1) * per]
        channel = np.nonzero(at)[0]
        if at.any():
            one = of(x[at][None], weight[channel], bias[channel], g[at][None])
            y[at], dx[at], dweight[at], dbias[at] = one.y[0], one.dx[0], one.dweight, one.dbias
    return Exact(y, dx, dweight.sum(1), dbias.sum(1))


@pytest.mark.parametrize("shape", few(MASKS, ((1, TIME),)), ids=str)
@pytest.mark.parametrize("groups", few((1, 2, CHANNELS), (2,)))
def test_groups(shape, groups):
    """At offsets to 1e6, with NaN under the mask; instance norm is a group a channel."""
    rng = np.random.default_rng(seed(2))
    normal, g = rng.normal(size=(2, CHANNELS, TIME)).astype(np.float32)
    weight, bias = rng.normal(size=(2, CHANNELS)).astype(np.float32)
    where = rng.uniform(size=shape) < 0.6
    if shape[0] > 1:
        where[-1] = False  # With a group a channel, one has no entry.
    for offset in (0, 1e6):
        x = normal + np.float32(offset)
        args = groups, x, weight, bias, g, where
        want, size = (exact_masked_groups(*args, of=of) for of in (exact_norm, terms))
        under = np.where(where, x, np.float32(np.nan))
        got = group_value_and_vjp(groups, under, weight, bias, g, where)
        assert_close(got, want, size, x.size)
        hidden = ~np.broadcast_to(where, x.shape)
        assert not np.asarray(got[0])[hidden].any() and not np.asarray(got[1])[hidden].any()


def test_a_mask_that_all_channels_share_is_kept_once():
    """Bytes: x, three scalars a group, weight, and the mask as it came."""
    x, where = jnp.ones((3, 64, 50), jnp.bfloat16), jnp.ones((3, 1, 50), bool)
    norm = lambda x: jax.vmap(lambda x, where: GroupNorm(8, 64)(x, where=where))(x, where)
    _, vjp = jax.vjp(jax.jit(norm), x)
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(vjp))
    assert held <= x.size * 2 + where.size + 3 * 8 * 12 + 64 * 4


def test_what_is_padded_does_not_reach_what_counts():
    """Proved: nobody reads the padding."""
    real = jnp.arange(4) < 3
    norm = lambda x: GroupNorm(2, 2, channelwise_affine=False)(x, where=real[None])
    x = np.random.default_rng(seed(4)).normal(size=(2, 4)).astype(np.float32)
    report = check_reads(norm, x, np.outer(real, real), axis=1, prove=True)
    assert report.status == "proved"


def test_bad_masks_of_groups():
    norm, x = GroupNorm(2, CHANNELS), jnp.ones((CHANNELS, TIME))
    for mask in (jnp.ones(TIME, bool), jnp.ones((1, TIME)), jnp.ones((2, TIME), bool)):
        with refused(ValueError, "as many axes as x, each of its size or of size 1: got"):
            norm(x, where=mask)
        with refused(ValueError, r"Type `mask\[None\]`"):
            group_norm(x, 2, where=mask)
