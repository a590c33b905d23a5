"""What is done for one compiler is decided for the platform that a program is compiled for.

Not for the one that runs this process: the programs here are lowered, on a CPU, for others too.
"""

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from draws import seed
from jax.interpreters import mlir
from oracles import assert_close, exact_norm, terms
from slow import few

from eqx_norms import group_norm, layer_norm, normalize_reference, rms_norm
from eqx_norms._op import _lowering

PLATFORMS = ("cpu", "cuda", "tpu")


def gradient(norm, argnums=(0, 1)):
    def loss(x, weight, g):
        return jnp.sum(g * jnp.sin(jax.vmap(norm, (0, None))(x, weight).astype(jnp.float32)))

    return jax.jit(jax.value_and_grad(loss, argnums))


def arrays(dtype):
    rng = np.random.default_rng(seed(5))
    x, g = rng.normal(size=(2, 4, 8)).astype(np.float32)
    return jnp.asarray(x, dtype), jnp.asarray(rng.normal(size=8), jnp.float32), jnp.asarray(g)


def barriers(norm, dtype, platform, argnums=(0, 1)):
    traced = gradient(norm, argnums).trace(*arrays(dtype))
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    return text.count("optimization_barrier")


@pytest.mark.parametrize("dtype", (jnp.float32, jnp.bfloat16))
@pytest.mark.parametrize("norm", (layer_norm, rms_norm))
def test_each_platform_gets_its_own(norm, dtype):
    for_cpu, for_cuda, for_tpu = (barriers(norm, dtype, platform) for platform in PLATFORMS)
    # On a CPU every pass has some. Elsewhere there is at most the one around the residuals.
    assert for_cpu > 5 and for_tpu == 0
    assert for_cuda == (norm is rms_norm and dtype == jnp.float32)
    # If x has no derivative it pays in the other dtype.
    without_dx = barriers(norm, dtype, "cuda", argnums=1)
    assert without_dx == (norm is rms_norm and dtype == jnp.bfloat16)


def two_groups(x, weight):
    return group_norm(x, 2, weight)


@pytest.mark.parametrize("dtype", (jnp.float32, jnp.bfloat16))
def test_groups_on_a_tpu_are_kept_from_an_old_compiler(dtype):
    """In a gradient, where the reshape behind them made it store what is subtracted."""
    assert barriers(two_groups, dtype, "cuda") == 0
    # Of y and of its cotangent.
    assert barriers(two_groups, dtype, "tpu") == (2 if jax.__version_info__ < (0, 11) else 0)
    x, weight, _ = arrays(dtype)
    forward = jax.jit(jax.vmap(two_groups, (0, None))).trace(x, weight)
    assert "optimization_barrier" not in forward.lower(lowering_platforms=("tpu",)).as_text()


@pytest.mark.parametrize("dtype", (jnp.float32, jnp.bfloat16))
def test_one_export_for_all_platforms(dtype):
    args = arrays(dtype)
    exported = jax.export.export(gradient(layer_norm), platforms=PLATFORMS)(*args)
    loaded = jax.export.deserialize(exported.serialize())
    assert loaded.platforms == PLATFORMS
    assert "optimization_barrier" in loaded.mlir_module()
    for got, want in zip(
        jax.tree.leaves(loaded.call(*args)),
        jax.tree.leaves(gradient(layer_norm)(*args)),
        strict=True,
    ):
        # The same operations, in fusions that may differ by an ulp of a sum.
        largest = np.abs(np.float64(want)).max()
        eps = float(jnp.finfo(want.dtype).eps)
        assert np.abs(np.float64(got) - np.float64(want)).max() <= 4 * eps * largest


# ---- Statistics in one pass about the middle of three entries, as on a TPU


def in_one_pass(f, *args):
    """What `f` is on a TPU, computed here: there it is, and here it is not, in the program."""
    there, here = (
        mlir.lower_fun(function, multiple_results=True)
        for function in (_lowering._in_one_pass, _lowering._as_they_came)
    )
    mlir.register_lowering(_lowering._moments_p, there, platform="cpu")
    try:
        return jax.jit(lambda *args: f(*args))(*args)
    finally:
        mlir.register_lowering(_lowering._moments_p, here, platform="cpu")


def is_in_one_pass(f, *args, platform):
    text = jax.jit(f).trace(*args).lower(lowering_platforms=(platform,)).as_text()
    return "stablehlo.slice" in text


NORMS = {
    "one weight for all": lambda x, weight: jax.vmap(layer_norm, (0, None))(x, weight),
    "a weight for each": lambda x, weight: jax.vmap(layer_norm)(x, x),
    "groups": lambda x, weight: jax.vmap(two_groups, (0, None))(x, weight),
    "images": lambda x, weight: jax.vmap(two_groups, (0, None))(x.reshape(2, 8, 2), weight),
}


@pytest.mark.parametrize("dtype", (jnp.float32, jnp.bfloat16))
@pytest.mark.parametrize("name", NORMS)
def test_which_statistics_are_taken_in_one_pass(name, dtype):
    """What was measured is in the docstring of `in_one_pass`."""
    norm, (x, weight, _) = NORMS[name], arrays(dtype)
    loss = lambda x, weight: jnp.sum(norm(x, weight).astype(jnp.float32))
    of_both, of_x = (jax.grad(loss, argnums) for argnums in ((0, 1), 0))
    taken = {
        platform: [is_in_one_pass(f, x, weight, platform=platform) for f in (norm, of_both, of_x)]
        for platform in PLATFORMS
    }
    half = dtype == jnp.bfloat16
    assert taken == {
        "tpu": [True, True, True],
        "cuda": [name == "images", half and name == "one weight for all", False],
        "cpu": [False, False, False],
    }


def of_rows(x, weight, bias, g):
    y, vjp = jax.vjp(jax.vmap(layer_norm, (0, None, None)), x, weight, bias)
    return y, *vjp(g)


def of_columns(x, weight, bias, g):
    """The same rows as columns, which are mapped along the last axis."""
    y, vjp = jax.vjp(jax.vmap(layer_norm, (1, None, None), 1), x.T, weight, bias)
    dx, dweight, dbias = vjp(g.T)
    return y.T, dx.T, dweight, dbias


@pytest.mark.parametrize("f", few((of_rows, of_columns), (of_rows,)))
@pytest.mark.parametrize("n", (1, 2, 3, 768))
@pytest.mark.parametrize("offset", (0, 1e6))
@pytest.mark.parametrize("rows", ("normal", "constant", "first far away", "middle far away"))
def test_in_one_pass_they_are_as_exact(rows, offset, n, f):
    rng = np.random.default_rng(seed(7))
    x, g = rng.normal(size=(2, 8, n))
    weight, bias = rng.normal(size=(2, n)) + 1
    if rows == "constant":
        x = np.broadcast_to(x[:, :1], x.shape)
    elif rows != "normal":
        x[:, 0 if rows == "first far away" else n // 2] += 1e4
    args = [a.astype(np.float32) for a in (x + offset, weight, bias, g)]
    got = in_one_pass(f, *args)
    assert_close(got, exact_norm(*args), terms(*args), n)


@pytest.mark.parametrize("n", (768, 16384))
def test_two_far_entries_of_the_three_cost_digits(n):
    """The origin is then D spreads from the mean, at most sqrt(n / 2).

    The variance is left of two numbers 1 + D^2 times as large, a mean of squares and a square, of
    which each is rounded by some ulps; y has half of its relative error.
    """
    x = np.random.default_rng(seed(8)).normal(size=(64, n))
    x[:, [n // 4, n // 2]] += 1e4
    args = [np.float32(a) for a in (x, np.ones(n), np.zeros(n), np.ones((64, n)))]
    want = exact_norm(*args).y
    error = np.abs(np.float64(in_one_pass(of_rows, *args)[0]) - want)
    largest = np.abs(want).max(-1, keepdims=True)
    assert (error <= 4 * (1 + n / 2) * np.finfo(np.float32).eps * largest).all()


@pytest.mark.parametrize("scale", (1e18, 1e20, 1e30))
def test_in_one_pass_y_is_zero_where_squares_overflow(scale):
    x = np.float32(scale * (np.random.default_rng(seed(9)).normal(size=(4, 768)) + 1))
    assert not in_one_pass(jax.vmap(layer_norm), x).any()


def of_the_gradient(x, v, norm=layer_norm):
    return jax.jvp(jax.grad(lambda x: jnp.sum(jnp.sin(norm(x)))), (x,), (v,))[1]


@pytest.mark.slow
def test_in_one_pass_second_derivatives_are_the_same():
    x, v = (a.reshape(-1) for a in arrays(jnp.float32)[::2])
    with jax.enable_x64(True):
        wide = x.astype(jnp.float64), v.astype(jnp.float64)
        want = np.asarray(of_the_gradient(*wide, norm=jax.jit(normalize_reference)))
    # Sums of 32 terms, some of them twice as large as what comes out.
    bound = 64 * np.finfo(np.float32).eps * np.abs(want).max()
    np.testing.assert_allclose(in_one_pass(of_the_gradient, x, v), want, rtol=0, atol=bound)


def test_where_examples_are_in_parts_there_are_three_passes():
    """No entry of them can be taken: of sharded features, of masked and of named ones."""
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):
        x = jax.device_put(arrays(jnp.float32)[0], jax.P(None, "d"))
        assert not is_in_one_pass(jax.vmap(layer_norm), x, platform="tpu")
        assert is_in_one_pass(jax.vmap(layer_norm), x.T, platform="tpu")
    masked = lambda x: layer_norm(x, where=x > 0)
    named = lambda x: layer_norm(x, axis_name="d")
    assert not is_in_one_pass(jax.vmap(masked), np.asarray(x), platform="tpu")
    assert not is_in_one_pass(jax.vmap(named, axis_name="d"), np.asarray(x), platform="tpu")
