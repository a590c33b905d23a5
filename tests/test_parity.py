"""Outputs and gradients against eqx.nn, torch, flax and haiku on random input.

Each library is its own oracle here, with inputs of offset 0, where all are right to a few ulps.
"""

import sys

import equinox as eqx
import flax.linen as linen
import haiku as hk
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from eqx_norms import LayerNorm

ROWS, N = 6, 37


@pytest.fixture
def data(getkey):
    """x, weight, bias, cotangent."""
    x, g = jr.normal(getkey(), (2, ROWS, N))
    weight, bias = jr.normal(getkey(), (2, N))
    return x, weight, bias, g


def run(norm, data):
    """(y, dx, dweight, dbias) of `norm(x, weight, bias)` on a batch."""
    *args, g = data
    y, vjp = jax.vjp(norm, *args)
    return y, *vjp(g)


def ours(eps=1e-5):
    def norm(x, weight, bias):
        layer = eqx.tree_at(lambda m: (m.weight, m.bias), LayerNorm(N, eps), (weight, bias))
        return jax.vmap(layer)(x)

    return norm


def assert_same(got, want):
    # Sums of 37 and of 6 products in float32, each taken in an order of its own.
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=5e-6)


def test_equinox(data):
    def norm(x, weight, bias):
        layer = eqx.tree_at(lambda m: (m.weight, m.bias), eqx.nn.LayerNorm(N), (weight, bias))
        return jax.vmap(layer)(x)

    assert_same(run(ours(), data), run(norm, data))


@pytest.mark.parametrize("fast_variance", (True, False))
def test_flax(data, fast_variance):
    """flax's eps is 1e-6, and its default variance is E[x^2] - E[x]^2."""

    def norm(x, weight, bias):
        layer = linen.LayerNorm(use_fast_variance=fast_variance)
        return layer.apply({"params": {"scale": weight, "bias": bias}}, x)

    with jax.numpy_rank_promotion("allow"):
        want = run(norm, data)
    assert_same(run(ours(eps=1e-6), data), want)


def test_haiku(data):
    def norm(x, weight, bias):
        layer = hk.transform(lambda x: hk.LayerNorm(-1, True, True)(x))
        return layer.apply({"layer_norm": {"scale": weight, "offset": bias}}, None, x)

    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        want = run(norm, data)
    assert_same(run(ours(), data), want)


torch_runs_here = pytest.mark.skipif(
    sys.version_info >= (3, 12),
    reason="torch is pinned to a release whose small CPU build is for Python 3.11",
)


@torch_runs_here
def test_torch(data):
    import torch

    x, weight, bias, g = (torch.tensor(np.asarray(a), requires_grad=True) for a in data)
    y = torch.nn.functional.layer_norm(x, (N,), weight, bias)
    y.backward(g.detach())
    want = [a.detach().numpy() for a in (y, x.grad, weight.grad, bias.grad)]
    assert_same(run(ours(), data), want)


@torch_runs_here
def test_torch_normalises_over_the_last_axes(getkey):
    """`normalized_shape` of k sizes: over the last k axes, all at once; those before are mapped."""
    import torch

    x = np.asarray(jr.normal(getkey(), (2, 3, 4)))
    for shape, maps in (((4,), 2), ((3, 4), 1), ((2, 3, 4), 0)):
        norm = LayerNorm(shape)
        for _ in range(maps):
            norm = jax.vmap(norm)
        want = torch.nn.LayerNorm(shape)(torch.tensor(x)).detach().numpy()
        np.testing.assert_allclose(norm(jnp.asarray(x)), want, rtol=1e-5, atol=1e-6)
