"""`implementation="kernel"`: the primitives in every transformation, and where the kernels are.

What stands in a program is read from its text, lowered on a CPU for a TPU, and for a GPU where JAX
does that without one.
"""

import functools as ft
import subprocess
import sys

import equinox as eqx
import jax
import jax.export
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from draws import normal
from jax.interpreters import mlir
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from oracles import assert_alike, assert_close, exact_norm, terms
from refused import refused
from test_transformations import (
    NAMES,
    check,
    make_case,
    normalize_reference,
    reference_rms_norm,
)

from eqx_norms import LayerNorm, RMSNorm, layer_norm, replace_norms, rms_norm
from eqx_norms._op import _kernels, _rows

pallas_layer_norm = ft.partial(layer_norm, implementation="pallas")
pallas_rms_norm = ft.partial(rms_norm, implementation="pallas")

CASES = {
    layer.__name__: make_case(
        ft.partial(layer, implementation="pallas"), ours, reference, shape=(6,), param_shape=(6,)
    )
    for layer, ours, reference in (
        (LayerNorm, lambda *args: pallas_layer_norm(*args), normalize_reference),
        (RMSNorm, lambda *args: pallas_rms_norm(*args), reference_rms_norm),
    )
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_layer_norm_under(name):
    with jax.enable_x64(True):
        check(name, CASES["LayerNorm"], jnp.float64)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_rms_norm_under(name):
    with jax.enable_x64(True):
        check(name, CASES["RMSNorm"], jnp.float64)


def over_batch(f, axes=1):
    for _ in range(axes):
        f = jax.vmap(f, (0, None, None))
    return f


def gradient(f):
    return jax.grad(lambda *args: jnp.sum(jnp.sin(f(*args).astype(jnp.float32))), (0, 1, 2))


def arrays(*batch, n=40, dtype=jnp.float32):
    return jnp.ones((*batch, n), dtype), jnp.ones(n), jnp.zeros(n)


TARGETS = {"tpu": "@tpu_custom_call", "cuda": "@__gpu$xla.gpu.triton"}
# From 0.12 on JAX lowers Triton only for a GPU that is there.
LOWERS_WITHOUT_GPU = jax.__version_info__ < (0, 12)
platforms = pytest.mark.parametrize("platform", ["tpu", *["cuda"] * LOWERS_WITHOUT_GPU])


def kernels(f, *args, platform="tpu"):
    """The types of the operands and results of each kernel."""
    text = jax.jit(f).trace(*args).lower(lowering_platforms=(platform,)).as_text()
    return [line.rsplit(" : ", 1)[1] for line in text.splitlines() if TARGETS[platform] in line]


@platforms
def test_nested_vmaps_are_rows_of_one_call(platform):
    nested = jax.vmap(over_batch(pallas_layer_norm), (2, None, None), 1)
    args = jnp.ones((5, 40, 3)), jnp.ones(40), jnp.zeros(40)
    forward, backward = kernels(gradient(nested), *args, platform=platform)
    x, param = "tensor<15x40xf32>", "tensor<1x40xf32>"
    assert forward == f"({x}, {param}, {param}) -> {x}"
    assert backward.startswith(f"({x}, {x}, {param}) -> ({x}, ")
    tangents = lambda *args: jax.jvp(nested, args, args)
    assert kernels(tangents, *args, platform=platform) == [forward]


@platforms
@pytest.mark.parametrize("check_vma", (True, False))
def test_kernels_inside_shard_map(platform, check_vma):
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    specs = P("d"), P(), P()
    f = over_batch(pallas_layer_norm, 2)
    f = jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=P("d"), check_vma=check_vma)
    found = kernels(gradient(f), *arrays(8, 5), platform=platform)
    assert len(found) == 2 and all(call.startswith("(tensor<5x40xf32>") for call in found)


@pytest.mark.slow
def test_in_a_shard_map_over_some_axes_the_plain_path_is_taken(getkey):
    mesh = jax.make_mesh((4, 2), ("d", "f"), axis_types=(AxisType.Auto,) * 2)
    f = over_batch(pallas_layer_norm)
    specs = P("d"), P(), P()
    f = jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=P("d"), axis_names={"d"})
    args = normal(getkey(), (8, 40)), *normal(getkey(), (2, 40))
    assert not kernels(gradient(f), *args)
    got, want = (jax.jit(gradient(g))(*args) for g in (f, over_batch(layer_norm)))
    for a, b in zip(got, want, strict=True):
        assert_alike(a, b, 40)


def on_mesh(axis_type):
    mesh = jax.make_mesh((8,), ("d",), axis_types=(axis_type,))
    x, weight, bias = arrays(8)
    return jax.device_put(x, NamedSharding(mesh, P("d"))), weight, bias


masked = lambda x, weight, bias: pallas_layer_norm(x, weight, bias, where=x > 0)
partial_sums = jax.vmap(
    ft.partial(pallas_layer_norm, axis_name="parts"), (0, None, None), axis_name="parts"
)
per_example = jax.vmap(gradient(lambda *args: pallas_layer_norm(*args)), (0, None, None))
PLAIN = {
    "mask": (over_batch(masked), arrays(8)),
    "axis_name": (partial_sums, arrays(8)),
    "mapped weight": (jax.vmap(pallas_layer_norm, (0, 0, None)), (arrays(8)[0], *arrays(8)[::2])),
    "no example": (over_batch(pallas_layer_norm), arrays(0)),
    "empty example": (over_batch(pallas_layer_norm), arrays(8, n=0)),
    "large example": (over_batch(pallas_layer_norm), arrays(8, n=_kernels.LARGEST + 1)),
    "float16 on a TPU": (over_batch(pallas_layer_norm), arrays(8, dtype=jnp.float16)),
    "default": (over_batch(layer_norm), arrays(8)),
}


@pytest.mark.parametrize("f, args", PLAIN.values(), ids=PLAIN)
def test_no_kernel(f, args):
    assert not kernels(f, *args)


def test_the_backward_of_each_example_is_no_kernel():
    """Its dweight is not the sum over all. The forward is one kernel all the same."""
    (forward,) = kernels(per_example, *arrays(8))
    assert forward.endswith("-> tensor<8x40xf32>")


@pytest.mark.parametrize("axis_type", (AxisType.Auto, AxisType.Explicit))
def test_no_kernel_in_a_jit_over_several_devices(axis_type):
    args = on_mesh(axis_type)
    assert not kernels(gradient(over_batch(pallas_layer_norm)), *args)


def test_for_a_gpu_that_jax_does_not_know_the_plain_path_is_lowered():
    found = kernels(gradient(over_batch(pallas_layer_norm)), *arrays(8), platform="cuda")
    assert len(found) == (2 if LOWERS_WITHOUT_GPU else 0)


@pytest.mark.slow
def test_one_export_for_all_platforms():
    f = jax.jit(gradient(over_batch(pallas_layer_norm)))
    args = normal(jr.key(0), (8, 40)), *arrays()[1:]
    exported = jax.export.export(f, platforms=("cpu", "cuda", "tpu"))(*args)
    loaded = jax.export.deserialize(exported.serialize())
    # JAX does not promise that a Triton kernel can be read back.
    assert "tpu_custom_call" in loaded.mlir_module() and "triton" not in loaded.mlir_module()
    for got, want in zip(loaded.call(*args), f(*args), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


@pytest.fixture(params=TARGETS)
def interpreted(request):
    """The kernels of this platform, interpreted, in programs for the CPU."""
    plain = {}
    for p, name in ((_rows.forward_p, "forward"), (_rows.backward_p, "backward")):
        several = p.multiple_results
        plain[p] = mlir.lower_fun(getattr(_rows, f"_{name}"), multiple_results=several)
        kernel = ft.partial(getattr(_kernels, name), platform=request.param, interpret=True)
        mlir.register_lowering(p, mlir.lower_fun(kernel, multiple_results=several), platform="cpu")
    yield
    for p, rule in plain.items():
        mlir.register_lowering(p, rule, platform="cpu")


@pytest.mark.slow
@pytest.mark.parametrize("unit_offset", (False, True))
def test_a_layer_by_its_kernels(interpreted, getkey, unit_offset):
    """Two maps around a layer of two axes; `unit_offset` adds one to the weight."""
    x, g = normal(getkey(), (2, 3, 5, 4, 6))
    layer = LayerNorm((4, 6), unit_offset=unit_offset, implementation="pallas")
    params = normal(getkey(), (2, 4, 6))
    layer = eqx.tree_at(lambda layer: (layer.weight, layer.bias), layer, tuple(params))

    @eqx.filter_jit
    def value_and_vjp(layer, x, g):
        y, vjp = eqx.filter_vjp(lambda layer, x: jax.vmap(jax.vmap(layer))(x), layer, x)
        return y, *vjp(g)

    y, dlayer, dx = value_and_vjp(layer, x, g)
    flat = lambda a: np.asarray(a).reshape(-1, 24)
    args = flat(x), flat(layer.weight)[0] + unit_offset, flat(layer.bias)[0], flat(g)
    got = flat(y), flat(dx), flat(dlayer.weight)[0], flat(dlayer.bias)[0]
    assert_close(got, exact_norm(*args), terms(*args), 24)


@pytest.mark.parametrize("make", (LayerNorm, RMSNorm))
def test_layers_say_what_they_take(make):
    assert make(4).implementation == "xla"
    for name in ("kernel", "pallas"):
        assert make(4, implementation=name).implementation == name
    with pytest.raises(ValueError, match=r'implementation=.*"xla" or "kernel".*; got \'triton\''):
        make(4, implementation="triton")


@pytest.mark.parametrize("f", (layer_norm, rms_norm))
def test_functions_say_what_they_take(f):
    with refused(ValueError, r'implementation=.*"xla" or "kernel".*; got None'):
        f(jnp.ones(4), implementation=None)


def test_replace_norms():
    model = [eqx.nn.LayerNorm(4), eqx.nn.RMSNorm(4), eqx.nn.GroupNorm(2, 4)]
    for layer in replace_norms(model, implementation="kernel"):
        assert layer.implementation == "kernel"
    assert replace_norms(model)[0].implementation == "xla"
    with pytest.raises(ValueError, match="implementation"):
        replace_norms(model, implementation="mosaic")


def test_pallas_and_numba_are_imported_by_those_who_need_them():
    run = "import sys, eqx_norms; assert not {'jax.experimental.pallas', 'numba'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", run], check=True)
