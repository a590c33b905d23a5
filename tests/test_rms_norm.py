"""RMSNorm where it differs from LayerNorm. Exact: test_normalize.py. Errors: test_layer_norm.py."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import normal
from oracles import assert_alike, ulps

from eqx_norms import LayerNorm, RMSNorm, layer_norm, rms_norm


@pytest.mark.parametrize("scale", (300.0, 60000.0))
def test_float16_above_256_does_not_vanish(scale):
    """Its square is infinite in float16, and 1 / sqrt(inf) is 0: haiku's RMSNorm returns zeros."""
    x = jnp.asarray([1.0, -1.0, 0.5, -0.25], jnp.float16) * jnp.float16(scale)
    y, vjp = jax.vjp(RMSNorm(4), x)
    want = np.float64(x) / np.sqrt((np.float64(x) ** 2).mean())
    # Rounded once, by half an ulp of float16; before that, by some ulps of float32.
    np.testing.assert_allclose(y, want, rtol=2.0**-11 + ulps(4) * 2.0**-23)
    (dx,) = vjp(jnp.ones(4, jnp.float16))
    assert np.isfinite(dx).all() and np.abs(dx).max() > 0.1 / scale


def test_it_is_layer_norm_of_what_has_no_mean(x64, getkey):
    x = normal(getkey(), (9,))
    x = x - x.mean()
    assert_alike(rms_norm(x), layer_norm(x), 9)


@pytest.mark.parametrize("dtype, size", ((jnp.float32, 4), (jnp.bfloat16, 2)))
@pytest.mark.parametrize("layer, scalars", ((RMSNorm, 1), (LayerNorm, 3)))
def test_residuals_are_x_and_a_scalar_an_example(layer, scalars, dtype, size):
    rows, n = 32, 64
    _, vjp = jax.vjp(jax.jit(jax.vmap(layer(n))), jnp.ones((rows, n), dtype))
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(vjp))
    assert held <= rows * (n * size + scalars * 4) + n * 4


@pytest.mark.slow
def test_query_and_key_norm_inside_attention(x64, getkey):
    """A norm for each head, mapped over tokens and heads in eqx.nn's `process_heads`."""
    heads, size, tokens = 2, 4, 5
    attention = eqx.nn.MultiheadAttention(heads, heads * size, key=getkey())
    x, g = normal(getkey(), (2, tokens, heads * size))
    weights = normal(getkey(), (2, size))

    def loss(layer, attention, weights, x):
        norms = [eqx.tree_at(lambda m: m.weight, layer(size), w) for w in weights]

        def process_heads(query, key, value):
            query_norm, key_norm = (jax.vmap(jax.vmap(norm)) for norm in norms)
            return query_norm(query), key_norm(key), value

        return jnp.sum(g * attention(x, x, x, process_heads=process_heads))

    def run(layer):
        f = eqx.filter_jit(eqx.filter_value_and_grad(lambda args: loss(layer, *args)))
        return jax.tree.leaves(f((attention, weights, x)))

    for a, b in zip(run(RMSNorm), run(eqx.nn.RMSNorm), strict=True):
        # Float64; norms of 4 entries and their gradients may magnify its rounding a hundredfold.
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-11 * np.abs(b).max())
