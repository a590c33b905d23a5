"""What the primitives and the kernels speak of: a batch, its parameters, the form of the norm."""

import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxtyping import Array, Float

Batch = Float[Array, "*batch_and_shape"]
Param = Float[Array, "..."]  # of the rank of the batch; where it is shared, an axis is of size 1


class Layout(NamedTuple):
    """Which weight is whose: rows are counted by (outer, params, inner), and params says of which.

    A row is of so many channels, each of a run of entries that have one weight.
    """

    outer: int
    params: int
    inner: int
    channels: int
    run: int


class Form(NamedTuple):
    """What is known before any array comes; hashable, as parameters of primitives must be."""

    eps: float
    centre: bool
    weight: bool
    bias: bool
    rank: int  # of one example

    def named(self, params: Sequence) -> tuple:
        """`(weight, bias)` of those that are there, `None` for those that are not."""
        left = iter(params)
        return tuple(next(left) if there else None for there in (self.weight, self.bias))

    def rows(self, x: Any) -> tuple[int, int]:
        """How many examples, and of how many entries."""
        axis = x.ndim - self.rank
        return math.prod(x.shape[:axis]), math.prod(x.shape[axis:])

    def layout(self, x: Any, params: Sequence[Any]) -> Layout | None:
        """`None` where parameters are shared in another order than that of a `Layout`."""
        if not params:
            return Layout(self.rows(x)[0], 1, 1, 1, self.rows(x)[1])
        sizes = [(size, own == size) for size, own in zip(x.shape, params[0].shape, strict=True)]
        axis = x.ndim - self.rank
        batch = _blocks(r"(s*)(o*)(s*)", sizes[:axis])
        entries = _blocks(r"(o*)(s*)", sizes[axis:])
        return None if batch is None or entries is None else Layout(*batch, *entries)


def _blocks(pattern: str, sizes: list[tuple[int, bool]]) -> list[int] | None:
    """How many examples or entries each group of the pattern has: o for own, s for shared."""
    sizes = [each for each in sizes if each[0] != 1]
    match = re.fullmatch(pattern, "".join("o" if own else "s" for _, own in sizes))
    if match is None:
        return None
    spans = map(match.span, range(1, len(match.groups()) + 1))
    return [math.prod(size for size, _ in sizes[slice(*span)]) for span in spans]
