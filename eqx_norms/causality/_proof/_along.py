"""Along an axis: reductions, cumulative sums, sorts and transforms."""

import math
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from . import _reads as r
from ._elementwise import outward, within, without
from ._flow import finite_as, rule
from ._known import Bounds, Known, all_read, everything, is_real, known, of_entries
from ._labels import Labels, joint, label

# Of so many labels it is counted how often each comes; of more the bounds are written out.
_FEW = 16


@rule(
    "reduce_sum", "reduce_prod", "reduce_and", "reduce_or", "reduce_xor", "reduce_max", "reduce_min"
)
def _reduce(context, eqn, x):
    """Every entry that is reduced; of a maximum, those that may be the largest."""
    aval, axes, name = eqn.outvars[0].aval, _axes(eqn), eqn.primitive.name
    if 0 in x.shape:
        return [finite_as(aval, None, x)]
    reads = r.reduced(_contenders(x, axes, name).reads, axes)
    bounds = _reduced_bounds(x, axes, name)
    return [finite_as(aval, reads, x) if bounds is None else bounds(aval, reads)]


def _axes(eqn) -> tuple[int, ...]:
    """NumPy's integers, as `vmap` leaves them, included."""
    return tuple(map(int, eqn.params["axes"]))


class _Rows:
    """What is reduced to each entry: how often each label comes."""

    def __init__(self, x: Known, axes: tuple[int, ...]):
        key = ("counts", axes, tuple(x.shape[axis] for axis in axes))
        if key not in x.labels.memo or x.labels.count == 1:
            found = self._counted(x, axes)
            if x.labels.count == 1:
                self.labels, self.counts = found
                return
            x.labels.memo[key] = found
        self.labels, self.counts = x.labels.memo[key]

    @staticmethod
    def _counted(x: Known, axes: tuple[int, ...]) -> tuple[Labels, np.ndarray]:
        """Labels for equal counts, with axes of size 1, and the counts of each."""
        index = x.labels.index
        same = math.prod(x.shape[axis] for axis in axes if index.shape[axis] == 1)
        counts = [(index == k).sum(axes, keepdims=True) for k in range(x.labels.count)]
        rows = np.stack(counts, -1).reshape(-1, x.labels.count)
        distinct, codes = np.unique(rows, axis=0, return_inverse=True)
        labels, kept = label(codes.reshape(counts[0].shape))
        return labels, distinct[kept] * same

    def most(self, table: np.ndarray) -> np.ndarray:
        """The largest of those that come."""
        return np.where(self.counts > 0, table, -np.inf).max(1)

    def total(self, table: np.ndarray) -> np.ndarray:
        with np.errstate(all="ignore"):
            return np.where(self.counts > 0, table * self.counts, 0).sum(1)

    def any(self, flags: np.ndarray) -> np.ndarray:
        return np.asarray(((self.counts > 0) & flags).any(1))


def _contenders(x: Known, axes: tuple[int, ...], name: str) -> Known:
    if (
        x.reads is None
        or name not in ("reduce_max", "reduce_min", "argmax", "argmin")
        or not is_real(x.dtype)
        or x.labels.count == 1
    ):
        return x
    sign = 1 if "max" in name else -1
    low, high = (x.low, x.high) if sign > 0 else (-x.high, -x.low)
    if x.labels.count <= _FEW:
        rows = _Rows(x, axes)
        labels, i, j = joint(x.labels, rows.labels)
        return without(x, labels, high[i] < rows.most(low)[j])
    loses = x.entries(high) < x.entries(low).max(axes, keepdims=True)
    labels, kept = label(loses.view(np.uint8))
    return without(x, labels, kept > 0)


def _reduced_bounds(x: Known, axes: tuple[int, ...], name: str) -> Callable | None:
    """A function of the result's aval and reads."""
    is_sum = name == "reduce_sum" and jnp.issubdtype(x.dtype, jnp.floating)
    if not is_real(x.dtype) or not (is_sum or name in ("reduce_max", "reduce_min")):
        return None
    if x.labels.count > _FEW:
        return _written_out(x, axes, name)
    rows = _Rows(x, axes)
    nan = rows.any(x.bounds.unsure)
    if name == "reduce_max":
        low, high = rows.most(x.low), rows.most(x.high)
    elif name == "reduce_min":
        low, high = -rows.most(-x.low), -rows.most(-x.high)
    else:
        size = rows.total(np.maximum(np.abs(x.low), np.abs(x.high)))
        ends = rows.total(x.low), rows.total(x.high)
        finite = [~rows.any(~np.isfinite(end)) for end in (x.low, x.high)]
        zero = ~rows.any(~x.bounds.zero)
        low, high = _sum_bounds(x, axes, size, ends, finite, zero)
        nan = np.zeros_like(nan)
    labels = rows.labels.reshaped(_left(rows.labels.index.shape, axes))
    low, high = np.where(nan, -np.inf, low), np.where(nan, np.inf, high)
    return lambda aval, reads: known(aval, reads, labels, low, high)


def _left(shape: tuple[int, ...], axes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(n for i, n in enumerate(shape) if i not in axes)


def _written_out(x: Known, axes: tuple[int, ...], name: str) -> Callable:
    low, high = x.entries(x.low), x.entries(x.high)
    if name in ("reduce_max", "reduce_min"):
        pick = np.max if name == "reduce_max" else np.min
        nan = x.entries(x.bounds.unsure).any(axes)
        low, high = np.where(nan, -np.inf, pick(low, axes)), np.where(nan, np.inf, pick(high, axes))
    else:
        same = math.prod(x.shape[axis] for axis in axes if low.shape[axis] == 1)
        with np.errstate(all="ignore"):
            size = np.maximum(np.abs(low), np.abs(high)).sum(axes) * same
            ends = low.sum(axes) * same, high.sum(axes) * same
        finite = [np.isfinite(end).all(axes) for end in (low, high)]
        low, high = _sum_bounds(x, axes, size, ends, finite, x.entries(x.bounds.zero).all(axes))
    return lambda aval, reads: of_entries(aval, reads, low, high)


def _sum_bounds(x: Known, axes: tuple[int, ...], size, ends, finite, zero):
    """Of the sum of the bounds, of their sizes, and where all of them are finite or zero."""
    count = math.prod(x.shape[axis] for axis in axes)
    with np.errstate(all="ignore"):
        slack = size - outward(size, size, x.dtype, max(count, 1))[0]
        ends = ends[0] - slack, ends[1] + slack
    whole = Bounds(x.dtype, *(np.where(end, 0, np.inf) for end in finite))
    return tuple(np.where(zero, 0, end) for end in within(*ends, whole))


@rule("reduce")
def _reduce_by_ones_own(context, eqn, *operands):
    """Whatever the function of two entries is, it is given those along the axes, and the start."""
    arrays, starts = operands[: len(operands) // 2], operands[len(operands) // 2 :]
    axes = tuple(map(int, eqn.params["dimensions"]))
    ndim = len(arrays[0].shape)
    reads = None if 0 in arrays[0].shape else r.reduced(all_read(ndim, *arrays), axes)
    row = r.spread(everything(*starts), ndim - len(axes))
    return [finite_as(v.aval, r.union(reads, row), *operands) for v in eqn.outvars]


@rule("argmax", "argmin")
def _argmax(context, eqn, x):
    axes = _axes(eqn)
    reads = r.reduced(_contenders(x, axes, eqn.primitive.name).reads, axes)
    aval = eqn.outvars[0].aval
    return [known(aval, reads, None, 0, x.shape[axes[0]] - 1)]


@rule("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp")
def _cumulative(context, eqn, x):
    """What came before, along the axis."""
    reads = r.accumulated(x.reads, eqn.params["axis"], eqn.params["reverse"])
    return [finite_as(eqn.outvars[0].aval, reads, x)]


_ALONG: dict[str, Callable[[dict], tuple[int, ...]]] = {
    "sort": lambda p: (p["dimension"],),
    "top_k": lambda p: (p.get("axis", -1),),
    "approx_top_k": lambda p: (p["reduction_dimension"],),
    "fft": lambda p: tuple(range(-len(p["fft_lengths"]), 0)),
}


@rule(*_ALONG)
def _along(context, eqn, *operands):
    """All along an axis, or the axes, of all operands."""
    ndim = len(operands[0].shape)
    axes = tuple(axis % ndim for axis in _ALONG[eqn.primitive.name](eqn.params))
    reads = r.reduced(all_read(ndim, *operands), axes, keepdims=True)
    return [finite_as(var.aval, reads, *operands) for var in eqn.outvars]
