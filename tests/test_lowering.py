"""What is done for one compiler is decided for the platform that a program is compiled for.

Not for the one that runs this process: the programs here are lowered, on a CPU, for others too.
"""

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from draws import seed

from eqx_norms import group_norm, layer_norm, rms_norm

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
