"""What a softmax makes of the scores of an attention, in a few numbers: the scores themselves are
larger than all else in a model.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .._mesh import on_any_mesh

_ALONE = 17  # So far ahead of all others, a score has weight 1, in float32.
_MASKED = 50


@on_any_mesh
def of_scores(x: Float[Array, "*shape"], axis: int) -> Float[Array, "*lead 5"]:
    """Of each matrix of scores, the rows of which stand along `axis`, sums over the rows: of the
    variance of the weights; of those that are not finite, in which one score is so far ahead that
    its weight is 1, and that are counted for this. And the largest weight.

    Rows in which a mask leaves but one are not counted: there, the second is a large negative
    number.
    """
    # Nobody differentiates these numbers, of which JAX would trace the derivative all the same.
    x = jax.lax.stop_gradient(jnp.moveaxis(x, axis, -1).astype(jnp.float32))
    top = jnp.max(x, axis=-1)
    powers = jnp.exp(x - top[..., None])
    total = jnp.sum(powers, axis=-1)
    variance = jnp.mean((powers / total[..., None] - 1 / x.shape[-1]) ** 2, axis=-1)
    first = x == top[..., None]
    second = jnp.max(jnp.where(first, -jnp.inf, x), axis=-1)
    alone = (jnp.sum(first, axis=-1) == 1) & (top - second > _ALONE)
    counted = second >= -jnp.maximum(jnp.abs(top), _MASKED)
    rows = [variance, ~jnp.isfinite(total), counted & alone, counted]
    over_rows = -1 if x.ndim > 1 else ()
    sums = [jnp.sum(each.astype(jnp.float32), axis=over_rows) for each in rows]
    return jnp.stack([*sums, jnp.max(1 / total, axis=over_rows)], axis=-1)


def pooled(
    numbers: Float[np.ndarray, "steps *lead 5"], shape: tuple[int, ...], axis: int
) -> dict[str, np.ndarray]:
    """Statistics of all weights in each step, of scores of this shape. Their mean is known."""
    *sums, largest = np.moveaxis(numbers.reshape(len(numbers), -1, 5).astype(float), -1, 0)
    variance, bad, alone, counted = (each.sum(1) for each in sums)
    rows, mean = math.prod(shape) // shape[axis], 1 / shape[axis]
    return {
        "mean": np.where(bad > 0, np.nan, mean),
        "std": np.sqrt(variance / rows),
        "rms": np.sqrt(variance / rows + mean**2),
        "largest": largest.max(1),
        "non_finite": bad / rows,
        "saturated": alone / np.maximum(counted, 1),
    }
