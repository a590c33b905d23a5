"""Whether scores are as small as a proof assumes: the function is run, and they are looked at."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..._jaxprs import called, opened
from .._loops import rewritten
from ._definitions import DEFINED, definition
from ._devices import SHARD_MAP
from ._masks import Meeting

Meetings = Mapping[Any, Meeting]  # by the path of the equation and the number of the operand


def sizes(closed: jex.ClosedJaxpr, meetings: Meetings) -> Callable[..., Float[Array, " M"]]:
    """A function of the same leaves: how large the scores of each meeting are, in its limit.

    NaN counts as infinite; minus infinity, which is a mask already, not at all.
    """
    run = _Run(meetings)
    last = max(path[0] for path, _ in meetings)  # what comes after it need not be compiled
    jaxpr = closed.jaxpr.replace(eqns=closed.jaxpr.eqns[: last + 1], outvars=[])
    before = jex.ClosedJaxpr(jaxpr, closed.consts)
    return lambda *leaves: run.evaluate(before, leaves, ())[1]


class _Run:
    """Evaluates a jaxpr; loops and branches that hold a meeting are written anew around it."""

    def __init__(self, meetings: Meetings):
        self.meetings = meetings
        self.numbers = {name: number for number, name in enumerate(meetings)}

    def evaluate(self, closed: Any, args: Sequence[Any], path) -> tuple[list, Array]:
        """The results, and the largest size of each meeting in there."""
        jaxpr = opened(closed)
        consts = getattr(closed, "consts", ())
        values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
        found = self.none()
        read = lambda atom: atom.val if isinstance(atom, jex.Literal) else values[atom]
        for i, eqn in enumerate(jaxpr.eqns):
            operands = [read(atom) for atom in eqn.invars]
            here = (*path, i)
            for operand, value in enumerate(operands):
                found = self.look((here, operand), value, found)
            outs, inside = self.equation(eqn, operands, here)
            found = jnp.maximum(found, inside)
            values.update(zip(eqn.outvars, outs, strict=True))
        return [read(atom) for atom in jaxpr.outvars], found

    def none(self) -> Array:
        return jnp.zeros(len(self.numbers), jnp.float32)

    def look(self, name, value: Any, found: Array) -> Array:
        if name not in self.numbers:
            return found
        meeting = self.meetings[name]
        size = jnp.abs(jnp.asarray(value)).astype(jnp.float32) / jnp.float32(meeting.limit)
        size = jnp.where(jnp.isnan(size), jnp.float32(jnp.inf), size)
        size = jnp.where(meeting.where & (value != -jnp.inf), size, jnp.float32(0))
        return found.at[self.numbers[name]].max(size.max(initial=0))

    def equation(self, eqn: jex.JaxprEqn, args: Sequence[Any], path) -> tuple[Sequence, Array]:
        name = eqn.primitive.name
        inside = any(place[: len(path)] == path for place, _ in self.numbers if place != path)
        defined = inside and name in DEFINED
        inner = definition(eqn) if defined else called(eqn)
        if inside and inner is not None:
            device = [np.int32(0)] if name == SHARD_MAP else []
            return self.evaluate(inner, [*device, *args], path)
        if inside:
            return rewritten(eqn, args, self.evaluate, self.none(), jnp.maximum, path)
        outs = eqn.primitive.bind(*args, **eqn.primitive.get_bind_params(eqn.params))
        return outs if eqn.primitive.multiple_results else [outs], self.none()
