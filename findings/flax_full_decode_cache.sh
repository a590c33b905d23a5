#!/usr/bin/env bash
# flax 0.12.8: a decoding cache of nnx.MultiHeadAttention that is full takes further tokens in silence.
#
# We guessed: a step beyond the length of the cache raises, or returns NaN as out-of-bounds reads do.
# We saw: it returns finite numbers. Each further token overwrites the last slot, while the index goes on
# to count; the tokens in between are forgotten, and the mask lets all slots be read.
# What follows: generation beyond the length that `init_cache` was given degrades without an error.
# This script fails if that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet flax==0.12.8 jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
JAX_PLATFORMS=cpu "$work/venv/bin/python" - <<'PYTHON'
import flax
import jax.numpy as jnp
import numpy as np
from flax import nnx

print("flax", flax.__version__)
LENGTH = 4
layer = nnx.MultiHeadAttention(num_heads=1, in_features=4, decode=True, rngs=nnx.Rngs(0))
tokens = jnp.asarray(np.random.default_rng(0).normal(size=(7, 1, 1, 4)), jnp.float32)


def run(tokens):
    layer.init_cache((1, LENGTH, 4))
    outs = [np.asarray(layer(token))[0, 0] for token in tokens]
    return np.stack(outs), np.asarray(layer.cached_key[...])[0, :, 0]


outs, keys = run(tokens)
assert np.isfinite(outs).all()
print("after 7 tokens in a cache of 4: index", int(layer.cache_index[...]))
_, four = run(tokens[:4])
same = [bool((a == b).all()) for a, b in zip(keys, four)]
print("slots that still hold tokens 0 to 3:", same)
assert same == [True, True, True, False]
# The last step sees tokens 0, 1, 2 and itself, as if 3, 4 and 5 had never been.
short, _ = run(jnp.concatenate([tokens[:3], tokens[6:]]))
off = float(np.abs(outs[-1] - short[-1]).max())
print("step 7 beside a run without tokens 3, 4, 5: apart by", off)
assert off < 1e-6
PYTHON
