"""An example that is split along a mapped axis: equal to the same layer on the whole example.

The oracle is the unsharded layer, for values and for every derivative, in float64; and float64
numpy for float32 at an offset, where partial means must be compensated too.
"""

import functools as ft
import itertools as it

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from draws import normal, seed
from jax.sharding import AxisType, PartitionSpec as P
from oracles import assert_alike, assert_close, exact_norm, terms

from eqx_norms import LayerNorm, RMSNorm, layer_norm, rms_norm

N, ROWS = 16, 3
NORMS = pytest.mark.parametrize("norm", (layer_norm, rms_norm))


def by_shard_map(norm, devices, check_vma):
    mesh = jax.make_mesh((devices,), ("features",), axis_types=(AxisType.Auto,))
    spec, params = P(None, "features"), P("features")

    def local(x, weight, bias, where):
        f = lambda x, where: norm(x, weight, bias, where=where, axis_name="features")
        return jax.vmap(f)(x, where)

    return jax.shard_map(
        local, mesh=mesh, in_specs=(spec, params, params, spec), out_specs=spec, check_vma=check_vma
    )


def by_vmap(norm, parts):
    def sharded(x, weight, bias, where):
        split = lambda a: a.reshape(*a.shape[:-1], parts, -1)
        one = lambda x, w, b, m: norm(x, w, b, where=m, axis_name="features")
        f = jax.vmap(one, axis_name="features")
        y = jax.vmap(f, (0, None, None, 0))(split(x), split(weight), split(bias), split(where))
        return y.reshape(x.shape)

    return sharded


def whole(norm):
    def f(x, weight, bias, where):
        return jax.vmap(lambda x, where: norm(x, weight, bias, where=where))(x, where)

    return f


SHARDED = {
    **{f"shard_map-{k}": ft.partial(by_shard_map, devices=k, check_vma=True) for k in (2, 4, 8)},
    "shard_map-4-unchecked": ft.partial(by_shard_map, devices=4, check_vma=False),
    "vmap-4": ft.partial(by_vmap, parts=4),
}
WAYS = pytest.mark.parametrize("way", SHARDED.values(), ids=SHARDED)
# With a mask; the rest of the product is slow.
QUICK = {(layer_norm, "vmap-4", True)}
CASES = [
    pytest.param(norm, SHARDED[way], masked, marks=[] if case in QUICK else pytest.mark.slow)
    for case in it.product((layer_norm, rms_norm), SHARDED, (False, True))
    for norm, way, masked in (case,)
]


def _loss(f, g, where):
    return lambda x, weight, bias: jnp.sum(g * jnp.sin(f(x, weight, bias, where)))


def derivatives(f, args, tangents, g, where):
    loss = _loss(f, g, where)
    grad = jax.grad(loss, (0, 1, 2))
    slope = lambda *args: jax.jvp(loss, args, tangents)[1]
    return dict(
        value=f(*args, where),
        grad=grad(*args),
        grad_of_weight=jax.grad(loss, 1)(*args),
        jvp=slope(*args),
        forward_over_reverse=jax.jvp(grad, args, tangents),
        reverse_over_forward=jax.grad(slope, (0, 1, 2))(*args),
        reverse_over_reverse=jax.grad(lambda *args: jnp.vdot(grad(*args)[0], tangents[0]))(*args),
    )


@pytest.mark.parametrize("norm, way, masked", CASES)
def test_equals_the_whole_example(norm, way, masked, getkey):
    with jax.enable_x64(True):
        draw = lambda *shape: normal(getkey(), shape)
        args = draw(ROWS, N), draw(N), draw(N)
        tangents = draw(ROWS, N), draw(N), draw(N)
        g = draw(ROWS, N)
        # With a mask the parts do not weigh the same; one row has parts masked whole.
        where = jr.bernoulli(getkey(), 0.5, (ROWS, N)).at[0].set(jnp.arange(N) < 3)
        where = where if masked else None
        got, want = (
            jax.jit(ft.partial(derivatives, f))(args, tangents, g, where)
            for f in ((way(norm) if masked else _without_mask(way, norm)), whole(norm))
        )
        for name in want:
            for a, b in zip(jax.tree.leaves(got[name]), jax.tree.leaves(want[name]), strict=True):
                # Float64; rows of few entries, and second derivatives, magnify its rounding.
                atol = 1e-9 * np.abs(b).max()
                np.testing.assert_allclose(a, b, rtol=0, atol=atol, err_msg=name)


def _without_mask(way, norm):
    """The mask goes through the mapped functions as an array; `norm` is not given it."""
    f = way(lambda x, w, b, where, axis_name: norm(x, w, b, axis_name=axis_name))
    return lambda x, weight, bias, where: f(x, weight, bias, jnp.ones(x.shape, bool))


@pytest.mark.slow
@NORMS
@WAYS
def test_float32_at_an_offset(way, norm):
    f = _without_mask(way, norm)

    @jax.jit
    def run(x, weight, bias, g):
        y, vjp = jax.vjp(lambda *args: f(*args, None), x, weight, bias)
        return y, *vjp(g)

    rng = np.random.default_rng(seed(0))
    x, g = rng.normal(size=(2, ROWS, N))
    weight, bias, g = (a.astype(np.float32) for a in (*rng.normal(size=(2, N)), g))
    for offset in (0, 1e4, 1e6):
        args = (x + offset).astype(np.float32), weight, bias, g
        want, size = (of(*args, centre=norm is layer_norm) for of in (exact_norm, terms))
        assert_close(run(*args), want, size, N)


@pytest.mark.slow
@pytest.mark.parametrize("layer", (LayerNorm, RMSNorm))
def test_the_layers_take_it_as_an_option(layer, getkey):
    x, weight, bias = normal(getkey(), (3, 2, 4))
    local = eqx.tree_at(
        lambda m: (m.weight, m.bias), layer(4, axis_name="features"), (weight, bias)
    )
    whole = eqx.tree_at(
        lambda m: (m.weight, m.bias), layer(8), (weight.reshape(8), bias.reshape(8))
    )
    y = eqx.filter_vmap(lambda m, x: m(x), axis_name="features")(local, x)
    assert_alike(y.reshape(8), whole(x.reshape(8)), 8)


def test_without_the_axis_it_is_jax_that_says_so():
    with pytest.raises(NameError, match="features"):
        LayerNorm(4, axis_name="features")(jnp.ones(4))


# What may stand outside the vmap that names the axis; each takes f(x, weight, bias) of one row.
OUTSIDE = {
    "jit": lambda f: jax.jit(jax.vmap(f, (0, None, None))),
    "checkpoint": lambda f: jax.checkpoint(jax.vmap(f, (0, None, None))),
    "vmap of jit": lambda f: jax.vmap(jax.jit(f), (0, None, None)),
    "scan": lambda f: lambda x, *p: jax.lax.scan(lambda c, x: (c, f(x, *p)), 0, x)[1],
    "map": lambda f: lambda x, *p: jax.lax.map(lambda x: f(x, *p), x),
    "cond": lambda f: (
        lambda x, *p: jax.lax.cond(
            x[0, 0] < 99, lambda x: jax.vmap(f, (0, None, None))(x, *p), jnp.sin, x
        )
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("outside", OUTSIDE)
@pytest.mark.parametrize("norm", (layer_norm, rms_norm))
def test_a_named_vmap_inside_other_transformations(outside, norm, getkey):
    """They are differentiated when the vmap, and the name with it, has long gone."""
    outside = OUTSIDE[outside]

    def in_parts(x, weight, bias):
        split = (a.reshape(4, -1) for a in (x, weight, bias))
        one = lambda *args: norm(*args, axis_name="features")
        return jax.vmap(one, axis_name="features")(*split).ravel()

    with jax.enable_x64(True):
        draw = lambda *shape: normal(getkey(), shape)
        args = draw(ROWS, N), draw(N), draw(N)
        tangents = draw(ROWS, N), draw(N), draw(N)
        g = draw(ROWS, N)
        # `derivatives` gives the mask to the function as one more argument.
        f = lambda norm: lambda x, weight, bias, where: outside(norm)(x, weight, bias)
        got, want = (
            jax.jit(ft.partial(derivatives, f(norm)))(args, tangents, g, None)
            for norm in (in_parts, norm)
        )
    for name in want:
        for a, b in zip(jax.tree.leaves(got[name]), jax.tree.leaves(want[name]), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11, err_msg=name)


# How many devices, how many parts of an example on each, and what stands around the vmap.
MEETING = [
    pytest.param(*case, marks=[] if case == (4, 2, "jit") else pytest.mark.slow)
    for case in it.product((2, 4), (2, 4), OUTSIDE)
]


@pytest.mark.parametrize("devices, parts, outside", MEETING)
def test_a_vmap_with_the_name_of_a_mesh_axis(devices, parts, outside, getkey):
    """It is the inner one that counts. A rule traced late took counts from the mesh."""
    mesh = jax.make_mesh((devices,), ("parts",), axis_types=(AxisType.Auto,))
    with jax.enable_x64(True):
        args = normal(getkey(), (devices, N)), normal(getkey(), (N,)), normal(getkey(), (N,))
        g, where = normal(getkey(), (devices, N)), jr.bernoulli(getkey(), 0.6, (N,))

        def in_parts(x, weight, bias):
            split = [a.reshape(parts, -1) for a in (x, weight, bias, where)]
            one = lambda x, w, b, m: (
                layer_norm(x, w, b, axis_name="parts")
                + layer_norm(x, w, b, where=m, axis_name="parts")
            )
            return jax.vmap(one, axis_name="parts")(*split).ravel()

        def at_once(x, weight, bias):
            return layer_norm(x, weight, bias) + layer_norm(x, weight, bias, where=where)

        def loss(f):
            specs = P("parts"), P(), P()
            f = jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=P("parts"), check_vma=False)
            return lambda *args: jnp.sum(g * f(*args))

        got = jax.jit(jax.grad(loss(OUTSIDE[outside](in_parts)), (0, 1, 2)))(*args)
        want = jax.jit(jax.grad(loss(jax.vmap(at_once, (0, None, None))), (0, 1, 2)))(*args)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-9 * np.abs(b).max())


@pytest.mark.parametrize("layer", (LayerNorm, RMSNorm))
def test_a_list_of_names(layer):
    """As `jax.lax.psum` takes; kept as a tuple, for static fields are hashed."""
    split = layer(4, axis_name=["features"])
    assert split.axis_name == ("features",) and hash(jax.tree.structure(split))
    x = jnp.arange(8.0).reshape(2, 4)
    y = jax.jit(jax.vmap(lambda x: split(x), axis_name="features"))(x)
    assert_alike(y.ravel(), layer(8)(x.ravel()), 8)
