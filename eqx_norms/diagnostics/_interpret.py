"""Evaluate a jaxpr and hand out what its tags mark, adding a shift to each on the way.

Only equations with a tag inside are taken apart; JAX evaluates all others as they stand, so that
custom derivative rules stay in force.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import eval_jaxpr
from jax.extend.core import DebugInfo, Jaxpr, Literal, jaxprs_in_params, primitives

from ._tag import Output, tag_p

# One entry a tag, in program order, each with one entry an array that the tag marks.
Marked = list[list[Any]]


def outputs_in(jaxpr: Any, recomputed: bool = False) -> list[Output]:
    """What the tags in `jaxpr` mark, in program order.

    **Arguments:**

    - `recomputed`: count also the tags that a differentiated checkpoint computes anew in its
        backward pass. Each of these has its twin in the forward pass.
    """
    return [output for eqn in jaxpr.eqns for output in _outputs_of(eqn, recomputed)]


def _outputs_of(eqn: Any, recomputed: bool = False) -> list[Output]:
    if eqn.primitive is tag_p:
        return [eqn.params["output"]]
    if eqn.primitive is primitives.remat_p and eqn.params["differentiated"] and not recomputed:
        return []
    inner = _inner_jaxprs(eqn.params)
    return [output for jaxpr in inner for output in outputs_in(jaxpr, recomputed)]


def _inner_jaxprs(params: dict[str, Any]) -> Iterator[Any]:
    yield from jaxprs_in_params(params)
    # The newer kind of primitive, which `jax_remat3` and `jax_custom_vjp3` switch on, keeps its
    # parameters one level down, some of them in a `jax.stages.Traced`.
    if "_prim" in params:
        inner = params["_prim"].params
        yield from jaxprs_in_params({k: getattr(v, "jaxpr", v) for k, v in inner.items()})


def evaluate(jaxpr: Any, consts: Any, args: Any, shifts: Marked) -> tuple[list[Any], Marked]:
    """Evaluate `jaxpr`; return its outputs and the arrays that its tags mark.

    **Arguments:**

    - `shifts`: for every marked array what to add to it, or `None`.
    """
    env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
    marked = []
    for eqn in jaxpr.eqns:
        count = len(_outputs_of(eqn))
        here, shifts = shifts[:count], shifts[count:]
        rule = _rules.get(eqn.primitive, _refuse) if count else _as_it_stands
        outs, found = rule(eqn, [_read(env, atom) for atom in eqn.invars], here)
        env.update(zip(eqn.outvars, outs, strict=True))
        marked += found
    return [_read(env, atom) for atom in jaxpr.outvars], marked


def _read(env: dict, atom: Any) -> Any:
    return atom.val if isinstance(atom, Literal) else env[atom]


def _evaluate_inner(jaxpr: Any, args: Any, shifts: Marked) -> tuple[list[Any], Marked]:
    # Some primitives hold a jaxpr, some a closed one, and newer JAX has one type for both.
    return evaluate(getattr(jaxpr, "jaxpr", jaxpr), getattr(jaxpr, "consts", ()), args, shifts)


def _as_it_stands(eqn: Any, args: list, shifts: Marked) -> tuple[list[Any], Marked]:
    pairs = zip(eqn.invars, args, strict=True)
    inputs = {atom: x for atom, x in pairs if not isinstance(atom, Literal)}
    names = DebugInfo("capture", "", ("",) * len(inputs), ("",) * len(eqn.outvars))
    alone = Jaxpr((), list(inputs), eqn.outvars, [eqn], eqn.effects, names)
    return eval_jaxpr(alone, (), *inputs.values()), []


def _tag(eqn: Any, args: list, shifts: Marked) -> tuple[list[Any], Marked]:
    [shift] = shifts
    return [_shifted(x, dx) for x, dx in zip(args, shift, strict=True)], [args]


def _shifted(x: Any, dx: Any) -> Any:
    return x if dx is None else jax.lax.add(x, dx)


def _inline(eqn: Any, args: list, shifts: Marked) -> tuple[list[Any], Marked]:
    [jaxpr] = jaxprs_in_params(eqn.params)
    return _evaluate_inner(jaxpr, args, shifts)


def _jit(eqn: Any, args: list, shifts: Marked) -> tuple[list[Any], Marked]:
    def run(args, shifts):
        return _evaluate_inner(eqn.params["jaxpr"], args, shifts)

    run.__name__ = eqn.params["name"]
    return jax.jit(run, inline=eqn.params["inline"])(args, shifts)


def _checkpoint(eqn: Any, args: list, shifts: Marked) -> tuple[list[Any], Marked]:
    def run(args, shifts):
        return _evaluate_inner(eqn.params["jaxpr"], args, shifts)

    cse = eqn.params["prevent_cse"]
    prevent_cse = cse if isinstance(cse, bool) else any(cse)
    return jax.checkpoint(run, prevent_cse=prevent_cse, policy=eqn.params["policy"])(args, shifts)


def _scan(eqn: Any, args: list, shifts: Marked) -> tuple[list[Any], Marked]:
    body = eqn.params["jaxpr"]
    # A carry has the same rank inside the loop and outside, what is scanned over has one axis
    # less inside: counted so, for each JAX version keeps the numbers in another parameter.
    num_carry = _count_equal_rank(eqn.outvars, body.outvars)
    num_consts = _count_equal_rank(eqn.invars, body.invars) - num_carry
    consts, init = args[:num_consts], args[num_consts : num_consts + num_carry]

    def step(carry, x):
        xs, shifts = x
        outs, marked = _evaluate_inner(body, [*consts, *carry, *xs], shifts)
        return outs[:num_carry], (outs[num_carry:], marked)

    carry, (ys, marked) = jax.lax.scan(
        step,
        init,
        (args[num_consts + num_carry :], shifts),
        length=eqn.params["length"],
        reverse=eqn.params["reverse"],
        unroll=eqn.params["unroll"],
    )
    return [*carry, *ys], marked


def _count_equal_rank(outside: list, inside: list) -> int:
    return sum(len(a.aval.shape) == len(b.aval.shape) for a, b in zip(outside, inside, strict=True))


def _cond(eqn: Any, args: list, shifts: Marked) -> tuple[list[Any], Marked]:
    index, *operands = args
    branches = eqn.params["branches"]
    parts = []
    for branch in branches:
        count = len(outputs_in(branch))
        parts.append(shifts[:count])
        shifts = shifts[count:]

    def run(i, operands, parts):
        return _evaluate_inner(branches[i], operands, parts[i])

    missing = [_not_computed(run, i, operands, parts) for i in range(len(branches))]

    def branch(i):
        def run_branch(operands, parts):
            outs, marked = run(i, operands, parts)
            of_all = [*missing[:i], marked, *missing[i + 1 :]]
            return outs, [entry for of_branch in of_all for entry in of_branch]

        return run_branch

    return jax.lax.switch(index, [branch(i) for i in range(len(branches))], operands, parts)


def _not_computed(run: Callable, i: int, operands: list, parts: list) -> Marked:
    _, shapes = jax.eval_shape(lambda operands, parts: run(i, operands, parts), operands, parts)
    return jax.tree.map(_blank, shapes)


def _blank(shape: jax.ShapeDtypeStruct) -> jax.Array:
    # Not zero, which a statistic would take for an activation.
    inexact = jnp.issubdtype(shape.dtype, jnp.inexact)
    return jnp.full(shape.shape, jnp.nan if inexact else 0, shape.dtype)


def _refuse(eqn: Any, args: list, shifts: Marked) -> tuple[list[Any], Marked]:
    paths = ", ".join(sorted({repr(output.path) for output in _outputs_of(eqn)}))
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
