"""The same function in another precision: what float noise does not survive and a leak does.

A difference is either rounding or a leak, and only a second precision can tell. Re-running the
user's function on float64 inputs is not enough: parameters held in a closure stay float32, a
`scan` whose carry starts as float32 refuses float64, and a cast inside the model throws the
precision away again. So the function is traced at its own dtypes and the trace is evaluated
with every float in another. What was `astype(float32)` keeps float64.

But for what is coarser than 16 bits: a cast to float8 or float4 is quantisation, which is part
of what the function says, as a cast to an integer is. Such values are held in the wider dtype
and rounded to the grid of their own.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from .._jaxprs import called, is_foreign, is_jaxpr, is_ref, opened, scan_counts
from .._processes import fetched
from ._host import in_precision
from ._loops import BODIES, rewritten

# These hold a traced function of single entries, or read the bits of a dtype.
_NARROW = ("bitcast_convert_type", "reduce", "reduce_window")
_FINE_MANTISSA = 7  # that of bfloat16
_INPUT = ""
_SHARD_MAP = "shard_map"


def trace(fn: Callable, leaves: Sequence[Any]) -> jex.ClosedJaxpr:
    """The jaxpr of `fn`, retraced at each call: JAX would give a second trace from its cache."""
    return jax.make_jaxpr(lambda *args: fn(*args))(*leaves)


class _How(NamedTuple):
    """Every float becomes one of `to`; a constant is what `constant` makes of it.

    `calls` are the equations that this one is inside of, for `watch`.
    """

    to: np.dtype
    constant: Callable[[Any], Any]
    watch: Callable[..., Sequence[Array]] | None = None
    calls: tuple[jex.JaxprEqn, ...] = ()


def widen(
    closed: jex.ClosedJaxpr,
    to: Any = np.float64,
    constant: Callable[[Any], Any] = lambda c: c,
    watch: Callable[..., Sequence[Array]] | None = None,
) -> Callable[..., tuple[Array, ...]]:
    """A function of the same leaves that evaluates `closed` with every float as `to`.

    `constant` may put others in the place of the constants, and `watch(eqn, args, outs, calls)` in
    that of the results of each operation; it sees loops and branches as a whole, and calls never.
    Call it under `jax.enable_x64(True)`.
    """
    how = _How(np.dtype(to), constant, watch)

    def wide(*leaves: Array) -> tuple[Array, ...]:
        return tuple(_evaluate(closed, [_wide(leaf, how.to) for leaf in leaves], how))

    return wide


def float_dtypes(closed: jex.ClosedJaxpr) -> set[np.dtype]:
    """Every real float dtype that a value of the traced function has, complex as its parts."""
    found = set()
    for jaxpr in _all_jaxprs(opened(closed)):
        for var in [*jaxpr.invars, *jaxpr.constvars, *(v for e in jaxpr.eqns for v in e.outvars)]:
            dtype = getattr(_aval(var), "dtype", None)
            if dtype is not None and jnp.issubdtype(dtype, jnp.inexact):
                found.add(np.dtype(jnp.finfo(dtype).dtype))
    return found


def coarsest(*functions: jex.ClosedJaxpr) -> np.dtype:
    """The least precise float in the functions, wherever it stands; float32 if they have none.

    A float32 model that multiplies in bfloat16 rounds as bfloat16 does. But casts to float8 and
    float4 are quantisation: a noise level of their size would hide everything.
    """
    found = {dtype for closed in functions for dtype in float_dtypes(closed)}
    rounded = {dtype for dtype in found if not is_quantised(dtype)}
    return max(rounded, key=lambda dtype: jnp.finfo(dtype).eps, default=np.dtype(np.float32))


def float_constants(closed: jex.ClosedJaxpr) -> list[np.ndarray]:
    """The constants of the traced function that are floats or complex, those in loops included."""
    consts = [fetched(c) for c in _all_consts(closed) if not is_key(c)]
    return [const for const in consts if jnp.issubdtype(const.dtype, jnp.inexact)]


def is_quantised(dtype: Any) -> bool:
    """Whether `dtype` is a float so coarse that a cast to it is no mere rounding."""
    return jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 16


def opaque_parts(closed: jex.ClosedJaxpr) -> set[str]:
    """The names of the operations that `widen` leaves in their own precision, if it matters.

    It does where they read an input and an output reads them. So a debug callback does not
    count, nor the bit casts in every draw of random floats, nor `equinox.error_if`.
    """
    outs = _origins(closed, [frozenset([_INPUT]) for _ in opened(closed).invars])
    return set(frozenset().union(*outs) - {_INPUT})


def same_trace(one: jex.ClosedJaxpr, two: jex.ClosedJaxpr) -> bool:
    """Whether two traces are equal, constants included. False where that cannot be told."""
    consts_one, consts_two = _all_consts(one), _all_consts(two)
    return (
        str(one) == str(two)
        and len(consts_one) == len(consts_two)
        and all(_same_bits(a, b) for a, b in zip(consts_one, consts_two, strict=True))
    )


def _evaluate(closed: Any, args: Sequence[Array], how: _How) -> list[Array]:
    jaxpr = opened(closed)
    consts = [_wide(how.constant(const), how.to) for const in _consts(closed)]
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))

    def read(atom):
        if isinstance(atom, jex.Literal):
            return _wide(how.constant(atom.val), how.to)
        return values[atom]

    for eqn in jaxpr.eqns:
        if not eqn.outvars and not any(map(is_ref, eqn.invars)):
            continue  # a debug callback: once is enough
        outs = _equation(eqn, [read(atom) for atom in eqn.invars], how)
        for var, out in zip(eqn.outvars, outs, strict=True):
            values[var] = out if is_ref(var) else _wide(_on_grid(out, _aval(var)), how.to)
    return [read(atom) for atom in jaxpr.outvars]


def _equation(eqn: jex.JaxprEqn, args: list[Array], how: _How) -> Sequence[Array]:
    name, params = eqn.primitive.name, eqn.params
    if name == _SHARD_MAP:
        return _shard_mapped(eqn, how._replace(watch=None))(*args)
    if _is_opaque(eqn):
        return narrowed(eqn, args)
    if name == "reduce_precision" and params["mantissa_bits"] >= _FINE_MANTISSA:
        return args
    inner = called(eqn)
    if inner is not None:
        return _evaluate(inner, args, how._replace(calls=(*how.calls, eqn)))
    inside = how._replace(watch=None)
    if (beside := in_precision(eqn, how.to)) is not None:
        outs = beside(*args)
    elif name in BODIES and any(map(is_ref, args)):
        run = lambda body, args, _: (_evaluate(body, args, inside), None)
        outs = rewritten(eqn, args, run)[0]
    else:
        params = {key: _wide_param(key, value, inside) for key, value in params.items()}
        outs = _bind(eqn, args, params)
    return outs if how.watch is None else how.watch(eqn, args, outs, how.calls)


def narrowed(eqn: jex.JaxprEqn, args: Sequence[Array]) -> Sequence[Array]:
    """What an equation gives in the precision in which it was traced."""
    return _bind(eqn, list(map(_narrow, args, map(dtype_of, eqn.invars))), eqn.params)


def dtype_of(atom: Any) -> Any:
    """That of a variable or a literal of a trace."""
    return _aval(atom).dtype


def _shard_mapped(eqn: jex.JaxprEqn, how: _How) -> Callable[..., Sequence[Array]]:
    """The same map of what is widened inside it."""
    params = eqn.params
    return jax.shard_map(
        lambda *args: tuple(_evaluate(params["jaxpr"], args, how)),
        mesh=params["mesh"],
        in_specs=params["in_specs"],
        out_specs=params["out_specs"],
        axis_names=params["newly_manual_axes"],
        check_vma=params["check_vma"],
    )


def _bind(eqn: jex.JaxprEqn, args: Sequence[Array], params: dict) -> Sequence[Array]:
    outs = eqn.primitive.bind(*args, **eqn.primitive.get_bind_params(params))
    return outs if eqn.primitive.multiple_results else [outs]


def _is_opaque(eqn: jex.JaxprEqn) -> bool:
    name = eqn.primitive.name
    foreign = is_foreign(eqn) and name != _SHARD_MAP and in_precision(eqn) is None
    return name in _NARROW or foreign


def _origins(closed: Any, ins: Sequence[frozenset[str]]) -> list[frozenset[str]]:
    """For every output what it was made of: `_INPUT`, opaque operations, or neither."""
    jaxpr = opened(closed)
    origins = dict(zip(jaxpr.invars, ins, strict=True))

    def read(atom):
        return frozenset() if isinstance(atom, jex.Literal) else origins.get(atom, frozenset())

    for eqn in jaxpr.eqns:
        refs = [atom for atom in eqn.invars if is_ref(atom)]
        outs = _equation_origins(eqn, [read(atom) for atom in eqn.invars], bool(refs))
        origins.update(zip(eqn.outvars, outs, strict=True))
        # What was put into a Ref: all that went in there.
        written = frozenset().union(*outs, *map(read, eqn.invars))
        origins.update({ref: written for ref in refs})
    return [read(atom) for atom in jaxpr.outvars]


def _equation_origins(
    eqn: jex.JaxprEqn, ins: list[frozenset[str]], whole: bool = False
) -> Sequence[frozenset[str]]:
    """`whole`: results may be made of all that the equation holds, as where it writes to Refs."""
    inner = None if _is_opaque(eqn) or whole else called(eqn)
    if eqn.primitive.name == _SHARD_MAP and not whole:
        inner = eqn.params["jaxpr"]
    if inner is not None:
        return _origins(inner, ins)
    if eqn.primitive.name == "scan" and not whole:
        return _scan_origins(eqn, ins)
    made_of = frozenset() if _only_raises(eqn) else frozenset().union(*ins)
    if made_of and _is_opaque(eqn):
        made_of |= {eqn.primitive.name}
    elif made_of:
        # A loop or a branch as a whole: every result of it may be made of everything in it.
        for body in jax.tree.leaves(list(eqn.params.values()), is_leaf=is_jaxpr):
            if is_jaxpr(body):
                made_of = made_of.union(*_origins(body, [made_of] * len(opened(body).invars)))
    return [made_of] * len(eqn.outvars)


def _only_raises(eqn: jex.JaxprEqn) -> bool:
    """Whether this is a callback of `equinox.error_if`, which raises or is not run at all."""
    callback = getattr(eqn.params.get("callback"), "callback_func", None)
    return getattr(callback, "__module__", None) == eqx.error_if.__module__


def _scan_origins(eqn: jex.JaxprEqn, ins: list[frozenset[str]]) -> list[frozenset[str]]:
    first, carries = scan_counts(eqn)
    last = first + carries
    while True:
        outs = _origins(eqn.params["jaxpr"], ins)
        carry = [a | b for a, b in zip(ins[first:last], outs[:carries], strict=True)]
        if carry == ins[first:last]:
            return outs
        ins = [*ins[:first], *carry, *ins[last:]]


def _wide_param(key: str, value: Any, how: _How) -> Any:
    if isinstance(value, tuple) or is_jaxpr(value):
        return jax.tree.map(lambda leaf: _wide_jaxpr(leaf, how), value, is_leaf=is_jaxpr)
    if key == "precision":
        return None
    return _wide_dtype(value, how.to) if isinstance(value, np.dtype) else value


def _wide_jaxpr(closed: Any, how: _How) -> Any:
    if not is_jaxpr(closed):
        return closed
    avals = [_aval(var) for var in opened(closed).invars]
    structs = [
        jax.ShapeDtypeStruct(
            a.shape,
            _wide_dtype(a.dtype, how.to),
            sharding=a.sharding,
            manual_axis_type=a.manual_axis_type,
        )
        for a in avals
    ]
    wide = jax.make_jaxpr(lambda *args: _evaluate(closed, args, how))(*structs)
    return wide if isinstance(closed, jex.ClosedJaxpr) else opened(wide)


def _wide_dtype(dtype: Any, to: np.dtype) -> Any:
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return np.result_type(to, np.complex64)
    return to if jnp.issubdtype(dtype, jnp.floating) else dtype


def _wide(value: Any, to: np.dtype) -> Array:
    value = jnp.asarray(value)
    return _narrow(value, _wide_dtype(value.dtype, to))


def _on_grid(value: Array, aval: Any) -> Array:
    """`value`, rounded as it was in the trace if it was quantised there."""
    return _narrow(value, aval.dtype) if is_quantised(aval.dtype) else value


def _narrow(value: Array, dtype: Any) -> Array:
    return value if value.dtype == dtype else jax.lax.convert_element_type(value, dtype)


def _aval(atom: Any) -> Any:
    return atom.aval


def _consts(closed: Any) -> Sequence[Any]:
    return getattr(closed, "consts", ())


def _all_jaxprs(jaxpr: jex.Jaxpr) -> Iterator[jex.Jaxpr]:
    yield jaxpr
    for inner in jex.subjaxprs(jaxpr):
        yield from _all_jaxprs(inner)


def _all_consts(closed: Any) -> list[Any]:
    consts = list(_consts(closed))
    for eqn in opened(closed).eqns:
        consts += [atom.val for atom in eqn.invars if isinstance(atom, jex.Literal)]
        for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=is_jaxpr):
            consts += _all_consts(value) if is_jaxpr(value) else []
    return consts


def is_key(value: Any) -> bool:
    """Whether `value` is an array of random keys."""
    # Not by `jnp.asarray`: a literal out of a `jax.pmap` has the mesh of that in its type, and JAX
    # would keep what it makes of it for every array of this shape.
    return jnp.issubdtype(getattr(value, "dtype", type(value)), jax.dtypes.prng_key)


def _same_bits(a: Any, b: Any) -> bool:
    if is_key(a):
        a, b = jax.random.key_data(a), jax.random.key_data(b)
    return a is b or np.array_equal(fetched(a), fetched(b), equal_nan=False)
