#!/usr/bin/env bash
# equinox 0.13.8, jax 0.10.2: a float8 or int4 leaf is written without an error and cannot be read again.
#
# A user expects that what eqx.tree_serialise_leaves writes, eqx.tree_deserialise_leaves reads, as of bfloat16. We
# guessed that both would refuse such a dtype.
# We saw: the file is written. Reading it into the same leaf fails: float8_e4m3fn and int4 come back as NumPy arrays
# of bytes, float8_e5m2 as a dtype that NumPy does not parse. The bytes are there, after NumPy's header of 128.
# This script fails if that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.11}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet equinox==0.13.8 jax==0.10.2 2>"$work/errors" || { cat "$work/errors"; exit 1; }
JAX_PLATFORMS=cpu "$work/venv/bin/python" - <<'PYTHON'
import io

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

print("equinox", eqx.__version__, "jax", jax.__version__)
values = [1, 0, 1, 1, 0]
for dtype in ("bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "int4"):
    x = jnp.asarray(values).astype(dtype)
    file = io.BytesIO()
    eqx.tree_serialise_leaves(file, x)
    assert file.getvalue()[128:] == np.asarray(x).tobytes()
    file.seek(0)
    try:
        came = np.asarray(eqx.tree_deserialise_leaves(file, x)).tolist()
    except Exception as error:
        while error.__cause__ or error.__context__:
            error = error.__cause__ or error.__context__
        came = f"{type(error).__name__}: {error}"
    print(f"{dtype}: written {len(file.getvalue())} bytes, read: {came}")
    assert (came == values) == (dtype in ("bfloat16", "float16"))
PYTHON
