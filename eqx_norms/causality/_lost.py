"""At which operation a function loses its precision: where float64 would keep it.

The traced function is run in float64 except for one operation, which is done in its own precision.
The operation after which the output is as far off as it was seen to be is the one to blame.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from .._processes import fetch, fetched, jit
from ._lines import line_of
from ._widen import dtype_of, narrowed, widen

_SUMS = ("add", "sub", "add_any", "reduce_sum", "cumsum", "dot_general", "conv_general_dilated")
_CANDIDATES = 8


class _Step(NamedTuple):
    """An operation on floats, and what it gives in its own precision of operands in float64.

    - `error`: the largest change of an entry, over the largest in float64; infinite if it is not
      finite where float64 is.
    - `size`, `operands`: the largest result and the largest operand in float64.
    - `vanished`: whether an operand or a result is 0 that is not 0 in float64.
    - `inherited`: whether an operand was not finite before.
    """

    eqn: jex.JaxprEqn
    line: str
    error: Any
    size: Any
    operands: Any
    vanished: Any
    inherited: Any


def blame(closed: jex.ClosedJaxpr, row: Sequence[Any], leaf: int, error: float) -> str:
    """Where output `leaf` comes to be `error` off, in a sentence; empty if no operation alone does.

    `error` is infinite for an output that is not finite.
    """
    with jax.enable_x64(True), np.errstate(over="ignore"):
        steps, found, size = _measured(closed, row, leaf)
    enough = min(error, size) / 64
    told = [step for step, off in zip(steps, found, strict=True) if off >= enough]
    return _sentence(max(told, key=lambda step: step.error)) if told else ""


def _measured(closed: jex.ClosedJaxpr, row, leaf: int) -> tuple[list[_Step], list[float], float]:
    """The steps that lose most, how far off the output is by each alone, and its size."""
    told: list[tuple[jex.JaxprEqn, str]] = []

    def run(chosen, *leaves):
        """The output, where operation number `chosen` alone is done in its own precision."""
        told.clear()
        numbers = []

        def watch(eqn, args, outs, calls):
            if not all(jnp.issubdtype(out.dtype, jnp.inexact) for out in outs):
                return outs
            own = narrowed(eqn, args)
            take = chosen == len(told)
            told.append((eqn, line_of([*calls, eqn])))
            numbers.append(_numbers(eqn, args, own, outs))
            return [jnp.where(take, a.astype(b.dtype), b) for a, b in zip(own, outs, strict=True)]

        return widen(closed, watch=watch)(*leaves)[leaf], numbers

    compiled = jit(run)
    exact, numbers = fetch(compiled(-1, *row))
    steps = [_Step(*names, *values) for names, values in zip(told, numbers, strict=True)]
    loss = np.array([-1 if step.inherited else step.error for step in steps])
    worst = [k for k in np.argsort(-loss, kind="stable")[:_CANDIDATES].tolist() if loss[k] >= 0]
    off = []
    for k in worst:
        out = fetched(compiled(k, *row)[0])
        with np.errstate(invalid="ignore"):  # inf - inf
            apart = np.abs(out - exact)
        off.append(float(np.where(np.isfinite(apart), apart, np.inf).max(initial=0)))
    return [steps[k] for k in worst], off, float(np.abs(exact).max(initial=0))


def _numbers(eqn: jex.JaxprEqn, args, own, outs) -> tuple[Array, ...]:
    """Of a step what is measured."""
    floats = [
        (a.astype(dtype_of(atom)).astype(a.dtype), a)
        for a, atom in zip(args, eqn.invars, strict=True)
        if jnp.issubdtype(a.dtype, jnp.inexact)
    ]
    results = [(a.astype(b.dtype), b) for a, b in zip(own, outs, strict=True)]
    # XLA's maximum may lose a NaN; none of these has one.
    worst = lambda sizes: functools.reduce(jnp.maximum, [size.max(initial=0) for size in sizes])
    zero = jnp.zeros(())
    size = worst([zero, *(_size(b) for _, b in results)])
    return (
        worst([zero, *(_apart(a, b) for a, b in results)]) / jnp.where(size > 0, size, 1),
        size,
        worst([zero, *(_size(b) for _, b in floats)]),
        worst([zero, *(((a == 0) & (b != 0)).astype(float) for a, b in [*results, *floats])]) > 0,
        ~jnp.isfinite(worst([zero, *(_apart(a, b) for a, b in floats)])),
    )


def _size(b: Array) -> Array:
    """The magnitude of each number, infinite for NaN."""
    return jnp.where(jnp.isnan(b), jnp.inf, jnp.abs(b))


def _apart(a: Array, b: Array) -> Array:
    """How far `a` is from `b`, infinitely if it alone is not finite."""
    size = jnp.abs(a - b)
    return jnp.where(jnp.isfinite(b), jnp.where(jnp.isfinite(size), size, jnp.inf), 0)


def _sentence(step: _Step) -> str:
    eqn = step.eqn
    dtype = dtype_of(eqn.outvars[0])
    limits = jnp.finfo(dtype)
    if not np.isfinite(step.error) and step.size > float(limits.max):
        why = f"overflow: {step.size:.2g} in float64, and {dtype} ends at {float(limits.max):.2g}"
    elif step.vanished and (not np.isfinite(step.error) or step.size < float(limits.tiny)):
        why = f"underflow: numbers that are not 0 in float64 are 0 in {dtype}"
    elif eqn.primitive.name in _SUMS and step.operands > 8 * step.size:
        why = (
            f"cancellation: numbers of size {step.operands:.2g} are rounded to {dtype}, and "
            f"{step.size:.2g} is left"
        )
    else:
        why = f"rounding to {dtype}, by {step.error:.2g} of the largest entry there"
    return f"The precision is lost at `{eqn.primitive.name}` in {step.line}: {why}."
