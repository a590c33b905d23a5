#!/usr/bin/env bash
# safetensors 0.8.0, jax 0.10.2: safetensors.flax.load cannot read the bfloat16 bytes that safetensors.flax.save gives.
#
# We guessed: the module for JAX, of which bfloat16 is the usual dtype, reads what it writes, whether from a file or
# from bytes; and what it cannot read, as float8, it does not write.
# We saw: load_file reads bfloat16 from the file that save_file wrote. load raises KeyError: 'BF16' for the same
# bytes. float8_e4m3fn is written without an error by both, and neither of them reads it.
# This script fails if that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.11}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet safetensors==0.8.0 jax==0.10.2 flax==0.12.8 2>"$work/errors" || { cat "$work/errors"; exit 1; }
cd "$work"
JAX_PLATFORMS=cpu "$work/venv/bin/python" - <<'PYTHON'
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from safetensors.flax import load, load_file, save, save_file

print("safetensors", safetensors.__version__, "jax", jax.__version__)


def attempt(read):
    try:
        return np.asarray(read()["x"]).tolist()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


values = [1, 0, 1, 1]
expected = {  # what a file gives, and what bytes give
    "float32": (values, values),
    "bfloat16": (values, "KeyError: 'BF16'"),
    "float8_e4m3fn": ("AttributeError: module 'numpy' has no attribute 'float8_e4m3fn'", "KeyError: 'F8_E4M3'"),
}
for dtype, came in expected.items():
    arrays = {"x": jnp.asarray(values).astype(dtype)}
    save_file(arrays, "x.safetensors")
    assert Path("x.safetensors").read_bytes() == save(arrays)
    found = attempt(lambda: load_file("x.safetensors")), attempt(lambda: load(save(arrays)))
    print(f"{dtype}: load_file gives {found[0]}, load gives {found[1]}")
    assert found == came
PYTHON
