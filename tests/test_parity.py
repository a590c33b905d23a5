"""Outputs and gradients against torch, flax and haiku on random input; eqx.nn: test_drop_in.py.

Each library is its own oracle here, with inputs of offset 0, where all are right to a few ulps.
"""

import sys

import equinox as eqx
import flax.linen as linen
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import normal
from oracles import assert_alike

from eqx_norms import GroupNorm, LayerNorm, RMSNorm

ROWS, N, GROUPS, CHANNELS = 6, 37, 3, 6
SHAPES = {LayerNorm: (ROWS, N), RMSNorm: (ROWS, N), GroupNorm: (ROWS, CHANNELS, 5, 4)}
EACH_LAYER = pytest.mark.parametrize("layer", SHAPES)


@pytest.fixture
def data(layer, getkey):
    """x, weight, bias, cotangent."""
    x, g = normal(getkey(), (2, *SHAPES[layer]))
    weight, bias = normal(getkey(), (2, SHAPES[layer][1]))
    return x, weight, bias, g


def run(norm, data):
    """The batch y of `norm(x, weight, bias)`, and dx, dweight, dbias."""
    *args, g = data
    y, vjp = jax.vjp(norm, *args)
    return [y, *vjp(g)]


def ours(layer, eps=1e-5):
    def norm(x, weight, bias):
        module = layer(GROUPS, CHANNELS, eps) if layer is GroupNorm else layer(N, eps)
        module = eqx.tree_at(lambda m: m.weight, module, weight)
        if layer is RMSNorm:  # Theirs have no bias.
            bias = jnp.zeros_like(bias)
        return jax.vmap(eqx.tree_at(lambda m: m.bias, module, bias))(x)

    return norm


def assert_same(got, want):
    for a, b in zip(got, want, strict=True):
        assert_alike(a, b, ROWS * 20)  # the longest sum, of a channel of GroupNorm


@pytest.mark.slow
@EACH_LAYER
@pytest.mark.parametrize("fast_variance", (True, False))
def test_flax(layer, data, fast_variance):
    """flax's eps is 1e-6, its default variance E[x^2] - E[x]^2, its channels come last."""
    options = {} if layer is RMSNorm else {"use_fast_variance": fast_variance}

    def norm(x, weight, bias):
        params = {"scale": weight} if layer is RMSNorm else {"scale": weight, "bias": bias}
        if layer is GroupNorm:
            module = linen.GroupNorm(GROUPS, **options)
            y = module.apply({"params": params}, jnp.moveaxis(x, 1, -1))
            return jnp.moveaxis(y, -1, 1)
        return getattr(linen, layer.__name__)(**options).apply({"params": params}, x)

    with jax.numpy_rank_promotion("allow"):
        want = run(norm, data)
    assert_same(run(ours(layer, eps=1e-6), data), want)


@pytest.mark.slow
@EACH_LAYER
def test_haiku(layer, data):
    make = {
        LayerNorm: lambda: hk.LayerNorm(-1, True, True, name="norm"),
        RMSNorm: lambda: hk.RMSNorm(-1, name="norm"),
        GroupNorm: lambda: hk.GroupNorm(GROUPS, data_format="channels_first", name="norm"),
    }[layer]

    def norm(x, weight, bias):
        wide = lambda p: p.reshape(-1, 1, 1) if layer is GroupNorm else p
        params = {"scale": wide(weight)} | ({} if layer is RMSNorm else {"offset": wide(bias)})
        return hk.transform(lambda x: make()(x)).apply({"norm": params}, None, x)

    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        want = run(norm, data)
    assert_same(run(ours(layer), data), want)


torch_runs_here = pytest.mark.skipif(
    sys.version_info >= (3, 12),
    reason="torch is pinned to a release whose small CPU build is for Python 3.11",
)


@pytest.mark.slow
@torch_runs_here
@EACH_LAYER
def test_torch(layer, data):
    import torch.nn.functional as F
    from torch import tensor

    x, weight, bias, g = (tensor(np.asarray(a), requires_grad=True) for a in data)
    if layer is LayerNorm:
        y = F.layer_norm(x, (N,), weight, bias)
    elif layer is RMSNorm:
        y = F.rms_norm(x, (N,), weight, eps=1e-5) + 0 * bias
    else:
        y = F.group_norm(x, GROUPS, weight, bias)
    y.backward(g.detach())
    want = [a.detach().numpy() for a in (y, x.grad, weight.grad, bias.grad)]
    assert_same(run(ours(layer), data), want)


@torch_runs_here
def test_torch_normalises_over_the_last_axes(getkey):
    """`normalized_shape` of k sizes: over the last k axes, all at once; those before are mapped."""
    import torch

    x = np.asarray(normal(getkey(), (2, 3, 4)))
    for shape, maps in (((4,), 2), ((3, 4), 1), ((2, 3, 4), 0)):
        norm = LayerNorm(shape)
        for _ in range(maps):
            norm = jax.vmap(norm)
        want = torch.nn.LayerNorm(shape)(torch.tensor(x)).detach().numpy()
        assert_alike(norm(jnp.asarray(x)), want, x.size)
