"""Which entries of an array are alike, so that what is known of them is said once.

A label is a number for each entry, in an array that broadcasts to the shape of the one it is
about: what is alike along an axis is written once along it. A table beside it says what each label
means. The scores of an attention, millions of them, have two labels then, and an operation on them
is one on tables of two.
"""

import functools
import hashlib
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Integer

# Look-ups of larger arrays go by pieces, for NumPy makes indices of 8 bytes of those of one.
_PIECE = 2**20


class Labels:
    """Numbers from 0 to `count - 1`, each of them used, in the order in which they appear first.

    Along an axis on which nothing depends `index` is of size 1. Two that are equal are one object,
    so that `memo` holds what was made of it before.
    """

    __slots__ = ("__weakref__", "count", "index", "memo")

    def __init__(self, index: Integer[np.ndarray, "..."], count: int):
        self.index, self.count = index, count
        self.memo: dict[Any, Any] = {}

    def take(self, table: np.ndarray) -> np.ndarray:
        """What a table says of each entry, of the shape of `index`."""
        return _through(table, self.index)

    def merged(self, codes: np.ndarray) -> tuple["Labels", np.ndarray]:
        """With one label for all of an equal code; and for each of these one of the old ones."""
        if self.count == 1:
            return self, np.zeros(1, np.intp)
        if codes.dtype == bool:
            numbers = (codes != codes[0]).astype(np.uint8)
            first = np.array([0, numbers.argmax()] if numbers.any() else [0])
        else:
            _, first, where = np.unique(codes, return_index=True, return_inverse=True)
            order = np.argsort(first)
            rank = np.empty_like(order)
            rank[order] = np.arange(len(order))
            numbers, first = rank[where.reshape(-1)].astype(_dtype(len(order))), first[order]
        if len(first) == self.count:
            return self, np.arange(self.count)
        key = numbers.tobytes()
        if key not in self.memo:
            self.memo[key] = label(self.take(numbers))[0]
        return self.memo[key], first

    def reshaped(self, shape: tuple[int, ...]) -> "Labels":
        """With other axes of size 1."""
        if self.count == 1:
            return one(len(shape))
        key = ("reshaped", shape)
        if key not in self.memo:
            self.memo[key] = _interned(self.index.reshape(shape), self.count)
        return self.memo[key]

    def wide(self, ndim: int) -> "Labels":
        """With axes of size 1 in front, as NumPy broadcasts."""
        shape = self.index.shape
        return self if len(shape) == ndim else self.reshaped((1,) * (ndim - len(shape)) + shape)

    def moved(
        self, move: Callable[[np.ndarray], np.ndarray], key: Any = None, outside: bool = False
    ) -> tuple["Labels", np.ndarray]:
        """After an operation that only moves entries; and for each label the old one.

        If entries may come from `outside`, `move` puts zeros there, and their label was -1.
        `key` is the name of the operation, to find the result again.
        """
        key = key and ("moved", key, outside)
        if key is None or key not in self.memo:
            wide = self.index.astype(_dtype(self.count + 1)) + 1 if outside else self.index
            labels, kept = label(np.asarray(move(wide)))
            found = labels, kept - outside
            if key is None or self.count == 1:  # there is one such for all
                return found
            self.memo[key] = found
        return self.memo[key]


_ALL: weakref.WeakValueDictionary[Any, Labels] = weakref.WeakValueDictionary()


@functools.cache
def one(ndim: int) -> Labels:
    """All alike."""
    return Labels(np.zeros((1,) * ndim, np.uint8), 1)


def label(codes: Integer[np.ndarray, "..."]) -> tuple[Labels, Integer[np.ndarray, " count"]]:
    """A label for all of an equal code, and the code of each label."""
    codes = _narrow(codes)
    if codes.size <= 1:
        return one(codes.ndim), codes.reshape(-1).astype(np.intp) if codes.size else _NO_CODE
    flat = np.ascontiguousarray(codes).reshape(-1)
    top = int(flat.max()) + 1
    if top > 4 * flat.size + 2**16:
        kept, flat = np.unique(flat, return_inverse=True)
        found, numbers = label(flat.reshape(codes.shape))
        return found, kept[numbers]
    kept = _by_appearance(flat, top)
    if len(kept) == 1:
        return one(codes.ndim), kept
    if len(kept) == top and (kept == np.arange(top)).all():
        return _interned(flat.reshape(codes.shape).astype(_dtype(top), copy=False), top), kept
    numbers = np.zeros(top, _dtype(len(kept)))
    numbers[kept] = np.arange(len(kept))
    index = _through(numbers, flat).reshape(codes.shape)
    return _interned(index, len(kept)), kept


_NO_CODE = np.zeros(1, np.intp)


def joint(a: Labels, b: Labels) -> tuple[Labels, np.ndarray, np.ndarray]:
    """Labels for what is alike in both, and for each of them its label in `a` and in `b`."""
    if a is b or b.count == 1:
        same = np.arange(a.count)
        return a, same, (same if a is b else np.zeros(a.count, np.intp))
    if a.count == 1:
        return b, np.zeros(b.count, np.intp), np.arange(b.count)
    if b not in a.memo:
        kind = _dtype(a.count * b.count)
        codes = a.index.astype(kind) * kind(b.count) + b.index.astype(kind)
        labels, kept = label(codes)
        a.memo[b] = labels, kept // b.count, kept % b.count
    return a.memo[b]


def jointly(*parts: Labels) -> tuple[Labels, list[np.ndarray]]:
    """The same for any number."""
    labels, maps = parts[0], [np.arange(parts[0].count)]
    for part in parts[1:]:
        labels, before, mine = joint(labels, part)
        maps = [old[before] for old in maps] + [mine]
    return labels, maps


def _dtype(count: int) -> type[np.integer]:
    sizes = ((np.uint8, 8), (np.uint16, 16), (np.int32, 31))
    return next((kind for kind, bits in sizes if count <= 2**bits), np.int64)


def _narrow(codes: np.ndarray) -> np.ndarray:
    """Of size 1 along the axes on which nothing depends."""
    for axis, size in enumerate(codes.shape):
        if size < 2:
            continue
        first = codes[(slice(None),) * axis + (slice(1),)]
        if codes.strides[axis] == 0:
            codes = first
        elif np.array_equal(first, codes[(slice(None),) * axis + (slice(-1, None),)]) and (
            bool((codes == first).all())
        ):
            codes = first
    return codes


def _by_appearance(flat: np.ndarray, top: int) -> np.ndarray:
    """The distinct numbers, in the order in which they come."""
    if top <= 8:
        firsts = [(int((flat == code).argmax()), code) for code in range(top)]
        return np.array([c for i, c in sorted(firsts) if flat[i] == c], np.intp)
    first = np.full(top, flat.size, np.intp)
    for start in reversed(range(0, flat.size, _PIECE)):  # of what comes twice, the last holds
        piece = flat[start : start + _PIECE][::-1]
        first[piece] = np.arange(start + len(piece) - 1, start - 1, -1)
    kept = np.flatnonzero(first < flat.size)
    return kept[np.argsort(first[kept])]


def _through(table: np.ndarray, index: np.ndarray) -> np.ndarray:
    if index.size <= _PIECE:
        return np.asarray(table[index])
    flat, out = index.reshape(-1), np.empty(index.size, table.dtype)
    for start in range(0, index.size, _PIECE):
        piece = slice(start, start + _PIECE)
        out[piece] = table[flat[piece]]
    return out.reshape(index.shape)


def _interned(index: np.ndarray, count: int) -> Labels:
    """The one that there is with these numbers: a copy, because a caller may write into its own."""
    index = np.ascontiguousarray(index)
    data = index.tobytes() if index.nbytes <= 64 else hashlib.blake2b(index.data).digest()
    key = (index.shape, index.dtype.char, data)
    found = _ALL.get(key)
    return _ALL.setdefault(key, Labels(index.copy(), count)) if found is None else found


class Mask(NamedTuple):
    """Some of the entries: of two labels those of `yes`. `True` and `False` are all and none."""

    labels: Labels
    yes: int

    def array(self) -> Bool[np.ndarray, "..."]:
        return self.labels.index == self.yes


def mask(labels: Labels, flags: Bool[np.ndarray, " count"]) -> Mask | bool:
    """The entries whose label has a flag."""
    if flags.all() or not flags.any():
        return bool(flags.all())
    two, kept = labels.merged(flags)
    return Mask(two, int(flags[kept].argmax()))


def mask_of(array: Bool[np.ndarray, "..."]) -> Mask | bool:
    """The entries where an array is true."""
    labels, kept = label(array.view(np.uint8) if array.dtype == bool else array)
    return mask(labels, kept > 0)


def others(where: Mask | bool) -> Mask | bool:
    return Mask(where.labels, 1 - where.yes) if isinstance(where, Mask) else not where


def both(a: Mask | bool, b: Mask | bool) -> Mask | bool:
    if not isinstance(a, Mask):
        return b if a else False
    if not isinstance(b, Mask):
        return a if b else False
    labels, mine, its = joint(a.labels, b.labels)
    return mask(labels, (mine == a.yes) & (its == b.yes))


def moved_mask(where: Mask | bool, move, key=None, outside: bool = False) -> Mask | bool:
    """What comes from outside reads nothing: whether it is among them does not matter."""
    if not isinstance(where, Mask):
        return where
    labels, kept = where.labels.moved(move, key, outside)
    return mask(labels, kept == where.yes)


def any_along(where: Mask, axes: tuple[int, ...]) -> Mask | bool:
    """Whether any of these, along the axes, which stay with size 1."""
    key = ("any", where.yes, axes)
    memo = where.labels.memo
    if key not in memo:
        memo[key] = mask_of(np.asarray(where.array().any(axes, keepdims=True)))
    return memo[key]
