"""How the checks are called, and how they call the user's function while it is traced.

An error comes with what to write instead.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np

Check = TypeVar("Check", bound=Callable)

_ON_THE_HOST = """\
fn must be made of JAX operations, so that it can be traced, got {error}.
Write it with jax.numpy instead of numpy. What cannot be written so runs beside JAX, unchanged:

    from eqx_norms.causality import from_torch, host

    host(fn)  # of NumPy arrays, in the place of fn; also for TensorFlow, Keras, ONNX Runtime
    from_torch(module)  # a torch module; or from_torch(module, call=lambda module, x: module(x)[0])
"""
_NNX = (
    "fn must leave its modules as they are while it is traced, but a module of flax.nnx was "
    "updated: batch statistics or random streams in train mode, got {error}. Let fn update a "
    "copy: lambda x: nnx.clone(model)(x); or ask about the model in use, after model.eval()"
)


def options_by_name(check: Check) -> Check:
    """`check`, which says of an option that comes by position what to write instead."""
    parameters = inspect.signature(check).parameters.values()
    taken = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]

    @functools.wraps(check)
    def checked(*args, **options):
        if len(args) > len(taken):
            raise TypeError(_by_position(check.__name__, taken, args[len(taken)]))
        return check(*args, **options)

    return checked  # pyright: ignore[reportReturnType]


def _by_position(check: str, taken: list[str], more: Any) -> str:
    is_array = isinstance(more, jax.Array | np.ndarray)
    what = f"an array {more.dtype}{[*more.shape]}" if is_array else repr(more)
    what = what if len(what) <= 60 else f"a {type(more).__name__}"
    example = f"axis={more}" if type(more) is int else "axis=1"
    return (
        f"{check}({', '.join(taken)}) takes options by name alone, got one more argument: {what}. "
        f"Write the name of the option in front, as in {example}. What the function takes beside x "
        "goes in by closure, lambda x: fn(x, more); or within x, to be edited as well: "
        "lambda x: fn(*x), with (x, more) for x"
    )


def call(fn: Callable[[Any], Any], x: Any) -> Any:
    """`fn(x)`."""
    try:
        return fn(x)
    except Exception as error:
        better = _in_our_words(error, fn, x)
        if better is None:
            raise
        raise better from error


def _in_our_words(error: Exception, fn: Callable, x: Any) -> Exception | None:
    what = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    if type(error).__name__ == "TraceContextError":
        return ValueError(_NNX.format(error=what))
    if _left_jax(error):
        return TypeError(_ON_THE_HOST.format(error=what))
    return _other_arguments(fn, x) if isinstance(error, TypeError) else None


def _left_jax(error: Exception) -> bool:
    """Whether NumPy, torch or the like was given a traced array. Only the latter's words tell."""
    if isinstance(error, jax.errors.TracerArrayConversionError):
        return True
    foreign = type(error) in (TypeError, AttributeError, RuntimeError, ValueError)
    return foreign and "JaxprTracer" in str(error)


def _other_arguments(fn: Callable, x: Any) -> TypeError | None:
    """What to say if `fn` cannot be called with one argument."""
    try:
        signature = inspect.signature(fn)
    except (TypeError, ValueError):  # some that are written in C tell nothing
        return None
    try:
        signature.bind(x)
        return None
    except TypeError:
        pass
    name = getattr(fn, "__name__", type(fn).__name__)
    asked = f"fn must take one argument, x, got {name}{signature}"
    free = [p for p in signature.parameters.values() if p.default is p.empty]
    named = [p.name for p in free if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if not named:
        return TypeError(f"{asked}; write lambda x: ... around it")
    given = ["x", *named[1:], *(f"{p.name}={p.name}" for p in free if p.kind is p.KEYWORD_ONLY)]
    unpacked = isinstance(x, tuple | list) and len(x) == len(named)
    return TypeError(
        f"{asked}; give it the others by closure: lambda x: fn({', '.join(given)})"
        + ("; or, as x holds them all, lambda x: fn(*x)" if unpacked else "")
    )
