"""Values inside modules: the attention weights of Equinox, against hand computation."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import normal

from eqx_norms.diagnostics import capture_grads


@pytest.mark.parametrize("heads", [1, 3])
def test_attention_weights_are_the_output_of_the_dropout(heads, x64, getkey):
    """As docs/diagnosis.md says; queries and keys of different number, a mask for each head.

    In float64, sums of six terms of order one: a millionfold of their rounding is allowed.
    """
    model = eqx.nn.MultiheadAttention(heads, 5, 4, 2, 3 * heads, qk_size=3, vo_size=3, key=getkey())
    sizes = (2, 4, 5), (2, 6, 4), (2, 6, 2)
    q, k, v = (normal(getkey(), shape) for shape in sizes)
    mask = normal(getkey(), (heads, 4, 6)) > -0.5
    mask = mask.at[..., 0].set(True)
    cotangent = normal(getkey(), (2, 4, 3 * heads))

    def loss_fn(model, *inputs):
        outs = jax.vmap(lambda q, k, v: model(q, k, v, mask=mask))(*inputs)
        return jnp.sum(outs * cotangent)

    loss, values, grads, _ = capture_grads(loss_fn, model, q, k, v, where=eqx.nn.Dropout)
    split = lambda layer, x: (x @ layer.weight.T).reshape(2, -1, heads, 3)
    projections = model.query_proj, model.key_proj, model.value_proj
    q, k, v = map(split, projections, (q, k, v))
    scores = np.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(3)
    expected = np.exp(np.where(mask, scores, -np.inf))
    expected /= expected.sum(-1, keepdims=True)
    np.testing.assert_allclose(values["dropout"], expected, rtol=0, atol=1e-9)
    of_heads = (cotangent @ model.output_proj.weight).reshape(2, 4, heads, 3)
    slope = np.einsum("bqhd,bkhd->bhqk", of_heads, v)
    np.testing.assert_allclose(grads["dropout"], slope, rtol=0, atol=1e-9)
    np.testing.assert_allclose(loss, np.sum(expected * slope), rtol=1e-9)
