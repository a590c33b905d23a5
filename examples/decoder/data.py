"""Names as rows of letters, held-out ones apart, in an order that follows from the step."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ..names_data import END, Vocabulary

HELD_OUT = 0.1  # of the names
_END_ID = 0  # Vocabulary has the end mark first


class Data(NamedTuple):
    """A row is a name, its end mark, and end marks to the end of the row."""

    train: Int[np.ndarray, "names context"]
    held_out: Int[np.ndarray, "names context"]
    vocabulary: Vocabulary
    too_long: int


def split(names: Sequence[str], context: int) -> Data:
    """Every name counts once, so that none is trained on and held out."""
    short = sorted({name for name in names if len(name) < context})
    too_long = len(set(names)) - len(short)
    held_out = round(HELD_OUT * len(short))
    if not held_out:
        raise ValueError(
            f"training needs 5 different names of fewer than {context} letters, got {len(short)}; "
            "give a larger file, or a larger --context"
        )
    vocabulary = Vocabulary.of(short)
    # The same split for every --seed: losses of different runs can be compared.
    shuffled = np.random.default_rng(0).permutation(short)
    rows = np.stack([vocabulary.encode(name.ljust(context, END)) for name in shuffled])
    return Data(rows[held_out:], rows[:held_out], vocabulary, too_long)


def batch_at(data: Data, step: int, *, size: int, seed: int) -> Int[np.ndarray, "size context"]:
    """The names of a step, a function of nothing but its number and the seed.

    Every epoch goes once through the names, in an order of its own, but for the last few that
    fill no batch.
    """
    steps = len(data.train) // size
    if not steps:
        raise ValueError(
            f"there are {len(data.train)} names to train on, fewer than a batch; "
            f"give --batch {len(data.train)} or less"
        )
    epoch, place = divmod(step, steps)
    order = _order(len(data.train), seed, epoch)
    return data.train[order[place * size :][:size]]


@functools.lru_cache(maxsize=1)
def _order(count: int, seed: int, epoch: int) -> Int[np.ndarray, " count"]:
    return np.random.default_rng((seed, epoch)).permutation(count)


def as_text(rows: Int[np.ndarray, "names context"], vocabulary: Vocabulary) -> list[str]:
    """Up to the end mark."""
    return [vocabulary.decode(row).split(END, 1)[0] for row in rows]
