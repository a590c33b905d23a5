"""Meshes that JAX's types know of: manual over some axes only, and explicitly sharded.

Under both, the cotangents of a rule must have the types of its inputs, which are not always placed
alike. Oracle: the same derivatives without a mesh, in float64.
"""

import functools as ft

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import normal
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from eqx_norms import AdaLayerNorm, GroupNorm, LayerNorm, group_norm, layer_norm, rms_norm

ROWS, N = 8, 16
MASK = np.arange(N) % 3 > 0


def groups_of_four(x, weight, bias):
    return group_norm(x, 4, weight, bias)


def masked(x, weight, bias):
    return layer_norm(x, weight, bias, where=jnp.asarray(MASK))


def mesh_of(axis_type):
    return jax.make_mesh((4, 2), ("d", "f"), axis_types=(axis_type,) * 2)


def over_rows(norm):
    return jax.vmap(norm, (0, None, None))


def gradient(f, g):
    return jax.grad(lambda *args: jnp.sum(g * jnp.sin(f(*args))), (0, 1, 2))


def derivatives(f, args, tangents, g):
    in_weight = lambda weight: gradient(f, g)(args[0], weight, args[2])[1]
    return dict(
        value=f(*args),
        grad=gradient(f, g)(*args),
        jvp=jax.jvp(f, args, tangents)[1],
        hvp_in_weight=jax.jvp(in_weight, args[1:2], tangents[1:2])[1],
    )


def assert_same(got, want):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11)


@pytest.fixture
def arrays(getkey):
    """x, weight, bias and tangents of each, and a cotangent of y; in float64."""
    with jax.enable_x64(True):
        x, dx, g = normal(getkey(), (3, ROWS, N))
        weight, bias, dweight, dbias = normal(getkey(), (4, N))
        yield (x, weight, bias), (dx, dweight, dbias), g


slow = lambda *case: pytest.param(*case, marks=pytest.mark.slow)


@pytest.mark.slow
@pytest.mark.parametrize("norm", [layer_norm, slow(rms_norm), slow(groups_of_four)])
def test_manual_over_one_of_two_axes(norm, arrays):
    f = over_rows(norm)
    want = jax.jit(lambda *a: derivatives(f, *a))(*arrays)
    shard = ft.partial(jax.shard_map, mesh=mesh_of(AxisType.Auto), axis_names={"d"})
    specs = P("d"), P(), P()

    outside = shard(f, in_specs=specs, out_specs=P("d"))
    assert_same(jax.jit(lambda *a: derivatives(outside, *a))(*arrays), want)
    inside = shard(lambda args, g: gradient(f, g)(*args), in_specs=(specs, P("d")), out_specs=specs)
    args, _, g = arrays
    assert_same(jax.jit(inside)(args, g), want["grad"])


# Of x, weight and bias: features split and parameters replicated, as they are made; the other way
# round; some of each.
AS_MADE = P("d", "f"), P(), P()
PLACES = [AS_MADE, (P(), P("f"), P("f")), (P(None, "f"), P("f"), P())]
EXPLICIT = [
    (layer_norm, AS_MADE),
    *(slow(layer_norm, places) for places in PLACES[1:]),
    *(slow(norm, places) for norm in (rms_norm, groups_of_four, masked) for places in PLACES),
]


def put(mesh, array, spec):
    return jax.device_put(array, NamedSharding(mesh, spec))


@pytest.mark.parametrize("norm, places", EXPLICIT)
def test_explicit_sharding(norm, places, arrays):
    f = over_rows(norm)
    want = jax.jit(lambda *a: derivatives(f, *a))(*arrays)
    mesh = mesh_of(AxisType.Explicit)
    args, tangents, g = arrays
    place = lambda values: tuple(put(mesh, a, spec) for a, spec in zip(values, places, strict=True))
    y_spec = P(places[0][0] if len(places[0]) else None, "f")
    with jax.set_mesh(mesh):
        args = place(args)
        got = jax.jit(lambda *a: derivatives(f, *a))(args, place(tangents), put(mesh, g, y_spec))
    assert_same(got, want)
    # A gradient lies where its parameter lies.
    for a, da in zip(args, got["grad"], strict=True):
        assert da.sharding.is_equivalent_to(a.sharding, a.ndim)


# Of x, and of weight and bias: split as in FSDP, over the axis that has the batch.
FSDP = [
    (layer_norm, P("d"), P("d")),
    *(slow(layer_norm, *places) for places in ((P("d"), P(("d", "f"))), (P("d", "f"), P("d")))),
    *(slow(norm, P("d"), P("d")) for norm in (rms_norm, groups_of_four, masked)),
]


@pytest.mark.parametrize("norm, place, param_place", FSDP)
def test_parameters_that_are_split_as_the_batch_is(norm, place, param_place, arrays):
    """They are gathered; their gradients lie where they do. (equinox.nn's are an error there.)"""
    f = lambda x, weight, bias: jax.vmap(lambda x: norm(x, weight, bias))(x)
    want = jax.jit(lambda *a: derivatives(f, *a))(*arrays)
    mesh = mesh_of(AxisType.Explicit)
    places = place, param_place, param_place
    args, tangents, g = arrays
    on = lambda values: tuple(put(mesh, a, spec) for a, spec in zip(values, places, strict=True))
    with jax.set_mesh(mesh):
        args = on(args)
        got = jax.jit(lambda *a: derivatives(f, *a))(args, on(tangents), put(mesh, g, place))
    assert_same(got, want)
    assert got["value"].sharding.is_equivalent_to(args[0].sharding, 2)
    for a, da in zip(args, got["grad"], strict=True):
        assert da.sharding.is_equivalent_to(a.sharding, a.ndim)


LAYERS = {
    "tokens and features": (LayerNorm((ROWS, N)), P("d")),
    "channels": (GroupNorm(4, ROWS), P("d")),
    "channels, two groups on two devices": (GroupNorm(2, ROWS), P("f")),
    "without parameters": (GroupNorm(4, channelwise_affine=False), P("d")),
}


@pytest.mark.slow
@pytest.mark.parametrize("layer, spec", LAYERS.values(), ids=LAYERS)
def test_a_layer_whose_leading_axis_is_split(layer, spec, arrays):
    x, g = jax.tree.map(jnp.float32, (arrays[0][0], arrays[2]))
    mesh = mesh_of(AxisType.Explicit)
    loss = lambda layer_and_x, g: jnp.sum(g * jnp.sin(layer_and_x[0](layer_and_x[1])))
    run = eqx.filter_jit(eqx.filter_grad(loss))
    want = run((layer, x), g)
    with jax.set_mesh(mesh):
        got = run((layer, put(mesh, x, spec)), put(mesh, g, spec))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        # Sums of 128 in float32, in another order.
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())


@pytest.mark.slow
def test_ada_layer_norm_of_split_features(arrays, getkey):
    layer = AdaLayerNorm(N, 3, key=getkey())
    layer = jax.tree.map(lambda a: normal(getkey(), a.shape, a.dtype), layer)
    cond = normal(getkey(), (3,))
    (x, *_), _, g = arrays
    loss = lambda layer, x, g: jnp.sum(g * jnp.sin(jax.vmap(layer, (0, None))(x, cond)))
    run = eqx.filter_jit(eqx.filter_grad(loss))
    want = run(layer, x, g)
    mesh = mesh_of(AxisType.Explicit)
    with jax.set_mesh(mesh):
        got = run(layer, *(put(mesh, a, P("d", "f")) for a in (x, g)))
    assert_same(got, want)
