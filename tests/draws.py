"""Where every random draw of the tests begins: `pytest --draw N` shifts all of them.

A test passes for any draw; one that passes only for the draw it was written with states no bound.
"""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

shift = 0  # set by conftest.py


def seed(n: int = 0) -> int:
    """For `np.random.default_rng` and `jr.key`: another seed for each n and each `--draw`."""
    return n + 1_000_003 * shift


def normal(key, shape=(), dtype=float) -> jax.Array:
    """As `jr.normal`, of which JAX compiles a program for each shape: a tenth of all the time."""
    numbers = np.random.default_rng(np.asarray(jr.key_data(key))).normal(size=shape)
    return jnp.asarray(numbers, jax.dtypes.canonicalize_dtype(dtype))
