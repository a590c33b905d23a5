"""Who may read whom, and which edits put that to the test."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
from jaxtyping import Bool

from ._edits import Edit

Kind = Literal["causal", "strictly causal", "independent"]
_ALL_UP_TO = 128
_CHOSEN = 64
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
        # As floats: NumPy multiplies matrices of bools without BLAS, a hundred times slower.
        where = np.stack([edit.where for edit in edits]).astype(np.float32)
        return where @ self.allowed.T.astype(np.float32) == 0

    def choose(self, splits: Sequence[int] | str, rng: np.random.Generator) -> tuple[int, ...]:
        """The splits to try: all of up to 128, or 64 that are well spread and hit borders."""
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
        powers = [2**i for i in range(self.length.bit_length())]
        borders = [p + step for p in powers for step in (-1, 0, 1)]
        first = [self.possible[0], 1, 2, self.length // 2, self.length - 1, *borders]
        wanted = dict.fromkeys([*first, *rng.permutation(self.length).tolist()])
        return tuple(sorted([s for s in wanted if s in self.possible][:_CHOSEN]))
