"""The mathematics of the kernels, once for all platforms: that of `_normalize.py`, by rows."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._form import Form
from .._normalize import divided

Rows = Float[Array, "rows width"]
Row = Float[Array, "1 width"]
Each = Float[Array, "rows 1"]  # one number for each row
Only = Callable[[Rows], Rows]  # zero beyond the last column


def mean(n: int, a: Rows) -> Each:
    return divided(jnp.sum(a, axis=1, keepdims=True), n)


def scale_of(form: Form, x: Rows) -> Each:
    """A power of two for each row, after which no square of x - mean overflows, or vanishes.

    The largest entry is then between 2**-24 and 2**54, or comes from the smallest that there are.
    So a sum of 2**15 squares is below 2**124; and entries that differ do so by 2**-54 at least, of
    which the mean square, over as many, is above 2**-124. Small ones matter if eps does not swamp
    them.
    """
    # A maximum may lose a NaN: it is in the sums of the row, whatever the scale.
    largest = jnp.max(jnp.abs(x), axis=1, keepdims=True)
    scale = jnp.where(largest > 2.0**50, 2.0**-74, 1.0)
    if form.eps < 2.0**-100:
        scale = jnp.where(largest < 2.0**-20, 2.0**72, scale)
    return scale


def normalised(form: Form, n: int, x: Rows, only: Only) -> tuple[Rows, Each, Each]:
    """`(xhat, rstd, scale)`, of which 1 / sqrt(variance + eps) is the product of the last two.

    Of the largest numbers the product is too small to be had. x is zero where `only` makes it so.
    """
    x = x.astype(jnp.float32)
    scale = scale_of(form, x)
    xc = x * scale
    if form.centre:  # the mean in two parts, as in `_normalize._forward`
        xc = only(xc - mean(n, xc))
        xc = only(xc - mean(n, xc))
    var = mean(n, jnp.square(xc))
    # Where all entries are alike, eps alone is left, which the scale may have made zero.
    alike = var == 0
    rstd = jax.lax.rsqrt(jnp.where(alike, form.eps, var + form.eps * scale * scale))
    return xc * rstd, rstd, jnp.where(alike, 1.0, scale)


def forward(form: Form, n: int, x: Rows, params: list[Row], only: Only) -> Rows:
    weight, bias = form.named(params)
    y, *_ = normalised(form, n, x, only)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def backward(form: Form, n: int, g: Rows, x: Rows, weight: list[Row], only: Only):
    """`(dx, terms)`: what is to be summed over rows for dweight and dbias, as far as there are."""
    xhat, rstd, scale = normalised(form, n, x, only)
    g = g.astype(jnp.float32)
    gw = g * weight[0] if weight else g
    dx = gw - xhat * mean(n, gw * xhat)
    if form.centre:
        dx = dx - mean(n, gw)
    return rstd * dx * scale, [g * xhat] * form.weight + [g] * form.bias


def like(x: Array) -> jax.ShapeDtypeStruct:
    return result(x, x.shape, x.dtype)


def result(x: Array, shape: tuple[int, ...], dtype=jnp.float32) -> jax.ShapeDtypeStruct:
    """One that varies over the axes of `jax.shard_map` as x does."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(x).manual_axis_type)
