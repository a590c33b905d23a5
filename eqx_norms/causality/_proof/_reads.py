"""Which inputs each entry of an array may read: exact, and not written out entry by entry.

A score of an attention reads what its query reads and what its key reads. That is two terms, each
of which is the same along one axis; and what a mask hides of them is said by the mask. Only a sum
over an axis has to bring a term and its mask together, and there the rows of a mask are runs, as
long as the rule is one of intervals: each a look-up, whatever the length.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, UInt64

from ._labels import (
    Labels,
    Mask,
    any_along,
    both,
    joint,
    label,
    mask_of,
    moved_mask,
    one,
    others,
)


class TooLarge(Exception):
    """The rows of bits would take too much memory: fewer inputs at a time will do."""


# Of words. Up to the first a union is written out, so that few terms are left; beyond the second
# there are too many inputs at a time.
_SMALL = 2**14
_LARGE = 2**26


class Term(NamedTuple):
    """Reads of an array: 64 inputs to a word, a row of them for each label, where the mask says."""

    labels: Labels
    rows: UInt64[np.ndarray, "count words"]
    where: Mask | bool = True

    @property
    def pattern(self) -> tuple[int, ...]:
        return self.labels.index.shape


# The union of all terms; `None` for nothing.
Reads = tuple[Term, ...] | None


def term(labels: Labels, rows: np.ndarray, where: Mask | bool = True) -> Reads:
    """One term, if it reads anything."""
    return (Term(labels, rows, where),) if where is not False and rows.any() else None


def spread(row: UInt64[np.ndarray, " words"] | None, ndim: int) -> Reads:
    """One row at every entry."""
    return None if row is None else term(one(ndim), row[None])


def union(*parts: Reads) -> Reads:
    """What any of these reads, for arrays that broadcast together."""
    parts = tuple(part for part in parts if part is not None)
    if len(parts) < 2:
        return parts[0] if parts else None
    groups: dict = {}
    for t in [t for part in parts for t in part]:
        key = t.pattern, t.where
        groups[key] = _united(groups[key], t) if key in groups else t
    terms = tuple(groups.values())
    return (folded(terms),) if len(terms) > 1 and _is_small(terms) else terms


def _united(a: Term, b: Term) -> Term:
    if a.labels is b.labels:
        return a if a.rows is b.rows else a._replace(rows=a.rows | b.rows)
    labels, i, j = joint(a.labels, b.labels)
    _require_room(labels.count * a.rows.shape[1])
    new = Term(labels, a.rows[i] | b.rows[j], a.where)
    return distinct(new) if labels.count > max(a.labels.count, b.labels.count) else new


def _is_small(terms: Sequence[Term]) -> bool:
    shapes = [t.pattern for t in terms]
    shapes += [t.where.labels.index.shape for t in terms if isinstance(t.where, Mask)]
    return int(np.prod(np.max(shapes, 0))) * terms[0].rows.shape[1] <= _SMALL if shapes[0] else True


def _require_room(words: int) -> None:
    if words > _LARGE:
        raise TooLarge


def folded(terms: Sequence[Term]) -> Term:
    """All terms in one, with no mask. It may have as many labels as entries."""
    parts = []
    for t in terms:
        if isinstance(t.where, Mask):
            labels, i, j = joint(t.labels, t.where.labels)
            _require_room(labels.count * t.rows.shape[1])
            t = Term(labels, np.where((j == t.where.yes)[:, None], t.rows[i], _NOTHING))
        parts.append(distinct(t))
    return functools.reduce(_united, parts)


_NOTHING = np.uint64(0)


def equal(a: Reads, b: Reads) -> bool:
    """Whether these are the same, however they are held."""
    if a is None or b is None:
        return a is b
    mine, its = distinct(folded(a)), distinct(folded(b))
    return mine.labels is its.labels and np.array_equal(mine.rows, its.rows)


def distinct_rows(reads: Reads) -> set[int]:
    """What there is, of 64 inputs at most, as a set of words."""
    return set() if reads is None else set(folded(reads).rows[:, 0].tolist())


def distinct(t: Term) -> Term:
    """With one label for all that read the same."""
    if t.labels.count == 1:
        return t
    factors = _factors(t.rows.shape[1])
    with np.errstate(over="ignore"):
        sums = ((t.rows ^ (t.rows >> np.uint64(29))) * factors).sum(1)
    _, first, where = np.unique(sums, return_index=True, return_inverse=True)
    if len(first) == t.labels.count or not (t.rows == t.rows[first[where]]).all():
        return t
    labels, kept = t.labels.merged(where)
    return t._replace(labels=labels, rows=t.rows[kept])


@functools.cache
def _factors(count: int) -> np.ndarray:
    numbers = np.random.default_rng(0).integers(2**63, size=count, dtype=np.uint64)
    return numbers * np.uint64(2) + np.uint64(1)


def without(reads: Reads, where: Mask | bool) -> Reads:
    """Reading nothing at some entries."""
    keep = others(where)
    if reads is None or keep is True:
        return reads
    parts = [] if keep is False else [_kept(t, keep) for t in reads]
    return union(*((t,) for t in parts if t is not None))


def _kept(t: Term, keep: Mask) -> Term | None:
    where = both(t.where, keep)
    if where is False:
        return None
    t = t._replace(where=where)
    return folded((t,)) if isinstance(where, Mask) and _is_small((t,)) else t


def restricted(reads: Reads, inputs: UInt64[np.ndarray, " words"] | None) -> Reads:
    """Reading only these inputs: none, if `None`."""
    if reads is None or inputs is None:
        return None
    return union(*(term(t.labels, t.rows & inputs, t.where) for t in reads))


def moved(reads: Reads, move: Callable, key=None, outside: bool = False) -> Reads:
    """After an operation that only moves entries; see `Labels.moved`."""
    return reads and union(*(_moved(t, move, key, outside) for t in reads))


def _moved(t: Term, move, key, outside: bool) -> Reads:
    labels, kept = t.labels.moved(move, key, outside)
    rows = t.rows[kept]
    rows = np.where((kept < 0)[:, None], _NOTHING, rows) if outside else rows
    return term(labels, rows, moved_mask(t.where, move, key, outside))


def reshaped(reads: Reads, change: Callable[[tuple[int, ...]], tuple[int, ...]]) -> Reads:
    """With other axes of size 1."""

    def of(labels: Labels) -> Labels:
        return labels.reshaped(change(labels.index.shape))

    def one_term(t: Term) -> Term:
        where = (
            t.where._replace(labels=of(t.where.labels)) if isinstance(t.where, Mask) else t.where
        )
        return Term(of(t.labels), t.rows, where)

    return reads and tuple(map(one_term, reads))


def wide(reads: Reads, ndim: int) -> Reads:
    """With axes of size 1 in front, as NumPy broadcasts."""
    if reads is None or reads[0].labels.index.ndim == ndim:
        return reads
    return reshaped(reads, lambda shape: (1,) * (ndim - len(shape)) + shape)


def everything(*parts: Reads) -> UInt64[np.ndarray, " words"] | None:
    """The inputs that any entry of any part reads."""
    rows = [np.bitwise_or.reduce(_visible(t), 0) for part in parts for t in part or ()]
    return np.bitwise_or.reduce(rows, 0) if rows else None


def _visible(t: Term) -> np.ndarray:
    if not isinstance(t.where, Mask):
        return t.rows
    _, i, j = joint(t.labels, t.where.labels)
    return t.rows[i[j == t.where.yes]]


# Along axes


def reduced(reads: Reads, axes: Sequence[int], keepdims: bool = False) -> Reads:
    """What any entry along the axes reads, each of which has a size."""
    axes = tuple(axes)
    found = reads and union(*((_along(t, axes),) for t in reads))
    if found is None or keepdims:
        return found
    return reshaped(found, lambda shape: tuple(n for i, n in enumerate(shape) if i not in axes))


def _along(t: Term, axes: tuple[int, ...]) -> Term:
    of_rows = tuple(axis for axis in axes if t.pattern[axis] > 1)
    if not isinstance(t.where, Mask):
        return _or_along(t, of_rows)
    of_mask = tuple(axis for axis in axes if t.where.labels.index.shape[axis] > 1)
    shared = tuple(axis for axis in of_rows if axis in of_mask)
    if alone := tuple(axis for axis in of_mask if axis not in shared):
        return _along(t._replace(where=any_along(t.where, alone)), axes)
    if alone := tuple(axis for axis in of_rows if axis not in shared):
        return _along(_or_along(t, alone), axes)
    if not shared:
        return folded((t,)) if isinstance(t.where, Mask) and _is_small((t,)) else t
    return _masked(t, shared)


def _or_along(t: Term, axes: tuple[int, ...]) -> Term:
    if not axes:
        return t
    index = np.moveaxis(t.labels.index, axes, range(-len(axes), 0))
    kept, words = index.shape[: -len(axes)], t.rows.shape[1]
    index = index.reshape(*kept, -1).reshape(-1, int(np.prod([t.pattern[a] for a in axes])))
    _require_room(len(index) * words)
    out = np.empty((len(index), words), np.uint64)
    step = max(1, 2**22 // (index.shape[1] * words))
    for start in range(0, len(index), step):
        piece = slice(start, start + step)
        out[piece] = np.bitwise_or.reduce(t.rows[index[piece]], 1)
    shape = tuple(1 if i in axes else n for i, n in enumerate(t.pattern))
    return _of_rows(out, shape, t.where)


def _of_rows(rows: np.ndarray, shape: tuple[int, ...], where: Mask | bool = True) -> Term:
    """Of one row for each entry, in C order."""
    labels, kept = label(np.arange(len(rows)).reshape(shape))
    return distinct(Term(labels, rows[kept], where))


def _masked(t: Term, shared: tuple[int, ...]) -> Term:
    """The union along the shared axes of what the mask lets through, for each of its rows."""
    assert isinstance(t.where, Mask)
    mine, its = t.pattern, t.where.labels.index.shape
    rest = [axis for axis in range(len(mine)) if axis not in shared]
    batch = [axis for axis in rest if mine[axis] > 1 and its[axis] > 1]
    rows = [axis for axis in rest if its[axis] > 1 and axis not in batch]
    free = [axis for axis in rest if mine[axis] > 1 and axis not in batch]
    size = lambda shape, axes: int(np.prod([shape[axis] for axis in axes], dtype=int))
    nb, nm, nr, nf = size(its, batch), size(its, rows), size(its, shared), size(mine, free)
    order = (*batch, *rows, *shared)
    starts, ends = _runs(t.where, order, nr)
    index = t.labels.index.transpose(*batch, *shared, *free, *_ones(mine, batch, shared, free))
    index = index.reshape(nb, nr, nf)
    words = t.rows.shape[1]
    _require_room(max(nb * nm, nr) * nf * words)
    out = np.zeros((nb, nm, nf, words), np.uint64)
    borders = np.searchsorted(starts, np.arange(nb + 1) * nm * nr)
    for b in range(nb):
        mine_here = slice(borders[b], borders[b + 1])
        first, last = starts[mine_here] - b * nm * nr, ends[mine_here] - b * nm * nr
        _or_runs(t.rows[index[b]], first, last, out[b])
    shape = [*(its[a] for a in batch), *(its[a] for a in rows), *(mine[a] for a in free)]
    places = [*batch, *rows, *free]
    codes = np.arange(nb * nm * nf).reshape(shape)
    codes = codes.transpose(np.argsort(places))
    full = [1] * len(mine)
    for axis, n in zip(places, shape, strict=True):
        full[axis] = n
    labels, kept = label(codes.reshape(full))
    return distinct(Term(labels, out.reshape(-1, words)[kept]))


def _ones(shape, *taken) -> list[int]:
    return [axis for axis in range(len(shape)) if not any(axis in axes for axes in taken)]


def _runs(where: Mask, order: tuple[int, ...], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Where each run of the mask begins and where it ends, row by row, counted through all."""
    key = ("runs", where.yes, order, length)
    memo = where.labels.memo
    if key not in memo:
        array = where.array()
        array = array.transpose(*order, *_ones(array.shape, order)).reshape(-1, length)
        starts, ends = array.copy(), array.copy()
        starts[:, 1:] &= ~array[:, :-1]
        ends[:, :-1] &= ~array[:, 1:]
        memo[key] = np.flatnonzero(starts), np.flatnonzero(ends)
    return memo[key]


def _or_runs(
    rows: UInt64[np.ndarray, "length free words"],
    first: np.ndarray,
    last: np.ndarray,
    out: UInt64[np.ndarray, "m free words"],
) -> None:
    """The union of the rows from `first` to `last`, for each of the runs, into its row of `out`.

    Each is covered by two spans of a power of two, whose unions `rows` become in turn.
    """
    length = len(rows)
    if rows.shape[1] > 1 and (rows == rows[:, :1]).all():
        rows, narrow = rows[:, :1], np.zeros_like(out[:, :1])
        _or_runs(rows, first, last, narrow)
        out |= narrow
        return
    row, first, last = first // length, first % length, last % length
    level = np.frexp(last - first + 1)[1] - 1
    step = max(1, 2**22 // (rows.shape[1] * rows.shape[2]))
    for power in range(int(level.max(initial=-1)) + 1):
        span = 2**power
        if power:
            rows = rows[: -span // 2] | rows[span // 2 :]
        runs = np.flatnonzero(level == power)
        for start in range(0, len(runs), step):
            here = runs[start : start + step]
            found = rows[first[here]] | rows[last[here] - span + 1]
            target, begins = np.unique(row[here], return_index=True)
            out[target] |= np.bitwise_or.reduceat(found, begins, axis=0)


def accumulated(reads: Reads, axis: int, reverse: bool) -> Reads:
    """What any entry before, along the axis, reads, and the entry itself."""
    if reads is None:
        return None
    parts = []
    for t in reads:
        reaches = isinstance(t.where, Mask) and t.where.labels.index.shape[axis] > 1
        if not reaches and t.pattern[axis] == 1:
            parts.append(t)
            continue
        t = folded((t,)) if isinstance(t.where, Mask) else t
        turn = (lambda a: np.flip(a, axis)) if reverse else (lambda a: a)
        shape = t.pattern
        _require_room(t.labels.index.size * t.rows.shape[1])
        rows = turn(np.bitwise_or.accumulate(turn(t.rows[t.labels.index]), axis))
        parts.append(_of_rows(rows.reshape(-1, rows.shape[-1]), shape))
    return union(*((t,) for t in parts))


def concatenated(
    parts: Sequence[Reads], shapes: Sequence[tuple[int, ...]], axis: int, stacked: bool = False
) -> Reads:
    """Of arrays that are put one behind the other along an axis, or along a new one."""
    words = next((t.rows.shape[1] for part in parts for t in part or ()), None)
    if words is None:
        return None
    nothing = np.zeros((1, words), np.uint64)
    found = []
    for k in range(max(len(part or ()) for part in parts)):
        ndim = len(shapes[0])
        blank = Term(one(ndim), nothing)
        terms = [part[k] if part is not None and k < len(part) else blank for part in parts]
        starts = np.cumsum([0, *(len(t.rows) for t in terms[:-1])])
        codes = [t.labels.index.astype(np.intp) + s for t, s in zip(terms, starts, strict=True)]
        labels, kept = label(chained(codes, shapes, axis, stacked))
        where: Mask | bool = True
        if any(isinstance(t.where, Mask) for t in terms):
            masks = [
                t.where.array() if isinstance(t.where, Mask) else np.ones((1,) * ndim, bool)
                for t in terms
            ]
            where = mask_of(chained(masks, shapes, axis, stacked))
        t = Term(labels, np.concatenate([t.rows for t in terms])[kept], where)
        found.append((distinct(t),))
    return union(*found)


def chained(
    arrays: Sequence[np.ndarray],
    shapes: Sequence[tuple[int, ...]],
    axis: int,
    stacked: bool = False,
) -> np.ndarray:
    """Arrays that broadcast to these shapes, behind each other; still of size 1 where all are."""
    size = np.max([a.shape for a in arrays], 0) if arrays[0].ndim else ()
    if stacked:
        return np.stack([np.broadcast_to(a, size) for a in arrays], axis)
    along = lambda shape: tuple(shape[axis] if i == axis else n for i, n in enumerate(size))
    pairs = zip(arrays, shapes, strict=True)
    return np.concatenate([np.broadcast_to(a, along(shape)) for a, shape in pairs], axis)


def dense(reads: Reads, shape: tuple[int, ...]) -> UInt64[np.ndarray, "*shape words"]:
    """Entry by entry."""
    assert reads is not None
    t = folded(reads)
    _require_room(int(np.prod(shape)) * t.rows.shape[1])
    return np.broadcast_to(t.rows[t.labels.index], (*shape, t.rows.shape[1]))


def of_dense(words: UInt64[np.ndarray, "*shape words"]) -> Reads:
    t = _of_rows(np.ascontiguousarray(words).reshape(-1, words.shape[-1]), words.shape[:-1])
    return term(*t)


def packed(bits: np.ndarray) -> np.ndarray:
    """Bits, along the last axis, a multiple of 64 of them, as words of 64."""
    return np.packbits(bits, axis=-1, bitorder="little").view(np.uint64)


def unpacked(words: np.ndarray) -> np.ndarray:
    """Words as single bits, of zeros and ones in uint8."""
    return np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=-1, bitorder="little")


def by_position(reads: Reads, axis: int, length: int) -> Bool[np.ndarray, "T bits"] | None:
    """What any entry reads at each position of an axis."""
    if reads is None:
        return None
    rest = [i for i in range(reads[0].labels.index.ndim) if i != axis]
    found = reduced(reads, rest, keepdims=False)
    return None if found is None else unpacked(dense(found, (length,))) > 0
