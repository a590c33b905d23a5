"""Programs that run once, and so take longer to compile than to run."""

from collections.abc import Callable

import jax


def jit_once(fn: Callable) -> Callable:
    """`jax.jit`, with little optimisation on a CPU: that is half of the time to compile."""
    if jax.default_backend() != "cpu":
        return jax.jit(fn)
    return jax.jit(fn, compiler_options={"xla_backend_optimization_level": 0})
