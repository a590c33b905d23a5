"""The same function in float64: what float noise does not survive and a leak does.

A difference of a few ulps is either rounding or a weak leak, and only more precision can tell.
Re-running the user's function on float64 inputs is not enough: parameters held in a closure
stay float32, a `scan` whose carry starts as float32 refuses float64, and a cast inside the
model throws the precision away again. So the function is traced at its own dtypes and the
trace is evaluated with every float widened. What was `astype(float32)` keeps float64.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

# These hand their operands to code that expects the dtypes it was traced with.
_OPAQUE = ("callback", "pallas_call", "ffi_call", "shard_map", "hi_primitive")
_INNER = ("jaxpr", "call_jaxpr", "fun_jaxpr")
# These are bound again with a wider body; every other inner jaxpr is a call, to be inlined.
_BODIES = ("scan", "while", "cond")


def trace(fn: Callable, leaves: Sequence[Any]) -> jex.ClosedJaxpr:
    """The jaxpr of `fn`, retraced at each call: JAX would give a second trace from its cache."""
    return jax.make_jaxpr(lambda *args: fn(*args))(*leaves)


def widen(closed: jex.ClosedJaxpr) -> Callable[..., tuple[Array, ...]]:
    """A function of the same leaves that evaluates `closed` with every float in float64.

    Call it under `jax.enable_x64(True)`.
    """

    def wide(*leaves: Array) -> tuple[Array, ...]:
        return tuple(_evaluate(closed, [_wide(leaf) for leaf in leaves]))

    return wide


def float_dtypes(closed: jex.ClosedJaxpr) -> set[np.dtype]:
    """Every real float dtype that a value of the traced function has, complex as its parts."""
    found = set()
    for jaxpr in _all_jaxprs(_open(closed)):
        for var in [*jaxpr.invars, *jaxpr.constvars, *(v for e in jaxpr.eqns for v in e.outvars)]:
            dtype = getattr(_aval(var), "dtype", None)
            if dtype is not None and jnp.issubdtype(dtype, jnp.inexact):
                found.add(np.dtype(jnp.finfo(dtype).dtype))
    return found


def opaque_parts(closed: jex.ClosedJaxpr) -> set[str]:
    """The names of the operations that `widen` leaves in their own precision.

    But for bit casts: they occur in every draw of random floats, and those do not depend on x.
    """
    equations = (e for jaxpr in _all_jaxprs(_open(closed)) for e in jaxpr.eqns)
    return {e.primitive.name for e in equations if _is_opaque(e)} - {"bitcast_convert_type"}


def same_trace(one: jex.ClosedJaxpr, two: jex.ClosedJaxpr) -> bool:
    """Whether two traces are equal, constants included. False where that cannot be told."""
    consts_one, consts_two = _all_consts(one), _all_consts(two)
    return (
        str(one) == str(two)
        and len(consts_one) == len(consts_two)
        and all(_same_bits(a, b) for a, b in zip(consts_one, consts_two, strict=True))
    )


def _evaluate(closed: Any, args: Sequence[Array]) -> list[Array]:
    jaxpr = _open(closed)
    consts = [_wide(const) for const in _consts(closed)]
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))

    def read(atom):
        return _wide(atom.val) if isinstance(atom, jex.Literal) else values[atom]

    for eqn in jaxpr.eqns:
        outs = _equation(eqn, [read(atom) for atom in eqn.invars])
        values.update(zip(eqn.outvars, map(_wide, outs), strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _equation(eqn: jex.JaxprEqn, args: list[Array]) -> Sequence[Array]:
    name, params = eqn.primitive.name, eqn.params
    if _is_opaque(eqn):
        dtypes = [_aval(atom).dtype for atom in eqn.invars]
        return _bind(eqn, list(map(_narrow, args, dtypes)), params)
    if name == "reduce_precision":
        return args
    inner = next((params[key] for key in _INNER if key in params), None)
    if inner is not None and name not in _BODIES:
        return _evaluate(inner, args)
    return _bind(eqn, args, {key: _wide_param(key, value) for key, value in params.items()})


def _bind(eqn: jex.JaxprEqn, args: Sequence[Array], params: dict) -> Sequence[Array]:
    outs = eqn.primitive.bind(*args, **eqn.primitive.get_bind_params(params))
    return outs if eqn.primitive.multiple_results else [outs]


def _is_opaque(eqn: jex.JaxprEqn) -> bool:
    # A bit cast reads the bits of its own dtype; `lax.reduce` also holds a traced function.
    name = eqn.primitive.name
    return name in ("bitcast_convert_type", "reduce") or any(part in name for part in _OPAQUE)


def _wide_param(key: str, value: Any) -> Any:
    if isinstance(value, tuple) or _is_jaxpr(value):
        return jax.tree.map(_wide_jaxpr, value, is_leaf=_is_jaxpr)
    if key == "precision":
        return None
    return _wide_dtype(value) if isinstance(value, np.dtype) else value


def _wide_jaxpr(closed: Any) -> Any:
    if not _is_jaxpr(closed):
        return closed
    avals = [_aval(var) for var in _open(closed).invars]
    structs = [
        jax.ShapeDtypeStruct(a.shape, _wide_dtype(a.dtype), sharding=a.sharding) for a in avals
    ]
    wide = jax.make_jaxpr(lambda *args: _evaluate(closed, args))(*structs)
    return wide if isinstance(closed, jex.ClosedJaxpr) else _open(wide)


def _wide_dtype(dtype: np.dtype) -> np.dtype:
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return np.dtype(np.complex128)
    return np.dtype(np.float64) if jnp.issubdtype(dtype, jnp.floating) else dtype


def _wide(value: Any) -> Array:
    value = jnp.asarray(value)
    return _narrow(value, _wide_dtype(value.dtype))


def _narrow(value: Array, dtype: np.dtype) -> Array:
    return value if value.dtype == dtype else jax.lax.convert_element_type(value, dtype)


def _aval(atom: Any) -> Any:
    return atom.aval


# JAX 0.12 has one class where 0.10 has two, Jaxpr and ClosedJaxpr.
def _open(closed: Any) -> jex.Jaxpr:
    return closed.jaxpr if isinstance(closed, jex.ClosedJaxpr) else closed


def _consts(closed: Any) -> Sequence[Any]:
    return getattr(closed, "consts", ())


def _all_jaxprs(jaxpr: jex.Jaxpr) -> Iterator[jex.Jaxpr]:
    yield jaxpr
    for inner in jex.subjaxprs(jaxpr):
        yield from _all_jaxprs(inner)


def _all_consts(closed: Any) -> list[Any]:
    consts = list(_consts(closed))
    for eqn in _open(closed).eqns:
        consts += [atom.val for atom in eqn.invars if isinstance(atom, jex.Literal)]
        for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_jaxpr):
            consts += _all_consts(value) if _is_jaxpr(value) else []
    return consts


def _is_jaxpr(value: Any) -> bool:
    return isinstance(value, jex.Jaxpr | jex.ClosedJaxpr)


def _same_bits(a: Any, b: Any) -> bool:
    if jnp.issubdtype(jnp.asarray(a).dtype, jax.dtypes.prng_key):
        a, b = jax.random.key_data(a), jax.random.key_data(b)
    return np.array_equal(np.asarray(a), np.asarray(b), equal_nan=False) or a is b
