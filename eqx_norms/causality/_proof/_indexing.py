"""Entries that only move: to places that the shape says, or an index that is known, or any."""

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ..._real import Integer
from . import _reads as r
from ._flow import finite_as, rule
from ._known import (
    Known,
    also,
    chained,
    everything,
    full,
    known,
    moved,
    of_entries,
    size,
)
from ._labels import joint, label, mask_of, others


def _aligned(old: tuple[int, ...], new: tuple[int, ...]):
    """Which axes of a reshape make which: pairs of ranges of axes with as many entries."""
    i = j = 0
    while i < len(old) or j < len(new):
        a, b, start, begin = 1, 1, i, j
        while (i == start and j == begin) or a != b:
            if a <= b and i < len(old):
                a, i = a * old[i], i + 1
            else:
                b, j = b * new[j], j + 1
        yield (start, i), (begin, j)


def _reshape(array: np.ndarray, old: tuple[int, ...], new: tuple[int, ...]) -> np.ndarray:
    """Of an array that broadcasts to `old`: what is the same along axes stays so."""
    if 0 in old:
        return np.zeros((1,) * len(new), array.dtype)
    full, small = list(array.shape), []
    for (i, k), (j, m) in _aligned(old, new):
        same = all(n == 1 for n in array.shape[i:k])
        small += [1] * (m - j) if same else new[j:m]
        if not same:
            full[i:k] = old[i:k]
    return np.broadcast_to(array, full).reshape(small)


def _slices(a: np.ndarray, p: dict) -> np.ndarray:
    strides = p["strides"] or [1] * a.ndim
    ranges = zip(p["start_indices"], p["limit_indices"], strides, strict=True)
    return a[
        tuple(slice(None) if n == 1 else slice(*s) for n, s in zip(a.shape, ranges, strict=True))
    ]


def _broadcast_in_dim(a: np.ndarray, p: dict) -> np.ndarray:
    new = [i for i in range(len(p["shape"])) if i not in p["broadcast_dimensions"]]
    return np.expand_dims(a, new)


def _tiled(a: np.ndarray, p: dict) -> np.ndarray:
    return np.tile(a, [1 if n == 1 else k for n, k in zip(a.shape, p["reps"], strict=True)])


# Of arrays that broadcast to the shape of the operand.
SHAPE_MOVES: dict[str, Callable] = {
    "reshape": lambda a, p, shape: _reshape(a, shape, p["new_sizes"]),
    "squeeze": lambda a, p, shape: a.squeeze(p["dimensions"]),
    "tile": lambda a, p, shape: _tiled(a, p),
    "transpose": lambda a, p, shape: a.transpose(p["permutation"]),
    "rev": lambda a, p, shape: np.flip(a, p["dimensions"]),
    "slice": lambda a, p, shape: _slices(a, p),
    "broadcast_in_dim": lambda a, p, shape: _broadcast_in_dim(a, p),
}


MOVES = (
    *SHAPE_MOVES,
    *"concatenate dynamic_slice dynamic_update_slice gather pad split stack unstack".split(),
)


@rule(*SHAPE_MOVES)
def _move(context, eqn, x, *_):
    name, params = eqn.primitive.name, eqn.params
    key = (name, x.shape, *(tuple(v) for v in params.values() if isinstance(v, tuple | list)))
    move = lambda a: SHAPE_MOVES[name](a, params, x.shape)
    return [moved(x, eqn.outvars[0].aval, move, key)]


@rule("concatenate")
def _concatenate(context, eqn, *operands):
    return [chained(eqn.outvars[0].aval, operands, eqn.params["dimension"])]


@rule("stack")
def _stack(context, eqn, *operands):
    return [chained(eqn.outvars[0].aval, operands, eqn.params["axis"], stacked=True)]


@rule("unstack")
def _unstack(context, eqn, x):
    axis = eqn.params["axis"]
    take = lambda a, i: a.take(i if a.shape[axis] > 1 else 0, axis)
    results = enumerate(eqn.outvars)
    return [moved(x, v.aval, functools.partial(take, i=i)) for i, v in results]


@rule("split")
def _split(context, eqn, x):
    axis, borders = eqn.params["axis"], np.cumsum([0, *eqn.params["sizes"]])
    results = []
    for v, start, end in zip(eqn.outvars, borders[:-1], borders[1:], strict=True):
        part = slice(None if start == end else start, None if start == end else end)
        cut = (slice(None),) * axis + (part,)
        results.append(moved(x, v.aval, lambda a, cut=cut: a[cut] if a.shape[axis] > 1 else a))
    return results


def _bind(eqn, *args, **changed) -> np.ndarray:
    params = eqn.primitive.get_bind_params({**eqn.params, **changed})
    return np.asarray(eqn.primitive.bind(*map(jnp.asarray, args), **params))


def _by_source(x: Known, aval, sources: np.ndarray) -> Known:
    """Each entry is that in this place of x, counted through; or, at -1, one from outside."""
    outside = bool((sources < 0).any())

    def move(a):
        flat = np.broadcast_to(a, x.shape).reshape(-1)
        if not flat.size:
            return np.zeros(sources.shape, a.dtype)
        found = flat[sources]
        return np.where(sources < 0, 0, found) if outside else found

    return moved(x, aval, move, outside=outside)


def _numbers(x: Known) -> np.ndarray:
    """The places of all entries."""
    return np.arange(size(x), dtype=np.int32).reshape(x.shape)


@rule("pad")
def _pad(context, eqn, x, padding):
    sources = _bind(eqn, _numbers(x), np.int32(-1))
    aval = eqn.outvars[0].aval
    return [_over(aval, _by_source(x, aval, sources), sources >= 0, padding)]


def _over(aval, x: Known, where: np.ndarray, other: Known) -> Known:
    """X at some entries, and elsewhere another array that broadcasts to it."""
    chosen = mask_of(where)
    if chosen is True:
        return x
    ndim = len(aval.shape)
    first = r.without(x.reads, others(chosen))
    second = r.without(r.wide(other.reads, ndim), chosen)
    labels, i, j = joint(x.labels, other.labels.wide(ndim))
    if chosen is False:
        low, high = other.low[j], other.high[j]
    else:
        labels, k, m = joint(labels, chosen.labels)
        mine = m == chosen.yes
        low, high = (
            np.where(mine, getattr(x, end)[i[k]], getattr(other, end)[j[k]])
            for end in ("low", "high")
        )
    return known(aval, r.union(first, second), labels, low, high)


@rule("dynamic_slice")
def _dynamic_slice(context, eqn, x, *starts):
    """Where an index along an axis is not a constant, every entry along it may be meant."""
    aval = eqn.outvars[0].aval
    fixed = [_settled(start) for start in starts]
    x = _any_along(x, [axis for axis, ok in enumerate(fixed) if not ok])
    places = [
        _start(s, n, m) if ok else 0
        for s, ok, n, m in zip(starts, fixed, x.shape, aval.shape, strict=True)
    ]
    cuts = [slice(place, place + n) for place, n in zip(places, aval.shape, strict=True)]
    cut = lambda a: a[
        tuple(s if n > 1 else slice(None) for s, n in zip(cuts, a.shape, strict=True))
    ]
    row = r.spread(everything(*starts), len(aval.shape))
    return [also(moved(x, aval, cut), row)]


def _start(start: Known, length: int, size: int) -> int:
    """Where a slice of this size begins: inside, as XLA has it."""
    return min(max(int(start.low[0]), 0), length - size)


@rule("dynamic_update_slice")
def _dynamic_update_slice(context, eqn, x, update, *starts):
    """Where a start along an axis is not a constant, the update may lie anywhere along it, beside
    what was there; along one that it fills there is one place for it.
    """
    aval, ndim = eqn.outvars[0].aval, len(x.shape)
    whole = [n == m for n, m in zip(x.shape, update.shape, strict=True)]
    unknown = [i for i, s in enumerate(starts) if not (whole[i] or _settled(s))]
    row = everything(*(starts[i] for i in unknown))
    update = _any_along(also(update, r.spread(row, ndim)), unknown)
    ends = zip(starts, x.shape, update.shape, strict=True)
    places = [0 if i in unknown else _start(*args) for i, args in enumerate(ends)]
    spot = tuple(slice(p, p + n) for p, n in zip(places, update.shape, strict=True))
    alike = [w or i in unknown for i, w in enumerate(whole)]

    def move(a):
        """What is put there, among zeros; still of size 1 where it is the same along an axis."""
        out = np.zeros([n if w else m for n, m, w in zip(a.shape, x.shape, alike, strict=True)])
        out = out.astype(a.dtype)
        out[tuple(slice(None) if w else s for s, w in zip(spot, alike, strict=True))] = a
        return out

    key = "put", x.shape, update.shape, *places, *unknown
    put = moved(update, aval, move, key, outside=True)
    if unknown:
        return [finite_as(aval, r.union(x.reads, put.reads), x, update)]
    return [_over(aval, put, move(np.ones((1,) * ndim, bool)), x)]


def _settled(index: Known) -> bool:
    """Whether an index is known, and means the same to every compiler: those of XLA take a large
    unsigned one for a negative number in one place and not in the other.
    """
    return bool(_means_one(index).all())


def _means_one(index: Known) -> np.ndarray:
    """The same of each label."""
    return index.bounds.constant & (index.high <= largest_index(index.dtype))


def largest_index(dtype) -> int:
    """That of the signed integers of this size, of 32 bits at most."""
    return 2 ** min(8 * np.dtype(dtype).itemsize - 1, 31) - 1


def _any_along(x: Known, axes: Sequence[int]) -> Known:
    """Every entry along the axes reads what any of them reads."""
    if not axes or 0 in x.shape:
        return x
    reads = r.reduced(x.reads, axes, keepdims=True)
    low = x.entries(x.low).min(tuple(axes), keepdims=True)
    high = x.entries(x.high).max(tuple(axes), keepdims=True)
    return of_entries(x, reads, low, high)


@rule("gather")
def _gather(context, eqn, x, indices):
    """Along an axis whose index is not a constant, all entries; the rows of the index besides."""
    aval, dims = eqn.outvars[0].aval, eqn.params["dimension_numbers"]
    places, unknown = _places(indices, dims.start_index_map)
    sources = _bind(eqn, _numbers(x), places, fill_value=-1)
    out = _by_source(_any_along(x, unknown), aval, sources)
    if unknown and "FILL" in str(eqn.params["mode"]):
        # With NaN, or with the largest integer; a NaN that depends on the input is excepted.
        out = finite_as(aval, out.reads, out)
    rows = r.reduced(indices.reads, [len(indices.shape) - 1])
    return [also(out, r.reshaped(rows, lambda shape: _with_axes(shape, dims.offset_dims)))]


def _places(indices: Known, axes: Sequence[Integer]) -> tuple[np.ndarray, list[int]]:
    """What the indices are, 0 along the axes for which they are no constants; and these axes."""
    constant = full(indices, _means_one(indices))
    settled = np.ravel(constant.all(tuple(range(constant.ndim - 1))))
    places = np.where(settled, full(indices, indices.low), 0).astype(indices.dtype)
    return places, [int(axis) for axis, fixed in zip(axes, settled, strict=True) if not fixed]


@rule("scatter", "scatter_add", "scatter_mul", "scatter_min", "scatter_max", "scatter_sub")
def _scatter(context, eqn, x, indices, updates):
    """Where an update lands is asked of the gather that is its transpose. Along an axis for which
    the index is not a constant that may be anywhere, and the row of the index is read.
    """
    dims = eqn.params["dimension_numbers"]
    places, unknown = _places(indices, dims.scatter_dims_to_operand_dims)
    window = _window(eqn, len(x.shape), updates.shape)
    shape = tuple(window[i] if i in unknown else n for i, n in enumerate(x.shape))
    landing = _landing(eqn, shape, places, updates.shape).reshape(-1)
    inside = np.flatnonzero(landing >= 0)
    targets = landing[inside]
    reads, put = x.reads, updates.reads
    overwrites = eqn.primitive.name == "scatter" and eqn.params["update_jaxpr"] is None
    if unknown:
        rows = r.reduced(indices.reads, [len(indices.shape) - 1])
        put = r.union(put, r.reshaped(rows, lambda n: _with_axes(n, dims.update_window_dims)))
    elif overwrites:
        overwritten = np.zeros(size(x), bool)
        overwritten[targets] = True
        reads = r.without(reads, mask_of(overwritten.reshape(x.shape)))
    if put is not None and len(targets):
        rows = r.dense(put, updates.shape).reshape(size(updates), -1)[inside]
        order = np.argsort(targets, kind="stable")
        hit, first = np.unique(targets[order], return_index=True)
        rows = np.bitwise_or.reduceat(rows[order], first, axis=0)
        codes = np.zeros(math.prod(shape), np.intp)
        codes[hit] = 1 + np.arange(len(hit))
        labels, kept = label(codes.reshape(shape))
        rows = np.concatenate([np.zeros_like(rows[:1]), rows])[kept]
        reads = r.union(reads, r.reduced(r.term(labels, rows), unknown, keepdims=True))
    out = finite_as(eqn.outvars[0].aval, reads, x, updates)
    return [out if unknown else _elsewhere(out, x, targets, updates, inside, overwrites)]


def _elsewhere(out: Known, x: Known, targets, updates: Known, inside, overwrites: bool) -> Known:
    """With the bounds that x has where no update lands, and there, if it overwrites and is the only
    one, those of the update.
    """
    sources = np.full(x.shape, -1)
    sources.flat[targets] = inside
    there = _over(out, out, sources >= 0, x)
    if overwrites and len(np.unique(targets)) == len(targets):
        there = _over(out, _by_source(updates, out, sources), sources >= 0, x)
    return known(out, out.reads, there.labels, there.low, there.high)


def _with_axes(shape: tuple[int, ...], axes: Sequence[Integer]) -> tuple[int, ...]:
    return np.expand_dims(np.empty(shape, bool), tuple(axes)).shape


def _window(eqn, ndim: int, updates: Sequence[int]) -> tuple[int, ...]:
    """How much an update covers along each axis of what it is put into."""
    dims = eqn.params["dimension_numbers"]
    single = {*dims.inserted_window_dims, *dims.operand_batching_dims}
    sizes = iter(updates[i] for i in dims.update_window_dims)
    return tuple(1 if axis in single else next(sizes) for axis in range(ndim))


def _landing(eqn, shape: Sequence[int], indices: np.ndarray, updates: Sequence[int]) -> np.ndarray:
    """The place in an array of this shape of each entry of the updates; -1 outside."""
    dims = eqn.params["dimension_numbers"]
    landing = jax.lax.gather(
        jnp.arange(math.prod(shape), dtype=jnp.int32).reshape(shape),
        jnp.asarray(indices),
        jax.lax.GatherDimensionNumbers(
            offset_dims=dims.update_window_dims,
            collapsed_slice_dims=dims.inserted_window_dims,
            start_index_map=dims.scatter_dims_to_operand_dims,
            operand_batching_dims=dims.operand_batching_dims,
            start_indices_batching_dims=dims.scatter_indices_batching_dims,
        ),
        slice_sizes=_window(eqn, len(shape), updates),
        mode="clip" if "CLIP" in str(eqn.params["mode"]) else "fill",
        fill_value=-1,
    )
    return np.asarray(landing)


def order_matters(eqn, x: np.ndarray, indices: np.ndarray, updates: np.ndarray) -> bool:
    """Whether what a scatter of constants gives is left to the compiler: where updates that were
    said not to meet do, or one that is not equal to another may overwrite it or be overwritten.
    """
    name, unique = eqn.primitive.name, eqn.params["unique_indices"]
    if name != "scatter" and not unique:
        return False
    landing = _landing(eqn, x.shape, indices, updates.shape).reshape(-1)
    order = np.argsort(landing, kind="stable")
    places = landing[order]
    meet = (places[1:] == places[:-1]) & (places[1:] >= 0)
    if not unique:
        numbers = np.ascontiguousarray(updates).reshape(-1)[order]
        bits = numbers.view(np.uint8).reshape(len(numbers), updates.dtype.itemsize)
        meet &= (bits[1:] != bits[:-1]).any(1)
    return bool(meet.any())
