"""capture and capture_grads inside `jax.shard_map`, and on meshes with explicit axes.

Tolerances as in test_diagnostics_capture.py: the same float32 operations on numbers of order one,
in programs that XLA may fuse differently.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import normal
from slow import few

from eqx_norms.diagnostics import (
    Watch,
    activation_stats,
    capture,
    capture_grads,
    dead_unit_fraction,
    diagnose,
    effective_rank,
    histogram,
    saturation_fraction,
    singular_value_ratio,
    stable_rank,
)

RTOL, ATOL = 2e-6, 2e-6
AUTO, EXPLICIT = jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit
LINEAR = eqx.nn.Linear


def assert_close(a, b):
    np.testing.assert_allclose(a, b, rtol=RTOL, atol=ATOL)


def in_shards(fn, *args):
    """`fn` on each of four shards of the arguments' first axis."""
    mesh = jax.make_mesh((4,), ("i",), axis_types=(AUTO,))
    spec = jax.P("i")
    return jax.jit(jax.shard_map(fn, mesh=mesh, in_specs=spec, out_specs=spec))(*args)


@pytest.mark.slow
def test_in_a_shard_map_each_shard_has_the_derivative_of_its_own_loss(getkey):
    linear = LINEAR(3, 3, key=getkey())
    x = normal(getkey(), (8, 3))
    scale = jnp.arange(1.0, 5.0)  # another loss on each shard

    def loss(linear, x, scale):
        twice = lambda x, _: (jnp.tanh(jax.vmap(linear)(x)), None)
        return scale * jnp.sum(jax.lax.scan(twice, x, length=2)[0] ** 2)

    def one(x, scale):
        value, values, grads, _ = capture_grads(loss, linear, x, scale[0], where=LINEAR)
        return value[None], jnp.swapaxes(values[""], 0, 1), jnp.swapaxes(grads[""], 0, 1)

    def by_hand(x, scale):
        def shifted(shift):
            first = linear(x) + shift[0]
            second = linear(jnp.tanh(first)) + shift[1]
            return scale * jnp.sum(jnp.tanh(second) ** 2), jnp.stack([first, second])

        (value, values), grads = jax.value_and_grad(shifted, has_aux=True)(jnp.zeros((2, 3)))
        return value, values, grads

    value, values, grads = in_shards(one, x, scale)
    of_example, *expected = jax.vmap(by_hand)(x, jnp.repeat(scale, 2))
    assert_close(value, jnp.sum(of_example.reshape(4, 2), axis=1))
    assert_close(values, expected[0])
    assert_close(grads, expected[1])


def test_what_is_the_same_on_all_shards_has_the_derivative_of_their_sum(getkey):
    linear = LINEAR(3, 3, key=getkey())
    x = normal(getkey(), (4, 3))
    loss = lambda linear, x: jnp.vdot(linear(jnp.ones(3)), x)
    one = lambda x: capture_grads(loss, linear, x[0], where=LINEAR)[2][""][None]
    # `jax.grad` with respect to an unvarying array does the same.
    assert_close(in_shards(one, x), jnp.broadcast_to(jnp.sum(x, axis=0), (4, 3)))


def branches(linear, x):
    return jax.lax.switch(
        jnp.int32(jnp.sum(x) > 0), [lambda x: linear(2 * x), lambda x: linear(linear(x))], x
    )


def branches_by_hand(linear, x):
    missing = jnp.full((), jnp.nan)
    twice, once = linear(2 * x), linear(x)
    positive = jnp.sum(x) > 0
    values = jnp.where(
        jnp.array([positive, ~positive, ~positive])[:, None],
        missing,
        jnp.stack([twice, once, linear(once)]),
    )
    return values, 2 * jnp.where(positive, linear(once), twice)


@pytest.mark.slow
def test_a_cond_in_a_shard_map(getkey):
    linear = LINEAR(3, 3, key=getkey())
    row = normal(getkey(), (3,))
    x = jnp.stack([row, -row, -row, row])  # both branches are taken

    def one(x):
        values = capture(branches, linear, x[0], where=LINEAR)[1]
        loss = lambda *args: jnp.sum(branches(*args) ** 2)
        grads = capture_grads(loss, linear, x[0], where=LINEAR)[2]
        stack = lambda tree: jnp.stack([tree[key] for key in ("", "#1", "#2")])[None]
        return stack(values), stack(grads)

    values, grads = in_shards(one, x)
    expected, at_the_output = jax.vmap(lambda x: branches_by_hand(linear, x))(x)
    assert_close(values, expected)
    positive = (jnp.sum(x, axis=1) > 0)[:, None]
    assert_close(grads[:, 0], jnp.where(positive, 0, at_the_output))
    assert_close(grads[:, 2], jnp.where(positive, at_the_output, 0))
    assert_close(grads[:, 1], jnp.where(positive, at_the_output @ linear.weight, 0))


@pytest.mark.slow
def test_on_an_explicit_mesh_derivatives_and_branches_lie_where_the_values_do(getkey):
    mesh = jax.make_mesh((4, 2), ("batch", "other"), axis_types=(EXPLICIT, EXPLICIT))
    linear = LINEAR(3, 3, key=getkey())
    x = normal(getkey(), (8, 3))

    def fn(linear, x, positive):
        batched = lambda x: jax.vmap(linear)(x)
        step = lambda x, _: (
            jax.lax.cond(positive, batched, lambda x: jnp.tanh(batched(batched(x))), x),
            None,
        )
        return jax.lax.scan(step, x, length=2)[0]

    loss = lambda *args: jnp.sum(fn(*args) ** 2)
    run = lambda x, positive: capture_grads(loss, linear, x, positive, where=LINEAR)[:3]
    for positive in (jnp.array(True), jnp.array(False)):
        expected = jax.jit(run)(x, positive)
        for transform in (jax.jit, lambda f: f):
            with jax.set_mesh(mesh):
                sharded = jax.device_put(x, jax.P("batch", None))
                _, values, grads = found = transform(run)(sharded, positive)
            jax.tree.map(assert_close, found, expected)
            for key, value in values.items():
                assert value.sharding.spec == jax.P(None, "batch", None), key
                assert grads[key].sharding.spec == value.sharding.spec, key


@pytest.mark.slow
def test_a_shard_map_over_one_axis_of_an_explicit_mesh(getkey):
    mesh = jax.make_mesh((2, 4), ("manual", "batch"), axis_types=(EXPLICIT, EXPLICIT))
    linear = LINEAR(3, 3, key=getkey())
    x = normal(getkey(), (2, 8, 3))
    batched = lambda linear, x: jax.vmap(lambda x: jnp.tanh(linear(x)))(x)
    loss = lambda linear, x: jnp.sum(
        jax.lax.cond(x.shape[0] > 0, batched, lambda linear, x: x, linear, x) ** 2
    )

    def one(x):
        _, values, grads, _ = capture_grads(loss, linear, x[0], where=LINEAR)
        assert jax.typeof(grads[""]) == jax.typeof(values[""])
        return values[""][None], grads[""][None]

    expected = jax.vmap(jax.vmap(linear))(x)
    spec = jax.P("manual")
    with jax.set_mesh(mesh):
        sharded = jax.device_put(x, jax.P("manual", "batch", None))
        mapped = jax.shard_map(one, in_specs=spec, out_specs=spec, axis_names={"manual"})
        values, grads = jax.jit(mapped)(sharded)
    assert_close(values, expected)
    t = jnp.tanh(expected)
    assert_close(grads, 2 * t * (1 - t**2))


@pytest.mark.parametrize("axis_type", [AUTO, EXPLICIT])
def test_a_mesh_that_is_not_set(axis_type, getkey):
    mesh = jax.make_mesh((4,), ("batch",), axis_types=(axis_type,))
    x = normal(getkey(), (8, 3))
    sharded = jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.P("batch")))
    act = eqx.nn.Lambda(jnp.tanh)
    loss = lambda act, x: jnp.sum(jnp.sin(act(x)))
    _, values, grads, _ = jax.jit(lambda x: capture_grads(loss, act, x, where=eqx.nn.Lambda))(
        sharded
    )
    assert_close(grads[""], jnp.cos(jnp.tanh(x)))
    assert grads[""].sharding.is_equivalent_to(values[""].sharding, 2)


# Statistics. Oracle: those of the same array on one device, of which the sums may be in another
# order: so many ulps of what is summed.


def split(x, *axes):
    """On a mesh of the kind that `jax.make_mesh` gives, whose axes are explicit."""
    mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(EXPLICIT, EXPLICIT))
    return jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.P(*axes)))


MATRIX = {
    "effective_rank": effective_rank,
    "stable_rank": stable_rank,
    "singular_value_ratio": singular_value_ratio,
}
ANY = {
    "activation_stats": activation_stats,
    "histogram": lambda x: histogram(x, jnp.linspace(-2.0, 2.0, 9)),
    "dead_unit_fraction": dead_unit_fraction,
    "saturation_fraction": lambda x: saturation_fraction(jnp.tanh, x),
}


@pytest.mark.parametrize("name", few(MATRIX | ANY, ("effective_rank",)))
def test_statistics_of_a_split_array(name, getkey):
    fn, shape = (MATRIX | ANY)[name], (8, 4) if name in MATRIX else (8, 4, 6)
    x = normal(getkey(), shape)
    for axes in (("a", "b"), (*[None] * (len(shape) - 1), "a")):
        found, expected = jax.jit(fn)(split(x, *axes)), jax.jit(fn)(x)
        assert jax.tree.structure(found) == jax.tree.structure(expected)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_instruments_on_an_explicit_mesh(getkey):
    mlp = LINEAR(4, 4, key=getkey())
    x = normal(getkey(), (16, 6, 4))
    loss = lambda mlp, x: jnp.mean((jax.vmap(jax.vmap(mlp))(x) - x) ** 2)
    mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(EXPLICIT, EXPLICIT))
    measure = eqx.filter_jit(Watch(loss, where=LINEAR).measure)
    sharded = jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.P("a")))
    expected = measure(mlp, x), diagnose(loss, mlp, x)
    with jax.set_mesh(mesh):
        look, diagnosis = measure(mlp, sharded), diagnose(loss, mlp, sharded)
    for a, b in zip(jax.tree.leaves(look), jax.tree.leaves(expected[0]), strict=True):
        if jnp.issubdtype(a.dtype, jnp.floating):  # a count may be next to its bin
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    assert [row.name for row in diagnosis.calls] == [row.name for row in expected[1].calls]
    for a, b in zip(diagnosis.calls, expected[1].calls, strict=True):
        assert set(a.statistics) == set(b.statistics)
        for name, number in a.statistics.items():
            np.testing.assert_allclose(number, b.statistics[name], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_watch_of_a_batch_over_two_axes_of_a_mesh_that_is_not_set(getkey):
    """With the model on the mesh as well; without, JAX refuses the loss's own gradient."""
    linear, x = LINEAR(4, 4, key=getkey()), normal(getkey(), (16, 6, 4))
    loss = lambda linear, x: jnp.mean((jax.vmap(jax.vmap(linear))(x) - x) ** 2)
    measure = eqx.filter_jit(Watch(loss, where=LINEAR).measure)
    look = measure(jax.tree.map(split, linear), split(x, "a", "b"))
    for a, b in zip(jax.tree.leaves(look), jax.tree.leaves(measure(linear, x)), strict=True):
        if jnp.issubdtype(a.dtype, jnp.floating):  # a count may be next to its bin
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
