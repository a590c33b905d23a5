#!/usr/bin/env bash
# jax 0.10.2 (CPU): the maximum of an array that holds a NaN is a finite number from 4096 entries on.
#
# We guessed: `jnp.max` returns NaN at any size, as NumPy's does.
# We saw: it does up to 4095 entries. From 4096 on float32 loses the NaN in `max`, `min`, `ptp` and
# `linalg.norm(x, inf)`; bfloat16 and float16 lose it in `min` alone. `sort`, `top_k`, `cummax` and
# `logsumexp` keep it. jax 0.12.0.1 does the same.
# What follows: a check such as `jnp.max(jnp.abs(grad)) < limit` passes a gradient that is NaN, and a
# scale for quantisation that is the largest weight looks sane. `jnp.isnan(x).any()` is right.
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

print("jax", jax.__version__)
reductions = {
    "max": jnp.max,
    "min": jnp.min,
    "ptp": jnp.ptp,
    "norm(inf)": lambda x: jnp.linalg.norm(x, jnp.inf),
    "sort": lambda x: jnp.sort(x)[-1],
    "top_k": lambda x: jax.lax.top_k(x, 1)[0][0],
    "cummax": lambda x: jax.lax.cummax(x)[-1],
    "logsumexp": jax.nn.logsumexp,
}


def loses(dtype, n):
    x = np.random.default_rng(0).normal(size=n).astype(np.float32)
    x[n // 2] = np.nan
    x = jnp.asarray(x, dtype)
    return [name for name, reduce in reductions.items() if not np.isnan(float(reduce(x)))]


for dtype in ("float32", "bfloat16", "float16"):
    for n in (4095, 4096):
        print(f"{dtype:9} {n} entries, one of them NaN; a finite result of: {loses(dtype, n)}")
    assert loses(dtype, 4095) == []
assert loses("float32", 4096) == ["max", "min", "ptp", "norm(inf)"]
assert loses("bfloat16", 4096) == loses("float16", 4096) == ["min"]
PYTHON
