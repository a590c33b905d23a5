#!/usr/bin/env bash
# optax 0.2.8: `clip_by_global_norm` of float16 gradients whose norm is 316 returns zeros.
#
# We guessed: the norm is taken in float32, or is at least right where float16 can hold it.
# We saw: `global_norm` adds up squares in float16. A thousand entries of 10 have the norm 316, far
# below float16's 65504, but their squares add up to 100000: the norm is infinite, and every gradient
# is multiplied by 1 / inf. Training stands still without a NaN or a warning. A thousand entries of
# 1e-4 have the norm 0, for their squares vanish. (torch 2.13.0 clips the same gradient to a norm of 1.)
# This script fails if that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet optax==0.2.8 jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
JAX_PLATFORMS=cpu "$work/venv/bin/python" - <<'PYTHON'
import jax.numpy as jnp
import numpy as np
import optax

print("optax", optax.__version__)
clip = optax.clip_by_global_norm(1.0)
for dtype, entry in (("float16", 10.0), ("float16", 1e-4), ("float32", 10.0)):
    gradient = jnp.full(1000, entry, dtype)
    true = float(np.linalg.norm(np.asarray(gradient, np.float64)))
    norm = float(optax.global_norm(gradient))
    clipped, _ = clip.update(gradient, clip.init(gradient))
    print(f"{dtype}: norm {true:.3g}, global_norm says {norm:.3g}, clipped entries {clipped[0]:.3g}")
    if (dtype, entry) == ("float16", 10.0):
        assert norm == np.inf and not clipped.any()
    elif dtype == "float16":
        assert norm == 0
    else:
        assert abs(norm - true) < 1e-3 * true and abs(float(clipped[0]) - 10 / true) < 1e-5
PYTHON
