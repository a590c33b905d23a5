#!/usr/bin/env bash
# keras 3.15.1 (backend jax): `MultiHeadAttention(query, value, query_mask=...)` ignores its mask.
#
# We guessed: a query that the mask calls padding gives zeros, or a row that differs in some way.
# We saw: not one bit of the output changes, whatever the mask says; `value_mask=` and
# `attention_mask=` do change it. A mask of queries alone also gives no output to a loss that trusts it.
# What follows: whoever has queries with padding must drop those rows after the layer, or mask the loss.
# This script fails if that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet keras==3.15.1 jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
KERAS_BACKEND=jax JAX_PLATFORMS=cpu "$work/venv/bin/python" - <<'PYTHON'
import keras
import numpy as np

print("keras", keras.__version__, keras.backend.backend())
x = np.random.default_rng(0).normal(size=(1, 8, 4)).astype("float32")
half = np.arange(8)[None] < 4
layer = keras.layers.MultiHeadAttention(num_heads=2, key_dim=4, seed=0)
plain = np.asarray(layer(x, x))
changed = {}
for name in ("query_mask", "value_mask"):
    for mask in (half, np.zeros_like(half), np.ones_like(half)):
        out = np.asarray(layer(x, x, **{name: mask}))
        changed.setdefault(name, []).append(float(np.abs(out - plain).max()))
rows = np.broadcast_to(half[:, :, None], (1, 8, 8))
changed["attention_mask of the same rows"] = [
    float(np.abs(np.asarray(layer(x, x, attention_mask=rows)) - plain).max())
]
for name, sizes in changed.items():
    print(f"{name}: the output changes by {sizes}")
assert changed["query_mask"] == [0, 0, 0]
assert changed["value_mask"][0] > 0.01
assert changed["attention_mask of the same rows"][0] > 0.01
PYTHON
