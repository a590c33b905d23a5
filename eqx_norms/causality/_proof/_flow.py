"""How dependencies pass through each operation of JAX: the table from primitive to rule.

A rule takes what is known of the operands and gives what is known of the results. It may claim
less than is true, never more: an operation that is not in the table connects everything with
everything. The rules are in modules by family:

- `_elementwise`: entry by entry, and the bounds of numbers;
- `_indexing`: entries that only move, to places that are known or not;
- `_along`: reductions, cumulative sums, sorts: along an axis;
- `_contraction`: products of matrices, and what solves with them;
- `_windows`: convolutions and windows;
- `_control`: loops and branches.

What bounds there are hold in every compilation. Of integers they come from what moves or picks
numbers and from nothing that computes and may wrap; of floats they are widened by what rounding,
underflow and flushing to zero may do in their dtype.
"""

from collections.abc import Callable
from typing import Any

from . import _reads as r
from ._known import Known, all_read, everything, known, unknown
from ._reads import Reads

Rule = Callable[..., list[Known]]
RULES: dict[str, Rule] = {}


def rule(*names: str):
    """Enters a function of (context, equation, operands) in the table."""

    def enter(fn: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, fn))
        return fn

    return enter


# A draw reads the whole key, and the other functions run a loop until every entry has converged:
# an entry's last bits depend on how long the others take.
_WHOLE = (
    "random_gamma random_unwrap random_wrap rng_bit_generator rng_uniform igamma igammac "
    "igamma_grad_a regularized_incomplete_beta"
)


@rule(*_WHOLE.split())
def connect_all(context, eqn, *operands: Known) -> list[Known]:
    """Every entry of every result reads what any entry of any operand reads."""
    row = everything(*operands)
    avals = [var.aval for var in eqn.outvars]
    return [finite_as(aval, r.spread(row, len(aval.shape)), *operands) for aval in avals]


def finite_as(aval: Any, reads: Reads, *operands: Known) -> Known:
    """A result without bounds: of finite numbers it is finite, else it may be anything."""
    if all(x.finite for x in operands):
        return known(aval, reads)
    return unknown(aval.shape, aval.dtype, reads)


@rule("random_bits", "random_split", "random_fold_in", "random_seed")
def _of_keys(context, eqn, keys: Known, *numbers: Known) -> list[Known]:
    """A key, and a number beside it, decide what is drawn from it and nothing else, of threefry."""
    impl = eqn.params["impl"] if "impl" in eqn.params else keys.dtype._impl
    if "threefry" not in impl.name:
        return connect_all(context, eqn, keys, *numbers)
    aval = eqn.outvars[0].aval
    ndim = max(len(x.shape) for x in (keys, *numbers))
    drawn = (1,) * (len(aval.shape) - ndim)
    reads = r.reshaped(all_read(ndim, keys, *numbers), lambda shape: (*shape, *drawn))
    return [finite_as(aval, reads, keys, *numbers)]
