"""The statistics of one layer's output, of one derivative, of one activation function.

Each takes one array and returns scalars under fixed names, under `jax.jit` and `jax.vmap`: what
`diagnose` shows once can be measured at every step.
"""

import functools as ft
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ._mesh import on_any_mesh
from ._statistics import activation_stats, effective_rank

# The singular values of so many examples say whether a layer's outputs collapse, at a bounded cost.
RANK_EXAMPLES = 256


@on_any_mesh
def layer_statistics(x: Float[Array, "*shape"], unit_axis: int = -1) -> dict[str, Float[Array, ""]]:
    """What one array looks like, in numbers.

    **Arguments:**

    - `x`: activations, of any shape; all axes but one are counted as examples.
    - `unit_axis`: that one, which a convolution has elsewhere than last.

    **Returns:**

    Scalars in float32, or float64 for float64: `mean`, `std`, `rms`, `largest` (in absolute
    value), `non_finite` (the share of entries) and `effective_rank`, of at most `RANK_EXAMPLES`
    examples, drawn at random, always the same. It is NaN where there are not two examples and two
    units.
    """
    mean, std, rms, largest, _ = activation_stats(x)
    examples = as_examples(x, unit_axis)
    return {
        "mean": mean,
        "std": std,
        "rms": rms,
        "largest": largest,
        "non_finite": non_finite(x),
        "effective_rank": _rank(examples).astype(rms.dtype),
    }


@on_any_mesh
def derivative_statistics(
    x: Float[Array, "*shape"], unit_axis: int = -1
) -> dict[str, Float[Array, ""]]:
    """Of a derivative: `rms`, `non_finite`, and `silent`.

    `silent` is the share of units of which the derivative is 0 in every example: whatever comes
    after a unit, nothing comes back to it.
    """
    rms = activation_stats(x).rms
    silent = jnp.all(as_examples(x, unit_axis) == 0, axis=0)
    return {
        "rms": rms,
        "non_finite": non_finite(x),
        "silent": jnp.mean(silent, dtype=rms.dtype),
    }


def non_finite(x: Float[Array, "*shape"]) -> Float[Array, ""]:
    """The share of entries that are infinite or NaN."""
    dtype = jnp.float64 if x.dtype == jnp.float64 else jnp.float32
    return jnp.mean(~jnp.isfinite(x), dtype=dtype)


def is_floating(x: Any) -> bool:
    """Whether `x` is an array of floats that has entries: what these statistics can be taken of."""
    return eqx.is_array(x) and jnp.issubdtype(x.dtype, jnp.floating) and x.size > 0


def each_step(loops: tuple[int, ...], fn: Callable) -> Callable:
    """`fn` of every step, of arrays with an axis in front for each of the loops around."""
    return ft.reduce(lambda f, _: jax.vmap(f), loops, fn)


def as_examples(x: Float[Array, "*shape"], unit_axis: int = -1) -> Float[Array, "examples units"]:
    """A row for each example."""
    x = jnp.moveaxis(jnp.atleast_1d(x), unit_axis, -1)
    return x.reshape(-1, x.shape[-1])


def _rank(examples: Float[Array, "examples units"]) -> Float[Array, ""]:
    if min(examples.shape) < 2:
        return jnp.asarray(jnp.nan)
    if len(examples) > RANK_EXAMPLES:
        examples = examples[drawn_rows(len(examples), RANK_EXAMPLES)]
    return effective_rank(examples)


def drawn_rows(count: int, size: int) -> np.ndarray:
    """The numbers of so many rows at most, always the same, of any layout.

    They are drawn, because a stride may meet the length of an axis that was flattened, and see one
    position of all examples.
    """
    if count <= size:
        return np.arange(count)
    return np.sort(np.random.default_rng(0).choice(count, size, replace=False))
