"""What is known of a value before any input comes: which inputs it may read, and its bounds."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt64

# The bounds of a float that may be any finite number. Larger than what any dtype holds, and still
# finite: minus infinity, the usual mask, stays apart from it.
ANY = np.finfo(np.float64).max


@dataclasses.dataclass(frozen=True)
class Known:
    """What is known of one array of a traced function, entry by entry.

    - `reads`: 64 inputs to a word; a bit is set if the entry may change with that input. `None`
        if it changes with none.
    - `low`, `high`: bounds, of a shape that broadcasts to that of the array. Where both are
        equal the entry is a constant. A quotient may be NaN besides: then it is either this
        number or NaN, and which of the two is what it reads.
    - `value`: the array itself, where it can be computed before any input comes.
    """

    shape: tuple[int, ...]
    dtype: Any
    reads: UInt64[np.ndarray, "*shape words"] | None = None
    low: Float[np.ndarray, "..."] | np.float64 = dataclasses.field(
        default_factory=lambda: np.float64(-ANY)
    )
    high: Float[np.ndarray, "..."] | np.float64 = dataclasses.field(
        default_factory=lambda: np.float64(ANY)
    )
    value: Any = None

    @property
    def constant(self) -> np.ndarray:
        """Which entries are constants."""
        return np.broadcast_to(self.low == self.high, self.shape)

    @property
    def zero(self) -> np.ndarray | None:
        """Which entries are exactly zero; `None` if no entry is."""
        zero = (self.low == 0) & (self.high == 0)
        return np.broadcast_to(zero, self.shape) if zero.any() else None

    @property
    def bounded(self) -> bool:
        return bool((self.low > -ANY).all() and (self.high < ANY).all())


def known(aval: Any, reads=None, low=None, high=None) -> Known:
    """An array of the shape and dtype of `aval`, with the bounds of its dtype if none are given."""
    if low is None:
        low, high = bounds_of(aval.dtype)
    low, high = np.asarray(low, np.float64), np.asarray(high, np.float64)
    if reads is not None and not jnp.issubdtype(aval.dtype, jnp.inexact) and (low == high).any():
        # Of integers and bools, which are never NaN, a constant reads nothing.
        decided = np.broadcast_to(low == high, aval.shape)
        reads = np.where(decided[..., None], np.uint64(0), reads)
    if reads is not None and not reads.any():
        reads = None
    return Known(aval.shape, aval.dtype, reads, low, high)


def free(shape: tuple[int, ...], dtype: Any, reads=None) -> Known:
    """An array of which nothing is known but what it reads."""
    low, high = bounds_of(dtype)
    return Known(shape, dtype, reads, np.float64(low), np.float64(high))


def constant(value: Any) -> Known:
    """An array that is there before any input comes."""
    shape, dtype = jnp.shape(value), jnp.result_type(value)
    if not is_real(dtype):
        return Known(shape, dtype, value=value)
    numbers = np.asarray(value).astype(np.float64)
    nan = np.isnan(numbers)
    if nan.any():
        low, high = (np.where(nan, side, numbers) for side in (-np.inf, np.inf))
        return Known(shape, dtype, low=low, high=high, value=value)
    if numbers.size and (numbers == numbers.flat[0]).all():
        numbers = numbers.reshape(-1)[0]
    return Known(shape, dtype, low=numbers, high=numbers, value=value)


def parameter(value: Any, large: float) -> Known:
    """An array held by the function: as it is if of integers, any finite values if of floats.

    But for what no parameter is: minus infinity, and numbers of `-large` and below, are masks.
    """
    if not jnp.issubdtype(jnp.result_type(value), jnp.inexact):
        return constant(value)
    shape, dtype = jnp.shape(value), jnp.result_type(value)
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return Known(shape, dtype)
    numbers = np.asarray(value).astype(np.float64)
    mask = numbers <= -large
    if not mask.any():
        return Known(shape, dtype)
    low, high = np.where(mask, numbers, -ANY), np.where(mask, numbers, ANY)
    return Known(shape, dtype, low=low, high=high)


def bounds_of(dtype: Any) -> tuple[float, float]:
    if dtype == jnp.bool_:
        return 0.0, 1.0
    if is_real(dtype) and jnp.issubdtype(dtype, jnp.integer):
        info = jnp.iinfo(dtype)
        return float(info.min), float(info.max)
    return -ANY, ANY


def union(shape: tuple[int, ...], *parts: Known):
    """The inputs that any of the parts, broadcast to `shape`, reads."""
    reads = None
    for part in parts:
        if part.reads is not None:
            if part.shape != shape:
                raise ValueError(f"{part.shape} is not {shape}")
            reads = either(reads, part.reads)
    return reads


def either(a, b):
    """The inputs that `a` or `b` reads, each `None` or words that broadcast together."""
    return b if a is None else a if b is None else a | b


def everything(*parts: Known):
    """The inputs that any entry of any part reads, as one row of words."""
    rows = [
        np.bitwise_or.reduce(p.reads.reshape(-1, p.reads.shape[-1]), 0)
        for p in parts
        if p.reads is not None and p.reads.size
    ]
    return np.bitwise_or.reduce(rows, 0) if rows else None


def spread(row, shape: tuple[int, ...]):
    """One row of words at every entry of `shape`."""
    return None if row is None else np.broadcast_to(row, (*shape, row.shape[-1]))


def packed(bits: np.ndarray) -> np.ndarray:
    """Bits, along the last axis, as words of 64."""
    return np.packbits(bits, axis=-1, bitorder="little").view(np.uint64)


def unpacked(words: np.ndarray) -> np.ndarray:
    """Words as single bits, of zeros and ones in uint8."""
    return np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=-1, bitorder="little")


def is_real(dtype: Any) -> bool:
    """Whether of real numbers, integers or bools: what has bounds."""
    return not jnp.issubdtype(dtype, jax.dtypes.extended) and not jnp.issubdtype(
        dtype, jnp.complexfloating
    )
