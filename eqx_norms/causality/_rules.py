"""Who may read whom, and which edits put that to the test."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float

from ._edits import Edit

Kind = Literal["causal", "strictly causal", "independent"]
_ALL_UP_TO = 128
_CHOSEN = 64
_BORDERS = 32
_EDITS = 144


@dataclasses.dataclass(frozen=True)
class Rule:
    """A rule over `length` positions, and the splits at which it can be tested.

    Split `s` of a causal rule replaces every input from `s` on. "Split" `b` of the
    independence rule keeps example `b` and replaces every other.
    """

    kind: Kind
    length: int

    @property
    def allowed(self) -> Bool[np.ndarray, "T T"]:
        """`allowed[t, j]`: whether output `t` may read input `j`."""
        if self.kind == "independent":
            return np.eye(self.length, dtype=bool)
        return np.tri(self.length, k=-1 if self.kind == "strictly causal" else 0, dtype=bool)

    @property
    def possible(self) -> range:
        """Every split. Split 0 replaces all inputs: only a strict model has an output to watch."""
        return range(1 if self.kind == "causal" else 0, self.length)

    def where(self, split: int) -> Bool[np.ndarray, " T"]:
        """The inputs that `split` replaces."""
        positions = np.arange(self.length)
        return positions != split if self.kind == "independent" else positions >= split

    def watch(self, edits: Sequence[Edit]) -> Bool[np.ndarray, "E T"]:
        """For every edit, the outputs that must not change."""
        where = np.stack([edit.where for edit in edits])
        if self.kind == "independent":
            return ~where
        read = np.logical_or.accumulate(where, 1)  # some input up to this position is replaced
        if self.kind == "strictly causal":
            read = np.pad(read, [(0, 0), (1, 0)])[:, :-1]
        return ~read

    def covered(self, splits: Sequence[int]) -> Float[np.ndarray, "T T"]:
        """The matrix of a check that found nothing: 0 where `splits` would have shown a leak."""
        # For `length` of some 10,000, this and `allowed` are the largest arrays there are.
        matrix = np.full((self.length, self.length), np.nan, np.float32)
        if self.kind == "independent":
            matrix[list(splits)] = 0
            np.fill_diagonal(matrix, np.nan)
            return matrix
        start = 0
        for split in splits:  # of those behind an output, the first replaces most
            end = split + 1 if self.kind == "strictly causal" else split
            matrix[start:end, split:] = 0
            start = end
        return matrix

    def choose(self, splits: Sequence[int] | str, rng: np.random.Generator) -> tuple[int, ...]:
        """The splits to try, in order: all of up to 128, or 64 as `_auto` chooses them."""
        if isinstance(splits, str):
            if splits != "auto":
                raise ValueError(f'splits must be "auto" or a sequence of integers, got {splits!r}')
            return self._auto(rng)
        chosen = tuple(sorted({int(split) for split in splits}))
        if not chosen or not all(split in self.possible for split in chosen):
            raise ValueError(
                f"splits must be integers from {self.possible[0]} to {self.possible[-1]}, "
                f"got {tuple(splits)}"
            )
        return chosen

    def edits(self, splits: Sequence[int], kinds: int) -> Iterator[Edit]:
        """Every split once with a mixed edit, then as many pure ones as the budget allows."""
        pure = [(split, kind) for kind in range(1, kinds) for split in splits]
        extra = _EDITS - len(splits) if self.length <= _ALL_UP_TO else len(splits) // 16
        picked = np.linspace(0, len(pure) - 1, min(max(extra, 1), len(pure))).astype(int)
        for seed, (split, kind) in enumerate([(s, 0) for s in splits] + [pure[i] for i in picked]):
            yield Edit(self.where(split), kind, seed)

    def _auto(self, rng: np.random.Generator) -> tuple[int, ...]:
        if self.length <= _ALL_UP_TO:
            return tuple(self.possible)
        # At and beside powers of two, where chunks, windows and tables end; the largest first.
        powers = [2**i for i in reversed(range(self.length.bit_length()))]
        borders = [p + step for p in powers for step in (0, -1, 1)]
        wanted = dict.fromkeys([self.possible[0], self.length - 1, *borders])
        chosen = [split for split in wanted if split in self.possible][:_BORDERS]
        # The rest where the gap is widest; not in its middle, or all would be ends of chunks.
        while len(chosen) < _CHOSEN:
            edges = np.sort([*chosen, self.length])
            widest = np.diff(edges).argmax()
            start, gap = int(edges[widest]), int(edges[widest + 1] - edges[widest])
            low, high = max(1, 3 * gap // 8), min(gap - 1, 5 * gap // 8)
            chosen.append(start + int(rng.integers(low, high + 1)))
        return tuple(sorted(chosen))
