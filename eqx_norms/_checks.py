"""What every layer asks of its arguments, and how it says so."""

import math
import numbers
import operator
from collections.abc import Iterable, Sequence

import jax.numpy as jnp
from jaxtyping import Array

from ._real import Integer, Real

# The default of the layers' `state`: None would be a state like any other.
no_state = object()


def check_shape(name: str, shape: Integer | Sequence[Integer]) -> tuple[int, ...]:
    try:
        sizes = tuple(map(operator.index, shape if isinstance(shape, Iterable) else [shape]))
    except TypeError:
        raise TypeError(f"`{name}(shape)` takes an int or ints; got {shape!r}.") from None
    if not sizes or min(sizes) < 1:
        raise ValueError(
            f"`{name}(shape)` takes one or more sizes, each at least 1; got {shape!r}. "
            f"Give the shape of one example without batch axes, as in `{name}(768)`."
        )
    return sizes


def check_size(call: str, size: Integer) -> int:
    try:
        number = operator.index(size)
    except TypeError:
        raise TypeError(f"`{call}` must be an int; got {size!r}.") from None
    if number < 1:
        raise ValueError(f"`{call}` must be 1 or more; got {number}.")
    return number


def check_eps(name: str, eps: Real) -> float:
    if not (isinstance(eps, numbers.Real) and 0 <= eps < math.inf):
        raise ValueError(f"`{name}(eps=...)` must be a finite number, 0 or above; got {eps!r}.")
    return float(eps)


def check_implementation(name: str, implementation: str) -> str:
    if implementation not in ("xla", "pallas"):
        raise ValueError(
            f'`{name}(implementation=...)` must be "xla" or "pallas"; got {implementation!r}.'
        )
    return implementation


def check_param_dtype(name: str, dtype):
    """`dtype` itself: `None` stays `None`, for JAX's default."""
    try:
        floating = dtype is None or jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
    except TypeError:
        floating = False
    if not floating:
        raise TypeError(
            f"`{name}(dtype=...)` is the dtype of weight and bias and must be floating point, "
            f"such as `jnp.float32`, or None; got {dtype!r}."
        )
    return dtype


def check_floating(name: str, x: Array) -> None:
    dtype = getattr(x, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        got = f"an array of dtype {dtype}" if dtype is not None else f"a {type(x).__name__}"
        raise TypeError(
            f"`{name}` normalises real floating-point arrays; got {got}. "
            "Convert it first, as in `x.astype(jnp.float32)`."
        )


def check_broadcast(name: str, x: Array, **params: Array | None) -> None:
    for param, value in params.items():
        if value is None:
            continue
        check_floating(f"{name}({param}=...)", value)
        try:
            fits = jnp.broadcast_shapes(value.shape, x.shape) == x.shape
        except ValueError:
            fits = False
        if not fits:
            raise ValueError(
                f"`{name}(x, {param}=...)` needs a {param} that broadcasts to the shape of x; "
                f"got {param} of shape {value.shape} and x of shape {x.shape}."
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
