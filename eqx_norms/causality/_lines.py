"""Which line of the user's source an operation of a traced program comes from."""

import os
from collections.abc import Sequence

import jax
import jax.extend.core as jex

from .._jaxprs import called, opened

_INSTALLED = os.path.dirname(os.path.dirname(jax.__file__))
_OURS = os.path.dirname(__file__)


def line_of(calls: Sequence[jex.JaxprEqn]) -> str:
    """The line of the user's source that traced to the last of these equations, each in the next.

    What is inside a library's jitted function was traced once, for whoever called it first: there
    the line is that of the call.
    """
    line = "an unknown line"
    for eqn in calls:
        line = _user_line(eqn) or line
        if of_a_library(eqn):
            break
    return line


def of_a_library(eqn: jex.JaxprEqn) -> bool:
    """Whether this calls a jitted function that a library has."""
    inner = called(eqn)
    jitted = eqn.primitive.name in ("jit", "pjit") and inner is not None
    return jitted and _INSTALLED in str(opened(inner).debug_info)


def _user_line(eqn: jex.JaxprEqn) -> str | None:
    frames = getattr(eqn.source_info.traceback, "frames", ())
    outside = lambda f: not f.file_name.startswith((_INSTALLED, _OURS, "<"))
    frame = next(filter(outside, frames), None)
    return frame and f"{frame.file_name}:{frame.line_num} ({frame.function_name})"
