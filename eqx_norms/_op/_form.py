"""What the primitives and the kernels speak of: a batch, its parameters, the form of the norm."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxtyping import Array, Float

Batch = Float[Array, "*batch_and_shape"]
Param = Float[Array, "*shape"]


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
