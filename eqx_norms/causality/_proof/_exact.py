"""Which results of constants are the same in every compilation: those that nothing rounds."""

import math
from collections.abc import Callable
from typing import Any

import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np

from ._indexing import largest_index, order_matters
from ._known import tiny

# These give a number that was there, a whole one, or one with another sign.
_ROUND_NOTHING = (
    "abs bitcast_convert_type broadcast broadcast_in_dim ceil clamp concatenate copy copy_p cummax "
    "cummin device_put dynamic_slice dynamic_update_slice floor gather imag iota max min name neg "
    "nextafter optimization_barrier pad real reduce_max reduce_min reshape rev round scatter "
    "select_n sharding_constraint sign slice sort split squeeze stop_gradient tile transpose"
).split()
_INDEXED = ("dynamic_slice", "dynamic_update_slice", "gather", "scatter")
_SUMS = ("reduce_sum", "cumsum", "dot_general")
# Any number, or whole ones that rounding or the platform decides.
_LEFT_OPEN = ("rng_uniform", "approx_top_k", "empty", "empty2", "geqp3", "lu")
_ROUNDED = ("add", "sub", "add_any", "mul", "div", *_SUMS)  # unless the numbers are short

# Of integers and bools, which wrap in NumPy as everywhere, NumPy gives the same bits sooner.
_IN_NUMPY: dict[str, Callable] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "max": np.maximum,
    "min": np.minimum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "not": np.invert,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "eq": np.equal,
    "ne": np.not_equal,
    "select_n": lambda which, *cases: np.where(which, *reversed(cases)),
    "convert_element_type": lambda x: x,
}


def in_numpy(eqn: jex.JaxprEqn, args: list[np.ndarray]) -> np.ndarray | None:
    """The result of an operation on integers and bools, or of a cast that is none."""
    name = eqn.primitive.name
    *dtypes, out = map(_dtype, [*eqn.invars, eqn.outvars[0]])
    if name == "convert_element_type" and dtypes == [out]:
        return args[0]
    by_number = name == "select_n" and (len(args) != 3 or dtypes[0] != np.bool_)
    if name not in _IN_NUMPY or by_number or not all(map(_is_whole, [*dtypes, out])):
        return None
    args = [arg.astype(dtype) for arg, dtype in zip(args, dtypes, strict=True)]
    with np.errstate(over="ignore"):
        return np.asarray(_IN_NUMPY[name](*args)).astype(out)


def _dtype(atom: Any) -> Any:
    return atom.aval.dtype


def _is_whole(dtype: Any) -> bool:
    return isinstance(dtype, np.dtype) and dtype.kind in "iub"


def exact(eqn: jex.JaxprEqn, args: list[Any], out: Any) -> bool:
    """Whether no rounding was needed. Of integers and bools none is, but at a cast from floats."""
    name, dtype = eqn.primitive.name, out.dtype
    if name in _LEFT_OPEN:
        return False
    if name == "sort" and not eqn.params["is_stable"] and len(args) > eqn.params["num_keys"]:
        return False
    if name.replace("-", "_").startswith(_INDEXED) and any(map(_out_of_range, args[1:])):
        return False
    if name.startswith("scatter") and _scattered_anyhow(eqn, args):
        return False
    if name == "convert_element_type":
        return _converted(np.asarray(args[0]), out)
    if not jnp.issubdtype(dtype, jnp.inexact):
        return True
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return name in _ROUND_NOTHING
    if name in _ROUND_NOTHING:
        return True
    if name not in _ROUNDED:
        return False
    if not np.isfinite(np.asarray(out).astype(np.float64)).all():
        return False
    numbers = [np.asarray(arg).astype(np.float64) for arg in args]
    if not all(np.isfinite(a).all() for a in numbers):
        return False
    digits = jnp.finfo(dtype).nmant + 1
    small = np.abs(np.asarray(out).astype(np.float64))
    if ((small < tiny(dtype)) & (small > 0)).any():
        return False
    if name in ("add", "sub", "add_any"):
        a, b = np.broadcast_arrays(*numbers)
        unit = np.minimum(_unit(a), _unit(b))
        short = np.abs(a) + np.abs(b) <= np.ldexp(1.0, digits) * unit
        return bool((short | (a == 0) | (b == 0)).all())
    if name == "mul":
        a, b = np.broadcast_arrays(*numbers)
        zero = (a == 0) | (b == 0)
        return bool((zero | ((_digits(a) + _digits(b) <= digits) & (small > 0))).all())
    if name == "div":
        a, b = np.broadcast_arrays(*numbers)
        return bool(((b != 0) & ((a == 0) | ((_digits(b) == 1) & (small > 0)))).all())
    return _summed(numbers, digits)


def _scattered_anyhow(eqn: jex.JaxprEqn, args: list[Any]) -> bool:
    """Whether a function is applied, which may round, or the order of the updates is left open."""
    applies = eqn.primitive.name == "scatter" and eqn.params["update_jaxpr"] is not None
    return applies or order_matters(eqn, *map(np.asarray, args))


def _out_of_range(index: Any) -> bool:
    """Whether compilers differ on what it means as an index."""
    index = np.asarray(index)
    if not jnp.issubdtype(index.dtype, jnp.integer):
        return False
    return bool((index > min(largest_index(index.dtype), jnp.iinfo(index.dtype).max)).any())


def _converted(value: np.ndarray, out: Any) -> bool:
    """A cast that loses nothing: whole numbers, and floats that the new dtype has."""
    if out.dtype == jnp.bool_ or value.dtype == np.bool_:
        return True
    old, new = jnp.issubdtype(value.dtype, jnp.inexact), jnp.issubdtype(out.dtype, jnp.inexact)
    if not old and not new:
        return True
    if jnp.issubdtype(value.dtype, jnp.complexfloating) or jnp.issubdtype(
        out.dtype, jnp.complexfloating
    ):
        return np.array_equal(np.asarray(out), value)
    after, before = (np.asarray(a).astype(np.float64) for a in (out, value))
    same = (after == before) & (np.abs(before) <= 2.0**53) if not old else after == before
    if new:
        overflowed = np.isinf(after) & ~np.isnan(before)
        normal = (np.abs(before) >= tiny(out.dtype)) | (before == 0)
        return bool(((same & normal) | overflowed).all())
    whole = np.trunc(before) == after
    return bool((whole & (np.abs(before) <= 2.0**31 - 129)).all())


def _summed(numbers: list[np.ndarray], digits: int) -> bool:
    """Small whole numbers, whose sums are exact in any order and in what matrix units round to."""
    whole = all((a == np.round(a)).all() and (np.abs(a) <= 256).all() for a in numbers)
    if not whole:
        return False
    count = max((a.size for a in numbers), default=0)
    largest = math.prod(float(np.abs(a).max(initial=0)) for a in numbers)
    return count * largest <= 2.0**digits


def _unit(a: np.ndarray) -> np.ndarray:
    """The value of the last digit that is not zero; infinite for 0."""
    fraction, exponent = np.frexp(a)
    whole = np.ldexp(fraction, 53).astype(np.int64)
    lowest = (whole & -whole).astype(np.float64)
    return np.where(whole == 0, np.inf, np.ldexp(lowest, exponent - 53))


def _digits(a: np.ndarray) -> np.ndarray:
    """How many binary digits there are from the first to the last that is not zero; of 0 none."""
    fraction, _ = np.frexp(a)
    whole = np.ldexp(np.abs(fraction), 53).astype(np.int64)
    lowest = np.where(whole == 0, 1, whole & -whole)
    return np.where(whole == 0, 0, 53 - np.log2(lowest.astype(np.float64)))
