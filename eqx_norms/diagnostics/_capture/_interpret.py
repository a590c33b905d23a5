"""Evaluate a jaxpr and hand out what its tags mark, edited on the way.

Only equations with a tag inside are taken apart; JAX evaluates all others as they stand, so that
custom derivative rules stay in force.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.core import eval_jaxpr
from jax.extend.core import DebugInfo, Jaxpr, Literal, primitives

from ..._jaxprs import scan_counts
from ..._real import Real
from ._plan import Plan, Step, kind
from ._tag import tag_p

# One entry a tag, in program order, each with one entry an array that the tag marks.
Marked = list[list[Any]]


class Edit(eqx.Module):
    """What becomes of the arrays that a tag marks, before the program continues with them.

    **Arguments:**

    - `shifts`: for each of them what to add, or `None`.
    - `replacement`: called with the arrays and with `steps`, it returns those that are handed out,
        and shifted, in their place.
    - `steps`: the numbers of the steps of the loops around the tag, the outermost first.
    """

    shifts: list[Any]
    replacement: Callable[..., list[Any]] | None = eqx.field(static=True)
    steps: tuple[Any, ...] = ()

    def replaced(self, values: list[Any]) -> list[Any]:
        return values if self.replacement is None else self.replacement(values, *self.steps)

    def shifted(self, values: list[Any]) -> list[Any]:
        pairs = zip(values, self.shifts, strict=True)
        return [x if dx is None else jax.lax.add(x, dx) for x, dx in pairs]

    def at_step(self, number: Any, shifts: list[Any]) -> "Edit":
        return Edit(shifts, self.replacement, (*self.steps, number))


def evaluate(plan: Plan, args: Sequence, edits: list[Edit]) -> tuple[list[Any], Marked]:
    """Evaluate the plan's jaxpr; return its outputs and the arrays that its tags mark.

    **Arguments:**

    - `edits`: one a tag, in program order.
    """
    jaxpr = plan.jaxpr
    env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*plan.consts, *args], strict=True))
    marked = []
    for eqn, step, last_uses in zip(jaxpr.eqns, plan.steps, plan.last_uses, strict=True):
        count = len(step.outputs)
        here, edits = edits[:count], edits[count:]
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
    if step.result:
        return _result
    return _rules.get(kind(eqn)[0], _refuse) if step.outputs else _as_it_stands


def _read(env: dict, atom: Any) -> Any:
    # A literal holds a Python or NumPy scalar.
    return jnp.asarray(atom.val) if isinstance(atom, Literal) else env[atom]


def _as_it_stands(eqn: Any, step: Step, args: list, edits: list[Edit]) -> tuple[list[Any], Marked]:
    pairs = zip(eqn.invars, args, strict=True)
    inputs = {atom: x for atom, x in pairs if not isinstance(atom, Literal)}
    names = DebugInfo("capture", "", ("",) * len(inputs), ("",) * len(eqn.outvars))
    alone = Jaxpr((), list(inputs), eqn.outvars, [eqn], eqn.effects, names)
    run = lambda *inputs: eval_jaxpr(alone, (), *inputs)
    # What is given away may be what is captured, but nothing is in a function that is jitted.
    run = jax.jit(run) if step.donates else run
    return run(*inputs.values()), []


def _operand_and_result(
    eqn: Any, step: Step, args: list, edits: list[Edit]
) -> tuple[list[Any], Marked]:
    outs, _ = _as_it_stands(eqn, step, args, [])
    x = args[step.operand or 0]
    return outs, [[x, outs[0]] if step.summary is None else [step.summary(x)]]


def _result(eqn: Any, step: Step, args: list, edits: list[Edit]) -> tuple[list[Any], Marked]:
    outs, _ = _as_it_stands(eqn, step, args, [])
    values = edits[0].replaced(outs)
    return edits[0].shifted(values), [values]


def _tag(eqn: Any, step: Step, args: list, edits: list[Edit]) -> tuple[list[Any], Marked]:
    [output], [edit] = step.outputs, edits
    if len(output.paths) > 1:
        raise NotImplementedError(
            f"Which of {', '.join(map(repr, output.paths))} is called cannot be told, so that its "
            "output has no path: `fn` has stacked or combined them, or they are equal static "
            "arguments of one jitted function. Stack or combine them before, so that `model` holds "
            "what is called, or type a `where` that leaves them out."
        )
    values = edit.replaced(args[: len(eqn.outvars)])
    return edit.shifted(values), [values]


def _name(eqn: Any, step: Step, args: list, edits: list[Edit]) -> tuple[list[Any], Marked]:
    [x], marked = _tag(eqn, step, args, edits)
    # It keeps its name, which the policy of a checkpoint around may ask for.
    return [checkpoint_name(x, kind(eqn)[1]["name"])], marked


def _inline(eqn: Any, step: Step, args: list, edits: list[Edit]) -> tuple[list[Any], Marked]:
    [plan] = step.inner
    return evaluate(plan, args, edits)


def _jit(eqn: Any, step: Step, args: list, edits: list[Edit]) -> tuple[list[Any], Marked]:
    def run(args, edits):
        return _inline(eqn, step, args, edits)

    params = eqn.params
    run.__name__ = params["name"]
    # All but the donations, for the same reason as in `_as_it_stands`.
    jitted = jax.jit(
        run,
        in_shardings=(_given(params["in_shardings"]), None),
        out_shardings=(_given(params["out_shardings"]), None),
        keep_unused=params["keep_unused"],
        inline=params["inline"],
    )
    return jitted(args, edits)


def _given(shardings: Sequence) -> list:
    return [s if isinstance(s, jax.sharding.Sharding) else None for s in shardings]


def _checkpoint(eqn: Any, step: Step, args: list, edits: list[Edit]) -> tuple[list[Any], Marked]:
    def run(args, edits):
        return _inline(eqn, step, args, edits)

    _, params = kind(eqn)
    cse = params["prevent_cse"]
    prevent_cse = cse if isinstance(cse, bool) else any(cse)
    return jax.checkpoint(run, prevent_cse=prevent_cse, policy=params["policy"])(args, edits)


def _scan(eqn: Any, step: Step, args: list, edits: list[Edit]) -> tuple[list[Any], Marked]:
    num_consts, num_carry = scan_counts(eqn)
    consts, init = args[:num_consts], args[num_consts : num_consts + num_carry]
    # Counted as the axes of the values are, also where the loop runs in reverse.
    numbers = jnp.arange(eqn.params["length"])

    def body(carry, x):
        xs, number, shifts = x
        here = [edit.at_step(number, each) for edit, each in zip(edits, shifts, strict=True)]
        outs, marked = _inline(eqn, step, [*consts, *carry, *xs], here)
        return outs[:num_carry], (outs[num_carry:], marked)

    carry, (ys, marked) = jax.lax.scan(
        body,
        init,
        (args[num_consts + num_carry :], numbers, [edit.shifts for edit in edits]),
        length=eqn.params["length"],
        reverse=eqn.params["reverse"],
        unroll=eqn.params["unroll"],
    )
    return [*carry, *ys], marked


def _cond(eqn: Any, step: Step, args: list, edits: list[Edit]) -> tuple[list[Any], Marked]:
    index, *operands = args
    parts = []
    for plan in step.inner:
        count = len(plan.outputs)
        parts.append(edits[:count])
        edits = edits[count:]

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
        sharding = self.sharding if self._explicit else None
        return self._varied(jax.lax.full(self.shape, value, self.dtype, sharding=sharding))

    def placed(self, array: jax.Array) -> jax.Array:
        """`array`, which has this shape and dtype, where an array of this type lies."""
        array = jax.sharding.reshard(array, self.sharding) if self._explicit else array
        return self._varied(array)

    @property
    def _explicit(self) -> bool:
        return jax.sharding.AxisType.Explicit in self.sharding.mesh.axis_types

    def _varied(self, array: jax.Array) -> jax.Array:
        # `jax.shard_map` sums a derivative over the axes along which its variable is the same.
        missing = tuple(self.varying - jax.typeof(array).manual_axis_type.varying)
        return jax.lax.pcast(array, missing, to="varying") if missing else array

    def stacked(self, length: int) -> "ArrayType":
        spec = jax.P(None, *self.sharding.spec)
        sharding = jax.sharding.NamedSharding(self.sharding.mesh, spec)
        return self._replace(shape=(length, *self.shape), sharding=sharding)


def marked_types(plan: Plan) -> list[list[ArrayType]]:
    """The types of the arrays that `evaluate` hands out."""
    pairs = zip(plan.jaxpr.eqns, plan.steps, strict=True)
    return [types for eqn, step in pairs if step.outputs for types in _types_in(eqn, step)]


def loops_around(plan: Plan) -> list[tuple[int, ...]]:
    """For each tag, the lengths of the scans around it, the outermost first."""
    lengths = []
    for eqn, step in zip(plan.jaxpr.eqns, plan.steps, strict=True):
        here = (eqn.params["length"],) if eqn.primitive is primitives.scan_p else ()
        inner = [(*here, *more) for plan in step.inner for more in loops_around(plan)]
        lengths += inner or [()] * len(step.outputs)
    return lengths


def _types_in(eqn: Any, step: Step) -> list[list[ArrayType]]:
    if step.operand is not None:
        x, out = eqn.invars[step.operand].aval, eqn.outvars[0].aval
        if step.summary is None:
            return [[type_of(x), type_of(out)]]
        given = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
        return [[type_of(aval) for aval in jax.make_jaxpr(step.summary)(given).out_avals]]
    if step.result or kind(eqn)[0] in (tag_p, primitives.name_p):
        return [[type_of(atom.aval) for atom in eqn.outvars]]
    inner = [types for plan in step.inner for types in marked_types(plan)]
    if eqn.primitive is primitives.scan_p:
        return [[kind.stacked(eqn.params["length"]) for kind in types] for types in inner]
    return inner


def type_of(aval: Any) -> ArrayType:
    return ArrayType(aval.shape, aval.dtype, aval.sharding, aval.manual_axis_type.varying)


def _refuse(eqn: Any, step: Step, args: list, edits: list[Edit]) -> tuple[list[Any], Marked]:
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
    primitives.name_p: _name,
    primitives.jit_p: _jit,
    primitives.closed_call_p: _inline,
    primitives.remat_p: _checkpoint,
    primitives.scan_p: _scan,
    primitives.cond_p: _cond,
}
# Primitives inside which values can be captured.
supported = frozenset(_rules)
