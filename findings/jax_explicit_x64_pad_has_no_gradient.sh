#!/usr/bin/env bash
# jax 0.10.2 and 0.12.0.1: with jax_explicit_x64_dtypes="allow", float64 arrays have no gradient through lax.pad.
#
# We guessed: in this mode, which keeps the float64 that is asked for, float64 arrays are differentiated as with
# jax_enable_x64.
# We saw: TypeError, the cotangent of lax.pad is padded by a float32 zero. So jnp.pad and lax.associative_scan
# have no gradient either. Slices, cumsum and a concatenation in place of the padding have one.
# This script fails if that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.11}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet jax==0.10.2 2>"$work/errors" || { cat "$work/errors"; exit 1; }
JAX_PLATFORMS=cpu "$work/venv/bin/python" - <<'PYTHON'
import jax
import jax.numpy as jnp
import numpy as np

print("jax", jax.__version__)
jax.config.update("jax_explicit_x64_dtypes", "allow")
x = jnp.asarray(np.random.default_rng(0).normal(size=6), dtype=jnp.float64)
assert x.dtype == jnp.float64
zero = jnp.zeros((), x.dtype)
padded = {
    "lax.pad": lambda x: jax.lax.pad(x, zero, ((1, -1, 0),)),
    "jnp.pad": lambda x: jnp.pad(x[:-1], (1, 0)),
    "lax.associative_scan": lambda x: jax.lax.associative_scan(jnp.add, x),
}
others = {
    "a slice": lambda x: x[1:],
    "cumsum": jnp.cumsum,
    "a concatenation": lambda x: jnp.concatenate([zero[None], x[:-1]]),
}
for name, f in (padded | others).items():
    assert f(x).dtype == jnp.float64
    try:
        came = str(jax.grad(lambda x: (f(x) ** 3).sum())(x).dtype)
    except TypeError as error:
        came = str(error)
    print(f"gradient through {name}: {came}")
    assert came == ("pad operand and padding_value must be same dtype: got float64 and float32."
                    if name in padded else "float64")
PYTHON
