#!/usr/bin/env bash
# mlx 0.32.4, keras 3.15.1, flax 0.12.8 (nnx): LayerNorm of a row of equal numbers is 1.
#
# We guessed: where all entries are alike, x - mean is 0 or a last bit of it, and eps keeps it small.
# We saw: for a float32 row of 1e6 / 3 it is 1 in size everywhere, at some lengths of four: the mean is a
# last bit off, and what is left of x - mean is divided by the root of its own square. Flax does so with
# use_fast_variance=False, its exact way. At 1 / 3 all give 0 or nearly so.
# What follows: padding that was filled with one large number, or a sensor that stands still, comes out
# of the norm as large as any other row.
# This script fails if that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.11}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet "mlx[cpu]==0.32.4" keras==3.15.1 flax==0.12.8 \
    jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
KERAS_BACKEND=jax JAX_PLATFORMS=cpu "$work/venv/bin/python" - <<'PYTHON'
import keras
import mlx.core as mx
import mlx.nn
import numpy as np
from flax import nnx

LENGTHS = (48, 100, 300, 768)


def of_mlx(x):
    return np.array(mlx.nn.LayerNorm(len(x))(mx.array(x[None])))


def of_keras(x):
    return np.asarray(keras.layers.LayerNormalization()(x[None]))


def of_flax(x):
    return np.asarray(nnx.LayerNorm(len(x), use_fast_variance=False, rngs=nnx.Rngs(0))(x[None]))


largest = {}
for name, norm in {"mlx": of_mlx, "keras": of_keras, "flax": of_flax}.items():
    for value in (1 / 3, 1e6 / 3):
        rows = [np.full(n, value, np.float32) for n in LENGTHS]
        largest[name, value] = max(float(np.abs(norm(row)).max()) for row in rows)
        print(f"{name}: rows of {value:.7g}: the largest output is {largest[name, value]:.3g}")
for name in ("mlx", "keras", "flax"):
    assert largest[name, 1e6 / 3] > 0.5 and largest[name, 1 / 3] < 0.01, name
PYTHON
