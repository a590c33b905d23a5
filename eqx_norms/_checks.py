"""What every layer asks of its arguments, and how it says so."""

import math
import numbers
import operator
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array

from ._real import Integer, Number

Param = Array | np.ndarray | None

# float8 and float4 would leave a normalised entry one or two digits, and some have no zero.
DTYPES = ("float16", "bfloat16", "float32", "float64")

# The default of the layers' `state`: None would be a state like any other.
no_state = object()


def check_shape(name: str, shape: Integer | Sequence[Integer]) -> tuple[int, ...]:
    try:
        sizes = tuple(map(operator.index, shape if isinstance(shape, Iterable) else [shape]))
    except TypeError:
        raise TypeError(f"`{name}(shape)` takes an int or ints; got {shape!r}.") from None
    if any(size < 0 for size in sizes):
        raise ValueError(
            f"`{name}(shape)` takes sizes that are 0 or above; got {shape!r}. "
            f"Give the shape of one example without batch axes, as in `{name}(768)`."
        )
    return sizes


def check_size(call: str, size: Integer, least: int = 1) -> int:
    try:
        number = operator.index(size)
    except TypeError:
        raise TypeError(f"`{call}` must be an int; got {size!r}.") from None
    if number < least:
        raise ValueError(f"`{call}` must be {least} or more; got {number}.")
    return number


# Inside of `jax.jit` even `jnp.float32(1e-3)` is traced, and no value can be had of it.
_TRACED_EPS = (
    " It is traced, and its value must be known before. Type a number, as in `eps=1e-3` or "
    "`np.float32(1e-3)`, instead of `jnp.float32(1e-3)`, and `float(jnp.finfo(x.dtype).eps)` for "
    "that of a dtype. If it is an argument of a jitted function, name it in its `static_argnames`."
)


def check_eps(name: str, eps: Number) -> float:
    number = as_float(eps)
    if not 0 <= number < math.inf:
        traced = isinstance(eps, Tracer)
        raise ValueError(
            f"`{name}(eps=...)` must be a finite number, 0 or above; got {eps!r}."
            + _TRACED_EPS * traced
        )
    return number


def as_float(number: Any) -> float:
    """Of any library's real scalar, an array without axes included; NaN if it is none."""
    dtype = getattr(number, "dtype", None)
    if dtype is None:
        real = isinstance(number, numbers.Real)
    else:
        kinds = (jnp.floating, jnp.integer)
        dtype = _as_jax(dtype)
        real = tuple(number.shape) == () and any(jnp.issubdtype(dtype, kind) for kind in kinds)
    try:
        return float(number) if real else math.nan
    except TypeError:  # of an array that JAX traces
        return math.nan


def _as_jax(dtype: Any) -> Any:
    """Of another library, by its name: `torch.float32`. None if that says nothing to JAX."""
    try:
        return jnp.dtype(dtype)
    except TypeError:
        pass
    try:
        return jnp.dtype(str(dtype).rsplit(".", 1)[-1])
    except TypeError:
        return None


def check_axis_name(axis_name: Any) -> Hashable | None:
    """A list of names as a tuple, because it is kept in static fields."""
    return tuple(axis_name) if isinstance(axis_name, list) else axis_name


def check_implementation(name: str, implementation: str) -> str:
    if implementation not in ("xla", "kernel", "pallas"):
        raise ValueError(
            f'`{name}(implementation=...)` must be "xla" or "kernel", whose first name was '
            f'"pallas"; got {implementation!r}.'
        )
    return implementation


def check_param_dtype(name: str, dtype):
    """`dtype` itself: `None` stays `None`, for JAX's default."""
    try:
        known = dtype is None or jnp.dtype(dtype).name in DTYPES
    except TypeError:
        known = False
    if not known:
        raise TypeError(
            f"`{name}(dtype=...)` is the dtype of weight and bias and must be floating point, "
            f"one of {', '.join(DTYPES)}, or None; got {dtype!r}."
        )
    return dtype


def check_groups(name: str, groups: Integer, channels: Integer | None) -> int:
    groups = check_size(f"{name}(groups=...)", groups)
    if channels is not None and channels % groups:
        raise ValueError(
            f"`{name}` needs a number of groups that divides the number of channels; "
            f"got {groups} groups and {channels} channels."
        )
    return groups


def check_floating(name: str, x: Any, *, narrow: bool = False) -> None:
    """`narrow` is for parameters, which are cast up: it lets float8 and float4 through."""
    dtype = getattr(x, "dtype", None)
    known = getattr(dtype, "name", None) in DTYPES
    cast_up = narrow and dtype is not None and jnp.issubdtype(dtype, jnp.floating)
    if not (known or cast_up):
        got = f"an array of dtype {dtype}" if dtype is not None else f"a {type(x).__name__}"
        raise TypeError(
            f"`{name}` normalises real floating-point arrays of 16, 32 or 64 bits; got {got}. "
            "Convert it first, as in `x.astype(jnp.float32)`."
        )


def check_broadcast(name: str, x: Array, **params: Array | None) -> None:
    for param, value in params.items():
        if value is None:
            continue
        check_floating(f"{name}({param}=...)", value, narrow=True)
        if not fits(value.shape, x.shape):
            raise ValueError(
                f"`{name}(x, {param}=...)` needs a {param} that broadcasts to the shape of x; "
                f"got {param} of shape {value.shape} and x of shape {x.shape}."
            )


def fits(shape: tuple[int, ...], into: tuple[int, ...]) -> bool:
    """Whether one broadcasts to the other."""
    try:
        return jnp.broadcast_shapes(shape, into) == into
    except ValueError:
        return False


def own_params(layer: Any, *, weight: bool, bias: bool) -> tuple[Param, Param]:
    """The weight and bias of a layer, as far as its flags, which are these, say it has them.

    A flag that is False hides a parameter that was set all the same, as in `equinox.nn`.
    """
    for param, flag in (("weight", weight), ("bias", bias)):
        if flag:
            check_there(type(layer).__name__, param, getattr(layer, param))
    return layer.weight if weight else None, layer.bias if bias else None


def check_there(name: str, param: str, value: Any) -> None:
    if value is None:
        raise ValueError(
            f"This `{name}` was made with a {param}, which is None now, as in a half of "
            "`eqx.partition`. Put the halves together: eqx.combine(params, static)"
        )


def check_stacked(name: str, shape: tuple[int, ...], found: Iterable[tuple[int, ...]]) -> None:
    """That the parameters of a layer, of these shapes, are of one layer, and not of several."""
    for one in found:
        if not fits(one, shape):
            raise ValueError(
                f"A parameter of this `{name}` has shape {one}, which does not broadcast to "
                f"{shape}. If these are several layers, stacked, map over them: "
                "eqx.filter_vmap(lambda layer: layer(x))(layers)"
            )


def check_mask(name: str, x: Array, where: Array | None) -> None:
    if where is None:
        return
    got = getattr(where, "shape", None), getattr(where, "dtype", None)
    if got != (x.shape, jnp.bool_):
        raise ValueError(
            f"`{name}(x, where=...)` takes a boolean mask of the shape of x, True for entries that "
            f"count: expected {x.shape} and bool, got {got[0]} and {got[1]}. "
            "Type `jnp.broadcast_to(mask, x.shape)` for a mask that broadcasts."
        )


def check_broadcast_mask(name: str, x: Any, where: Any) -> None:
    """Of as many axes as x: with fewer, it would be a matter of taste which are left out."""
    if where is None:
        return
    got = getattr(where, "shape", ()), getattr(where, "dtype", type(where).__name__)
    if got[1] != jnp.bool_ or len(got[0]) != x.ndim or not fits(got[0], x.shape):
        raise ValueError(
            f"`{name}(x, where=...)` takes a boolean mask, True for entries that count, with as "
            f"many axes as x, each of its size or of size 1: got {got[0]} and {got[1]} for x of "
            f"shape {x.shape}. Type `mask[None]` for a mask without the first axis."
        )


def check_example(name: str, call: str, shape: tuple[int, ...], x: Array) -> None:
    """That `x` is one example of `shape`; if not, the error ends in the call that works.

    `name` is the class, `call` the variable by which the message calls the layer.
    """
    if x.shape == shape:
        return
    message = (
        f"`{name}` takes one example, of exactly the shape it was made with: "
        f"expected {shape}, got an array of shape {x.shape}."
    )
    cure = _mapped_call(call, shape, x.shape)
    if cure is None:
        raise ValueError(f"{message} Neither all axes of x nor some of them have that shape.")
    raise ValueError(f"{message} Map it over the other axes: {cure}")


def _mapped_call(call: str, shape: tuple[int, ...], got: tuple[int, ...]) -> str | None:
    """The `jax.vmap`s that bring an array of shape `got` to `call` one example at a time."""
    starts = [i for i in range(len(got)) if got[i : i + len(shape)] == shape]
    if not starts:
        return None
    # The last axes first: that is where features mostly are.
    before, after = starts[-1], len(got) - starts[-1] - len(shape)
    for _ in range(after):
        call = f"jax.vmap({call}, in_axes=-1, out_axes=-1)"
    for _ in range(before):
        call = f"jax.vmap({call})"
    return f"{call}(x)"
