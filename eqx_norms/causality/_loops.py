"""Loops and branches written anew, around another evaluation of their bodies."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
from jaxtyping import Array

from .._jaxprs import is_ref, scan_counts

Evaluate = Callable[[Any, Sequence[Any], tuple], tuple[Sequence[Any], Any]]
BODIES = ("scan", "while", "cond")


def rewritten(
    eqn: jex.JaxprEqn,
    args: Sequence[Any],
    evaluate: Evaluate,
    none: Any = None,
    join: Callable[[Any, Any], Any] = lambda a, b: a,
    path: tuple = (),
) -> tuple[Sequence[Any], Any]:
    """The results of a scan, a while or a cond, and what was found on the way.

    `evaluate(body, args, path)` gives the results of a body and what it found; `join` puts two
    finds together, of which `none` is the empty one. Of Refs among the operands the bodies are
    closures, as they were when the function was written.
    """
    how = _How(evaluate, none, join)
    return {"scan": how.scan, "while": how.loop, "cond": how.branch}[eqn.primitive.name](
        eqn, args, path
    )


class _How:
    def __init__(self, evaluate: Evaluate, none: Any, join: Callable[[Any, Any], Any]):
        self.evaluate, self.none, self.join = evaluate, none, join

    def scan(self, eqn: jex.JaxprEqn, args: Sequence[Any], path):
        held, carried = scan_counts(eqn)
        consts, init, xs = args[:held], args[held : held + carried], args[held + carried :]

        def step(state, rows):
            carry, found = state
            outs, inside = self.evaluate(eqn.params["jaxpr"], [*consts, *carry, *rows], path)
            return (list(outs[:carried]), self.join(found, inside)), list(outs[carried:])

        state = (_strong(init), self.none)
        length, reverse = eqn.params["length"], eqn.params["reverse"]
        (carry, found), ys = jax.lax.scan(step, state, list(xs), length=length, reverse=reverse)
        return [*carry, *ys], found

    def loop(self, eqn: jex.JaxprEqn, args: Sequence[Any], path):
        test, body = eqn.params["cond_jaxpr"], eqn.params["body_jaxpr"]
        a, b = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        test_consts, body_consts, init = args[:a], args[a : a + b], args[a + b :]

        def holds(carry):
            (go,), found = self.evaluate(test, [*test_consts, *carry], (*path, 0))
            return go, found

        def step(state):
            carry, found = state
            go, before = holds(carry)
            outs, inside = self.evaluate(body, [*body_consts, *carry], (*path, 1))
            if jnp.ndim(go):  # under vmap each row has a loop of its own
                rows = lambda x: go.reshape(*go.shape, *[1] * (jnp.ndim(x) - go.ndim))
                outs = [jnp.where(rows(x), x, y) for x, y in zip(outs, carry, strict=True)]
            return list(outs), self.join(self.join(found, before), inside)

        go = lambda state: jnp.any(holds(state[0])[0])
        carry, found = jax.lax.while_loop(go, step, (_strong(init), self.none))
        return carry, self.join(found, holds(carry)[1])

    def branch(self, eqn: jex.JaxprEqn, args: Sequence[Any], path):
        which, *operands = args
        arrays = [x for x in operands if not is_ref(x)]
        branches = [
            lambda *xs, i=i, branch=branch: self._results(branch, operands, xs, (*path, i))
            for i, branch in enumerate(eqn.params["branches"])
        ]
        return jax.lax.switch(which, branches, *arrays)

    def _results(self, branch, operands: Sequence[Any], arrays: Sequence[Array], path):
        rest = iter(arrays)
        args = [x if is_ref(x) else next(rest) for x in operands]
        outs, found = self.evaluate(branch, args, path)
        return list(outs), self.join(self.none, found)


def _strong(values: Sequence[Any]) -> list[Array]:
    """Arrays that are not weakly typed, as what comes out of an equation."""
    arrays = map(jnp.asarray, values)
    return [jax.lax.convert_element_type(x, x.dtype) for x in arrays]
