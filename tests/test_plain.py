"""Inside `plain()` the layers are made of operations of JAX, and compute the same.

Against themselves outside of it, which other tests hold to float64; and in what refuses them there.
"""

import jax
import jax.numpy as jnp
import jax.random as jr
import pytest
from draws import normal
from jax.experimental import pallas as pl
from jax.experimental.jet import jet
from jax.experimental.sparse import sparsify
from oracles import assert_alike
from slow import few

from eqx_norms import (
    AdaLayerNorm,
    GroupNorm,
    LayerNorm,
    RMSNorm,
    layer_norm,
    normalize_reference,
    plain,
    rms_norm,
)

N = 8
LAYERS = {
    "LayerNorm": LayerNorm(N),
    "RMSNorm": RMSNorm(N),
    "GroupNorm": GroupNorm(2, N),
    "AdaLayerNorm": lambda x: AdaLayerNorm(N, 3, key=jr.key(0))(x, jnp.ones(3)),
    "pallas": LayerNorm(N, implementation="pallas"),
}


def of(f, *args):
    return str(jax.make_jaxpr(f)(*args))


def is_plain(program):
    return not any(name in program for name in ("eqx_norms_", "custom_jvp", "remat", "checkpoint"))


@pytest.mark.parametrize("name", LAYERS)
def test_it_holds_for_what_is_traced_in_it(name, getkey):
    """In functions, too, that `jax.jit` has traced outside; and no longer."""
    layer, x = LAYERS[name], normal(getkey(), (N,))
    f = jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(layer(x)))))
    for _ in range(2):
        assert not is_plain(of(f, x))
        with plain():
            assert is_plain(of(f, x))


@pytest.mark.parametrize("name", few(LAYERS, ("LayerNorm",)))
@pytest.mark.parametrize("offset", few((0, 1e6), (1e6,)))
def test_values_and_gradients_are_the_same(name, offset, getkey):
    x, g = normal(getkey(), (2, N)) + jnp.asarray([[offset], [0.0]])

    def run(x):
        y, vjp = jax.vjp(LAYERS[name], x)
        return y, *vjp(g)

    want = jax.jit(run)(x)
    with plain():
        for a, b in zip(jax.jit(run)(x), want, strict=True):
            assert_alike(a, b, N)


@pytest.mark.slow
def test_what_refuses_custom_derivatives_takes_them(getkey):
    x, v = normal(getkey(), (2, N))
    with plain():
        _, (dy, ddy) = jet(layer_norm, (x,), ([v, jnp.zeros(N)],))
        sparse = sparsify(layer_norm)(x)
    jvp = lambda f: lambda x: jax.jvp(f, (x,), (v,))[1]
    assert_alike(dy, jvp(normalize_reference)(x), N)
    assert_alike(ddy, jvp(jvp(normalize_reference))(x), N)
    assert_alike(sparse, layer_norm(x), N)


# ---- Kernels of one's own, for a TPU


def in_kernel(norm, x, **how):
    def kernel(x_ref, y_ref):
        y_ref[...] = jax.vmap(norm)(x_ref[...])

    return pl.pallas_call(kernel, jax.ShapeDtypeStruct(x.shape, x.dtype), **how)(x)


def lowered(norm, x):
    traced = jax.jit(lambda x: in_kernel(norm, x)).trace(x)
    return traced.lower(lowering_platforms=("tpu",)).as_text()


OF_ROWS = layer_norm, rms_norm, GroupNorm(4, channelwise_affine=False)


@pytest.mark.parametrize("norm", few(OF_ROWS, (layer_norm,)))
def test_in_a_kernel(norm):
    x = normal(jr.key(0), (8, 256)) + 1e4
    with pytest.raises(NotImplementedError):
        lowered(norm, x)
    with plain():
        assert "tpu_custom_call" in lowered(norm, x)
        assert_alike(in_kernel(norm, x, interpret=True), jax.vmap(norm)(x), 256)
