#!/usr/bin/env bash
# jax 0.10.2 (CPU): `dynamic_slice` from a constant unsigned start gives other rows under `jax.jit`.
#
# We guessed: a start beyond the end is clamped to the last slice, eagerly and under jit alike.
# We saw: it is for int32, and for unsigned integers that are an argument. Where a uint8, uint16 or
# uint32 is a constant of the program and its highest bit is set, as in 255 of uint8, jit takes it for a
# negative number, and slices from row 0. jax 0.12.0.1 does the same.
# What follows: indices kept as uint8, as of images and tokens, read other rows once a function is
# compiled, without an error.
# This script fails if that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
JAX_PLATFORMS=cpu "$work/venv/bin/python" - <<'PYTHON'
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

print("jax", jax.__version__)
x = jnp.arange(8.0).reshape(4, 2)


def first(start, x):
    """The first entry of two rows from `start`; of the last two, if that is beyond the end."""
    return lax.dynamic_slice(x, (start, start - start), (2, 2))[0, 0]


for dtype in (np.uint8, np.uint16, np.uint32, np.int32):
    start = np.array(np.iinfo(dtype).max, dtype)
    eager = float(first(start, x))
    argument = float(jax.jit(first)(start, x))
    constant = float(jax.jit(lambda x: first(start, x))(x))
    print(f"{dtype.__name__} {start}: eager {eager}, argument of jit {argument}, constant {constant}")
    assert eager == argument == 4
    assert constant == (4 if dtype is np.int32 else 0)
PYTHON
