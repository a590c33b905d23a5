"""The statistics of one layer against NumPy's formulas in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import normal
from oracles import ulps

from eqx_norms.diagnostics._layer_statistics import (
    RANK_EXAMPLES,
    _rank,
    derivative_statistics,
    layer_statistics,
)


def _effective_rank(x):
    p = np.linalg.svd(np.asarray(x, np.float64), compute_uv=False)
    p = p / p.sum()
    return np.exp(-np.sum(p * np.log(p)))


@pytest.mark.parametrize("unit_axis", [-1, 1])
def test_layer_statistics(unit_axis, getkey):
    x = 3 * normal(getkey(), (5, 4, 6)) + 1
    found = jax.jit(layer_statistics, static_argnums=1)(x, unit_axis)
    exact = np.asarray(x, np.float64)
    rows = np.moveaxis(exact, unit_axis, -1).reshape(-1, x.shape[unit_axis])
    expected = {
        "mean": exact.mean(),
        "std": exact.std(),
        "rms": np.sqrt(np.mean(exact**2)),
        "largest": np.abs(exact).max(),
        "non_finite": 0,
        "effective_rank": _effective_rank(rows),
    }
    assert set(found) == set(expected)
    for name, value in expected.items():
        # A sum of 120 terms; singular values err by some ten roundings of the largest.
        rtol = 2 * ulps(x.size) * 2.0**-23
        np.testing.assert_allclose(found[name], value, rtol=rtol, atol=rtol, err_msg=name)


@pytest.mark.slow
def test_what_is_not_finite_is_counted(getkey):
    x = normal(getkey(), (4, 5)).at[0, :3].set(jnp.array([jnp.nan, jnp.inf, -jnp.inf]))
    np.testing.assert_allclose(layer_statistics(x)["non_finite"], 3 / 20, rtol=1e-6)
    np.testing.assert_allclose(derivative_statistics(x)["non_finite"], 3 / 20, rtol=1e-6)


@pytest.mark.slow
def test_a_rank_needs_two_examples_and_two_units(getkey):
    for shape in ((), (6,), (1, 6), (6, 1)):
        assert jnp.isnan(layer_statistics(normal(getkey(), shape))["effective_rank"])


LAYOUTS = [(256, 16), (16, 256), (512, 8), (32, 8, 8), (255, 17)]


@pytest.mark.parametrize("examples", LAYOUTS)
def test_the_rank_of_many_examples_is_fair_to_any_layout(examples, getkey):
    """Each position has a direction of its own, so that a sample that sees one has rank 1."""
    units, positions = 8, examples[-1]
    own = np.asarray(normal(getkey(), (positions, units)))
    size = 1 + 0.1 * np.asarray(normal(getkey(), (*examples[:-1], 1, 1)))
    x = (size * own).astype(np.float32).reshape(-1, units)
    assert len(x) > 2 * RANK_EXAMPLES
    # Of 4096 rows or so, 256 have singular values some 10% off; the entropy of these much less.
    np.testing.assert_allclose(_rank(jnp.asarray(x)), _effective_rank(x), rtol=0.15)


@pytest.mark.slow
def test_silent_units(getkey):
    g = normal(getkey(), (6, 4)).at[:, 1].set(0).at[:5, 2].set(0)
    found = derivative_statistics(g)
    assert found["silent"] == 1 / 4  # the one of which no example has any
    np.testing.assert_allclose(found["rms"], np.sqrt(np.mean(np.float64(g) ** 2)), rtol=1e-5)
    assert derivative_statistics(g.T, unit_axis=0)["silent"] == 1 / 4


@pytest.mark.slow
def test_steps_by_vmap(getkey):
    x = normal(getkey(), (3, 5, 4), jnp.bfloat16)
    together = jax.vmap(layer_statistics)(x)
    for i in range(3):
        for name, value in layer_statistics(x[i]).items():
            assert together[name].dtype == value.dtype == jnp.float32
            np.testing.assert_allclose(together[name][i], value, rtol=1e-5, atol=1e-6)
