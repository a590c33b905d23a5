"""What is known of a value before any input comes: which inputs it may read, and its bounds."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from . import _reads as r
from ._labels import Labels, Mask, jointly, label, mask, one
from ._reads import Reads

# The bounds of a float that may be any finite number. Larger than what any dtype holds, and still
# finite: minus infinity, the usual mask, stays apart from it.
ANY = np.finfo(np.float64).max
# Up to here float64 holds every integer. Larger ones have no bounds but those of their dtype.
WHOLE = 2.0**53


@dataclasses.dataclass(frozen=True)
class Bounds:
    """Bounds of numbers of one dtype: from minus to plus infinity is what may be NaN besides."""

    dtype: Any
    low: Float[np.ndarray, "..."] | np.float64
    high: Float[np.ndarray, "..."] | np.float64

    @property
    def constant(self) -> np.ndarray:
        """Which are constants, except for the sign of a zero."""
        return np.asarray(self.low == self.high)

    @property
    def zero(self) -> np.ndarray:
        """Which are exactly zero."""
        return np.asarray((self.low == 0) & (self.high == 0))

    @property
    def finite(self) -> np.ndarray:
        """Which are finite numbers."""
        return np.isfinite(self.low) & np.isfinite(self.high)

    @property
    def unsure(self) -> np.ndarray:
        """Which may be NaN."""
        return np.isneginf(self.low) & np.isposinf(self.high)

    def taken(self, which: np.ndarray) -> "Bounds":
        return Bounds(self.dtype, *(np.asarray(end)[which] for end in (self.low, self.high)))


@dataclasses.dataclass(frozen=True)
class Known:
    """What is known of one array of a traced function.

    - `reads`: for each entry the inputs with which it may change; see `_reads`.
    - `labels`: which entries have the same bounds, and `low`, `high`: these, for each label.
    - `value`: the array itself, where it is the same in every compilation: known before any
        input comes, and by no rounding.
    - `assumed`: the same array under the assumption that what meets a mask is small beside it.
        Nobody may look there but what leads to an exponential, and the exponential itself.
    - `rests_on`: of such an array, the names of the meetings that were assumed.
    """

    shape: tuple[int, ...]
    dtype: Any
    reads: Reads
    labels: Labels
    low: Float[np.ndarray, " count"]
    high: Float[np.ndarray, " count"]
    value: Any = None
    assumed: "Known | None" = None
    rests_on: frozenset = frozenset()

    @property
    def bounds(self) -> Bounds:
        """Of each label."""
        return Bounds(self.dtype, self.low, self.high)

    @property
    def finite(self) -> bool:
        """Whether every entry is a finite number."""
        return bool(self.bounds.finite.all())

    @property
    def constant(self) -> bool:
        """Whether every entry is a constant."""
        return bool((self.low == self.high).all())

    @property
    def zero(self) -> Mask | bool:
        """Which entries are exactly zero."""
        return mask(self.labels, self.bounds.zero)

    def entries(self, table: np.ndarray) -> np.ndarray:
        """What a table says of the labels, entry by entry; of a shape that broadcasts."""
        return self.labels.take(table)

    def reading(self, change: Callable[[Reads], Reads]) -> "Known":
        """With other reads, of which `change` makes them: under the assumption as well."""
        assumed = None if self.assumed is None else self.assumed.reading(change)
        return dataclasses.replace(self, reads=change(self.reads), value=None, assumed=assumed)


def known(aval: Any, reads: Reads = None, labels: Labels | None = None, low=None, high=None):
    """An array of the shape and dtype of `aval`; with the bounds of each label, or of its dtype.

    Labels of equal bounds become one.
    """
    if low is None or high is None:
        labels, (low, high) = None, bounds_of(aval.dtype)
    labels = one(len(aval.shape)) if labels is None else labels
    low, high = (np.broadcast_to(end, labels.count).astype(np.float64) for end in (low, high))
    return _known(tuple(aval.shape), aval.dtype, reads, labels, low, high)


def _known(shape, dtype, reads: Reads, labels: Labels, low, high) -> Known:
    labels, low, high = _distinct(labels, low, high)
    value = None
    if reads is not None and 0 in shape:
        reads = None
    if not jnp.issubdtype(dtype, jnp.inexact):
        # Of integers and bools, which are never NaN, a constant reads nothing.
        if reads is not None and (low == high).any():
            reads = r.without(reads, mask(labels, low == high))
        if jnp.issubdtype(dtype, jnp.integer) and (low == high).all():
            value = np.broadcast_to(labels.take(low).astype(dtype), shape)
    return Known(shape, dtype, reads, labels, low, high, value)


def _distinct(labels: Labels, low, high) -> tuple[Labels, np.ndarray, np.ndarray]:
    if labels.count == 1:
        return labels, low, high
    if labels.count == 2:
        if low[0] != low[1] or high[0] != high[1]:
            return labels, low, high
        return one(labels.index.ndim), low[:1], high[:1]
    codes = np.unique(low, return_inverse=True)[1] * (labels.count + 1)
    codes = codes + np.unique(high, return_inverse=True)[1]
    labels, kept = labels.merged(codes)
    return labels, low[kept], high[kept]


def free(shape: tuple[int, ...], dtype: Any, reads: Reads = None) -> Known:
    """An array of which nothing is known but what it reads."""
    return _uniform(shape, dtype, reads, *bounds_of(dtype))


def unknown(shape: tuple[int, ...], dtype: Any, reads: Reads = None) -> Known:
    """An array that may hold anything, NaN and infinities as well."""
    if not jnp.issubdtype(dtype, jnp.inexact):
        return free(shape, dtype, reads)
    return _uniform(shape, dtype, reads, -np.inf, np.inf)


def _uniform(shape, dtype, reads: Reads, low: float, high: float) -> Known:
    reads = None if 0 in shape else reads
    return Known(tuple(shape), dtype, reads, one(len(shape)), np.array([low]), np.array([high]))


def constant(value: Any) -> Known:
    """An array that is there before any input comes."""
    shape, dtype = jnp.shape(value), jnp.result_type(value)
    if not is_real(dtype):
        key = jnp.issubdtype(dtype, jax.dtypes.extended)
        finite = key or np.isfinite(np.asarray(value)).all()
        return dataclasses.replace((free if finite else unknown)(shape, dtype), value=value)
    labels, numbers = _labelled(np.asarray(value))
    low = high = numbers
    if jnp.issubdtype(dtype, jnp.integer):
        large = np.abs(numbers) > WHOLE
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
        low, high = np.where(nan, -np.inf, low), np.where(nan, np.inf, high)
    labels, low, high = _distinct(labels, low, high)
    return Known(tuple(shape), dtype, None, labels, low, high, value)


def _labelled(values: np.ndarray) -> tuple[Labels, Float[np.ndarray, " count"]]:
    """The distinct numbers in an array, as float64."""
    if 0 in values.strides:
        values = values[tuple(slice(None) if n else slice(1) for n in values.strides)]
    if values.dtype == bool:
        labels, kept = label(values.view(np.uint8))
        return labels, kept.astype(np.float64)
    if values.size < 2:
        number = values.reshape(-1) if values.size else np.zeros(1)
        return one(values.ndim), number.astype(np.float64)
    if values.dtype.kind not in "iuf":  # NumPy knows no bfloat16
        values = values.astype(np.float64)
    few = np.unique(values.reshape(-1)[:: max(1, values.size // 64)])
    if len(few) <= 8 < values.size:
        codes = np.zeros(values.shape, np.uint8)
        for code, number in enumerate(few):
            codes[values == number] = code + 1
        if codes.all():
            labels, kept = label(codes)
            return labels, few[kept - 1].astype(np.float64)
    if values.dtype.kind in "iu":
        start, end = int(values.min()), int(values.max())
        if end - start < 4 * values.size + 2**16 and max(-start, end) < WHOLE:
            wide = values if values.dtype.itemsize > 2 else values.astype(np.int32)
            labels, kept = label(wide - wide.dtype.type(start))
            return labels, (kept + start).astype(np.float64)
    numbers, codes = np.unique(values.astype(np.float64), return_inverse=True)
    labels, kept = label(codes.reshape(values.shape))
    return labels, numbers[kept]


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
    numbers = np.asarray(value)
    with np.errstate(all="ignore"):
        if (np.isfinite(numbers.astype(np.float32)) & (numbers > -large)).all():
            return free(shape, dtype)
    exact = constant(value)
    endless, masks = ~exact.bounds.finite, exact.low <= -large
    held = lambda fixed: _known(
        tuple(shape),
        dtype,
        None,
        exact.labels,
        np.where(fixed, exact.low, -ANY),
        np.where(fixed, exact.high, ANY),
    )
    masked = held(endless | masks) if (masks & ~endless).any() else None
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


def is_real(dtype: Any) -> bool:
    """Whether of real numbers, integers or bools: what has bounds."""
    return not jnp.issubdtype(dtype, jax.dtypes.extended) and not jnp.issubdtype(
        dtype, jnp.complexfloating
    )


# Several arrays together


def together(ndim: int, *parts: Known) -> tuple[Labels, list[Bounds]]:
    """Labels for what is alike in all parts, which broadcast together, and the bounds of each."""
    labels, maps = jointly(*(x.labels.wide(ndim) for x in parts))
    return labels, [x.bounds.taken(i) for x, i in zip(parts, maps, strict=True)]


def all_read(ndim: int, *parts: Known) -> Reads:
    """The inputs that any of the parts, which broadcast together, reads."""
    return r.union(*(r.wide(x.reads, ndim) for x in parts))


def everything(*parts: Known):
    """The inputs that any entry of any part reads, as one row of words."""
    return r.everything(*(x.reads for x in parts))


def also(x: Known, reads: Reads) -> Known:
    """Reads these inputs besides."""
    if reads is None:
        return x
    return _known(x.shape, x.dtype, r.union(x.reads, reads), x.labels, x.low, x.high)


def moved(x: Known, aval: Any, move: Callable[[np.ndarray], np.ndarray], key=None, outside=False):
    """After an operation that only moves entries, to the shape of `aval`.

    `move` is given arrays that broadcast to the shape of x, and may give back such. What comes from
    `outside`, where it puts zeros, may be anything.
    """
    labels, kept = x.labels.moved(move, key, outside)
    low, high = x.low[kept], x.high[kept]
    if outside:
        filled = unknown(aval.shape, aval.dtype)
        low, high = np.where(kept < 0, filled.low, low), np.where(kept < 0, filled.high, high)
    reads = r.moved(x.reads, move, key, outside)
    return _known(tuple(aval.shape), aval.dtype, reads, labels, low, high)


def of_entries(aval: Any, reads: Reads, low: np.ndarray, high: np.ndarray) -> Known:
    """From the bounds entry by entry, of a shape that broadcasts."""
    lows, i = np.unique(low, return_inverse=True)
    highs, j = np.unique(high, return_inverse=True)
    labels, kept = label(i.reshape(low.shape) * len(highs) + j.reshape(low.shape))
    low, high = lows[kept // len(highs)], highs[kept % len(highs)]
    return _known(tuple(aval.shape), aval.dtype, reads, labels, low, high)


def chained(aval: Any, parts: Sequence[Known], axis: int, stacked: bool = False) -> Known:
    """Arrays one behind the other along an axis, or along a new one."""
    shapes = [x.shape for x in parts]
    starts = np.cumsum([0, *(x.labels.count for x in parts)])
    codes = [x.labels.index.astype(np.intp) + s for x, s in zip(parts, starts, strict=False)]
    labels, kept = label(r.chained(codes, shapes, axis, stacked))
    low, high = (np.concatenate([getattr(x, end) for x in parts])[kept] for end in ("low", "high"))
    reads = r.concatenated([x.reads for x in parts], shapes, axis, stacked)
    return _known(tuple(aval.shape), aval.dtype, reads, labels, low, high)


def full(x: Known, table: np.ndarray) -> np.ndarray:
    """What a table says of the labels, entry by entry, at the shape of x."""
    return np.broadcast_to(x.entries(table), x.shape)


def size(x: Known) -> int:
    return math.prod(x.shape)
