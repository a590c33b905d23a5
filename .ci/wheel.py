"""What the wheel does by itself: run outside the checkout, with nothing but its dependencies."""

import importlib.util
import pathlib
import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

import eqx_norms
from eqx_norms import LayerNorm, assert_causal
from eqx_norms.causality import CausalityError, check_causal
from eqx_norms.diagnostics import capture

assert "site-packages" in pathlib.Path(eqx_norms.__file__).parts, eqx_norms.__file__
for package in ("matplotlib", "tqdm", "optax", "numba"):
    assert importlib.util.find_spec(package) is None, f"{package} is no dependency"

# A gradient, beside eqx.nn's: float32 of some tens of operations.
x, g = jr.normal(jr.key(0), (2, 5, 8))
gradient = lambda norm: jax.jit(jax.grad(lambda x: jnp.vdot(g, jax.vmap(norm)(x))))(x)
np.testing.assert_allclose(gradient(LayerNorm(8)), gradient(eqx.nn.LayerNorm(8)), atol=1e-5)

# The check, on a norm of each position and on one of the whole sequence.
assert_causal(jax.vmap(LayerNorm(8)), x, pointwise=True)
try:
    assert_causal(LayerNorm((5, 8)), x)
except CausalityError as error:
    assert "All pairs leak alike" in str(error)
else:
    raise AssertionError("no leak was found")

model = eqx.nn.Sequential([eqx.nn.Linear(8, 4, key=jr.key(1)), LayerNorm(4)])
out, values = capture(lambda m, x: jax.vmap(m)(x), model, x, where=LayerNorm)
np.testing.assert_array_equal(values["layers[1]"], out)

# What needs more says what.
try:
    check_causal(jax.vmap(LayerNorm(8)), x, pointwise=True).plot()
except ImportError as error:
    assert 'needs matplotlib: pip install "eqx-norms[plot]"' in str(error)
else:
    raise AssertionError("a plot without matplotlib")
# Kernels too: without numba the plain path, and one warning.
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for batch in (x, x[:2]):
        got = jax.jit(jax.vmap(LayerNorm(8, implementation="kernel")))(batch)
        np.testing.assert_allclose(got, jax.vmap(LayerNorm(8))(batch), atol=1e-5)
(said,) = caught
assert 'pip install "eqx-norms[cpu]"' in str(said.message), said
print("the wheel works by itself")
