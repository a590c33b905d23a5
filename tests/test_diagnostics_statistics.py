"""The statistics against NumPy's formulas in float64.

Tolerances: a sum of n float32 terms errs by about sqrt(n) roundings of 6e-8; SVD by some tens.
"""

import draws
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats
from draws import normal
from oracles import ulps
from refused import refused

from eqx_norms.diagnostics import (
    activation_stats,
    dead_unit_fraction,
    effective_rank,
    histogram,
    saturation_fraction,
    singular_value_ratio,
    stable_rank,
    update_ratio,
)

EVERY = [
    activation_stats,
    lambda x: histogram(x, jnp.linspace(-1, 1, 5)),
    dead_unit_fraction,
    lambda x: saturation_fraction(jnp.tanh, x),
    lambda x: update_ratio([x], [x]),
    singular_value_ratio,
    stable_rank,
    effective_rank,
]
NAMES = ["stats", "histogram", "dead", "saturation", "update", "ratio", "stable", "effective"]
every_statistic = pytest.mark.parametrize("statistic", EVERY, ids=NAMES)


@pytest.mark.slow
@every_statistic
def test_jit_and_vmap_change_nothing(statistic, getkey):
    xs = normal(getkey(), (3, 6, 4))
    expected = [statistic(x) for x in xs]
    together = jax.jit(jax.vmap(statistic))(xs)
    for i, each in enumerate(expected):
        for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(each), strict=True):
            np.testing.assert_allclose(a[i], b, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@every_statistic
def test_half_precision_is_computed_in_float32(statistic, getkey):
    x = normal(getkey(), (6, 4), jnp.bfloat16)
    for a, b in zip(
        jax.tree.leaves(statistic(x)),
        jax.tree.leaves(statistic(x.astype(jnp.float32))),
        strict=True,
    ):
        assert a.dtype in (jnp.float32, jnp.int32)
        assert jnp.array_equal(a, b)


@pytest.mark.slow
@every_statistic
def test_float64_stays_float64(statistic, getkey):
    with jax.enable_x64():
        x = normal(getkey(), (6, 4), jnp.float64)
        for leaf in jax.tree.leaves(statistic(x)):
            assert leaf.dtype in (jnp.float64, jnp.int32)


@every_statistic
@pytest.mark.parametrize("dtype", [jnp.int32, jnp.bool_, jnp.complex64])
def test_other_dtypes_are_refused(statistic, dtype):
    what = f"floating-point array, but this one is {jnp.dtype(dtype)}"
    with refused(TypeError, what, "Type `x.astype(jnp.float32)`"):
        statistic(jnp.ones((3, 4), dtype))


@every_statistic
def test_empty_arrays_are_refused(statistic):
    with pytest.raises(ValueError, match="at least one entry"):
        statistic(jnp.ones((0, 4)))


# activation_stats


@pytest.mark.slow
@pytest.mark.parametrize("offset", [0.0, 1e2, 1e6])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_activation_stats(offset, scale, getkey):
    x = (normal(getkey(), (200, 30)) + offset) * scale
    exact = np.asarray(x, np.float64)
    stats = activation_stats(x)
    rtol = ulps(x.size) * 2.0**-23
    atol = rtol * np.abs(exact).mean()
    np.testing.assert_allclose(stats.mean, exact.mean(), rtol=0, atol=atol)
    np.testing.assert_allclose(stats.std, exact.std(), rtol=rtol)
    np.testing.assert_allclose(stats.rms, np.sqrt(np.mean(exact**2)), rtol=rtol)
    assert stats.absmax == np.abs(x).max()
    assert stats.percentiles is None


@pytest.mark.parametrize("value", [0.0, -0.0, 3.0, -7e-39, 3.4e38, 1e-45])
def test_activation_stats_of_a_constant(value):
    for shape in ((), (1,), (5,)):
        stats = activation_stats(jnp.full(shape, value))
        # Numbers below 1.2e-38 are flushed to zero by XLA's CPU backend.
        expected = value if abs(value) > 1.2e-38 else 0.0
        np.testing.assert_allclose(stats.mean, expected, rtol=1e-6, atol=1.2e-38)
        np.testing.assert_allclose(stats.rms, abs(expected), rtol=1e-6, atol=1.2e-38)
        assert stats.std == 0


def test_activation_stats_do_not_hide_what_is_not_finite():
    assert all(jnp.isnan(s) for s in activation_stats(jnp.array([1.0, jnp.nan]))[:4])
    stats = activation_stats(jnp.array([1.0, -jnp.inf]))
    assert (stats.mean, stats.rms, stats.absmax) == (-jnp.inf, jnp.inf, jnp.inf)


@pytest.mark.parametrize("row", [0, 5, -1])
def test_a_nan_anywhere_is_in_all(row, getkey):
    x = normal(getkey(), (32, 8, 16)).at[row].set(jnp.nan)
    assert all(jnp.isnan(s) for s in activation_stats(x)[:4])


def test_percentiles(getkey):
    x = normal(getkey(), (40, 5))
    bands = activation_stats(x, percentiles=(16, 50, 84)).percentiles
    np.testing.assert_array_equal(bands, np.percentile(x, (16, 50, 84)))
    with pytest.raises(ValueError, match=r"outside `jax.jit` and `jax.vmap`, but `x` is traced"):
        jax.jit(lambda x: activation_stats(x, (50,)))(x)


# histogram


def test_histogram(getkey):
    edges = jnp.array([-2.0, -0.5, 0.0, 0.25, 2.0])
    x = jnp.concatenate([normal(getkey(), (3000,)) * 2, edges])
    counts = histogram(x.reshape(-1, 5), edges)
    assert counts.dtype == jnp.int32
    np.testing.assert_array_equal(counts, np.histogram(x, edges)[0])


def test_histogram_leaves_out_what_is_outside():
    x = jnp.array([-jnp.inf, -3.0, 0.5, 1.0, 1.5, jnp.inf, jnp.nan])
    np.testing.assert_array_equal(histogram(x, jnp.array([0.0, 1.0])), [2])
    np.testing.assert_array_equal(histogram(x, jnp.array([0.0, 1.0, 2.0])), [1, 2])


@pytest.mark.parametrize("edges", [jnp.ones((2, 2)), jnp.ones(1), jnp.ones(())])
def test_histogram_edges_must_be_a_vector(edges):
    with refused(ValueError, r"`edges` must be a vector.*jnp.linspace"):
        histogram(jnp.ones(3), edges)


# dead_unit_fraction


def test_dead_unit_fraction():
    x = jnp.ones((100, 4)).at[:, 0].set(0).at[:96, 1].set(-1e-9).at[:95, 2].set(0)
    # 100, 96, 95 and none of the examples silent: "more than .95" leaves out 95.
    assert dead_unit_fraction(x) == 0.5
    assert dead_unit_fraction(x, batch_fraction=0.94) == 0.75
    assert dead_unit_fraction(x, threshold=1e-10) == 0.25
    assert dead_unit_fraction(x, threshold=2.0) == 1.0
    assert dead_unit_fraction(x.reshape(4, 25, 4)) == 0.5
    assert dead_unit_fraction(-x) == 0.5


def test_dead_unit_fraction_at_exactly_the_fraction():
    # In floating point .57 * 100 is less than 57.
    x = jnp.zeros((100, 1)).at[57:].set(1)
    assert dead_unit_fraction(x, batch_fraction=0.57) == 0
    assert dead_unit_fraction(x.at[57].set(0), batch_fraction=0.57) == 1


def test_dead_unit_fraction_of_float16():
    # 1e-8 is zero in float16.
    assert dead_unit_fraction(jnp.zeros((3, 2), jnp.float16)) == 1


def test_dead_unit_fraction_counts_no_nan():
    assert dead_unit_fraction(jnp.full((3, 2), jnp.nan)) == 0


def test_dead_unit_fraction_needs_a_batch():
    with pytest.raises(ValueError, match=r"must have a batch axis.*\(4,\).*`x\[None, :\]`"):
        dead_unit_fraction(jnp.zeros(4))


# saturation_fraction


@pytest.mark.parametrize(
    ("fn", "edges"),
    [
        # Where |slope| is exactly .1, from solving for it in float64.
        (jnp.tanh, [-np.arctanh(np.sqrt(0.9)), np.arctanh(np.sqrt(0.9))]),
        (jax.nn.selu, [np.log(0.1 / (1.0507009873554805 * 1.6732632423543772))]),
        (lambda x: jax.nn.gelu(x, approximate=False), [-1.8611, -1.0775, -0.5534]),
    ],
    ids=["tanh", "selu", "gelu"],
)
def test_saturation_changes_where_the_slope_is_a_tenth(fn, edges):
    for edge in edges:
        below = saturation_fraction(fn, jnp.array(edge - 2e-3))
        above = saturation_fraction(fn, jnp.array(edge + 2e-3))
        assert below + above == 1


@pytest.mark.slow
def test_saturation_fraction(getkey):
    x = 2 * normal(getkey(), (50, 7))
    exact = 1 - np.tanh(np.asarray(x, np.float64)) ** 2
    np.testing.assert_allclose(saturation_fraction(jnp.tanh, x), np.mean(exact < 0.1), rtol=1e-6)
    np.testing.assert_allclose(
        saturation_fraction(jnp.tanh, x, slope=0.5), np.mean(exact < 0.5), rtol=1e-6
    )
    assert saturation_fraction(jax.nn.relu, jnp.array([-1.0, 2.0])) == 0.5
    assert saturation_fraction(lambda x: -x, x) == 0
    assert saturation_fraction(jnp.tanh, jnp.full(3, jnp.nan)) == 0


# update_ratio


@pytest.mark.slow
def test_update_ratio_of_optax_updates(getkey):
    params = {"w": normal(getkey(), (6, 4)), "norm": jnp.ones(4), "frozen": None}
    grads = {"w": normal(getkey(), (6, 4)), "norm": normal(getkey(), (4,)), "frozen": None}
    optimiser = optax.sgd(0.1)
    updates, _ = optimiser.update(grads, optimiser.init(params), params)
    ratios = update_ratio(updates, params)
    assert ratios["frozen"] is None
    for name in ("w", "norm"):
        expected = np.linalg.norm(0.1 * grads[name]) / np.linalg.norm(params[name])
        np.testing.assert_allclose(ratios[name], expected, rtol=ulps(24) * 2.0**-23)


def test_update_ratio_of_a_whole_model(getkey):
    model = {"w": jnp.full(4, 2.0), "activation": jnp.tanh, "layers": [jnp.ones(2), "name"]}
    updates = {"w": jnp.full(4, -1.0), "activation": None, "layers": None}
    assert update_ratio(updates, model) == {"w": 0.5, "activation": None, "layers": None}


def test_update_ratio_of_zero_parameters():
    ratios = update_ratio([jnp.ones(3), jnp.zeros(3)], [jnp.zeros(3), jnp.zeros(3)])
    assert jnp.isinf(ratios[0]) and jnp.isnan(ratios[1])


def test_update_ratio_neither_overflows_nor_underflows():
    assert update_ratio(jnp.full(3, 1e-25), jnp.full(3, 1e-22)) == pytest.approx(1e-3)
    assert update_ratio(jnp.full(3, 1e25), jnp.full(3, 1e28)) == pytest.approx(1e-3)


def test_update_ratio_of_other_shapes():
    with pytest.raises(ValueError, match=r"same shapes, but a leaf has \(3,\) and \(4,\)"):
        update_ratio(jnp.ones(3), jnp.ones(4))


# Singular values


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(32, 8), (8, 32), (5, 5), (1, 6), (1, 1)])
def test_singular_value_statistics(shape, getkey):
    x = normal(getkey(), shape)
    singular = np.linalg.svd(np.asarray(x, np.float64), compute_uv=False)
    exact = {
        singular_value_ratio: singular[0] / singular.sum(),
        stable_rank: np.sum(singular**2) / singular[0] ** 2,
        effective_rank: np.exp(scipy.stats.entropy(singular)),
    }
    for statistic, expected in exact.items():
        np.testing.assert_allclose(statistic(x), expected, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "scale", [1.0, *(pytest.param(s, marks=pytest.mark.slow) for s in (1e-30, 1e30))]
)
def test_singular_value_statistics_of_known_matrices(scale):
    same = scale * jnp.eye(4)
    assert singular_value_ratio(same) == pytest.approx(1 / 4)
    assert stable_rank(same) == pytest.approx(4)
    assert effective_rank(same) == pytest.approx(4)
    one = scale * jnp.outer(jnp.array([1.0, 2.0, 2.0]), jnp.array([3.0, 4.0]))
    for statistic in (singular_value_ratio, stable_rank, effective_rank):
        assert statistic(one) == pytest.approx(1, abs=1e-5)
        assert jnp.isnan(statistic(jnp.zeros((3, 4))))


@pytest.mark.parametrize("statistic", [singular_value_ratio, stable_rank, effective_rank])
@pytest.mark.parametrize("shape", [(3,), (2, 3, 4)])
def test_singular_values_are_of_a_matrix(statistic, shape):
    with refused(ValueError, r"must be a matrix.*`x.reshape\(-1, x.shape\[-1\]\)`"):
        statistic(jnp.ones(shape))


# Down to the smallest normal number and up to the largest: 1 to 2 times these.
@pytest.mark.slow
@pytest.mark.parametrize("size", [1.2e-38, 1e-30, 1e19, 1e36, 1.7e38])
def test_singular_value_statistics_of_any_size(size):
    rng = np.random.default_rng(draws.seed(0))
    entries = rng.choice([-1, 1], (20, 18)) * rng.uniform(1, 2, (20, 18))
    x = (size * entries).astype(np.float32)
    singular = np.linalg.svd(x.astype(np.float64), compute_uv=False)
    exact = {
        singular_value_ratio: singular[0] / singular.sum(),
        stable_rank: np.sum((singular / singular[0]) ** 2),
        effective_rank: np.exp(scipy.stats.entropy(singular)),
    }
    for statistic, expected in exact.items():
        np.testing.assert_allclose(statistic(x), expected, rtol=1e-5)


@pytest.mark.slow
def test_scaling_singular_values_adds_nothing_to_their_gradient(getkey):
    def plain(x):
        singular = jnp.linalg.svd(x, compute_uv=False)
        return singular[0] / jnp.sum(singular)

    with jax.enable_x64(True):
        x = normal(getkey(), (6, 4), jnp.float64)
        grad = jax.grad(singular_value_ratio)(x)
        # Singular values of random matrices are rarely closer than 1e-4, by which errors grow.
        np.testing.assert_allclose(grad, jax.grad(plain)(x), rtol=1e-9, atol=1e-9)
        # The ratio does not depend on the size of x: along x there is no slope.
        np.testing.assert_allclose(jnp.sum(grad * x), 0, atol=1e-9)
