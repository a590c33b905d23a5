"""Names as rows of letters, some held out, in an order that follows from the step."""

import functools
import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from ..names_data import END, Vocabulary

HELD_OUT = 0.05  # of the names
END_ID = 0  # Vocabulary has the end mark first

AnyArray = Array | np.ndarray


class Data(NamedTuple):
    """A row is a name and its end mark, filled up with end marks."""

    train: Int[np.ndarray, "names context"]
    held_out: Int[np.ndarray, "names context"]
    vocabulary: Vocabulary
    too_long: int

    def fingerprint(self) -> str:
        """Tells other names, or the same ones cleaned or cut in another way."""
        rows = self.train.tobytes() + self.held_out.tobytes()
        return hashlib.sha256(rows + self.vocabulary.symbols.encode()).hexdigest()[:16]


def split(names: Sequence[str], context: int) -> Data:
    """Every name counts once, so that none is both trained on and held out."""
    short = sorted({name for name in names if len(name) < context})
    too_long = len(set(names)) - len(short)
    held_out = round(HELD_OUT * len(short))
    if not held_out:
        raise ValueError(
            f"training needs 11 different names of fewer than {context} letters, got {len(short)} "
            f"and {too_long} longer ones; give a larger file, or a larger --context"
        )
    vocabulary = Vocabulary.of(short)
    # The same split for every --seed: losses of different runs can be compared.
    shuffled = np.random.default_rng(0).permutation(short)
    rows = np.stack([vocabulary.encode(name.ljust(context, END)) for name in shuffled])
    return Data(rows[held_out:], rows[:held_out], vocabulary, too_long)


def batch_at(data: Data, step: int, *, size: int, seed: int) -> Int[np.ndarray, "size context"]:
    """The names of a step, which follow from its number and the seed.

    Every epoch goes once through the names, in an order of its own, but for the last few that
    fill no batch.
    """
    steps = len(data.train) // size
    if not steps:
        raise ValueError(
            f"a batch of {size} is more than the {len(data.train)} names to train on; "
            f"give --batch {len(data.train)} or less"
        )
    epoch, place = divmod(step, steps)
    return data.train[_order(len(data.train), seed, epoch)[place * size :][:size]]


@functools.lru_cache(maxsize=1)
def _order(count: int, seed: int, epoch: int) -> Int[np.ndarray, " count"]:
    return np.random.default_rng((seed, epoch)).permutation(count)


def shifted(names: Int[AnyArray, "*batch context"]) -> Int[Array, "*batch context"]:
    """What a model reads: an end mark, then the letters before the one to predict."""
    return jnp.roll(names, 1, axis=-1).at[..., 0].set(END_ID)


def counted(names: Int[AnyArray, "*batch context"]) -> Bool[Array, "*batch context"]:
    """The letters of a name and one end mark, not those that fill up the row."""
    return (shifted(names) != END_ID).at[..., 0].set(True)


def as_text(rows: Int[AnyArray, "names context"], vocabulary: Vocabulary) -> list[str]:
    """The letters up to the end mark."""
    return [vocabulary.decode(row).split(END, 1)[0] for row in rows]
