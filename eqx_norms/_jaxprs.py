"""How equations hold further jaxprs, where that differs by operation or by JAX version."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.extend.core as jex

# These hand their operands to code that expects what it was traced with.
_FOREIGN = ("callback", "pallas_call", "ffi_call", "shard_map", "hi_primitive")
# The last two are those of jax.custom_batching and of linear_call.
_INNER = ("jaxpr", "call_jaxpr", "fun_jaxpr", "call", "callee")
# Their bodies do not take the operands one by one.
_BODIES = ("scan", "while", "cond")


def is_jaxpr(value: Any) -> bool:
    return isinstance(value, jex.Jaxpr | jex.ClosedJaxpr)


# JAX 0.12 has one class where 0.10 has two, Jaxpr and ClosedJaxpr.
def opened(closed: Any) -> Any:
    return closed.jaxpr if isinstance(closed, jex.ClosedJaxpr) else closed


def is_foreign(eqn: jex.JaxprEqn) -> bool:
    return any(part in eqn.primitive.name for part in _FOREIGN)


def is_ref(value: Any) -> bool:
    """Whether a variable of a jaxpr, or a constant, is a `jax.Ref`."""
    aval = value.aval if isinstance(value, jex.Var | jex.Literal) else jax.typeof(value)
    return type(aval).__name__ == "AbstractRef"  # JAX gives the type no public name


def first_ref(closed: Any) -> jex.JaxprEqn | None:
    """The first equation that makes or uses a Ref, except for those inside kernels."""
    for eqn in opened(closed).eqns:
        if is_foreign(eqn):
            continue
        if any(map(is_ref, [*eqn.invars, *eqn.outvars])):
            return eqn
        for inner in jex.jaxprs_in_params(eqn.params):
            if (found := first_ref(inner)) is not None:
                return found
    return None


def called(eqn: jex.JaxprEqn) -> Any:
    """The body of a call, which takes the operands and gives the results one by one, or `None`.

    So a `lax.reduce` is none, though it holds a jaxpr: that is of two entries.
    """
    if eqn.primitive.name in _BODIES or is_foreign(eqn):
        return None
    inner = next((eqn.params[key] for key in _INNER if key in eqn.params), None)
    if not is_jaxpr(inner):
        return None
    body = opened(inner)
    same = _shapes(eqn.invars) == _shapes(body.invars)
    return inner if same and _shapes(eqn.outvars) == _shapes(body.outvars) else None


def _shapes(atoms: Sequence[Any]) -> list[tuple[int, ...] | None]:
    return [getattr(atom.aval, "shape", None) for atom in atoms]


def scan_counts(eqn: jex.JaxprEqn) -> tuple[int, int]:
    """The numbers of constants and of carried arrays of a `scan`.

    A carry has the same rank inside the loop and outside, what is scanned over has one axis less
    inside: counted so, because each JAX version keeps the numbers in another parameter.
    """
    body = opened(eqn.params["jaxpr"])
    carried = _count_equal_rank(eqn.outvars, body.outvars)
    return _count_equal_rank(eqn.invars, body.invars) - carried, carried


def _count_equal_rank(outside: Sequence[Any], inside: Sequence[Any]) -> int:
    return sum(len(a.aval.shape) == len(b.aval.shape) for a, b in zip(outside, inside, strict=True))
