"""Evaluate a jaxpr and hand out what its tags mark, adding a shift to each on the way.

Only equations with a tag inside are taken apart; JAX evaluates all others as they stand, so that
custom derivative rules stay in force.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import eval_jaxpr
from jax.extend.core import DebugInfo, Jaxpr, Literal, primitives

from .._jaxprs import scan_counts
from .._real import Real
from ._plan import Plan, Step
from ._tag import tag_p

# One entry a tag, in program order, each with one entry an array that the tag marks.
Marked = list[list[Any]]


def evaluate(plan: Plan, args: Sequence, shifts: Marked) -> tuple[list[Any], Marked]:
    """Evaluate the plan's jaxpr; return its outputs and the arrays that its tags mark.

    **Arguments:**

    - `shifts`: for every marked array what to add to it, or `None`.
    """
    jaxpr = plan.jaxpr
    env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*plan.consts, *args], strict=True))
    marked = []
    for eqn, step, last_uses in zip(jaxpr.eqns, plan.steps, plan.last_uses, strict=True):
        count = len(step.outputs)
        here, shifts = shifts[:count], shifts[count:]
        outs, found = _rule(eqn, step)(eqn, step, [_read(env, atom) for atom in eqn.invars], here)
        env.update(zip(eqn.outvars, outs, strict=True))
        marked += found
        del outs
        for variable in last_uses:
            del env[variable]
    return [_read(env, atom) for atom in jaxpr.outvars], marked


def _rule(eqn: Any, step: Step) -> Callable:
    if step.operand is not None:
        return _operand_and_result
    return _rules.get(eqn.primitive, _refuse) if step.outputs else _as_it_stands


def _read(env: dict, atom: Any) -> Any:
    # A literal holds a Python or NumPy scalar.
    return jnp.asarray(atom.val) if isinstance(atom, Literal) else env[atom]


def _as_it_stands(eqn: Any, step: Step, args: list, shifts: Marked) -> tuple[list[Any], Marked]:
    pairs = zip(eqn.invars, args, strict=True)
    inputs = {atom: x for atom, x in pairs if not isinstance(atom, Literal)}
    names = DebugInfo("capture", "", ("",) * len(inputs), ("",) * len(eqn.outvars))
    alone = Jaxpr((), list(inputs), eqn.outvars, [eqn], eqn.effects, names)
    return eval_jaxpr(alone, (), *inputs.values()), []


def _operand_and_result(eqn: Any, step: Step, args: list, shifts: Marked) -> tuple[list, Marked]:
    outs, _ = _as_it_stands(eqn, step, args, [])
    return outs, [[args[step.operand or 0], outs[0]]]


def _tag(eqn: Any, step: Step, args: list, shifts: Marked) -> tuple[list[Any], Marked]:
    [output], [shift] = step.outputs, shifts
    if len(output.paths) > 1:
        raise NotImplementedError(
            f"The module that is called is made of {', '.join(map(repr, output.paths))} together, "
            "so its output has no path. Stack or combine them before, so that `model` holds what "
            "is called, or type a `where` that leaves them out."
        )
    values = args[: len(shift)]
    return [_shifted(x, dx) for x, dx in zip(values, shift, strict=True)], [values]


def _shifted(x: Any, dx: Any) -> Any:
    return x if dx is None else jax.lax.add(x, dx)


def _inline(eqn: Any, step: Step, args: list, shifts: Marked) -> tuple[list[Any], Marked]:
    [plan] = step.inner
    return evaluate(plan, args, shifts)


def _jit(eqn: Any, step: Step, args: list, shifts: Marked) -> tuple[list[Any], Marked]:
    def run(args, shifts):
        return _inline(eqn, step, args, shifts)

    params = eqn.params
    run.__name__ = params["name"]
    # All but the donations: what is given away may be what is captured.
    jitted = jax.jit(
        run,
        in_shardings=(_given(params["in_shardings"]), None),
        out_shardings=(_given(params["out_shardings"]), None),
        keep_unused=params["keep_unused"],
        inline=params["inline"],
    )
    return jitted(args, shifts)


def _given(shardings: Sequence) -> list:
    return [s if isinstance(s, jax.sharding.Sharding) else None for s in shardings]


def _checkpoint(eqn: Any, step: Step, args: list, shifts: Marked) -> tuple[list[Any], Marked]:
    def run(args, shifts):
        return _inline(eqn, step, args, shifts)

    cse = eqn.params["prevent_cse"]
    prevent_cse = cse if isinstance(cse, bool) else any(cse)
    return jax.checkpoint(run, prevent_cse=prevent_cse, policy=eqn.params["policy"])(args, shifts)


def _scan(eqn: Any, step: Step, args: list, shifts: Marked) -> tuple[list[Any], Marked]:
    num_consts, num_carry = scan_counts(eqn)
    consts, init = args[:num_consts], args[num_consts : num_consts + num_carry]

    def body(carry, x):
        xs, shifts = x
        outs, marked = _inline(eqn, step, [*consts, *carry, *xs], shifts)
        return outs[:num_carry], (outs[num_carry:], marked)

    carry, (ys, marked) = jax.lax.scan(
        body,
        init,
        (args[num_consts + num_carry :], shifts),
        length=eqn.params["length"],
        reverse=eqn.params["reverse"],
        unroll=eqn.params["unroll"],
    )
    return [*carry, *ys], marked


def _cond(eqn: Any, step: Step, args: list, shifts: Marked) -> tuple[list[Any], Marked]:
    index, *operands = args
    parts = []
    for plan in step.inner:
        count = len(plan.outputs)
        parts.append(shifts[:count])
        shifts = shifts[count:]

    def branch(i):
        def run(operands, parts):
            outs, marked = evaluate(step.inner[i], operands, parts[i])
            of_all = [_not_computed(plan) for plan in step.inner]
            of_all[i] = marked
            return outs, [entry for of_branch in of_all for entry in of_branch]

        return run

    branches = [branch(i) for i in range(len(step.inner))]
    return jax.lax.switch(index, branches, operands, parts)


def _not_computed(plan: Plan) -> Marked:
    return [[_blank(kind) for kind in kinds] for kinds in marked_types(plan)]


def _blank(kind: "ArrayType") -> jax.Array:
    # Not zero, which a statistic would take for an activation; but not what `jax_debug_nans`
    # would stop at, for no computation of the user's has made it.
    debug_nans = jax.config.jax_debug_nans  # pyright: ignore[reportAttributeAccessIssue]
    return kind.full(jnp.nan if jnp.issubdtype(kind.dtype, jnp.inexact) and not debug_nans else 0)


class ArrayType(NamedTuple):
    """What JAX wants to be the same where two arrays meet."""

    shape: tuple[int, ...]
    dtype: Any
    sharding: Any
    varying: frozenset[str]

    def full(self, value: Real) -> jax.Array:
        """An array of this type."""
        explicit = jax.sharding.AxisType.Explicit in self.sharding.mesh.axis_types
        sharding = self.sharding if explicit else None
        array = jax.lax.full(self.shape, value, self.dtype, sharding=sharding)
        # `jax.shard_map` sums a derivative over the axes along which its variable is the same.
        return jax.lax.pcast(array, tuple(self.varying), to="varying") if self.varying else array

    def stacked(self, length: int) -> "ArrayType":
        spec = jax.P(None, *self.sharding.spec)
        sharding = jax.sharding.NamedSharding(self.sharding.mesh, spec)
        return self._replace(shape=(length, *self.shape), sharding=sharding)


def marked_types(plan: Plan) -> list[list[ArrayType]]:
    """The types of the arrays that `evaluate` hands out."""
    pairs = zip(plan.jaxpr.eqns, plan.steps, strict=True)
    return [types for eqn, step in pairs if step.outputs for types in _types_in(eqn, step)]


def _types_in(eqn: Any, step: Step) -> list[list[ArrayType]]:
    if step.operand is not None:
        return [[_type_of(atom.aval) for atom in (eqn.invars[step.operand], eqn.outvars[0])]]
    if eqn.primitive is tag_p:
        return [[_type_of(atom.aval) for atom in eqn.outvars]]
    inner = [types for plan in step.inner for types in marked_types(plan)]
    if eqn.primitive is primitives.scan_p:
        return [[kind.stacked(eqn.params["length"]) for kind in types] for types in inner]
    return inner


def _type_of(aval: Any) -> ArrayType:
    return ArrayType(aval.shape, aval.dtype, aval.sharding, aval.manual_axis_type.varying)


def _refuse(eqn: Any, step: Step, args: list, shifts: Marked) -> tuple[list[Any], Marked]:
    paths = ", ".join(sorted({repr(path) for output in step.outputs for path in output.paths}))
    name = eqn.primitive.name
    raise NotImplementedError(
        f"The output of {paths} cannot be captured: it is computed inside `{name}`, from which no "
        f"value can be handed out. {_advice.get(name, _general_advice)}"
    )


_general_advice = "Type a `where` that leaves it out, or call it outside."
_advice = {
    "while": "Type `jax.lax.scan`, or `jax.lax.fori_loop` with Python integers as its bounds, "
    "instead of the while loop.",
    "shard_map": "Capture inside the function that is given to `jax.shard_map`.",
}
_rules: dict[Any, Callable] = {
    tag_p: _tag,
    primitives.jit_p: _jit,
    primitives.closed_call_p: _inline,
    primitives.remat_p: _checkpoint,
    primitives.scan_p: _scan,
    primitives.cond_p: _cond,
}
# Primitives inside which values can be captured.
supported = frozenset(_rules)
