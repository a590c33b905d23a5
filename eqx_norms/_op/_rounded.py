"""Roundings that a compiler may not leave out."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._checks import check_floating
from ._plain import is_plain


def rounded(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The same array, rounded to its dtype even where XLA would keep more digits.

    An operation on bfloat16 is computed in float32 and rounded. Under `jax.jit` XLA leaves out the
    rounding if a norm or a cast to float32 reads the result. So `norm(x + y)`, which is in every
    residual stream, differs from the same without `jax.jit`. `norm(rounded(x + y))` does not. Use
    it for ports that are compared to the last bit. In training, more digits do no harm.

    **Arguments:**

    - `x`: an array of any shape and of dtype float16, bfloat16, float32 or float64.

    **Returns:**

    `x`, rounded to its dtype. In float32, in float64 and in [`eqx_norms.plain`][] it is `x` itself.
    The derivative is the identity.

    **Raises:** `TypeError` if `x` is not of one of these dtypes.
    """
    check_floating("rounded", x)
    x = jnp.asarray(x)
    if x.dtype not in (jnp.bfloat16, jnp.float16) or is_plain():
        return x
    # With float32's exponents in float16 as well: with 5 bits its subnormals would become zero.
    return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=jnp.finfo(x.dtype).nmant)


def rounded_to(dtype: Any, a: Float[Array, "..."]) -> Float[Array, "..."]:
    """The nearest number of `dtype`, if that is not `None`, in the dtype of `a`.

    A tangent is not rounded, but in [`eqx_norms.plain`][] as JAX rounds it.
    """
    if dtype is None or jnp.finfo(dtype).bits >= jnp.finfo(a.dtype).bits:
        return a
    return _there_and_back(dtype, a) if is_plain() else _rounded_to(jnp.dtype(dtype), a)


# In `plain`, where `rounded` is nothing, of operations that `jet` knows.
def _there_and_back(dtype, a):
    return rounded(a.astype(dtype)).astype(a.dtype)


_rounded_to = jax.custom_jvp(_there_and_back, nondiff_argnums=(0,))


@_rounded_to.defjvp
def _rounded_to_jvp(dtype, primals, tangents):
    return _rounded_to(dtype, *primals), tangents[0]
