"""Exported by jax2onnx and run by ONNX Runtime, at offsets, against float64.

pip install -e ".[test,onnx]" && pytest -m onnx
"""

import importlib
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from draws import seed
from oracles import Exact, assert_close, exact_norm, terms

from eqx_norms import AdaLayerNorm, group_norm, layer_norm, replace_norms, rms_norm

N, GROUPS = 24, 4


@pytest.fixture
def export():
    """`export(f, *shapes)` is `f` as ONNX Runtime runs it; names in a shape are left open."""
    import jax2onnx
    import onnxruntime

    import eqx_norms.onnx  # noqa: F401

    def exported(f, *shapes):
        model = jax2onnx.to_onnx(f, list(shapes)).SerializeToString()
        session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
        names = [i.name for i in session.get_inputs()]
        return lambda *arrays: session.run(None, dict(zip(names, arrays, strict=True)))

    # It mixes dtypes and ranks.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield exported


def with_gradients(norm):
    def f(x, weight, bias, g):
        y, vjp = jax.vjp(jax.vmap(norm, (0, None, None)), x, weight, bias)
        return y, *vjp(g)

    return f


def drawn(rows, offset):
    """`x, weight, bias, g`, of which x has the offset."""
    rng = np.random.default_rng(seed(1))
    x, g = rng.normal(size=(2, rows, N))
    weight, bias = rng.normal(size=(2, N))
    return [np.float32(a) for a in (x + offset, weight, bias, g)]


def by_group(oracle):
    """`oracle` of each group of features, as of a norm of its own."""

    def of_all(*args):
        parts = zip(*(np.split(a, GROUPS, -1) for a in args), strict=True)
        results = [oracle(*part) for part in parts]
        return Exact(*(np.concatenate(r, -1) for r in zip(*results, strict=True)))

    return of_all


def by_kernel(x, weight, bias):
    return layer_norm(x, weight, bias, implementation="pallas")


def of_groups(x, weight, bias):
    return group_norm(x, GROUPS, weight, bias)


def without_mean(oracle):
    return lambda *args: oracle(*args, centre=False)


NORMS = {
    "LayerNorm": (layer_norm, exact_norm, terms),
    "LayerNorm, pallas": (by_kernel, exact_norm, terms),
    "RMSNorm": (rms_norm, without_mean(exact_norm), without_mean(terms)),
    "GroupNorm": (of_groups, by_group(exact_norm), by_group(terms)),
}


@pytest.mark.onnx
@pytest.mark.parametrize("name", NORMS)
def test_values_and_gradients(export, name):
    """Of a batch whose size the exported program leaves open."""
    norm, exact, size = NORMS[name]
    run = export(with_gradients(norm), ("B", N), (N,), (N,), ("B", N))
    for offset, rows in zip((0, 1e4, 1e6), (1, 6, 5), strict=True):
        args = drawn(rows, offset)
        assert_close(run(*args), exact(*args), size(*args), N)


@pytest.mark.onnx
def test_ada_layer_norm(export):
    """Its linear map is the identity, so that the condition is scale and shift as they are.

    (Not the gradient of the condition: of `eqx.nn.Linear` jax2onnx exports no derivative.)
    """
    layer = AdaLayerNorm(N, 2 * N, key=jr.key(0))
    layer = eqx.tree_at(lambda m: m.linear.weight, layer, jnp.eye(2 * N))

    def f(x, cond, g):
        y, vjp = jax.vjp(lambda x: jax.vmap(layer)(x, cond), x)
        return y, *vjp(g)

    run = export(f, (6, N), (6, 2 * N), (6, N))
    for offset in (0, 1e6):
        x, _, _, g = drawn(6, offset)
        cond = np.float32(np.random.default_rng(seed(2)).normal(size=(6, 2 * N)))
        scale, shift = np.split(cond, 2, -1)
        args = x, np.float32(1) + scale, shift, g
        of_x = lambda exact: Exact(*exact[:2], np.zeros(0), np.zeros(0))
        got = *run(x, cond, g), np.zeros(0), np.zeros(0)
        assert_close(got, of_x(exact_norm(*args)), of_x(terms(*args)), N)


@pytest.mark.onnx
def test_models(export):
    """Norms that are alike, of which JAX traces one; and a scan over three."""
    norms = replace_norms([eqx.nn.LayerNorm(N), eqx.nn.RMSNorm(N)])
    matrices = np.random.default_rng(seed(4)).normal(size=(3, N, N)).astype(np.float32) / N**0.5

    def layer(x, matrix):
        for norm in norms:
            x = jnp.tanh(jax.vmap(norm)(x) @ matrix)
        return x

    def unrolled(x):
        for matrix in matrices:
            x = layer(x, matrix)
        return x

    def scanned(x):
        return jax.lax.scan(lambda x, matrix: (layer(x, matrix), None), x, matrices)[0]

    x, g = np.random.default_rng(seed(3)).normal(size=(2, 6, N)).astype(np.float32)
    for f in unrolled, scanned:
        # Six layers, each of which may double what it is given of rounding.
        np.testing.assert_allclose(export(f, (6, N))(x)[0], f(x), rtol=0, atol=1e-5)
    (dx,) = jax.vjp(unrolled, x)[1](g)
    (got,) = export(lambda x, g: jax.vjp(unrolled, x)[1](g), (6, N), (6, N))(x, g)
    np.testing.assert_allclose(got, dx, rtol=0, atol=1e-5 * np.abs(dx).max())


def test_without_jax2onnx_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "jax2onnx.plugins.plugin_system", None)
    monkeypatch.delitem(sys.modules, "eqx_norms.onnx", raising=False)
    with pytest.raises(ImportError, match=r'pip install "eqx-norms\[onnx\]"'):
        importlib.import_module("eqx_norms.onnx")
