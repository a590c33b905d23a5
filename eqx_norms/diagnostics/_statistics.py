"""Statistics of activations, gradients, weights and updates.

All take floating-point arrays, compute in float32 (float64 for float64 input) and work under
`jax.jit` and `jax.vmap`. `jax.vmap` also gives a statistic for each unit, or for each step. Entries
below the smallest normal number, 1.2e-38 in float32, count as zero if XLA flushes them, as on CPUs.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int, PyTree

from .._largest import largest
from .._processes import fetched
from .._real import Real
from ._mesh import on_any_mesh


class ActivationStats(NamedTuple):
    """What [`eqx_norms.diagnostics.activation_stats`][] returns."""

    mean: Float[Array, ""]
    std: Float[Array, ""]
    rms: Float[Array, ""]
    absmax: Float[Array, ""]
    percentiles: np.ndarray | None


def activation_stats(
    x: Float[ArrayLike, "*shape"], percentiles: tuple[Real, ...] = ()
) -> ActivationStats:
    r"""Mean, spread and size of all entries of an array.

    $$\text{mean} = \frac{1}{n} \sum_i x_i, \quad
    \text{std} = \sqrt{\frac{1}{n} \sum_i (x_i - \text{mean})^2},$$

    $$\text{rms} = \sqrt{\frac{1}{n} \sum_i x_i^2}, \quad
    \text{absmax} = \max_i \lvert x_i \rvert.$$

    Neither a large offset nor large entries spoil them. The array is scaled by a power of two
    before it is squared, and the error of its mean is removed from its variance.

    **Arguments:**

    - `x`: activations, gradients or weights, in any unit; the statistics are in the same.
    - `percentiles`: numbers from 0 to 100. `(16, 50, 84)` is the median and one standard deviation
        to either side, if `x` is normal. They are interpolated linearly, as in `numpy.percentile`.

    **Returns:**

    A named tuple of scalars, and of `percentiles`, a NumPy array with one entry for each of those
    asked for, or `None`. A NaN in `x` makes all of them NaN.

    **Raises:**

    - `TypeError` if `x` is not a floating-point array, `ValueError` if it is empty.
    - `ValueError` for percentiles of a traced array, because XLA sorts for them, which can cost far
        more than the step itself. Take them outside `jax.jit`.
    """
    if percentiles and isinstance(x, jax.core.Tracer):
        raise ValueError(
            "`percentiles` must be taken outside `jax.jit` and `jax.vmap`, but `x` is traced. "
            "Return `x` itself and type `activation_stats(x, percentiles)` outside, or use "
            "`histogram`."
        )
    x = _wide(x)
    absmax = largest(x)
    scale = _power_of_two(absmax)
    u = x / scale
    mean = jnp.mean(u)
    rest = u - mean
    # Rounding leaves a little of the mean in `rest`, which is large beside a small spread.
    variance = jnp.mean(rest**2) - jnp.mean(rest) ** 2
    std = jnp.sqrt(jnp.maximum(variance, 0))
    rms = jnp.sqrt(jnp.mean(u**2))
    bands = np.percentile(fetched(x), percentiles) if percentiles else None
    return ActivationStats(mean * scale, std * scale, rms * scale, absmax, bands)


@on_any_mesh
def histogram(
    x: Float[ArrayLike, "*shape"], edges: Float[ArrayLike, " edges"]
) -> Int[Array, " bins"]:
    r"""Counts the entries of an array between fixed edges.

    $$\text{count}_k = \#\{i : e_k \le x_i < e_{k+1}\},$$

    the last bin with its upper edge, as `numpy.histogram` counts. Fixed edges keep the shape fixed
    in a `jax.lax.scan`, and let histograms be compared and added over steps.

    **Arguments:**

    - `x`: any floating-point array.
    - `edges`: increasing, one more than there are bins, in the unit of `x`.

    **Returns:**

    The counts, int32. What lies outside the edges and what is NaN is not counted:
    `x.size - counts.sum()` says how much that is.

    **Raises:**

    `TypeError` if `x` or `edges` is not floating-point, `ValueError` if `x` is empty, or if
    `edges` is not a vector of at least two.
    """
    x, edges = _wide(x), _wide(edges)
    if edges.ndim != 1 or edges.size < 2:
        raise ValueError(
            f"`edges` must be a vector of at least two, but its shape is {edges.shape}. Type for "
            "instance `jnp.linspace(-3, 3, 61)`."
        )
    dtype = jnp.float64 if jnp.float64 in (x.dtype, edges.dtype) else jnp.float32
    x, edges = x.astype(dtype).ravel(), edges.astype(dtype)
    # Place k is the bin before edge k: the first and the last one hold what lies outside.
    places = jnp.searchsorted(edges, x, side="right")
    counts = jnp.zeros(edges.size + 1, jnp.int32).at[places].add(1)
    return counts[1:-1].at[-1].add(jnp.sum(x == edges[-1], dtype=jnp.int32))


@on_any_mesh
def dead_unit_fraction(
    x: Float[ArrayLike, "*batch units"], threshold: Real = 1e-8, batch_fraction: Real = 0.95
) -> Float[Array, ""]:
    r"""The share of units that are silent on almost all of the batch.

    $$\frac{1}{\text{units}} \#\left\{j : \frac{1}{\text{batch}} \#\{i : |x_{ij}| <
    \text{threshold}\} > \text{batch fraction}\right\}.$$

    ??? cite

        A ReLU that no example activates gets no gradient and stays dead: Maas, Hannun and Ng,
        "Rectifier nonlinearities improve neural network acoustic models", 2013.

    **Arguments:**

    - `x`: the outputs of an activation function, units last.
    - `threshold`: what counts as silent, in the unit of `x`.
    - `batch_fraction`: a unit is dead if it is silent on more than this share of the examples.

    **Returns:**

    A scalar from 0 to 1. A NaN is not silent.

    **Raises:**

    `TypeError` if `x` is not a floating-point array, `ValueError` if it is empty or a single
    example.
    """
    x = _wide(x)
    if x.ndim < 2:
        raise ValueError(
            "`x` must have a batch axis and, last, an axis of units, but its shape is "
            f"{x.shape}. For one unit type `x[:, None]`, for one example `x[None, :]`."
        )
    examples = x.reshape(-1, x.shape[-1])
    silent = jnp.sum(jnp.abs(examples) < threshold, axis=0, dtype=jnp.int32)
    # Counted in whole examples, and rounded first, for .57 * 100 is 56.99999999999999.
    dead = silent > int(round(batch_fraction * examples.shape[0], 6))
    return jnp.mean(dead, dtype=x.dtype)


@on_any_mesh
def saturation_fraction(
    fn: Callable[[Float[Array, ""]], Float[Array, ""]],
    x: Float[ArrayLike, "*shape"],
    slope: Real = 0.1,
) -> Float[Array, ""]:
    r"""The share of entries at which an activation function is almost flat.

    $$\frac{1}{n} \#\{i : |\text{fn}'(x_i)| < \text{slope}\}.$$

    ??? cite

        Glorot and Bengio, "Understanding the difficulty of training deep feedforward neural
        networks", 2010, watch the same in tanh networks.

    **Arguments:**

    - `fn`: an activation function of one number, such as `jnp.tanh`. Its derivative is JAX's.
    - `x`: the inputs of the activation function, not its outputs.
    - `slope`: what counts as flat; a number without unit.

    **Returns:**

    A scalar from 0 to 1. A NaN is not counted as flat.

    **Raises:**

    `TypeError` if `x` is not a floating-point array, `ValueError` if it is empty.
    """
    x = _wide(x)
    slopes = jax.vmap(jax.grad(fn))(x.ravel())
    return jnp.mean(jnp.abs(slopes) < slope, dtype=x.dtype)


def update_ratio(updates: PyTree, params: PyTree) -> PyTree:
    r"""How far a step moves each parameter, relative to its size.

    $$\frac{\lVert \text{update} \rVert_2}{\lVert \text{parameter} \rVert_2},$$

    People plot its base-10 logarithm, and about -3 is a common rule of thumb.

    ??? cite

        The ratio that You, Gitman and Ginsburg hold fixed in "Large batch training of convolutional
        networks", 2017. Karpathy's "makemore, part 3" divides standard deviations. For weights of
        mean zero that is the same; for the weight of a norm, which starts as ones, it is infinite.

    **Arguments:**

    - `updates`: what an optax optimiser returns, including the learning rate. `None` leaves are
        those that do not move.
    - `params`: the parameters before the step, or the whole model.

    **Returns:**

    A pytree like `updates`, a scalar for each leaf. Parameters that are all zero, as biases are
    at first, give infinity, or NaN if they do not move.

    **Raises:**

    `TypeError` if an update or its parameter is not a floating-point array, `ValueError` if it is
    empty or if their shapes differ.
    """

    def ratio(update, param):
        if update is None:
            return None
        if jnp.shape(update) != jnp.shape(param):
            raise ValueError(
                "`updates` and `params` must have the same shapes, but a leaf has "
                f"{jnp.shape(update)} and {jnp.shape(param)}. Type `update_ratio(updates, params)` "
                "with the parameters that the optimiser was given."
            )
        moved, size = activation_stats(update).rms, activation_stats(param).rms
        return moved / size.astype(moved.dtype)

    return jtu.tree_map(ratio, updates, params, is_leaf=lambda leaf: leaf is None)


def singular_value_ratio(x: Float[ArrayLike, "rows columns"]) -> Float[Array, ""]:
    r"""The largest singular value over the sum of all.

    $$\frac{\sigma_1}{\sum_i \sigma_i}.$$

    It says how far a layer's outputs collapse onto one direction. It is 1 if the rows of `x` are
    multiples of one another, and `1 / min(rows, columns)` if all directions weigh the same.

    ??? cite

        The inverse of the intrinsic dimension, trace over norm, of $(x^\top x)^{1/2}$: Tropp, "An
        introduction to matrix concentration inequalities", 2015, definition 7.1.1.

    **Arguments:**

    - `x`: a matrix, such as the outputs of a layer for a batch.

    **Returns:**

    A scalar; NaN for a matrix of zeros.

    **Raises:**

    `TypeError` if `x` is not floating-point, `ValueError` if it is not a matrix or is empty.
    """
    singular = _singular_values(x)
    return singular[0] / jnp.sum(singular)


def stable_rank(x: Float[ArrayLike, "rows columns"]) -> Float[Array, ""]:
    r"""A rank that small singular values hardly change.

    $$\frac{\lVert x \rVert_F^2}{\lVert x \rVert_2^2} = \frac{\sum_i \sigma_i^2}{\sigma_1^2}.$$

    ??? cite

        Rudelson and Vershynin, "Sampling from large matrices: an approach through geometric
        functional analysis", 2007 (there "numerical rank").

    **Arguments:**

    - `x`: a matrix, such as the outputs of a layer for a batch, or a weight.

    **Returns:**

    A scalar from 1 to the rank; NaN for a matrix of zeros.

    **Raises:**

    `TypeError` if `x` is not floating-point, `ValueError` if it is not a matrix or is empty.
    """
    singular = _singular_values(x)
    return jnp.sum((singular / singular[0]) ** 2)


def effective_rank(x: Float[ArrayLike, "rows columns"]) -> Float[Array, ""]:
    r"""The number of equal singular values that would have the same entropy.

    $$\exp\left(-\sum_i p_i \log p_i\right), \quad p_i = \frac{\sigma_i}{\sum_j \sigma_j}.$$

    ??? cite

        Roy and Vetterli, "The effective rank: a measure of effective dimensionality", 2007.

    **Arguments:**

    - `x`: a matrix, such as the outputs of a layer for a batch, or a weight.

    **Returns:**

    A scalar from 1 to the rank; NaN for a matrix of zeros.

    **Raises:**

    `TypeError` if `x` is not floating-point, `ValueError` if it is not a matrix or is empty.
    """
    singular = _singular_values(x)
    p = singular / jnp.sum(singular)
    return jnp.exp(jnp.sum(jax.scipy.special.entr(p)))


@on_any_mesh
def _singular_values(x: Float[ArrayLike, "rows columns"]) -> Float[Array, " values"]:
    """Those of a multiple of `x`, whose squares and sums neither overflow nor underflow."""
    x = _wide(x)
    if x.ndim != 2:
        raise ValueError(
            f"`x` must be a matrix, but its shape is {x.shape}. Type "
            "`x.reshape(-1, x.shape[-1])` to count every leading axis as rows, or `jax.vmap` for "
            "one result each."
        )
    # No statistic depends on the size of `x`, so that its scale is a constant to differentiation.
    scale = _power_of_two(jax.lax.stop_gradient(largest(x)))
    # Of what is not finite LAPACK complains on stderr.
    finite = jnp.isfinite(x).all()
    singular = jnp.linalg.svd(jnp.where(finite, x / scale, 0), compute_uv=False)
    return jnp.where(finite, singular, jnp.nan)


def _wide(x: Float[ArrayLike, "*shape"]) -> Float[Array, "*shape"]:
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(
            f"A statistic must be given a floating-point array, but this one is {x.dtype}. Type "
            "`x.astype(jnp.float32)` if its entries are measurements."
        )
    if x.size == 0:
        raise ValueError(
            f"A statistic must be given at least one entry, but the shape is {x.shape}."
        )
    # Not `jnp.promote_types`, which strict promotion forbids.
    return x.astype(jnp.float64 if x.dtype == jnp.float64 else jnp.float32)


def _power_of_two(size: Float[Array, ""]) -> Float[Array, ""]:
    # The one next to `size`, for dividing by it rounds nothing. XLA multiplies by the inverse,
    # which must be a normal number too.
    limits = jnp.finfo(size.dtype)
    mantissa, _ = jnp.frexp(size)
    normal = jnp.isfinite(size) & (size >= limits.tiny)
    return jnp.where(normal, jnp.minimum(size / (2 * mantissa), 2.0 ** (limits.maxexp - 2)), 1)
