"""Correct models of three libraries pass the check, and made leaky they fail.

Also the thread in which a Haiku user asked whether a layer norm leaks: its table, what its
probe could not see, and what ours does.
"""

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from draws import normal, seed

from eqx_norms.causality import check_causal, check_independent, dependency_matrix

T, D = 8, 4


@pytest.fixture
def x():
    return normal(jr.key(seed(1)), (T, D))


def assert_verdicts(causal, leaky, x):
    report = check_causal(causal, x)
    assert not report.leak, str(report)
    # It mixes positions: else passing would show nothing.
    assert not any("react to no input but their own" in note for note in report.notes)
    assert check_causal(leaky, x).leak


def test_equinox_attention(x):
    attention = eqx.nn.MultiheadAttention(2, D, key=jr.key(seed(0)))
    mask = jnp.tri(T, dtype=bool)
    assert_verdicts(lambda x: attention(x, x, x, mask=mask), lambda x: attention(x, x, x), x)


@pytest.mark.slow
def test_equinox_gru_by_scan(x):
    cell = eqx.nn.GRUCell(D, D, key=jr.key(seed(0)))

    def run(x, reverse):
        step = lambda h, row: (cell(row, h),) * 2
        return jax.lax.scan(step, jnp.zeros(D), x, reverse=reverse)[1]

    assert_verdicts(lambda x: run(x, False), lambda x: run(x, True), x)


@pytest.mark.slow
def test_equinox_convolution(x):
    causal = eqx.nn.Conv1d(D, D, 3, padding=((2, 0),), key=jr.key(seed(0)))
    centred = eqx.nn.Conv1d(D, D, 3, padding=1, key=jr.key(seed(0)))
    assert_verdicts(lambda x: causal(x.T).T, lambda x: centred(x.T).T, x)


@pytest.mark.slow
def test_equinox_layer_norm_without_its_vmap(x):
    attention = eqx.nn.MultiheadAttention(2, D, key=jr.key(seed(0)))
    per_token, over_all = jax.vmap(eqx.nn.LayerNorm(D)), eqx.nn.LayerNorm((T, D))

    def block(norm, x):
        h = norm(x)
        return x + attention(h, h, h, mask=jnp.tri(T, dtype=bool))

    assert_verdicts(lambda x: block(per_token, x), lambda x: block(over_all, x), x)


@pytest.mark.slow
def test_equinox_batch_norm_in_training():
    norm, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(D, "batch", mode="batch")
    x = normal(jr.key(seed(1)), (6, D))

    def run(x, inference):
        mapped = jax.vmap(
            eqx.nn.inference_mode(norm, inference),
            axis_name="batch",
            in_axes=(0, None),
            out_axes=(0, None),
        )
        return mapped(x, state)[0]

    assert not check_independent(lambda x: run(x, True), x).leak
    assert check_independent(lambda x: run(x, False), x).leak


@pytest.mark.slow
def test_flax_attention(x):
    attention = nn.MultiHeadDotProductAttention(num_heads=2)
    params = attention.init(jr.key(seed(0)), x)
    mask = nn.make_causal_mask(jnp.ones(T))
    causal = lambda x: attention.apply(params, x, mask=mask)
    assert_verdicts(causal, lambda x: attention.apply(params, x), x)


@pytest.mark.slow
def test_haiku_attention(x):
    def attend(x, mask):
        init = hk.initializers.VarianceScaling()
        return hk.MultiHeadAttention(2, D, w_init=init)(x, x, x, mask=mask)

    model = hk.without_apply_rng(hk.transform(attend))
    mask = jnp.tri(T)[None]
    params = model.init(jr.key(seed(0)), x, mask)
    causal = lambda x: model.apply(params, x, mask)
    assert_verdicts(causal, lambda x: model.apply(params, x, mask * 0 + 1), x)


# The thread: github.com/google-deepmind/dm-haiku, issue 700. Batch 3, context 7, one feature.

# Printed there with two decimals: the gradient of sum(y[:, 4]) for a norm over axes (0, 1).
THREAD_TABLE = [
    [-0.09, -0.21, -0.17, -0.17, 1.03, -0.21, -0.17],
    [-0.15, -0.24, -0.15, -0.19, 0.98, -0.11, -0.17],
    [-0.17, -0.11, -0.19, -0.14, 0.99, -0.20, -0.15],
]


@pytest.fixture
def thread_input():
    partitionable = jax.config.jax_threefry_partitionable
    jax.config.update("jax_threefry_partitionable", False)
    yield jr.normal(jr.PRNGKey(42), (3, 7))
    jax.config.update("jax_threefry_partitionable", partitionable)


def haiku_norm(axis):
    norm = lambda x: hk.LayerNorm(axis, create_scale=True, create_offset=True)(x)
    model = hk.without_apply_rng(hk.transform(norm))

    def run(x):
        return model.apply(model.init(None, x), x)

    return run


def threads_probe(fn, x):
    """Their probe: the gradient of the sum of all outputs at position 4, a cotangent of ones."""
    return np.asarray(jax.grad(lambda x: fn(x)[:, 4].sum())(x))


@pytest.mark.slow
def test_the_threads_table_digit_for_digit(thread_input):
    table = threads_probe(haiku_norm((0, 1)), thread_input)
    assert np.array_equal(np.round(table.astype(np.float64), 2), THREAD_TABLE)


@pytest.mark.slow
def test_the_threads_probe_is_blind_to_its_fix(thread_input):
    # Over the batch: causal in time. The probe sees nothing, not even that position 4 is read.
    fix = haiku_norm((0,))
    # Rounding, beside entries of 1: 80 ulps.
    assert np.abs(threads_probe(fix, thread_input)).max() < 1e-5
    assert not check_causal(fix, thread_input, axis=1, pointwise=True).leak
    assert check_independent(fix, thread_input).leak
    assert dependency_matrix(fix, thread_input, axis=1, method="vjp").diagonal().min() > 1e-3


def test_the_threads_leak_is_found(thread_input):
    report = check_causal(haiku_norm((0, 1)), thread_input, axis=1)
    assert len(report.pairs()) == 21
    assert not check_causal(lambda x: x, thread_input, axis=1, pointwise=True).leak
