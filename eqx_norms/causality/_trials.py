"""Which edits put a rule to the test."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int, UInt64

from ._edits import Edit

Kind = Literal["causal", "strictly causal", "independent", "reads"]
_ALL_UP_TO = 128
_CHOSEN = 64
_BORDERS = 32
_EDITS = 144


@dataclasses.dataclass(frozen=True)
class Rule:
    """`allowed[t, j]`: whether output `t` may read input `j`; `required[t, j]`: whether it must.

    Every distinct row that forbids anything can be tested by an edit of all that it forbids. A
    split is the number of such a row: of the first output with it, but for the causal rule of the
    first input that it forbids, which is one more. What differs by `kind` beside that are words.
    """

    kind: Kind
    allowed: Bool[np.ndarray, "T_out T_in"]
    required: Bool[np.ndarray, "T_out T_in"] | None = None

    @functools.cached_property
    def possible(self) -> Int[np.ndarray, " splits"]:
        """Every split."""
        return np.array([t for t in self._rows if not self.allowed[t].all()], int) + self._ahead

    def where(self, split: int) -> Bool[np.ndarray, " T_in"]:
        """The inputs that `split` replaces."""
        return ~self.allowed[split - self._ahead]

    def watch(self, edits: Sequence[Edit]) -> Bool[np.ndarray, "E T_out"]:
        """For every edit, the outputs that must not change: they may read nothing it replaces."""
        return np.stack([self._unread(edit.where) for edit in edits])

    def covered(self, splits: Sequence[int]) -> Float[np.ndarray, "T_out T_in"]:
        """The matrix of a check that found nothing: 0 where `splits` would have shown a leak."""
        where = np.array([self.where(split) for split in splits], bool)
        watch = np.array([self._unread(row) for row in where], bool)
        # For `length` of some 10,000, this and `allowed` are the largest arrays there are: outputs
        # that the same splits watch are filled together, each once.
        matrix = np.full(self.allowed.shape, np.nan, np.float32)
        for column, outputs in alike(watch.T).items():
            seen = where[np.frombuffer(column, bool)].any(0)
            matrix[outputs] = np.where(seen, np.float32(0), np.float32(np.nan))
        return matrix

    def choose(self, splits: Sequence[int] | str, rng: np.random.Generator) -> tuple[int, ...]:
        """The splits to try, in order: all of up to 128 distinct rows, or 64 of more."""
        if isinstance(splits, str):
            if splits != "auto":
                raise ValueError(f'splits must be "auto" or a sequence of integers, got {splits!r}')
            return tuple(map(int, self.possible if self._are_few else spread(self.possible, rng)))
        chosen = tuple(sorted({int(split) for split in splits}))
        if not chosen or not set(chosen) <= set(self.possible.tolist()):
            raise ValueError(
                f"splits must be integers from {self.possible[0]} to {self.possible[-1]}, "
                f"got {tuple(splits)}"
            )
        return chosen

    def edits(self, splits: Sequence[int], kinds: int) -> Iterator[Edit]:
        """Every split once with a mixed edit, then as many pure ones as the budget allows."""
        pure = [(split, kind) for kind in range(1, kinds) for split in splits]
        extra = _EDITS - len(splits) if self._are_few else len(splits) // 16
        picked = np.linspace(0, len(pure) - 1, min(max(extra, 1), len(pure))).astype(int)
        for seed, (split, kind) in enumerate([(s, 0) for s in splits] + [pure[i] for i in picked]):
            yield Edit(self.where(split), kind, seed)

    @property
    def _ahead(self) -> int:
        return int(self.kind == "causal")

    @property
    def _are_few(self) -> bool:
        return len(self._rows) <= _ALL_UP_TO

    @functools.cached_property
    def _rows(self) -> list[int]:
        """The first output of every distinct row."""
        return [outputs[0] for outputs in alike(self._packed).values()]

    @functools.cached_property
    def _packed(self) -> UInt64[np.ndarray, "T_out words"]:
        return _in_words(self.allowed)

    def _unread(self, where: Bool[np.ndarray, " T_in"]) -> Bool[np.ndarray, " T_out"]:
        """The outputs that may read nothing of `where`."""
        row = _in_words(where)
        hit = np.flatnonzero(row)
        return ((self._packed[:, hit] & row[hit]) == 0).all(1)


def _in_words(rows: Bool[np.ndarray, "*rows T"]) -> UInt64[np.ndarray, "*rows words"]:
    """64 entries to a word: the fewer, the faster they are compared."""
    octets = np.packbits(rows, axis=-1)
    missing = [(0, 0)] * (rows.ndim - 1) + [(0, -octets.shape[-1] % 8)]
    return np.pad(octets, missing).view(np.uint64)


def alike(rows: np.ndarray) -> dict[bytes, list[int]]:
    """The distinct rows, and the numbers of those that are the same."""
    found: dict[bytes, list[int]] = {}
    for number, row in enumerate(np.ascontiguousarray(rows)):
        found.setdefault(row.tobytes(), []).append(number)
    return found


def spread(possible: Int[np.ndarray, " splits"], rng: np.random.Generator) -> list[int]:
    """64 of the splits: at and beside powers of two, then where that leaves the widest gap."""
    # Powers of two are where chunks, windows and tables end; the largest first.
    last = int(possible[-1])
    powers = [2**i for i in reversed(range((last + 1).bit_length()))]
    borders = [p + step for p in powers for step in (0, -1, 1)]
    wanted = dict.fromkeys([int(possible[0]), last, *borders])
    known = np.isin([*wanted], possible)
    places = np.searchsorted(possible, np.array([*wanted])[known][:_BORDERS]).tolist()
    # The rest where the gap is widest; not in its middle, or all would be ends of chunks.
    while len(places) < _CHOSEN:
        edges = np.sort([*places, len(possible)])
        widest = np.diff(edges).argmax()
        start, gap = int(edges[widest]), int(edges[widest + 1] - edges[widest])
        low, high = max(1, 3 * gap // 8), min(gap - 1, 5 * gap // 8)
        places.append(start + int(rng.integers(low, high + 1)))
    return possible[np.sort(places)].tolist()
