#!/usr/bin/env bash
# jax 0.10.2 and 0.12.0.1 on a CPU: a triangular solve of an FFT runs without jax.jit and is not compiled by it.
#
# We guessed: what runs one operation at a time also runs in jax.jit.
# We saw: JaxRuntimeError, INTERNAL: RET_CHECK failure in fft_thunk.cc, of the input's layout. The solve wants
# its right hand side by columns, XLA hands that layout on to the FFT, and the FFT takes rows alone. It is so
# for an FFT along the last axis. Along the first one it is compiled. Neither a barrier nor a transpose between helps.
# What follows: spectral preconditioners and Gaussian processes on a grid meet it, and must put the FFT into a
# program of its own.
# This script fails if that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.11}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet jax==0.10.2
JAX_PLATFORMS=cpu "$work/venv/bin/python" - 2>"$work/errors" <<'PYTHON' || { cat "$work/errors"; exit 1; }
import jax
import jax.numpy as jnp
import numpy as np

print("jax", jax.__version__)
x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 3)), jnp.float32)
lower = jnp.eye(8) + jnp.tri(8)


def solved(transform):
    return lambda x: jax.scipy.linalg.solve_triangular(lower, transform(x).real, lower=True)


last = solved(lambda x: jnp.fft.fft(x, axis=1))
first = solved(lambda x: jnp.fft.fft(x, axis=0))
want = np.linalg.solve(lower, np.fft.fft(x, axis=1).real)
np.testing.assert_allclose(last(x), want, atol=1e-4)
np.testing.assert_allclose(jax.jit(first)(x), first(x), atol=1e-4)
print("one operation at a time, and along the first axis: right")
try:
    jax.jit(last)(x)
except jax.errors.JaxRuntimeError as error:
    print("in jax.jit:", str(error).split("(")[0])
    assert "RET_CHECK failure" in str(error)
else:
    raise AssertionError("jax.jit compiles it now")
PYTHON
