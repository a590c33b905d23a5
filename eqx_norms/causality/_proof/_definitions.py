"""Operations that stand for a program, which the proof goes through in their place."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
from jax.sharding import AbstractMesh, use_abstract_mesh

from ..._jaxprs import first_ref
from ._devices import SHARD_MAP, at_line_of, on_one_device


def definition(eqn: jex.JaxprEqn) -> Any:
    """The program, as a jaxpr of the operands; of a `shard_map`, of the number of a device before
    them. `None` if there is none, or none that JAX can trace.
    """
    name = eqn.primitive.name
    if name not in DEFINED:
        return None
    alike: Callable[[Any], Any] = lambda aval: jax.ShapeDtypeStruct(aval.shape, aval.dtype)
    try:
        avals = [alike(v.aval) for v in eqn.invars]
        if name == SHARD_MAP:
            avals = [jax.ShapeDtypeStruct((), jnp.int32), *avals]
        with use_abstract_mesh(AbstractMesh((), ())), at_line_of(eqn):
            found = jax.make_jaxpr(functools.partial(DEFINED[name], eqn))(*avals)
    except Exception:  # of an operation that JAX has no rule for, each kind has its own
        return None
    return found if first_ref(found) is None else None


def _expanded(eqn: jex.JaxprEqn, *args: Any) -> list[Any]:
    """Of jax.experimental.hijax, whose operations are lowered by `expand`."""
    operation = eqn.params["_prim"]
    return jax.tree.leaves(operation.expand(*jax.tree.unflatten(operation.in_tree, args)))


def _solved(eqn: jex.JaxprEqn, *args: Any) -> list[Any]:
    """By the function that solves, which is given what it holds and the right-hand side."""
    counts, solve = eqn.params["const_lengths"], eqn.params["jaxprs"].solve
    start = counts.matvec + counts.vecmat
    held, right = args[start : start + counts.solve], args[sum(counts) :]
    return jex.jaxpr_as_fun(solve)(*held, *right)


DEFINED: dict[str, Callable] = {
    SHARD_MAP: on_one_device,
    "call_hi_primitive": _expanded,
    "custom_linear_solve": _solved,
}
