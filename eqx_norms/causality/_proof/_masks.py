"""Masks of large negative numbers, and what a proof has to assume of the scores that meet them.

Minus infinity hides a score whatever it is. -1e9 hides it from a softmax as long as it is small
beside that. So this is known besides, of what leads from a mask to an exponential: each array of
scores as it is if those that meet the mask are below a tenth of it. The exponential alone looks
there, and only where it then is exactly zero: anywhere else a large number is a number.
"""

import dataclasses
from collections.abc import Sequence

import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool

from ._elementwise import negative
from ._flow import RULES
from ._indexing import MOVES
from ._known import Known, known, together

# A number of this size or more, negative, in a sum or a select may be a mask.
LARGE = 1e4
# Beyond this a bound is no bound: it comes from a number that may be any finite one.
_FREE = 1e300
_EXPONENTIALS = ("exp", "exp2", "logistic")
_MEETING = ("add", "add_any", "sub", "select_n")
_ON_THE_WAY = (
    *_MEETING,
    *MOVES,
    *"convert_element_type copy div max min mul reduce_max reduce_min".split(),
    *"name optimization_barrier stop_gradient sharding_constraint".split(),
)


@dataclasses.dataclass
class Meeting:
    """Where scores meet a mask: an operand of an equation, the line, and what is assumed.

    The entries `where`, which broadcasts to it, are below `limit` in size, or minus infinity.
    """

    eqn: jex.JaxprEqn
    operand: int
    line: str
    limit: float
    where: Bool[np.ndarray, "..."]


def assumed(
    context, eqn: jex.JaxprEqn, operands: Sequence[Known], results: list[Known], path
) -> list[Known]:
    """The results, with what is known of them under the assumption."""
    name = eqn.primitive.name
    if name not in _ON_THE_WAY and name not in _EXPONENTIALS:
        return results
    twins = [x.assumed or x for x in operands]
    if name in _MEETING:
        twins = _met(context, eqn, twins, path)
    if all(twin is x for twin, x in zip(twins, operands, strict=True)):
        return results
    rests_on = frozenset().union(*(twin.rests_on for twin in twins))
    outs = RULES[name](context, eqn, *twins)
    if name not in _EXPONENTIALS:
        outs = [dataclasses.replace(out, rests_on=rests_on, assumed=None) for out in outs]
        return [dataclasses.replace(x, assumed=o) for x, o in zip(results, outs, strict=True)]
    _, (new, old) = together(len(outs[0].shape), outs[0], results[0])
    if not ((new.high == 0) & (old.high != 0)).any():
        return results
    context.used |= rests_on
    return outs


def _met(context, eqn, twins: list[Known], path) -> list[Known]:
    """With what is not bounded below a tenth of the largest mask among the operands."""
    sign = [negative if eqn.primitive.name == "sub" and k == 1 else lambda x: x for k in (0, 1)]
    first = int(eqn.primitive.name == "select_n")  # the predicate
    terms = [sign[k](x) if k < 2 else x for k, x in enumerate(twins)]
    largest = max(map(_mask_size, terms[first:]))
    if not largest:
        return twins
    return [
        _small(context, eqn, x, largest / 10, k, path) if k >= first else x
        for k, x in enumerate(twins)
    ]


def _mask_size(x: Known) -> float:
    """The size of the largest negative number that is about the whole value of an entry."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return 0.0
    large = (x.high <= -LARGE) & (x.low > -_FREE)
    return float(-np.min(np.where(large, x.low, 0.0))) if np.any(large) else 0.0


def _small(context, eqn, x: Known, limit: float, operand: int, path) -> Known:
    below, above = (x.low < -_FREE) & np.isfinite(x.low), (x.high > _FREE) & np.isfinite(x.high)
    if not (below | above).any():
        return x
    where = x.entries(below | above)
    context.meet(path, Meeting(eqn, operand, context.line(eqn), limit, where))
    low, high = np.where(below, -limit, x.low), np.where(above, limit, x.high)
    rests_on = x.rests_on | {(path, operand)}
    return dataclasses.replace(known(x, x.reads, x.labels, low, high), rests_on=rests_on)
