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

from eqx_norms import _lowering, group_norm, layer_norm, rms_norm

PLATFORMS = ("cpu", "cuda", "tpu")


def gradient(norm):
    def loss(x, weight, g):
        return jnp.sum(g * jnp.sin(jax.vmap(norm, (0, None))(x, weight).astype(jnp.float32)))

    return jax.jit(jax.value_and_grad(loss, (0, 1)))


def arrays(dtype):
    rng = np.random.default_rng(seed(5))
    x, g = rng.normal(size=(2, 4, 8)).astype(np.float32)
    return jnp.asarray(x, dtype), jnp.asarray(rng.normal(size=8), jnp.float32), jnp.asarray(g)


def barriers(norm, dtype, platform):
    traced = gradient(norm).trace(*arrays(dtype))
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    return text.count("optimization_barrier")


@pytest.mark.parametrize("dtype", (jnp.float32, jnp.bfloat16))
@pytest.mark.parametrize("norm", (layer_norm, rms_norm))
def test_each_platform_gets_its_own(norm, dtype):
    for_cpu, for_cuda, for_tpu = (barriers(norm, dtype, platform) for platform in PLATFORMS)
    # On a CPU every pass has some. Elsewhere there is at most the one around the residuals.
    assert for_cpu > 5 and for_tpu == 0
    assert for_cuda == (0 if norm is layer_norm and dtype == jnp.float32 else 1)


def two_groups(x, weight):
    return group_norm(x, 2, weight)


@pytest.mark.parametrize("dtype", (jnp.float32, jnp.bfloat16))
def test_groups_have_no_barrier_on_a_gpu(dtype):
    assert barriers(two_groups, dtype, "cpu") > 5
    assert barriers(two_groups, dtype, "cuda") == barriers(two_groups, dtype, "tpu") == 0


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


# ---- What entries are counted from on a TPU: the middle of three, in place of a mean


def middle_of_three(f, *args):
    """What `f` is on a TPU, computed here: there it is, and here it is not, in the program."""
    rule = mlir.lower_fun(_lowering._middle_of_three, multiple_results=False)
    mlir.register_lowering(_lowering._near_p, rule, platform="cpu")
    try:
        return jax.jit(f)(*args)
    finally:
        mlir.register_lowering(_lowering._near_p, _lowering._mean_of_all, platform="cpu")


def slices(f, *args, platform):
    text = jax.jit(f).trace(*args).lower(lowering_platforms=(platform,)).as_text()
    return text.count("stablehlo.slice") + text.count("stablehlo.minimum")


def test_on_a_tpu_no_pass_is_made_for_the_origin():
    f, args = gradient(layer_norm), arrays(jnp.float32)
    assert slices(f, *args, platform="tpu") > 0
    assert slices(f, *args, platform="cpu") == slices(f, *args, platform="cuda") == 0


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
@pytest.mark.parametrize("rows", ("normal", "constant", "first entry far away"))
def test_the_origin_of_a_tpu_is_as_exact(rows, offset, n, f):
    rng = np.random.default_rng(seed(7))
    x, g = rng.normal(size=(2, 8, n))
    weight, bias = rng.normal(size=(2, n)) + 1
    if rows == "constant":
        x = np.broadcast_to(x[:, :1], x.shape)
    elif rows != "normal":
        x[:, 0] += 1e4
    args = [a.astype(np.float32) for a in (x + offset, weight, bias, g)]
    got = middle_of_three(f, *args)
    assert_close(got, exact_norm(*args), terms(*args), n)


@pytest.mark.parametrize("n", (768, 16384))
def test_two_far_entries_of_the_first_three_cost_digits(n):
    """The origin is then D spreads from all others, at most sqrt(n / 2), and y off by ulps of D.

    x - origin, d and what is left of both are rounded by an ulp of D each, and so is the sum of n
    such roundings that are alike.
    """
    x = np.random.default_rng(seed(8)).normal(size=(64, n))
    x[:, :2] += 1e4
    args = x.astype(np.float32), np.ones(n), np.zeros(n), np.ones((64, n))
    args = [np.float32(a) for a in args]
    error = np.abs(np.float64(middle_of_three(of_rows, *args)[0]) - exact_norm(*args).y)
    far, eps = (n / 2) ** 0.5, np.finfo(np.float32).eps
    assert error[:, 2:].max() <= 4 * far * eps


def test_where_examples_are_in_parts_the_origin_is_the_mean():
    """A slice of them cannot be taken: of sharded features, of masked and of named ones."""
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):
        x = jax.device_put(arrays(jnp.float32)[0], jax.P(None, "d"))
        assert slices(jax.vmap(layer_norm), x, platform="tpu") == 0
        assert slices(jax.vmap(layer_norm), x.T, platform="tpu") > 0
    masked = lambda x: layer_norm(x, where=x > 0)
    named = lambda x: layer_norm(x, axis_name="d")
    assert slices(jax.vmap(masked), np.asarray(x), platform="tpu") == 0
    assert slices(jax.vmap(named, axis_name="d"), np.asarray(x), platform="tpu") == 0
