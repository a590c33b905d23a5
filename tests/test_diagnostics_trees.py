"""capture where `fn` takes the model apart, builds it anew, or holds a second tree of its shape.

Tolerances as in test_diagnostics_capture.py: the same float32 operations on numbers of order one,
in programs that XLA may fuse differently.
"""

import contextlib
import functools as ft
import threading

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import optax
import pytest
from draws import normal
from trees import assert_trees_close

import eqx_norms
from eqx_norms.diagnostics import capture, capture_grads

LINEAR = eqx.nn.Linear


assert_close = ft.partial(assert_trees_close, rtol=2e-6, atol=2e-6)


class Net(eqx.Module):
    """Two equal activations, which hold no array, and two linear layers of one shape."""

    first: eqx.nn.Linear
    act: eqx.nn.Lambda
    second: eqx.nn.Linear
    last: eqx.nn.Lambda

    def __init__(self, key):
        one, two = jr.split(key)
        self.first = eqx.nn.Linear(4, 4, key=one)
        self.act = eqx.nn.Lambda(jnp.tanh)
        self.second = eqx.nn.Linear(4, 4, key=two)
        self.last = eqx.nn.Lambda(jnp.tanh)

    def __call__(self, x):
        return self.last(self.second(self.act(self.first(x))))


@pytest.fixture
def net(getkey):
    return Net(getkey())


def loss_of(net, x):
    return jnp.mean(jax.vmap(net)(x) ** 2)


def by_hand(net, x):
    """What `capture_grads` of `loss_of` returns for all four layers."""

    def loss(net, shift):
        first = jax.vmap(net.first)(x) + shift["first"]
        act = jnp.tanh(first) + shift["act"]
        second = jax.vmap(net.second)(act) + shift["second"]
        last = jnp.tanh(second) + shift["last"]
        return jnp.mean(last**2), {"first": first, "act": act, "second": second, "last": last}

    zeros = dict.fromkeys(("first", "act", "second", "last"), jnp.zeros(x.shape))
    both = lambda pair: loss(*pair)
    (value, values), (net, grads) = eqx.filter_value_and_grad(both, has_aux=True)((net, zeros))
    return value, values, grads, net


WHERE = (LINEAR, eqx.nn.Lambda)


def split(net):
    return eqx.partition(net, eqx.is_inexact_array)


@pytest.mark.slow
def test_partition_and_combine(net, getkey):
    x = normal(getkey(), (5, 4))
    params, static = split(net)
    value, values, grads, net_grads = by_hand(net, x)

    combined = lambda params, static, x: loss_of(eqx.combine(params, static), x)
    found = capture_grads(combined, params, static, x, where=WHERE)
    assert_close(found, (value, values, grads, net_grads))

    closed = lambda params, x: loss_of(eqx.combine(params, static), x)
    assert_close(capture_grads(closed, params, x, where=WHERE), found)

    pair = lambda pair, x: loss_of(eqx.combine(*pair), x)
    *found, (pair_grads, _) = capture_grads(pair, (params, static), x, where=WHERE)
    in_pair = lambda tree: {f"[0].{key}": value for key, value in tree.items()}
    assert_close(found, [value, in_pair(values), in_pair(grads)])
    assert_close(pair_grads, net_grads)


@pytest.mark.slow
def test_frozen_layers(net, getkey):
    x = normal(getkey(), (5, 4))
    spec = jax.tree.map(lambda _: False, net)
    spec = eqx.tree_at(lambda net: net.second.weight, spec, True)
    params, frozen = eqx.partition(net, spec)
    combined = lambda params, frozen, x: loss_of(eqx.combine(params, frozen), x)
    value, values, grads, net_grads = by_hand(net, x)
    found = capture_grads(combined, params, frozen, x, where=WHERE)
    assert_close(found, (value, values, grads, eqx.filter(net_grads, spec)))


@pytest.mark.parametrize("rebuild", [eqx.filter_jit, eqx.filter_checkpoint])
def test_layers_without_arrays_in_a_tree_that_is_built_anew(rebuild, net, getkey):
    x = normal(getkey(), (5, 4))
    assert_close(capture_grads(rebuild(loss_of), net, x, where=WHERE), by_hand(net, x))


@pytest.mark.slow
def test_a_second_tree_of_the_models_structure(net, getkey):
    x = normal(getkey(), (5, 4))
    other = Net(getkey())
    mask = jax.tree.map(lambda leaf: eqx.is_array(leaf) and leaf.ndim == 2, net)
    _, values, grads, _ = by_hand(net, x)

    def loss(net, other, x):
        assert jtu.tree_structure(net) == jtu.tree_structure(other)
        far = lambda a, b: jnp.sum((a - b) ** 2) if eqx.is_array(a) else 0.0
        distance = sum(jtu.tree_leaves(jax.tree.map(far, net, other)))
        decayed, _ = eqx.partition(net, mask)
        decay = sum(jnp.sum(leaf**2) for leaf in jtu.tree_leaves(decayed))
        return loss_of(net, x) + distance + decay

    found = capture_grads(loss, net, other, x, where=WHERE)
    assert_close(found[:3], (loss(net, other, x), values, grads))
    assert_close(found[3], eqx.filter_grad(loss)(net, other, x))

    # Of an average the path is the one in the model, whichever tree stands first.
    x = x[0]
    average = lambda a, b: 0.5 * a + 0.5 * b if eqx.is_array(a) else a
    for order in (lambda net: (net, other), lambda net: (other, net)):
        fn = lambda net, x, order=order: jax.tree.map(average, *order(net))(x)
        _, values = capture(fn, net, x, where=LINEAR)
        assert list(values) == ["first", "second"]
        assert_close(values["first"], jax.tree.map(average, *order(net)).first(x))


@pytest.fixture
def optax_promotes():
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.usefixtures("optax_promotes")
def test_a_training_step(net, getkey):
    x = normal(getkey(), (5, 4))
    mask = jax.tree.map(lambda leaf: leaf.ndim == 2, eqx.filter(net, eqx.is_array))
    optimiser = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(0.1, weight_decay=0.1, mask=mask)
    )
    state = optimiser.init(eqx.filter(net, eqx.is_array))

    @eqx.filter_jit
    def step(net, state, x):
        loss, grads = eqx.filter_value_and_grad(loss_of)(net, x)
        updates, state = optimiser.update(grads, state, eqx.filter(net, eqx.is_array))
        return eqx.apply_updates(net, updates), state, loss

    (new, new_state, loss), values = capture(step, net, state, x, where=WHERE)
    assert_close((new, new_state, loss), step(net, state, x))
    assert_close(values, by_hand(net, x)[1])

    def two_steps(net, state, x):
        net, state, _ = step(net, state, x)
        return step(net, state, x)

    # The second step's weights are made of those of the model, so its calls are calls of it.
    _, values = capture(two_steps, net, state, x, where=WHERE)
    for key, value in by_hand(net, x)[1].items():
        assert_close(values[key], value)
    for key, value in by_hand(new, x)[1].items():
        np.testing.assert_allclose(values[f"{key}#1"], value, rtol=1e-5, atol=1e-5)


def test_weights_that_are_cast_masked_or_behind_a_barrier(net, getkey):
    x = normal(getkey(), (4,))

    def fn(net, x):
        arrays, static = eqx.partition(net, eqx.is_array)
        arrays = jax.jit(lambda tree: jax.tree.map(lambda a: a.astype(jnp.float16), tree))(arrays)
        arrays = jax.lax.optimization_barrier(arrays)
        arrays = jax.tree.map(lambda a: jnp.where(a > 0, a, 0).astype(jnp.float32), arrays)
        arrays = jax.tree.map(lambda a: jax.lax.reduce_precision(a, 5, 10), arrays)  # float16's
        return eqx.combine(arrays, static)(x)

    half = lambda a: jnp.maximum(a.astype(jnp.float16), 0).astype(jnp.float32)
    changed = jax.tree.map(lambda a: half(a) if eqx.is_array(a) else a, net)
    out, values = capture(fn, net, x, where=LINEAR)
    assert list(values) == ["first", "second"]
    assert_close(values["first"], changed.first(x))
    assert_close(values["second"], changed.second(jnp.tanh(changed.first(x))))
    assert_close(out, changed(x))


def test_one_trace_of_a_jitted_function_for_several_modules(net, getkey):
    traces = []

    @eqx.filter_jit
    def jitted(linear, x):
        traces.append(linear)
        return linear(x)

    x = normal(getkey(), (4,))
    fn = lambda net, x: jitted(net.second, jitted(net.first, jitted(net.first, x)))
    a = net.first(x)
    b = net.first(a)
    for _ in range(2):
        _, values = capture(fn, net, x, where=LINEAR)
        assert_close(values, {"first": a, "first#1": b, "second": net.second(b)})
    _, values = capture(fn, net, x, where=lambda path, _: path == "second")
    assert_close(values, {"second": net.second(b)})
    assert len(traces) == 2  # one for each `where`


@pytest.mark.slow
def test_a_loop_that_trains_the_model(net, getkey):
    x = normal(getkey(), (5, 4))

    def descend(net, x):
        grads = eqx.filter_grad(loss_of)(net, x)
        return eqx.apply_updates(net, jax.tree.map(lambda g: -0.1 * g, grads))

    def fn(net, x):
        arrays, static = eqx.partition(net, eqx.is_array)
        one = lambda a, _: (eqx.filter(descend(eqx.combine(a, static), x), eqx.is_array), None)
        return jax.lax.scan(one, arrays, length=3)[0]

    _, values = capture(fn, net, x, where=LINEAR)
    for step in range(3):
        expected = by_hand(net, x)[1]
        assert_close({k: v[step] for k, v in values.items()}, {k: expected[k] for k in values})
        net = descend(net, x)


def test_layers_that_are_stacked_in_the_function(net, getkey):
    def fn(net, x):
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), net.first, net.second)
        return jax.lax.scan(lambda x, linear: (linear(x), None), x, stacked)[0]

    message = r"Which of 'first', 'second' is called cannot be told.*Stack or combine them before"
    with pytest.raises(NotImplementedError, match=message):
        capture(fn, net, normal(getkey(), (4,)), where=LINEAR)


def test_equal_layers_without_arrays_of_which_it_cannot_be_told_which_is_called(net, getkey):
    x = normal(getkey(), (4,))
    fn = lambda net, x: eqx.filter_jit(lambda net, x: net.act(net.first(x)))(net, x)
    with pytest.raises(NotImplementedError, match=r"which of 'act', 'last' this is.*no array"):
        capture(fn, net, x, where=eqx.nn.Lambda)
    _, values = capture(fn, net, x, where=LINEAR)
    assert_close(values, {"first": net.first(x)})

    # One that has no equal can be told.
    net = eqx.tree_at(lambda net: net.last.fn, net, jnp.sin)
    _, values = capture(fn, net, x, where=eqx.nn.Lambda)
    assert_close(values, {"act": jnp.tanh(net.first(x))})


def test_modules_that_are_not_the_models(net, getkey):
    x, other = normal(getkey(), (4,)), Net(getkey())

    def fn(net, other, x):
        made = eqx.nn.Linear(4, 4, key=jr.key(0))
        return made(other(eqx.nn.Lambda(jnp.sin)(net.first(x))))

    _, values = capture(fn, net, other, x, where=WHERE)
    assert_close(values, {"first": net.first(x)})


@pytest.mark.slow
def test_norms_that_are_replaced_in_the_function(getkey):
    norm = eqx.nn.LayerNorm(4)
    x = 100 + normal(getkey(), (4,))
    fn = lambda norms, x: eqx_norms.replace_norms(norms)[1](norms[0](x))
    out, values = capture(fn, [norm, norm], x, where=eqx.nn.LayerNorm)
    assert_close(values, {"[0]": norm(x)})
    assert_close(out, eqx_norms.LayerNorm(4)(norm(x)))
    seen = []
    capture(
        lambda n, x: seen.append(eqx_norms.replace_norms(n)) or n(x), norm, x, where=lambda *_: 1
    )
    assert type(seen[0]) is eqx_norms.LayerNorm


# What is exchanged while `fn` runs


class Base(eqx.Module):
    scale: jax.Array

    def __call__(self, x):
        return self.scale * x


class Inherits(Base):
    pass


class Extends(Base):
    def __call__(self, x):
        return super().__call__(x) + 1


def test_classes_are_as_they_were_afterwards():
    own = Base.__dict__["__call__"]
    model = [Base(jnp.array(2.0)), Inherits(jnp.array(3.0)), Extends(jnp.array(5.0))]
    x = jnp.array(7.0)
    fn = lambda model, x: [module(x) for module in model]
    out, values = capture(fn, model, x, where=Base)
    assert_close(values, {"[0]": out[0], "[1]": out[1], "[2]": out[2]})
    assert_close(out, [jnp.array(14.0), jnp.array(21.0), jnp.array(36.0)])

    def fails(model, x):
        model[1](x)
        raise KeyError

    with contextlib.suppress(KeyError):
        capture(fails, model, x, where=Base)
    assert Base.__dict__["__call__"] is own
    assert "__call__" not in vars(Inherits)
    assert "tag" not in str(jax.make_jaxpr(lambda x: fn(model, x))(x))


def test_threads_do_not_see_each_others_captures():
    model = Base(jnp.array(2.0))
    both, results = threading.Barrier(2, timeout=60), {}

    def fn(model, x):
        both.wait()  # both captures, or the capture and the plain call, run at this point
        y = model(x)
        both.wait()
        return y

    def captures(name):
        results[name] = capture(fn, model, jnp.array(3.0), where=Base)[1]

    def calls(name):
        results[name] = str(jax.make_jaxpr(lambda x: fn(model, x))(jnp.array(3.0)))

    for pair in ((captures, captures), (captures, calls)):
        threads = [threading.Thread(target=run, args=(i,)) for i, run in enumerate(pair)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert_close(results[0], {"": jnp.array(6.0)})
        if captures is pair[1]:
            assert_close(results[1], {"": jnp.array(6.0)})
        else:
            assert "tag" not in results[1]
    assert Base.__dict__["__call__"].__name__ == "__call__"
    assert not hasattr(Base.__dict__["__call__"], "__wrapped__")
