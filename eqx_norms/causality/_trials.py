"""Which edits put a rule to the test."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int, UInt64

from .._real import Integer
from ._edits import Edit

Kind = Literal["causal", "strictly causal", "independent", "reads"]
_ALL_UP_TO = 128
_CHOSEN = 68
_PURE = 4  # of these
_CHUNKS = 36
_EDITS = 144


@dataclasses.dataclass(frozen=True)
class Rule:
    """`allowed[t, j]`: whether output `t` may read input `j`; `required[t, j]`: whether it must.

    Every distinct row that forbids anything can be tested by an edit of all that it forbids. A
    split is the number of such a row: of the first output with it, or for the causal rule of the
    first input that it forbids, which is one more. What differs by `kind` beside that are words.
    """

    kind: Kind
    allowed: Bool[np.ndarray, "T_out T_in"]
    required: Bool[np.ndarray, "T_out T_in"] | None = None

    @functools.cached_property
    def possible(self) -> Int[np.ndarray, " splits"]:
        """Every split."""
        return self.open(np.ones_like(self.allowed))

    def open(self, connected: Bool[np.ndarray, "T_out T_in"]) -> Int[np.ndarray, " splits"]:
        """The splits that are left if only `connected` pairs can leak."""
        reached = {*np.flatnonzero((connected & ~self.allowed).any(1)).tolist()}
        rows = [outputs[0] for outputs in self._groups if not reached.isdisjoint(outputs)]
        return np.array(rows, int) + self._ahead

    def where(self, split: Integer) -> Bool[np.ndarray, " T_in"]:
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

    def choose(
        self,
        splits: Sequence[int] | str,
        rng: np.random.Generator,
        connected: Bool[np.ndarray, "T_out T_in"] | None = None,
    ) -> tuple[int, ...]:
        """The splits to try, in order: all of up to 128 distinct rows, or 68 of more.

        With the pairs that a proof found `connected`, those of them where one is forbidden.
        """
        if isinstance(splits, str):
            if splits != "auto":
                raise ValueError(f'splits must be "auto" or a sequence of integers, got {splits!r}')
            left = self.possible if connected is None else self.open(connected)
            all_of_them = self._are_few or len(left) <= _CHOSEN
            return tuple(map(int, left if all_of_them else spread(left, rng, 1 - self._is_causal)))
        chosen = tuple(sorted({int(split) for split in splits}))
        if not chosen or not set(chosen) <= set(self.possible.tolist()):
            raise ValueError(
                f"splits must be integers from {self.possible[0]} to {self.possible[-1]}, "
                f"got {tuple(splits)}"
            )
        return chosen

    def edits(self, splits: Sequence[int], kinds: int, auto: bool = True) -> Iterator[Edit]:
        """Every split once with a mixed edit, then as many pure ones as the budget allows.

        Of many splits each is edited once, 4 of them purely. `auto`: they were not named.
        """
        chosen = [(split, 0) for split in splits]
        if len(splits) >= _CHOSEN and not self._are_few and auto:
            # The last kind first, as it replaces the more by zero the earlier it splits.
            for i, kind in enumerate(np.linspace(kinds - 1, 1, _PURE).astype(int).tolist()):
                place = (2 * i + 1) * len(splits) // (2 * _PURE)
                chosen[place] = (splits[place], kind)
        else:
            most = _EDITS if self._are_few else _CHOSEN if auto else len(splits) * 17 // 16
            pure = [(split, kind) for kind in range(1, kinds) for split in splits]
            extra = min(max(most - len(splits), 1), len(pure))
            chosen += [pure[i] for i in np.linspace(0, len(pure) - 1, extra).astype(int)]
        for seed, (split, kind) in enumerate(chosen):
            yield Edit(self.where(split), kind, seed)

    @property
    def _is_causal(self) -> bool:
        return self.kind in ("causal", "strictly causal")

    @property
    def _ahead(self) -> int:
        return int(self.kind == "causal")

    @property
    def _are_few(self) -> bool:
        return len(self._groups) <= _ALL_UP_TO

    @functools.cached_property
    def _groups(self) -> list[list[int]]:
        """The outputs of every distinct row."""
        return [*alike(self._packed).values()]

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


def spread(
    possible: Int[np.ndarray, " splits"], rng: np.random.Generator, ahead: int = 0
) -> list[int]:
    """68 of the splits: at powers of two, at the ends of chunks, and where the widest gaps are.

    `ahead` is how far behind a split the border lies that it tests.
    """
    last = int(possible[-1]) + ahead
    powers = [2**i for i in reversed(range(last.bit_length()))][:12]
    # What lies beside a power of two lies beside every smaller one of its multiples.
    beside = [power + step for power in powers[:3] for step in (-1, 1)]
    wanted = np.array([int(possible[0]) + ahead, last, *powers, *beside])
    numbers = possible + ahead
    chosen = dict.fromkeys(wanted[np.isin(wanted, numbers)].tolist())
    chunks = _Chunks(last + 1, [*chosen])
    for _ in range(_CHUNKS):
        best = int(numbers[chunks.gain[numbers].argmax()])
        if chunks.end_at(best):
            chosen[best] = None
    places = np.searchsorted(numbers, [*chosen]).tolist()
    # The rest where the gap is widest, there again the best end of chunks.
    while len(places) < _CHOSEN:
        edges = np.sort([*places, len(possible)])
        widest = np.diff(edges).argmax()
        start, gap = int(edges[widest]), int(edges[widest + 1] - edges[widest])
        low, high = start + max(1, 3 * gap // 8), start + min(gap - 1, 5 * gap // 8)
        gains = chunks.gain[numbers[low : high + 1]]
        places.append(low + int(rng.choice(np.flatnonzero(gains == gains.max()))))
        chunks.end_at(int(numbers[places[-1]]))
    return possible[np.sort(places)].tolist()


class _Chunks:
    """Of each number the `gain`: what the lengths weigh of which no multiple is among the splits.

    A read across the border of two chunks is seen by a split at that border alone, so that a chunk
    of 77 in 1000 positions has 12 such splits of 999. One number ends chunks of every length that
    divides it, so that few end those of many lengths.
    """

    def __init__(self, total: int, splits: Sequence[int]):
        self._hidden = {
            length: _usual(length, total)
            for length in range(2, min(total // 4, 4096) + 1)
            if length <= min(total // 8, 512) or _usual(length, total) > 1
        }
        self.gain = np.zeros(total, int)
        for length, weight in self._hidden.items():
            self.gain[::length] += weight
        for number in splits:
            self.end_at(number)

    def end_at(self, number: int) -> bool:
        """Takes a split; whether it is the first that ends chunks of some length."""
        ends = [length for length in self._hidden if number % length == 0]
        for length in ends:
            self.gain[::length] -= self._hidden.pop(length)
        return bool(ends)


def _usual(length: int, total: int) -> int:
    """How much a chunk of this length weighs: those come first that are round, or divide all."""
    return 1 + sum(length % by == 0 for by in (8, 10, 32, 50)) + 2 * (total % length == 0)
