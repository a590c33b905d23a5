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
# Up to here float64 holds every integer. Larger ones have no bounds but those of their dtype.
WHOLE = 2.0**53


@dataclasses.dataclass(frozen=True)
class Known:
    """What is known of one array of a traced function, entry by entry.

    - `reads`: 64 inputs to a word; a bit is set if the entry may change with that input. `None`
        if it changes with none.
    - `low`, `high`: bounds, of a shape that broadcasts to that of the array. Where both are
        equal the entry is a constant, but for the sign of a zero. From minus to plus infinity
        is what may be NaN besides.
    - `value`: the array itself, where it is the same in every compilation: known before any
        input comes, and by no rounding.
    - `assumed`: the same array under the assumption that what meets a mask is small beside it.
        Nobody may look there but what leads to an exponential, and the exponential itself.
    - `rests_on`: of such an array, the names of the meetings that were assumed.
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
    assumed: "Known | None" = None
    rests_on: frozenset = frozenset()

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
    def finite(self) -> np.ndarray | np.bool_:
        """Which entries are finite numbers, of a shape that broadcasts to that of the array."""
        return np.isfinite(self.low) & np.isfinite(self.high)

    @property
    def unsure(self) -> np.ndarray | np.bool_:
        """Which entries may be NaN, likewise."""
        return np.isneginf(self.low) & np.isposinf(self.high)

    def reading(self, change) -> "Known":
        """With other reads, of which `change` makes them: under the assumption as well."""
        assumed = None if self.assumed is None else self.assumed.reading(change)
        return dataclasses.replace(self, reads=change(self.reads), value=None, assumed=assumed)


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
    value = None
    if jnp.issubdtype(aval.dtype, jnp.integer) and (low == high).all():
        value = np.broadcast_to(low, aval.shape).astype(aval.dtype)
    return Known(aval.shape, aval.dtype, reads, low, high, value)


def free(shape: tuple[int, ...], dtype: Any, reads=None) -> Known:
    """An array of which nothing is known but what it reads."""
    low, high = bounds_of(dtype)
    return Known(shape, dtype, reads, np.float64(low), np.float64(high))


def unknown(shape: tuple[int, ...], dtype: Any, reads=None) -> Known:
    """An array that may hold anything, NaN and infinities as well."""
    if not jnp.issubdtype(dtype, jnp.inexact):
        return free(shape, dtype, reads)
    return Known(shape, dtype, reads, np.float64(-np.inf), np.float64(np.inf))


def constant(value: Any) -> Known:
    """An array that is there before any input comes."""
    shape, dtype = jnp.shape(value), jnp.result_type(value)
    if not is_real(dtype):
        key = jnp.issubdtype(dtype, jax.dtypes.extended)
        finite = key or np.isfinite(np.asarray(value)).all()
        return dataclasses.replace((free if finite else unknown)(shape, dtype), value=value)
    numbers = np.asarray(value).astype(np.float64)
    low = high = numbers
    if jnp.issubdtype(dtype, jnp.integer):
        large = np.abs(numbers) > WHOLE
        if large.any():
            least, most = bounds_of(dtype)
            low, high = np.where(large, least, low), np.where(large, most, high)
    elif jnp.issubdtype(dtype, jnp.floating):
        # Whether a subnormal number is flushed to zero, each compilation decides.
        small = (np.abs(numbers) < tiny(dtype)) & (numbers != 0)
        if small.any():
            value = None
            low, high = (
                np.where(small, pick(numbers, 0), numbers) for pick in (np.minimum, np.maximum)
            )
        nan = np.isnan(numbers)
        if nan.any():
            low, high = np.where(nan, -np.inf, low), np.where(nan, np.inf, high)
    if low is high and numbers.size and (numbers == numbers.flat[0]).all():
        low = high = numbers.reshape(-1)[0]
    return Known(shape, dtype, low=low, high=high, value=value)


def parameter(value: Any, large: float) -> Known:
    """An array held by the function: as it is if of integers, any finite values if of floats.

    But for infinities and NaN, which are no finite values. Numbers of `-large` and below are taken
    for masks, by assumption.
    """
    if not jnp.issubdtype(jnp.result_type(value), jnp.inexact):
        return constant(value)
    shape, dtype = jnp.shape(value), jnp.result_type(value)
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return free(shape, dtype)
    numbers = np.asarray(value).astype(np.float64)
    endless, mask = ~np.isfinite(numbers), numbers <= -large
    if not (endless | mask).any():
        return Known(shape, dtype)
    exact = constant(value)
    held = lambda fixed: Known(
        shape, dtype, None, np.where(fixed, exact.low, -ANY), np.where(fixed, exact.high, ANY)
    )
    masked = held(endless | mask) if (mask & ~endless).any() else None
    return dataclasses.replace(held(endless), assumed=masked)


def bounds_of(dtype: Any) -> tuple[float, float]:
    if dtype == jnp.bool_:
        return 0.0, 1.0
    if is_real(dtype) and jnp.issubdtype(dtype, jnp.integer):
        info = jnp.iinfo(dtype)
        return float(info.min), float(info.max)
    return -ANY, ANY


def tiny(dtype: Any) -> float:
    """The smallest normal number."""
    return float(jnp.finfo(dtype).smallest_normal)


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
