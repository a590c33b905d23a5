"""capture and capture_grads against the same functions instrumented by hand.

The oracle of a case is a second function that adds a shift to each output by hand and returns it;
JAX differentiates it with respect to the shifts. Tolerances: the two run the same operations, in
programs that XLA may fuse differently, and a norm of four entries magnifies rounding by what its
sigma happens to be. So most tests run in float64, where a millionfold is allowed.
"""

import functools as ft
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import pytest
from draws import normal
from refused import refused

from eqx_norms.diagnostics import capture, capture_grads


def assert_close(a, b):
    assert jtu.tree_structure(a) == jtu.tree_structure(b)
    for x, y in zip(jtu.tree_leaves(a), jtu.tree_leaves(b), strict=True):
        assert x.shape == y.shape and x.dtype == y.dtype
        if not jnp.issubdtype(x.dtype, jnp.floating):
            np.testing.assert_array_equal(x, y)
            continue
        largest = np.abs(np.asarray(y)[np.isfinite(y)]).max(initial=1)
        atol = 1e-9 if x.dtype == jnp.float64 else 1e-5
        np.testing.assert_allclose(x, y, rtol=0, atol=atol * largest)


class Tanh(eqx.Module):
    def __call__(self, x):
        return jnp.tanh(x)


class Net(eqx.Module):
    linear: eqx.nn.Linear
    stack: eqx.nn.Linear
    norm: eqx.nn.LayerNorm
    act: Tanh

    def __init__(self, key):
        one, three = jr.split(key)
        self.linear = eqx.nn.Linear(4, 4, key=one)
        self.stack = eqx.filter_vmap(lambda k: eqx.nn.Linear(4, 4, key=k))(jr.split(three, 3))
        self.norm = eqx.nn.LayerNorm(4)
        self.act = Tanh()


@pytest.fixture
def net(x64, getkey):
    return Net(getkey())


class Case(NamedTuple):
    fn: Callable[[Net, Any], Any]
    by_hand: Callable[[Net, Any, dict], tuple[Any, dict]]
    x: tuple[int, ...]
    shapes: dict[str, tuple[int, ...]]


CASES = {}


def case(x, **shapes):
    """Registers a pair of functions; `a__1` stands for the path `a#1`."""
    keys = {name.replace("__", "#"): shape for name, shape in shapes.items()}

    def register(make):
        CASES[make.__name__] = Case(*make(), x, keys)
        return make

    return register


@case((4,), linear=(4,), norm=(4,))
def plain():
    def fn(net, x):
        return net.norm(jnp.tanh(net.linear(x)))

    def by_hand(net, x, shift):
        a = net.linear(x) + shift["linear"]
        b = net.norm(jnp.tanh(a)) + shift["norm"]
        return b, {"linear": a, "norm": b}

    return fn, by_hand


@case((4,), linear=(4,), linear__1=(4,), linear__2=(4,))
def called_three_times():
    def fn(net, x):
        return net.linear(net.linear(net.linear(x)))

    def by_hand(net, x, shift):
        a = net.linear(x) + shift["linear"]
        b = net.linear(a) + shift["linear#1"]
        c = net.linear(b) + shift["linear#2"]
        return c, {"linear": a, "linear#1": b, "linear#2": c}

    return fn, by_hand


def _forward(net, x):
    return jnp.tanh(net.norm(net.linear(x)))


def _forward_by_hand(net, x, shift):
    a = net.linear(x) + shift["linear"]
    b = net.norm(a) + shift["norm"]
    return jnp.tanh(b), {"linear": a, "norm": b}


TRANSFORMED = {
    "jit": jax.jit(_forward),
    "filter_jit": eqx.filter_jit(_forward),
    "checkpoint": jax.checkpoint(_forward),
    "filter_checkpoint": eqx.filter_checkpoint(_forward),
    "policy": jax.checkpoint(_forward, policy=jax.checkpoint_policies.dots_saveable),
    "jit_of_checkpoint": jax.jit(jax.checkpoint(_forward)),
}
for _name, _fn in TRANSFORMED.items():
    CASES[_name] = Case(_fn, _forward_by_hand, (4,), {"linear": (4,), "norm": (4,)})
for _name in ("filter_jit", "filter_checkpoint", "jit_of_checkpoint"):
    CASES[f"vmap_of_{_name}"] = Case(
        lambda net, x, fn=TRANSFORMED[_name]: eqx.filter_vmap(fn, in_axes=(None, 0))(net, x),
        lambda net, x, shift: jax.vmap(ft.partial(_forward_by_hand, net))(x, shift),
        (5, 4),
        {"linear": (5, 4), "norm": (5, 4)},
    )


@case((4, 5), linear=(5, 4), norm=(5, 4))
def vmap_over_other_axes():
    def fn(net, x):
        return jax.vmap(ft.partial(_forward, net), in_axes=1, out_axes=1)(x)

    def by_hand(net, x, shift):
        one = ft.partial(_forward_by_hand, net)
        return jax.vmap(one, in_axes=(1, 0), out_axes=(1, 0))(x, shift)

    return fn, by_hand


@case((3, 4, 5), linear=(3, 5, 4), norm=(3, 5, 4))
def nested_vmap():
    def fn(net, x):
        return jax.vmap(jax.vmap(ft.partial(_forward, net), in_axes=1))(x)

    def by_hand(net, x, shift):
        one = ft.partial(_forward_by_hand, net)
        return jax.vmap(jax.vmap(one, in_axes=(1, 0)))(x, shift)

    return fn, by_hand


@case((4, 5), act=(5, 4))
def the_batch_axis_stands_last_at_the_call():
    def fn(net, x):
        return jax.vmap(net.act, in_axes=1, out_axes=1)(x)

    def by_hand(net, x, shift):
        a = jnp.tanh(x.T) + shift["act"]
        return a.T, {"act": a}

    return fn, by_hand


@case((6, 4), linear=(6, 4), norm=(4,))
def scan_over_time():
    def fn(net, xs):
        def step(h, x):
            h = jnp.tanh(net.linear(h) + x)
            return h, h**2

        h, ys = jax.lax.scan(step, jnp.zeros(4), xs, reverse=True, unroll=2)
        return net.norm(h), ys

    def by_hand(net, xs, shift):
        h, values, ys = jnp.zeros(4), [None] * 6, [None] * 6
        for t in reversed(range(6)):
            values[t] = net.linear(h) + shift["linear"][t]
            h = jnp.tanh(values[t] + xs[t])
            ys[t] = h**2
        b = net.norm(h) + shift["norm"]
        return (b, jnp.stack(ys)), {"linear": jnp.stack(values), "norm": b}

    return fn, by_hand


@case((4,), stack=(3, 4), norm=(3, 4))
def scan_over_stacked_layers():
    def fn(net, x):
        arrays, static = eqx.partition(net.stack, eqx.is_array)

        @jax.checkpoint
        def step(x, layer):
            return x + net.norm(jnp.tanh(eqx.combine(layer, static)(x))), None

        return jax.lax.scan(step, x, arrays)[0]

    def by_hand(net, x, shift):
        a, b = [], []
        for i in range(3):
            layer = jax.tree.map(lambda leaf: leaf[i], net.stack)  # noqa: B023
            a.append(layer(x) + shift["stack"][i])
            b.append(net.norm(jnp.tanh(a[-1])) + shift["norm"][i])
            x = x + b[-1]
        return x, {"stack": jnp.stack(a), "norm": jnp.stack(b)}

    return fn, by_hand


@case((6, 5, 4), linear=(6, 5, 4))
def vmap_in_a_scan():
    def fn(net, xs):
        step = lambda h, x: (jnp.tanh(jax.vmap(net.linear)(h) + x), None)
        return jax.lax.scan(step, jnp.zeros((5, 4)), xs)[0]

    def by_hand(net, xs, shift):
        def step(h, x_and_shift):
            x, shift = x_and_shift
            a = jax.vmap(net.linear)(h) + shift
            return jnp.tanh(a + x), a

        h, a = jax.lax.scan(step, jnp.zeros((5, 4)), (xs, shift["linear"]))
        return h, {"linear": a}

    return fn, by_hand


@case((5, 6, 4), linear=(6, 5, 4))
def time_comes_first_in_a_vmap_of_a_scan():
    _, by_hand_ = vmap_in_a_scan()

    def fn(net, xs):
        def one(xs):
            step = lambda h, x: (jnp.tanh(net.linear(h) + x), None)
            return jax.lax.scan(step, jnp.zeros(4), xs)[0]

        return jax.vmap(one)(xs)

    return fn, lambda net, xs, shift: by_hand_(net, jnp.swapaxes(xs, 0, 1), shift)


@case((4,), linear=(2, 3, 4))
def scan_in_a_scan():
    def fn(net, x):
        inner = lambda h, _: (jnp.tanh(net.linear(h)), None)
        outer = lambda h, _: (jax.lax.scan(inner, h, length=3)[0] + x, None)
        return jax.lax.scan(outer, x, length=2)[0]

    def by_hand(net, x, shift):
        h, values = x, []
        for i in range(2):
            for j in range(3):
                values.append(net.linear(h) + shift["linear"][i, j])
                h = jnp.tanh(values[-1])
            h = h + x
        return h, {"linear": jnp.stack(values).reshape(2, 3, 4)}

    return fn, by_hand


@case((6, 4), linear=(6, 4), norm=(6, 4))
def map_and_static_fori_loop():
    def fn(net, xs):
        ys = jax.lax.map(net.linear, xs)
        step = lambda i, acc: acc * 0.5 + net.norm(ys[i])
        return jax.lax.fori_loop(0, 6, step, jnp.zeros(4))

    def by_hand(net, xs, shift):
        a = jax.vmap(net.linear)(xs) + shift["linear"]
        b = jax.vmap(net.norm)(a) + shift["norm"]
        out = jnp.zeros(4)
        for i in range(6):
            out = out * 0.5 + b[i]
        return out, {"linear": a, "norm": b}

    return fn, by_hand


@case((5, 4), linear=(5, 4), norm=(5, 4))
def batched_cond_is_a_select_and_computes_both():
    def fn(net, x):
        one = lambda x: jax.lax.cond(
            x[0] > 0, lambda x: net.linear(x), lambda x: net.norm(2 * x), x
        )
        return jax.vmap(one)(x)

    def by_hand(net, x, shift):
        a = jax.vmap(net.linear)(x) + shift["linear"]
        b = jax.vmap(net.norm)(2 * x) + shift["norm"]
        return jnp.where(x[:, :1] > 0, a, b), {"linear": a, "norm": b}

    return fn, by_hand


def _wrong_slope(times):
    """The identity, with a derivative that nothing but its own rule can give."""
    by_vjp = jax.custom_vjp(lambda x: x)
    by_vjp.defvjp(lambda x: (x, None), lambda _, g: (times * g,))
    by_jvp = jax.custom_jvp(lambda x: x)
    by_jvp.defjvp(lambda primals, tangents: (primals[0], times * tangents[0]))
    return lambda x: by_vjp(by_jvp(x))


@case((5, 4), linear=(5, 4), norm=(5, 4))
def custom_rules_stay_in_force():
    def fn(net, x):
        one = lambda x: net.norm(jax.nn.relu(_wrong_slope(3.0)(net.linear(x))))
        return jax.lax.map(jax.checkpoint(jax.jit(one)), x)

    def by_hand(net, x, shift):
        a = jax.vmap(net.linear)(x) + shift["linear"]
        b = jax.vmap(net.norm)(jax.nn.relu(9 * a + jax.lax.stop_gradient(-8 * a))) + shift["norm"]
        return b, {"linear": a, "norm": b}

    return fn, by_hand


@case((4,), linear=(4,), norm=(4,))
def a_gradient_in_the_function():
    def fn(net, x):
        value, grads = eqx.filter_value_and_grad(lambda net: jnp.sum(jnp.cos(_forward(net, x))))(
            net
        )
        return value, grads.linear.weight

    def by_hand(net, x, shift):
        def loss(net):
            out, values = _forward_by_hand(net, x, shift)
            return jnp.sum(jnp.cos(out)), values

        (value, values), grads = eqx.filter_value_and_grad(loss, has_aux=True)(net)
        return (value, grads.linear.weight), values

    return fn, by_hand


def _where(shapes):
    return lambda path, module: path in {key.split("#")[0] for key in shapes}


def _loss_of(fn, weights):
    def loss(*args):
        out = fn(*args)
        parts = zip(jtu.tree_leaves(out), weights, strict=True)
        return sum(jnp.sum(x * w) for x, w in parts)

    return loss


# The others nest the primitives in other ways.
QUICK = ("scan_over_stacked_layers",)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in CASES]
)
def test_values_and_gradients_under_jit(name, net, getkey):
    _check(CASES[name], eqx.filter_jit, net, getkey)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain", "scan_over_stacked_layers"])
def test_values_and_gradients_eagerly(name, net, getkey):
    _check(CASES[name], lambda f: f, net, getkey)


def _check(case, transform, net, getkey):
    fn, by_hand, shape, shapes = case
    x = normal(getkey(), shape)
    zeros = {key: jnp.zeros(shape) for key, shape in shapes.items()}
    outs = jtu.tree_leaves(eqx.filter_eval_shape(fn, net, x))
    weights = [normal(getkey(), out.shape) for out in outs]
    loss = _loss_of(fn, weights)
    where = _where(shapes)

    def ours(net, x):
        return capture(fn, net, x, where=where), capture_grads(loss, net, x, where=where)

    def expected(net, x):
        loss_by_hand = _loss_of(lambda shift: by_hand(net, x, shift)[0], weights)
        value, model_grads = eqx.filter_value_and_grad(loss)(net, x)
        values = by_hand(net, x, zeros)[1]
        return (fn(net, x), values), (value, values, jax.grad(loss_by_hand)(zeros), model_grads)

    found = transform(ours)(net, x)
    assert {key: value.shape for key, value in found[0][1].items()} == shapes
    assert_close(found, eqx.filter_jit(expected)(net, x))


# Single features


LINEAR = eqx.nn.Linear


def test_one_forward_and_one_backward_pass(net, getkey):
    x = normal(getkey(), (5, 4))
    loss = lambda net, x: jnp.mean(jax.vmap(ft.partial(_forward, net))(x) ** 2)
    plain = jax.make_jaxpr(lambda x: eqx.filter_value_and_grad(loss)(net, x)[0])(x)
    ours = jax.make_jaxpr(lambda x: capture_grads(loss, net, x, where=LINEAR)[0])(x)
    assert str(plain).count("dot_general") == 2  # the linear layer, and its weight's gradient
    assert str(ours).count("dot_general") == 2


@pytest.mark.slow
def test_under_vmap_and_grad_from_outside(net, getkey):
    xs = normal(getkey(), (5, 4))
    one = lambda x: capture(_forward, net, x, where=LINEAR)[1]["linear"]
    assert_close(jax.vmap(one)(xs), jax.vmap(net.linear)(xs))
    through = jax.grad(lambda x: jnp.sum(jnp.sin(one(x))))(xs[0])
    assert_close(through, jax.grad(lambda x: jnp.sum(jnp.sin(net.linear(x))))(xs[0]))

    loss = lambda net, x: jnp.sum(_forward(net, x) ** 2)
    grads_of = lambda x: capture_grads(loss, net, x, where=LINEAR)[2]["linear"]
    by_hand = jax.grad(lambda shift, x: jnp.sum(_forward_by_hand(net, x, shift)[0] ** 2))
    shift = {"linear": jnp.zeros((5, 4)), "norm": jnp.zeros((5, 4))}
    assert_close(jax.jit(jax.vmap(grads_of))(xs), jax.vmap(by_hand)(shift, xs)["linear"])


@pytest.mark.slow
def test_the_batch_comes_first_with_the_vmap_outside(net, getkey):
    fn = CASES["time_comes_first_in_a_vmap_of_a_scan"].fn
    xs = normal(getkey(), (5, 6, 4))
    one = lambda x: capture(fn, net, x[None], where=LINEAR)[1]["linear"][:, 0]
    inside = capture(fn, net, xs, where=LINEAR)[1]["linear"]
    assert_close(jax.vmap(one)(xs), jnp.swapaxes(inside, 0, 1))


def test_an_output_that_does_not_depend_on_the_mapped_input_has_no_batch_axis(net, getkey):
    fn = lambda net, x: jax.vmap(lambda x: x * net.linear(jnp.ones(4)))(x)
    _, values = capture(fn, net, normal(getkey(), (5, 4)), where=LINEAR)
    assert_close(values["linear"], net.linear(jnp.ones(4)))


@pytest.mark.slow
def test_cond_gives_nan_for_the_branch_not_taken(net, getkey):
    def fn(net, x):
        other = lambda x: net.norm(net.linear(2 * x))
        return jax.lax.cond(x[0] > 0, lambda x: net.linear(x), other, x)

    x = jnp.abs(normal(getkey(), (4,)))
    missing = jnp.full(4, jnp.nan)
    # `lax.cond` holds the branch for False first.
    for sign, expected in ((1, (missing, missing, net.linear(x))), (-1, None)):
        out, values = capture(fn, net, sign * x, where=(LINEAR, eqx.nn.LayerNorm))
        assert_close(out, fn(net, sign * x))
        a = net.linear(-2 * x)
        expected = expected or (a, net.norm(a), missing)
        assert_close(values, dict(zip(("linear", "norm", "linear#1"), expected, strict=True)))

    *_, grads, _ = capture_grads(lambda *a: jnp.sum(fn(*a)), net, x, where=LINEAR)
    assert_close(grads, {"linear": jnp.zeros(4), "linear#1": jnp.ones(4)})


@pytest.mark.slow
def test_switch_in_a_scan(net, getkey):
    def loss(net, x):
        twice = lambda x: net.linear(jnp.tanh(net.linear(x)))
        step = lambda h, i: (jax.lax.switch(i, [jnp.sin, net.norm.__call__, twice], h), None)
        return jnp.sum(jax.lax.scan(step, x, jnp.arange(3))[0])

    def by_hand(shift, x):
        b = net.norm(jnp.sin(x)) + shift["norm"]
        c = net.linear(b) + shift["linear"]
        d = net.linear(jnp.tanh(c)) + shift["linear#1"]
        return jnp.sum(d), {"norm": b, "linear": c, "linear#1": d}

    x = normal(getkey(), (4,))
    step_of = {"norm": 1, "linear": 2, "linear#1": 2}
    (_, expected_values), expected_grads = jax.value_and_grad(by_hand, has_aux=True)(
        {key: jnp.zeros(4) for key in step_of}, x
    )
    where = (LINEAR, eqx.nn.LayerNorm)
    _, values, grads, _ = eqx.filter_jit(lambda n: capture_grads(loss, n, x, where=where))(net)
    for key, step in step_of.items():
        missing, zero = jnp.full((3, 4), jnp.nan), jnp.zeros((3, 4))
        assert_close(values[key], missing.at[step].set(expected_values[key]))
        assert_close(grads[key], zero.at[step].set(expected_grads[key]))


DERIVATIVES = {
    "grad": lambda f, x: jax.grad(lambda x: jnp.sum(f(x) ** 2))(x),
    "grad_of_jit": lambda f, x: jax.grad(jax.jit(lambda x: jnp.sum(f(x) ** 2)))(x),
    "grad_of_checkpoint": lambda f, x: jax.grad(jax.checkpoint(lambda x: jnp.sum(f(x) ** 2)))(x),
    "jvp_of_checkpoint": lambda f, x: jax.jvp(jax.checkpoint(f), (x,), (x,)),
    "jacfwd": lambda f, x: jax.jacfwd(f)(x),
    "hessian": lambda f, x: jax.hessian(jax.checkpoint(f))(x),
    "vmap_of_grad": lambda f, x: jax.vmap(jax.grad(lambda s: jnp.sum(f(x) * s)))(jnp.ones(2)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", DERIVATIVES)
def test_a_derivative_in_the_function_is_no_second_call(name, net, getkey):
    fn = lambda net, x: DERIVATIVES[name](lambda x: jnp.tanh(net.linear(x)), x)
    x = normal(getkey(), (4,))
    out, values = capture(fn, net, x, where=LINEAR)
    assert_close(values, {"linear": net.linear(x)})
    assert_close(out, fn(net, x))


@pytest.mark.slow
def test_explicitly_sharded_arrays(net, getkey):
    mesh = jax.make_mesh((4,), ("batch",), axis_types=(jax.sharding.AxisType.Explicit,))
    loss = lambda net, x: jnp.sum(jax.vmap(ft.partial(_forward, net))(x) ** 2)
    x = normal(getkey(), (8, 4))
    ours = eqx.filter_jit(lambda x: capture_grads(loss, net, x, where=LINEAR)[:3])
    expected = ours(x)
    with jax.set_mesh(mesh):
        found = ours(jax.device_put(x, jax.P("batch", None)))
        assert found[1]["linear"].sharding.spec == jax.P("batch", None)
    assert_close(found, expected)


def test_adding_zero_keeps_the_sign_of_zero():
    class Negate(eqx.Module):
        def __call__(self, x):
            return -x

    loss = lambda model, x: 1 / model(x)
    loss, *_ = capture_grads(loss, Negate(), jnp.zeros(()), where=Negate)
    assert loss == -jnp.inf


@pytest.mark.slow
def test_bfloat16(getkey):
    net = jax.tree.map(lambda x: x.astype(jnp.bfloat16), Net(getkey()), is_leaf=eqx.is_array)
    x = normal(getkey(), (5, 4), jnp.bfloat16)
    loss = lambda net, x: jnp.sum(jax.vmap(net.linear)(x) * x).astype(jnp.float32)
    _, values, grads, model_grads = capture_grads(loss, net, x, where=LINEAR)
    assert values["linear"].dtype == grads["linear"].dtype == jnp.bfloat16
    assert jnp.array_equal(values["linear"], jax.vmap(net.linear)(x))
    assert jnp.array_equal(grads["linear"], x)
    assert model_grads.linear.weight.dtype == jnp.bfloat16


def test_numpy_arrays_and_static_arguments(net):
    fn = lambda net, x, name, scale: (name, scale * net.linear(x), None)
    x = np.ones(4)
    out, values = capture(fn, net, x, "name", 2.0, where=LINEAR)
    assert out[0] == "name" and out[2] is None
    assert_close(out[1], 2 * values["linear"])
    assert_close(values["linear"], net.linear(jnp.ones(4)))


def test_debug_callbacks_run_once_and_in_order(net):
    seen = []

    def fn(net, x):
        jax.debug.callback(lambda: seen.append("before"), ordered=True)
        y = net.linear(x)
        jax.debug.callback(lambda y: seen.append(float(y)), y[0], ordered=True)
        return y

    out, _ = jax.jit(lambda x: capture(fn, net, x, where=LINEAR))(jnp.ones(4))
    jax.effects_barrier()
    assert seen == ["before", float(out[0])]


# What modules return


@pytest.mark.slow
def test_pytree_outputs_keep_their_structure(getkey):
    cell = eqx.nn.LSTMCell(3, 4, key=getkey())
    x, h = jnp.ones(3), (jnp.zeros(4), jnp.ones(4))
    loss = lambda cell, x: jnp.sum(cell(x, h)[0])
    _, values, grads, _ = capture_grads(loss, cell, x, where=eqx.nn.LSTMCell)
    assert_close(values, {"": cell(x, h)})
    assert_close(grads, {"": (jnp.ones(4), jnp.zeros(4))})


def test_integers_and_what_is_no_array():
    class Odd(eqx.Module):
        def __call__(self, x):
            return {"x": 2 * x, "index": jnp.argmax(x), "name": "odd", "none": None}

    x = jnp.array([1.0, 3.0])
    loss = lambda odd, x: jnp.sum(odd(x)["x"])
    _, values, grads, _ = capture_grads(loss, Odd(), x, where=Odd)
    assert values[""].pop("name") == "odd"
    assert_close(values, {"": {"x": 2 * x, "index": jnp.argmax(x), "none": None}})
    assert grads[""]["index"] is None
    assert_close(grads[""]["x"], jnp.ones(2))


@pytest.mark.slow
def test_a_stateful_layer_gives_its_output_without_the_state(getkey):
    norm, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(3, axis_name="batch", mode="batch")
    x = normal(getkey(), (5, 3))
    run = lambda norm, state, x: jax.vmap(
        norm, axis_name="batch", in_axes=(0, None), out_axes=(0, None)
    )(x, state)
    (out, new_state), values = capture(run, norm, state, x, where=eqx.nn.BatchNorm)
    expected_out, expected_state = run(norm, state, x)
    assert_close(values, {"": expected_out})
    assert_close(out, expected_out)
    assert_close(jtu.tree_leaves(new_state), jtu.tree_leaves(expected_state))


# Where


class Holder(eqx.Module):
    layers: list
    blocks: dict
    pair: tuple

    def __call__(self, x):
        return self.pair[0](self.blocks["a"](self.layers[0](x)))


@pytest.fixture
def holder(x64, getkey):
    linear = lambda: eqx.nn.Linear(4, 4, key=getkey())
    return Holder([linear(), eqx.nn.LayerNorm(4)], {"a": linear()}, (linear(), linear()))


def test_paths_and_the_model_itself(holder):
    asked = {}

    def where(path, module):
        asked[path] = module
        return True

    x = jnp.ones(4)
    out, values = capture(lambda m, x: m(x), holder, x, where=where)
    assert list(values) == ["layers[0]", "blocks['a']", "pair[0]", ""]
    assert set(asked) == {"", "layers[0]", "layers[1]", "blocks['a']", "pair[0]", "pair[1]"}
    assert asked["blocks['a']"] is holder.blocks["a"]
    assert_close(values[""], out)
    assert_close(values["layers[0]"], holder.layers[0](x))


def test_a_model_that_is_a_plain_container_or_partial(net):
    x = jnp.ones(4)
    _, values = capture(lambda m, x: m["net"][0](x), {"net": [net.linear]}, x, where=LINEAR)
    assert_close(values, {"['net'][0]": net.linear(x)})

    partial = jtu.Partial(lambda linear, x: linear(x), net.linear)
    _, values = capture(lambda m, x: m(x), partial, x, where=LINEAR)
    [(path, value)] = values.items()
    assert "0" in path
    assert_close(value, net.linear(x))


@jtu.register_pytree_node_class
class Box:
    def __init__(self, content):
        self.content = content

    def tree_flatten(self):
        return (self.content,), None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)


def test_a_pytree_registered_without_keys(net):
    x = jnp.ones(4)
    _, values = capture(lambda m, x: m.content(x), Box(net.linear), x, where=LINEAR)
    assert_close(values, {"[<flat index 0>]": net.linear(x)})


def test_an_object_at_two_paths_has_the_path_it_is_called_through(net):
    x = jnp.ones(4)
    pair = (net.linear, net.linear)
    _, values = capture(lambda m, x: m[1](m[0](x)), pair, x, where=LINEAR)
    assert_close(values, {"[0]": net.linear(x), "[1]": net.linear(net.linear(x))})


def test_shared_layers(net):
    shared = eqx.nn.Shared(
        [net.linear, jnp.tanh, net.linear], where=lambda m: m[2], get=lambda m: m[0]
    )

    def fn(shared, x):
        first, activation, second = shared()
        return second(activation(first(x)))

    x = jnp.ones(4)
    _, values = capture(fn, shared, x, where=LINEAR)
    a = net.linear(x)
    assert_close(values, {"pytree[0]": a, "pytree[0]#1": net.linear(jnp.tanh(a))})


@pytest.mark.parametrize("bias", [False, True])
def test_layers_that_share_a_weight(bias, getkey):
    """A tied head has its own path, also with the weight transposed and no other array."""
    up, down = (eqx.nn.Linear(*size, use_bias=bias, key=getkey()) for size in [(4, 3), (3, 4)])
    shared = eqx.nn.Shared((up, down), lambda m: m[1].weight, lambda m: m[0].weight.T)

    def fn(shared, x):
        up, down = shared()
        return jax.vmap(lambda x: down(up(x)))(x)

    x = normal(getkey(), (2, 4))
    out, values = capture(fn, shared, x, where=LINEAR)
    assert_close(values, {"pytree[0]": jax.vmap(up)(x), "pytree[1]": out})


def test_each_path_has_its_own_trace_of_a_jitted_function(holder):
    jitted = eqx.filter_jit(lambda linear, x: linear(x))
    x = jnp.ones(4)
    fn = lambda m, x: jitted(m.pair[1], jitted(m.pair[0], jitted(m.pair[0], x)))
    _, values = capture(fn, holder, x, where=LINEAR)
    a = holder.pair[0](x)
    b = holder.pair[0](a)
    assert_close(values, {"pair[0]": a, "pair[0]#1": b, "pair[1]": holder.pair[1](b)})


# The copy that `fn` gets


def test_the_copy_behaves_as_the_module(net):
    def fn(copy, x):
        assert isinstance(copy.linear, eqx.nn.Linear)
        assert type(copy.linear).__name__ == "Linear"
        assert copy.linear.in_features == 4
        assert type(copy.norm) is eqx.nn.LayerNorm
        arrays, static = eqx.partition(copy, eqx.is_array)
        return eqx.combine(arrays, static).linear(x)

    before = jtu.tree_structure(net)
    _, values = capture(fn, net, jnp.ones(4), where=LINEAR)
    assert_close(values, {"linear": net.linear(jnp.ones(4))})
    assert jtu.tree_structure(net) == before
    assert type(net.linear) is eqx.nn.Linear


def test_no_copy_comes_out(net):
    @eqx.filter_jit
    def fn(net, x):
        return net.linear(x), eqx.tree_at(lambda n: n.linear.bias, net, x), net.linear

    out, _ = capture(fn, net, jnp.ones(4), where=LINEAR)
    assert type(out[1].linear) is type(out[2]) is eqx.nn.Linear
    assert jtu.tree_structure(out[1]) == jtu.tree_structure(net)
    assert_close(out[1].linear.bias, jnp.ones(4))


def test_nothing_is_left_behind(net):
    jitted = eqx.filter_jit(lambda linear, x: linear(x))
    fn = lambda net, x: jitted(net.linear, x)
    capture(fn, net, jnp.ones(4), where=LINEAR)
    assert "tag" not in str(jax.make_jaxpr(lambda x: fn(net, x))(jnp.ones(4)))
    with pytest.raises(ValueError, match="calls none"):
        capture(fn, net, jnp.ones(4), where=eqx.nn.LayerNorm)


def test_classes_that_do_something_of_their_own():
    registry = []

    class Base(eqx.Module):
        def __init_subclass__(cls, *, label):
            registry.append(label)

    class Scale(Base, label="scale"):
        weight: jax.Array = eqx.field(converter=jnp.asarray)
        power: int = 1
        doubled: int = eqx.field(init=False, static=True)

        def __init__(self, weight):
            self.weight = weight
            self.doubled = 2

        def __check_init__(self):
            assert not isinstance(self.weight, jax.core.Tracer)

        @eqx.filter_jit
        @jax.named_scope("scale")
        def __call__(self, x, *, key=None):
            return self.raised() * x * self.doubled

        def raised(self):
            return self.weight**self.power

        @property
        def half(self):
            return self.weight / 2

    scale = Scale(3.0)
    fn = lambda m, x: m(x, key=None) + m.half + m.raised()
    out, values = capture(fn, scale, jnp.ones(()), where=Base)
    assert_close((out, values), (jnp.array(10.5), {"": jnp.array(6.0)}))
    assert registry == ["scale"]


# Errors


def _while(net, x):
    return jax.lax.while_loop(lambda x: jnp.sum(x) > 0, lambda x: net.linear(x) - 1, x)


def _in_custom_vjp(net, x):
    f = jax.custom_vjp(lambda linear, x: linear(x))
    f.defvjp(lambda linear, x: (linear(x), None), lambda _, g: (None, g))
    return f(net.linear, x)


def _in_custom_jvp(net, x):
    f = jax.custom_jvp(lambda x: net.linear(x))
    f.defjvp(lambda x, dx: (f(*x), dx[0]))
    return f(x)


def _in_shard_map(net, x):
    mesh = jax.make_mesh((2,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.P("i")
    return jax.shard_map(jax.vmap(net.linear), mesh=mesh, in_specs=spec, out_specs=spec)(
        jnp.stack([x, x])
    )


@pytest.mark.parametrize(
    ("fn", "place", "cure"),
    [
        (_while, "while", "Type `jax.lax.scan`"),
        (_in_custom_vjp, "custom_vjp_call", "Type a `where` that leaves it out"),
        (_in_custom_jvp, "custom_jvp_call", "Type a `where` that leaves it out"),
        (_in_shard_map, "shard_map", "Capture inside the function"),
    ],
)
def test_a_place_that_no_value_can_leave_is_named(fn, place, cure, net):
    scanned = lambda net, x: jax.lax.scan(lambda c, _: (c, fn(net, x)), 0, length=2)[1]
    for fn_ in (fn, scanned):
        with pytest.raises(NotImplementedError) as error:
            capture(fn_, net, jnp.ones(4), where=LINEAR)
        assert "The output of 'linear' cannot be captured" in str(error.value)
        assert f"inside `{place}`" in str(error.value)
        assert cure in str(error.value)


def test_the_newer_custom_rule_is_refused(net):
    before = getattr(jax.config, "jax_custom_vjp3")  # noqa: B009
    jax.config.update("jax_custom_vjp3", True)
    try:
        with pytest.raises(NotImplementedError, match=r"'linear' .* inside `call_hi_primitive`"):
            capture(_in_custom_vjp, net, jnp.ones(4), where=LINEAR)
    finally:
        jax.config.update("jax_custom_vjp3", before)


def test_where_that_matches_nothing(net):
    with pytest.raises(ValueError) as error:
        capture(_forward, net, jnp.ones(4), where=eqx.nn.Conv1d)
    assert "matches none" in str(error.value)
    assert (
        "The model has {'linear': equinox.nn.Linear, 'stack': equinox.nn.Linear, 'norm': "
        in str(error.value)
    )


@pytest.mark.parametrize("where", ["linear", (LINEAR, "norm"), None])
def test_where_of_another_kind(where, net):
    with refused(TypeError, r"`where` must be a submodule type.*where=eqx.nn.Linear"):
        capture(_forward, net, jnp.ones(4), where=where)


def test_a_function_that_holds_the_model_itself(net):
    with pytest.raises(ValueError, match=r"calls none.*type `lambda model, x: model"):
        capture(lambda _, x: net.linear(x), net, jnp.ones(4), where=LINEAR)


@pytest.mark.slow
def test_a_capture_in_a_capture(net, getkey):
    def inner(net, x):
        y = net.linear(x)  # the outer one's alone
        loss = lambda net, x: jnp.sum(eqx.filter_jit(_forward)(net, x) ** 2)
        loss, values, grads, _ = capture_grads(loss, net, y, where=eqx.nn.LayerNorm)
        return loss, values, grads

    x = normal(getkey(), (4,))
    where = (LINEAR, eqx.nn.LayerNorm)
    out, values = capture(inner, net, x, where=where)
    a = net.linear(x)
    b = net.linear(a)
    c = net.norm(b)
    assert_close(values, {"linear": a, "linear#1": b, "norm": c})
    assert_close(out, inner(net, x))
    assert_close(out[1:], ({"norm": c}, {"norm": 2 * jnp.tanh(c) * (1 - jnp.tanh(c) ** 2)}))


@pytest.mark.parametrize(
    "loss",
    [
        _forward,
        lambda net, x: jnp.argmax(_forward(net, x)),
        lambda net, x: [jnp.sum(_forward(net, x))],
    ],
)
def test_a_loss_that_is_no_scalar(loss, net):
    with pytest.raises(TypeError, match="`loss_fn` must return one floating-point scalar"):
        capture_grads(loss, net, jnp.ones(4), where=LINEAR)


@pytest.mark.slow
def test_a_checkpoint_that_the_loss_differentiates(net):
    def fn(net, x):
        return jnp.sum(jax.grad(lambda x: jnp.sum(jax.checkpoint(_forward)(net, x) ** 2))(x))

    x = jnp.ones(4)
    _, values = capture(fn, net, x, where=LINEAR)
    assert_close(values, {"linear": net.linear(x)})
    with pytest.raises(NotImplementedError, match=r"'linear' cannot be taken.*`jax.checkpoint`"):
        capture_grads(fn, net, x, where=LINEAR)
