"""capture and capture_grads with `replace`, against the same functions with the output exchanged by
hand.

Tolerances: the two run the same operations on numbers of order one, in float64, in programs that
XLA may fuse differently: a millionfold of its rounding is allowed.
"""

import functools as ft

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import pytest
from draws import normal
from refused import refused
from trees import assert_trees_close

from eqx_norms.diagnostics import capture, capture_grads

LINEAR = eqx.nn.Linear


assert_close = ft.partial(assert_trees_close, rtol=0, atol=1e-9)


class Net(eqx.Module):
    first: eqx.nn.Linear
    norm: eqx.nn.LayerNorm
    stack: eqx.nn.Linear

    def __init__(self, key):
        one, two = jr.split(key)
        self.first = eqx.nn.Linear(4, 4, key=one)
        self.norm = eqx.nn.LayerNorm(4)
        self.stack = eqx.filter_vmap(lambda k: eqx.nn.Linear(4, 4, key=k))(jr.split(two, 3))

    def __call__(self, x):
        return self.norm(jnp.tanh(self.first(x)))


@pytest.fixture
def net(x64, getkey):
    return Net(getkey())


def through_stack(net, x, edit=lambda value, step: value):
    """The stacked layers in a scan; `edit` by hand."""
    arrays, static = eqx.partition(net.stack, eqx.is_array)

    def step(x, layer_and_number):
        layer, number = layer_and_number
        return jnp.tanh(edit(eqx.combine(layer, static)(x), number)), None

    return jax.lax.scan(step, x, (arrays, jnp.arange(3)))[0]


# By a function


def halved(value):
    return jnp.sin(value) / 2


TRANSFORMED = {
    "plain": lambda net, x: net(x),
    "jit": jax.jit(lambda net, x: net(x)),
    "checkpoint": jax.jit(jax.checkpoint(lambda net, x: net(x))),
    "map": lambda net, x: jax.lax.map(net, x[None])[0],
    "vmap": lambda net, x: jax.vmap(eqx.filter_jit(net))(x[None])[0],
    "cond": lambda net, x: jax.lax.cond(x[0] < 1e6, lambda x: net(x), lambda x: net(net(x)), x),
}
IN_LOOPS = {"map"}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] if name != "map" else []) for name in TRANSFORMED],
)
def test_a_function_and_the_gradients_through_it(name, net, getkey):
    x, weights = normal(getkey(), (4,)), normal(getkey(), (4,))
    fn = TRANSFORMED[name]
    loss = lambda net, x: jnp.vdot(fn(net, x), weights)
    key = "first#2" if name == "cond" else "first"  # the branch for False is first in the program
    replace = {key: (lambda value, step: halved(value)) if name in IN_LOOPS else halved}

    @eqx.filter_jit
    def ours(net, x):
        def of(pair):
            return capture(loss, *pair, where=LINEAR, replace=replace)

        both = eqx.filter_value_and_grad(of, has_aux=True)((net, x))
        return both, capture_grads(loss, net, x, where=LINEAR, replace=replace)

    def by_hand(pair, shift):
        net, x = pair
        value = halved(net.first(x)) + shift
        return jnp.vdot(net.norm(jnp.tanh(value)), weights), value

    (out, value), (grads, at_value) = eqx.filter_value_and_grad(
        lambda both: by_hand(*both), has_aux=True
    )(((net, x), jnp.zeros(4)))
    ((out_, values), grads_), (loss_, values_, at_values, net_grads) = ours(net, x)
    assert_close((out_, loss_), (out, out))
    assert_close((values[key].reshape(4), values_[key].reshape(4)), (value, value))
    assert_close(grads_, grads)
    assert_close(at_values[key].reshape(4), at_value)
    assert_close(net_grads, grads[0])


@pytest.mark.slow
def test_with_the_vmap_inside_the_function_sees_the_batch(net, getkey):
    x = normal(getkey(), (5, 4))
    fn = lambda net, x: jax.vmap(net, in_axes=1)(x)
    reverse = {"first": lambda value: value[::-1]}
    out, values = capture(fn, net, x.T, where=(), replace=reverse)
    assert_close(values, {"first": jax.vmap(net.first)(x)[::-1]})
    assert_close(out, jax.vmap(net)(x)[::-1])
    one = lambda x: capture(lambda net, x: net(x), net, x, where=(), replace={"first": halved})[0]
    by_hand = lambda x: net.norm(jnp.tanh(halved(net.first(x))))
    assert_close(jax.vmap(one)(x), jax.vmap(by_hand)(x))


def test_each_call_has_its_own_key(net, getkey):
    x = normal(getkey(), (4,))
    fn = lambda net, x: net.first(net.first(x))
    out, values = capture(fn, net, x, where=LINEAR, replace={"first#1": halved})
    a = net.first(x)
    b = halved(net.first(a))
    assert_close((out, values), (b, {"first": a, "first#1": b}))
    out, _ = capture(fn, net, x, where=LINEAR, replace={"first": halved, "first#1": jnp.zeros_like})
    assert_close(out, jnp.zeros(4))
    out, _ = capture(fn, net, x, where=LINEAR, replace={"first": halved})
    assert_close(out, net.first(halved(a)))


def test_the_model_itself_and_a_branch_not_taken(net, getkey):
    x = normal(getkey(), (4,))
    fn = lambda net, x: jax.lax.cond(x[0] > 1e6, lambda x: net(x), jnp.cos, x)
    out, values = capture(fn, net, x, where=(), replace={"": jnp.zeros_like})
    assert_close(out, jnp.cos(x))
    assert np.isnan(values[""]).all()
    out, values = capture(lambda net, x: net(x), net, x, where=(), replace={"": halved})
    assert_close((out, values), (halved(net(x)), {"": halved(net(x))}))


# In loops


@pytest.mark.slow
def test_one_step_of_a_loop(net, getkey):
    x = normal(getkey(), (4,))
    loss = lambda net, x: jnp.sum(through_stack(net, x) ** 2)

    @eqx.filter_jit
    @eqx.filter_vmap(in_axes=(0, None, None))
    def ours(layer, net, x):
        silent = {"stack": lambda value, step: jnp.where(step == layer, 0 * value, value)}
        return capture_grads(loss, net, x, where=(), replace=silent)

    def by_hand(net, x, layer):
        silent = lambda value, step: jnp.where(step == layer, 0 * value, value)
        return jnp.sum(through_stack(net, x, silent) ** 2)

    found = ours(jnp.arange(3), net, x)
    for layer in range(3):
        loss_, values, _, grads = jtu.tree_map(lambda leaf: leaf[layer], found)  # noqa: B023
        assert_close((loss_, grads), eqx.filter_value_and_grad(by_hand)(net, x, layer))
        assert (values["stack"][layer] == 0).all() and (values["stack"] != 0).sum() == 8


def test_steps_are_counted_as_the_axes_of_the_values(net, getkey):
    def fn(net, x):
        inner = lambda h, _: (jnp.tanh(net.first(h)), None)
        outer = lambda h, _: (jax.lax.scan(inner, h, length=3, reverse=True)[0], None)
        return jax.lax.scan(outer, x, length=2)[0]

    numbered = {"first": lambda value, i, j: jnp.full_like(value, 10 * i + j)}
    x = normal(getkey(), (4,))
    _, values = capture(fn, net, x, where=(), replace=numbered)
    assert_close(values["first"][..., 0], jnp.array([[0.0, 1, 2], [10, 11, 12]]))
    # Run in reverse, the step with number 0 is the last.
    numbered = {"first": lambda value, i, j: jnp.where((i == 1) & (j == 0), 0 * value, value)}
    out, _ = capture(fn, net, x, where=(), replace=numbered)
    assert_close(out, jnp.zeros(4))


# By arrays


@pytest.mark.slow
def test_what_was_captured_is_put_back(net, getkey):
    def fn(net, xs):
        """A loop over layers in a map over examples, and a vmap."""
        one = lambda x: through_stack(net, net(x))
        return jax.lax.map(jax.vmap(one), xs)

    where = lambda path, _: path in ("first", "stack")
    xs, others = normal(getkey(), (2, 5, 4)), normal(getkey(), (2, 5, 4))
    out, values = capture(fn, net, xs, where=where)
    assert values["stack"].shape == (2, 3, 5, 4)
    for key in values:
        patched, again = capture(fn, net, others, where=where, replace={key: values[key]})
        assert_close(patched, out)
        assert_close(again["stack"], values["stack"])
    # One layer of it alone: the layers before are those of the others.
    first = {"stack": lambda value, i, layer: jnp.where(layer == 0, values["stack"][i, 0], value)}
    assert_close(capture(fn, net, others, where=(), replace=first)[0], out)


def test_gradients_with_respect_to_an_array_in_a_loop(net, getkey):
    x, patch = normal(getkey(), (4,)), normal(getkey(), (3, 4))
    loss = lambda net, x: jnp.sum(jax.lax.map(net.first, jnp.stack([x, x, x])) ** 3)
    of = lambda patch: capture(loss, net, x, where=(), replace={"first": patch})[0]
    assert_close(jax.value_and_grad(of)(patch), (jnp.sum(patch**3), 3 * patch**2))


def test_trees_integers_and_what_is_no_array(x64):
    class Odd(eqx.Module):
        def __call__(self, x):
            return {"x": 2 * x, "index": jnp.argmax(x), "name": "odd", "none": None}

    x = jnp.array([1.0, 3.0])

    def fn(odd, x):
        out = odd(x)
        assert out["name"] == "odd"
        return out["x"] * out["index"].astype(float)

    raised = lambda value: value | {"index": value["index"] + 2}
    out, values = capture(fn, Odd(), x, where=(), replace={"": raised})
    assert_close(out, 6 * x)
    assert values[""]["index"] == 3 and values[""]["name"] == "odd"
    new = {"x": np.ones(2), "index": np.int64(5), "name": "odd", "none": None}
    out, _ = capture(fn, Odd(), x, where=(), replace={"": new})
    assert_close(out, jnp.full(2, 5.0))


@pytest.mark.slow
def test_a_stateful_layer_keeps_its_state(x64, getkey):
    norm, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(3, axis_name="batch", mode="batch")
    x = normal(getkey(), (5, 3))
    run = lambda norm, state, x: jax.vmap(
        norm, axis_name="batch", in_axes=(0, None), out_axes=(0, None)
    )(x, state)
    (out, new_state), _ = capture(run, norm, state, x, where=(), replace={"": jnp.zeros_like})
    assert_close(out, jnp.zeros((5, 3)))
    assert_close(jtu.tree_leaves(new_state), jtu.tree_leaves(run(norm, state, x)[1]))


def test_bfloat16(getkey):
    linear = jtu.tree_map(lambda leaf: leaf.astype(jnp.bfloat16), LINEAR(4, 4, key=getkey()))
    x = normal(getkey(), (4,), jnp.bfloat16)
    out, _ = capture(lambda m, x: m(x), linear, x, where=(), replace={"": lambda v: 0.5 * v})
    assert out.dtype == jnp.bfloat16 and jnp.array_equal(out, linear(x) / 2)


# Meshes


@pytest.mark.slow
def test_in_a_shard_map_and_on_an_explicit_mesh(net, getkey):
    x, patch = normal(getkey(), (8, 4)), normal(getkey(), (4,))
    loss = lambda net, x: jnp.sum(jax.lax.map(net, x) ** 2)
    replacements = (
        lambda value, step: jnp.where(step == 1, patch, value),
        lambda value, step: patch,
        jnp.broadcast_to(patch, (2, 4)),
    )
    mesh = jax.make_mesh((4,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    for new in replacements:
        one = lambda x, new=new: capture_grads(loss, net, x, where=(), replace={"first": new})[2][
            "first"
        ]
        in_shards = jax.shard_map(one, mesh=mesh, in_specs=jax.P("i"), out_specs=jax.P("i"))
        assert_close(jax.jit(in_shards)(x), jnp.concatenate([*map(one, x.reshape(4, 2, 4))]))

    explicit = jax.make_mesh((4,), ("i",), axis_types=(jax.sharding.AxisType.Explicit,))
    fn = lambda net, x: jax.vmap(net)(x)
    new = normal(getkey(), (8, 4))
    expected = fn(eqx.tree_at(lambda net: net.first, net, eqx.nn.Identity()), new)
    with jax.set_mesh(explicit):
        sharded = jax.device_put(x, jax.P("i", None))
        out, values = jax.jit(
            lambda x: capture(fn, net, x, where=(), replace={"first": jnp.asarray(new)})
        )(sharded)
        assert values["first"].sharding.spec == jax.P("i", None)
    assert_close((out, values), (expected, {"first": new}))


# Captures in one another


def test_a_capture_in_a_capture(net, getkey):
    x = normal(getkey(), (4,))

    def inner(net, x):
        return capture(lambda net, x: net(x), net, x, where=(), replace={"first": halved})

    (out, values), outer = capture(inner, net, x, where=LINEAR, replace={"first": jnp.cos})
    # The inner one is nearer to what the layer is called by, the outer one to the layer.
    assert_close(outer, {"first": jnp.cos(net.first(x))})
    assert_close(values, {"first": halved(jnp.cos(net.first(x)))})
    assert_close(out, net.norm(jnp.tanh(values["first"])))


def test_nothing_is_left_behind(net, getkey):
    x = normal(getkey(), (4,))
    jitted = eqx.filter_jit(lambda net, x: net(x))
    before = jitted(net, x)
    capture(jitted, net, x, where=LINEAR, replace={"first": jnp.zeros_like})
    assert_close(jitted(net, x), before)
    assert_close(capture(jitted, net, x, where=LINEAR)[0], before)


# Errors

run = lambda net, x: net(x)


@pytest.mark.parametrize(
    ("replace", "error", "texts"),
    [
        (
            {"second": halved},
            ValueError,
            ("at 'second' there is none", "'first': equinox"),
        ),
        ({"first.weight": halved}, ValueError, ("at 'first.weight' there is none",)),
        ({"first#1": halved}, ValueError, ("the key 'first#1'", "Its calls are 'first'.")),
        ({"stack": halved}, ValueError, ("the key 'stack'", "not called")),
        ({"first": lambda value: value[:2]}, ValueError, ("f64[4]", "f64[2]", "broadcast_to")),
        ({"first": lambda value: 0.0}, ValueError, ("What `replace['first']` returns", "0.0")),
        ({"first": lambda value: (value,)}, ValueError, ("same structure", "(f64[4],)")),
        ({"first": lambda value: None}, ValueError, ("same structure", "None")),
        ({"first": np.ones(3)}, ValueError, ("`replace['first']` must be as", "(4,)")),
        ({"first": jnp.ones(4, jnp.int32)}, TypeError, ("i32[4]", "astype(jnp.float64)")),
        (
            {"first": lambda value: value.astype(jnp.float32)},
            TypeError,
            ("f32[4]", "astype(jnp.float64)"),
        ),
        (["first"], TypeError, ("`replace` must map", "replace={'layers[0]'")),
    ],
)
def test_what_cannot_stand_there(replace, error, texts, net):
    with refused(error, "replace", *texts):
        capture(run, net, jnp.ones(4), where=LINEAR, replace=replace)
    with refused(error, "replace", *texts):
        loss = lambda net, x: jnp.sum(net(x))
        capture_grads(loss, net, jnp.ones(4), where=LINEAR, replace=replace)


def test_where_may_be_empty_only_beside_a_replacement(net):
    with pytest.raises(ValueError, match="matches none"):
        capture(run, net, jnp.ones(4), where=())
    with pytest.raises(ValueError, match="matches none"):
        capture(run, net, jnp.ones(4), where=eqx.nn.Conv1d, replace={"first": halved})


def test_an_error_in_the_function_says_what_it_was_given(net):
    fn = lambda net, xs: jax.lax.map(net, xs)
    with pytest.raises(TypeError) as error:
        capture(fn, net, jnp.ones((2, 4)), where=(), replace={"first": lambda value: value})
    assert any("number of the step of each loop" in note for note in error.value.__notes__)


def test_an_array_in_a_loop_has_an_axis_for_it(net):
    fn = lambda net, xs: jax.lax.map(net, xs)
    with pytest.raises(ValueError, match=r"f64\[2,4\], but it is f64\[4\]"):
        capture(fn, net, jnp.ones((2, 4)), where=(), replace={"first": jnp.ones(4)})


DERIVATIVES = {
    "grad": lambda f, x: jax.grad(lambda x: jnp.sum(f(x)))(x),
    "jvp_of_checkpoint": lambda f, x: jax.jvp(jax.checkpoint(f), (x,), (x,)),
    "hessian_of_scan": lambda f, x: jax.hessian(
        lambda x: jax.lax.scan(lambda h, _: (f(h), None), x, length=2)[0]
    )(x),
}


@pytest.mark.parametrize("name", DERIVATIVES)
def test_a_derivative_in_the_function_is_refused(name, net):
    """It was taken before anything is replaced."""
    fn = lambda net, x: DERIVATIVES[name](lambda x: net(x), x)
    with pytest.raises(NotImplementedError, match=r"'first' cannot be replaced.*derivative"):
        capture(fn, net, jnp.ones(4), where=(), replace={"first": lambda value, *_: 2 * value})
    beside = lambda net, x: (net(x), jax.grad(lambda y: jnp.sum(net.norm(y)))(x))
    out, _ = capture(beside, net, jnp.ones(4), where=(), replace={"first": halved})
    assert_close(out[0], net.norm(jnp.tanh(halved(net.first(jnp.ones(4))))))
