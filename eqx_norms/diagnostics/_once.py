"""Programs that take longer to compile than to run."""

import functools as ft
from collections.abc import Callable
from typing import Any

import jax

from .._processes import jit


def once() -> Any:
    """The `compiler_options` of a program that takes longer to compile than to run."""
    return {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None


def jit_once(fn: Callable, static_argnums: int | tuple[int, ...] = ()) -> Callable:
    """`jax.jit`, with little optimisation on a CPU: that is half of the time to compile."""

    @ft.cache
    def compiled():  # Not before it is called, for this finds the devices.
        return jit(fn, static_argnums, once())

    return ft.wraps(fn)(lambda *args: compiled()(*args))
