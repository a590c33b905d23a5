"""What a softmax makes of the scores of an attention, in a few numbers: the scores themselves are
larger than all else in a model.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._mesh import on_any_mesh

NAMES: tuple[str, ...] = ("mean", "std", "rms", "largest", "non_finite", "saturated")
_ALONE = 17  # So far ahead of all others, a score has weight 1, in float32.
_MASKED = 50


@on_any_mesh
def of_scores(x: Float[Array, "*shape"], axis: int) -> Float[Array, "6"]:
    """Of the weights, the numbers that `NAMES` has.

    `saturated` is the share of rows in which one score is so far ahead that its weight is 1. Rows
    in which a mask leaves but one are not counted: there, the second is a large negative number.
    """
    # Nobody differentiates these numbers, of which JAX would trace the derivative all the same.
    x = jax.lax.stop_gradient(jnp.moveaxis(x, axis, -1).astype(jnp.float32))
    p = jax.nn.softmax(x, axis=-1)
    mean = jnp.mean(p)
    top = jnp.max(x, axis=-1)
    first = x == top[..., None]
    second = jnp.max(jnp.where(first, -jnp.inf, x), axis=-1)
    alone = (jnp.sum(first, axis=-1) == 1) & (top - second > _ALONE)
    counted = second >= -jnp.maximum(jnp.abs(top), _MASKED)
    share = jnp.sum(counted & alone) / jnp.maximum(jnp.sum(counted), 1)
    std, rms = (jnp.sqrt(jnp.mean(each**2)) for each in (p - mean, p))
    return jnp.stack([mean, std, rms, jnp.max(p), jnp.mean(~jnp.isfinite(p)), share])
