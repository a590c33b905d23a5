"""AdaLayerNorm against eqx.nn: a LayerNorm without parameters, and a Linear on the condition."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import normal
from oracles import assert_alike, ulps
from refused import refused

from eqx_norms import AdaLayerNorm, layer_norm

SHAPE, COND = (3, 4), 5


@pytest.fixture
def trained(x64, getkey):
    """As after training: the linear map is no longer zero."""
    layer = AdaLayerNorm(SHAPE, COND, key=getkey())
    linear = eqx.nn.Linear(COND, 24, key=getkey())
    return eqx.tree_at(lambda m: m.linear, layer, linear)


def reference(layer, x, cond):
    scale, shift = jnp.split(layer.linear(cond), 2)
    norm = eqx.nn.LayerNorm(SHAPE, layer.eps, use_weight=False, use_bias=False)
    return norm(x) * (1 + scale.reshape(SHAPE)) + shift.reshape(SHAPE)


def assert_same(a, b):
    """Float64; small variances may magnify its rounding, 2e-16, some ten thousand times."""
    np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9 * np.abs(b).max())


@pytest.mark.slow
def test_starts_as_a_layer_norm_whatever_the_condition(getkey):
    layer = AdaLayerNorm(SHAPE, COND, key=getkey())
    x = normal(getkey(), SHAPE)
    for _ in range(2):
        assert_alike(layer(x, normal(getkey(), (COND,))), layer_norm(x), x.size)
    # Zero, but not stuck at zero: the first step moves weight and bias of the linear map.
    grads = eqx.filter_grad(lambda m: jnp.sum(m(x, jnp.ones(COND)) * jnp.cos(x)))(layer)
    assert jnp.abs(grads.linear.weight).min() > 0 and jnp.abs(grads.linear.bias).min() > 0


def test_value_and_gradients(trained, getkey):
    x, g = normal(getkey(), (2, *SHAPE))
    args = trained, x, normal(getkey(), (COND,))
    loss = lambda f: lambda args: jnp.sum(g * f(*args))
    run = lambda f: eqx.filter_jit(eqx.filter_value_and_grad(loss(f)))(args)
    ours, theirs = run(lambda layer, x, cond: layer(x, cond)), run(reference)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert_same(a, b)


@pytest.mark.slow
@pytest.mark.parametrize(
    "in_axes", ((None, 0), (0, 0), pytest.param((0, None), marks=pytest.mark.slow))
)
def test_vmap_over_examples_and_conditions(trained, getkey, in_axes):
    """Weight and bias depend on the example: mapped with x, without x, x without them."""
    batch = lambda shape, axis: normal(getkey(), shape if axis is None else (7, *shape))
    x, cond = batch(SHAPE, in_axes[0]), batch((COND,), in_axes[1])
    g = normal(getkey(), (7, *SHAPE))

    def run(f):
        mapped = lambda m, x, cond: jax.vmap(lambda x, cond: f(m, x, cond), in_axes)(x, cond)
        loss = lambda args: jnp.sum(g * mapped(*args))
        return eqx.filter_jit(lambda args: (mapped(*args), eqx.filter_grad(loss)(args)))(
            (trained, x, cond)
        )

    ours, theirs = run(lambda m, x, cond: m(x, cond)), run(reference)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert_same(a, b)


@pytest.mark.slow
def test_bfloat16_activations_with_a_float32_condition(getkey):
    layer = AdaLayerNorm(SHAPE, COND, key=getkey())
    layer = eqx.tree_at(lambda m: m.linear, layer, eqx.nn.Linear(COND, 24, key=getkey()))
    x, cond = normal(getkey(), SHAPE).astype(jnp.bfloat16), normal(getkey(), (COND,))
    y = layer(x, cond)
    want = reference(layer, x.astype(jnp.float32), cond)
    assert y.dtype == jnp.bfloat16
    # Rounded once, by half an ulp of bfloat16; what cancels, by some ulps of float32.
    atol = 4 * ulps(12) * 2.0**-23 * np.abs(want).max()
    np.testing.assert_allclose(y.astype(jnp.float32), want, rtol=2.0**-8, atol=atol)


def test_bad_input(trained, getkey):
    with refused(ValueError, r"of shape \(5,\); got an array of shape \(2, 5\).*vmap"):
        trained(jnp.ones((2, *SHAPE)), jnp.ones((2, 5)))
    with refused(ValueError, r"jax.vmap\(ada_layer_norm\)\(x\)"):
        trained(jnp.ones((2, *SHAPE)), jnp.ones(5))
    static = eqx.partition(trained, eqx.is_array)[1]
    with refused(ValueError, "made with a linear.weight, which is None now.* eqx.combine"):
        static(jnp.ones(SHAPE), jnp.ones(COND))
    with refused(TypeError, r"cond=.*int32"):
        trained(jnp.ones(SHAPE), jnp.ones(5, jnp.int32))
    with refused(ValueError, r"cond_size=\.\.\.\)` must be 1 or more; got 0"):
        AdaLayerNorm(SHAPE, 0, key=getkey())
