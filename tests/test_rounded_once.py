"""Derivatives of narrow inputs are rounded once, at the end, however many are nested.

Their terms cancel: a norm does not see the mean of a tangent, which is here a thousand times its
spread, so that a term that had been rounded to bfloat16 would leave nothing. Oracle: the plain
reference under the same transformation, in float64.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import seed

from eqx_norms import layer_norm, normalize_reference, rms_norm

N = 64
CASES = [
    case
    for norm, mean in ((layer_norm, 1000), (layer_norm, 0), (rms_norm, 0))
    for case in ((norm, mean, jnp.bfloat16), (norm, mean, jnp.float16))
]


def derivatives(f, x, weight, t, c):
    """Each of which is one path from x to the result: nothing but the last rounding is narrow."""
    y = lambda x: f(x, weight)
    slope = lambda x: jax.jvp(y, (x,), (t,))[1]
    gradient = lambda x: jax.vjp(y, x)[1](c)[0]
    return dict(
        jvp=slope(x),
        linearize=jax.linearize(y, x)[1](t),
        grad=gradient(x),
        forward_over_reverse=jax.jvp(gradient, (x,), (t,))[1],
        reverse_over_forward=jax.grad(lambda x: jnp.vdot(c, slope(x)))(x),
        reverse_over_reverse=jax.grad(lambda x: jnp.vdot(t, gradient(x)))(x),
    )


@pytest.mark.slow
@pytest.mark.parametrize("norm, mean, dtype", CASES)
def test_derivatives_are_rounded_once(norm, mean, dtype):
    rng = np.random.default_rng(seed(17))
    draw = lambda: rng.normal(size=N)
    # The scales keep float16 within its range. The weight is the same in all dtypes, and above 1.
    x, t, c = (jnp.asarray(a, dtype) for a in (draw() / 4, mean + draw(), draw()))
    weight = jnp.asarray(8 + draw(), dtype).astype(jnp.float32)

    def reference(x, weight):
        return normalize_reference(x, weight, centre=norm is layer_norm)

    with jax.enable_x64(True):
        exact = derivatives(reference, *(jnp.asarray(np.float64(a)) for a in (x, weight, t, c)))
        exact = {name: np.asarray(a) for name, a in exact.items()}
    got = jax.jit(lambda *args: derivatives(norm, *args))(x, weight, t, c)

    # float32 makes its own errors on the way, some ulps of the largest terms, of which cancelling
    # leaves the spread.
    cancelled = np.abs(np.float64(t)).max() / np.float64(t).std()
    noise = 32 * 2**-24 * cancelled
    for name, want in exact.items():
        largest = np.abs(want).max()
        assert got[name].dtype == dtype and largest > 0.1
        off = np.abs(np.float64(got[name]) - want).max() / largest
        assert off <= float(jnp.finfo(dtype).eps) / 2 + noise, name
