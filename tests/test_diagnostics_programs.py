"""capture of what programs are made of besides layers: constants, jitted parts, branches."""

import functools as ft
import gc

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import pytest
from draws import normal
from jax.experimental import jet

from eqx_norms.diagnostics import capture, capture_grads
from eqx_norms.diagnostics._capture._library import as_model
from eqx_norms.diagnostics._diagnose._survey import Survey

LINEAR = eqx.nn.Linear


def assert_close(a, b):
    # The same float32 operations on numbers of order one, fused differently.
    assert jtu.tree_structure(a) == jtu.tree_structure(b)
    for x, y in zip(jtu.tree_leaves(a), jtu.tree_leaves(b), strict=True):
        assert x.shape == y.shape and x.dtype == y.dtype
        np.testing.assert_allclose(x, y, rtol=2e-6, atol=2e-6)


@pytest.fixture
def linear(getkey):
    return LINEAR(3, 3, key=getkey())


class Constant(eqx.Module):
    def __call__(self, x):
        return jnp.zeros(()), x


def test_constants_come_back_as_arrays(linear):
    x = jnp.ones(3)
    dtypes = (jnp.float32, jnp.bfloat16, jnp.int8, jnp.bool_)

    def fn(model, x):
        constants = {dtype.__name__: jnp.zeros((), dtype) for dtype in dtypes}
        weak = jnp.asarray(2.0)
        return model[0](x), model[1](x), constants, weak, np.float32(3), 4.0

    plain = fn([linear, Constant()], x)
    for transform in (lambda f: f, eqx.filter_jit):
        out, values = transform(lambda m: capture(fn, m, x, where=(LINEAR, Constant)))(
            [linear, Constant()]
        )
        assert out[-1] == 4.0 and type(out[-1]) is float
        pairs = zip(jtu.tree_leaves(out[:4]), jtu.tree_leaves(plain[:4]), strict=True)
        for found, expected in pairs:
            assert isinstance(found, jax.Array)
            assert jax.typeof(found) == jax.typeof(expected)  # weak types are part of it
            np.testing.assert_allclose(found, expected, rtol=2e-6)
        assert all(isinstance(leaf, jax.Array) for leaf in jtu.tree_leaves(values))
        assert values["[1]"][0] == 0


@pytest.mark.slow
def test_a_state_keeps_its_structure():
    norm, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(3, axis_name="batch", mode="ema")
    x = jnp.arange(12.0).reshape(4, 3)
    run = lambda norm, state, x: jax.vmap(
        norm, axis_name="batch", in_axes=(0, None), out_axes=(0, None)
    )(x, state)
    (_, new_state), _ = capture(run, norm, state, x, where=eqx.nn.BatchNorm)
    arrays = lambda tree: eqx.filter(tree, eqx.is_array)
    assert jtu.tree_structure(arrays(new_state)) == jtu.tree_structure(arrays(state))
    assert_close(arrays(new_state), arrays(run(norm, state, x)[1]))


# A derivative of the call


def test_a_call_that_is_transposed(linear, getkey):
    x, y = normal(getkey(), (3,)), normal(getkey(), (3,))

    class Matrix(eqx.Module):
        weight: jax.Array

        def __call__(self, x):
            return self.weight @ x

    def fn(matrix, x, y):
        out = matrix(x)
        transpose = jax.linear_transpose(matrix, x)
        in_weight = jax.linear_transpose(lambda w: Matrix(w)(x), matrix.weight)
        return out, transpose(y), in_weight(y)

    matrix = Matrix(linear.weight)
    out, values = capture(fn, matrix, x, y, where=Matrix)
    assert_close(out, (matrix.weight @ x, (matrix.weight.T @ y,), (jnp.outer(y, x),)))
    assert_close(values, {"": matrix.weight @ x})  # a transpose is no call


def test_a_call_in_a_taylor_series(linear, getkey):
    x, v = normal(getkey(), (3,)), normal(getkey(), (3,))
    weight = linear.weight

    def fn(linear, x, v):
        return jet.jet(lambda x: jnp.sin(linear(x)), (x,), ((v, jnp.zeros(3)),))

    (value, (first, second)), values = capture(fn, linear, x, v, where=LINEAR)
    a, da = linear(x), weight @ v
    assert_close(values, {"": a})
    assert_close(value, jnp.sin(a))
    assert_close(first, jnp.cos(a) * da)
    assert_close(second, -jnp.sin(a) * da**2)


# Jitted parts


def test_jit_keeps_its_shardings(linear):
    mesh = jax.make_mesh((4,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.NamedSharding(mesh, jax.P("i"))
    columns = jax.sharding.NamedSharding(mesh, jax.P(None, "i"))
    batched = lambda linear, x: (jax.vmap(linear)(x), x.T)
    fn = jax.jit(batched, in_shardings=(None, rows), out_shardings=(rows, columns))
    x = jnp.arange(24.0).reshape(8, 3)
    out, values = capture(fn, linear, x, where=LINEAR)
    assert out[0].sharding == rows and out[1].sharding == columns
    assert_close((out[0], out[0]), (values[""], jax.vmap(linear)(x)))
    _, (out, _) = jax.jit(lambda x: (0, capture(fn, linear, x, where=LINEAR)))(x)
    assert out[0].sharding == rows and out[1].sharding == columns


def test_jit_keeps_its_name_and_how_it_is_inlined(linear):
    fn = jax.jit(lambda linear, x: linear(x), keep_unused=True, inline=False)
    plain = jax.make_jaxpr(lambda x: fn(linear, x))(jnp.ones(3))
    ours = jax.make_jaxpr(lambda x: capture(fn, linear, x, where=LINEAR)[0])(jnp.ones(3))
    [plain], [ours] = ([eqn.params for eqn in jaxpr.eqns] for jaxpr in (plain, ours))
    for name in ("keep_unused", "inline", "name"):
        assert ours[name] == plain[name]


def applied(act):
    """Both modules of the model, one after the other."""
    return lambda m, x: act(m[1], act(m[0], x))


BY_JIT = (
    eqx.filter_jit(lambda module, x: module(x)),
    jax.jit(lambda module, x: module(x), static_argnums=0),
)


@pytest.mark.parametrize("act", BY_JIT)
def test_a_trace_that_jax_keeps_has_no_paths_of_another_model(act):
    x = jnp.array([-1.0, 2.0])
    model = [eqx.nn.Lambda(jax.nn.relu), eqx.nn.Lambda(jnp.tanh)]
    for first, second in (model, model[::-1], model):
        run = ft.partial(capture, applied(act), [first, second], x, where=eqx.nn.Lambda)
        assert_close(run()[1], {"[0]": first(x), "[1]": second(first(x))})
        out, _ = run(replace={"[0]": jnp.zeros_like})
        assert_close(out, jnp.zeros(2))  # of 0 the second one makes 0 again


@pytest.mark.parametrize("act", BY_JIT)
def test_equal_modules_that_share_a_trace_are_not_confused(act):
    model = [eqx.nn.Lambda(jnp.tanh), eqx.nn.Lambda(jnp.tanh)]
    with pytest.raises(NotImplementedError, match=r"'\[0\]', '\[1\]'.*cannot be told"):
        capture(applied(act), model, jnp.ones(2), where=eqx.nn.Lambda)


def test_a_diagnosis_and_a_capture_have_traces_of_their_own(linear, getkey):
    x = normal(getkey(), (4, 3))
    jitted = eqx.filter_jit(lambda linear, x: jnp.sum(jax.vmap(linear)(x) ** 2))
    loss = lambda linear, x: jitted(linear, x)
    everything = lambda path, module: True
    # A diagnosis begins with a survey, which marks inputs as well.
    survey = lambda: Survey(loss, as_model(linear), (x,), everything)
    ends = lambda: [(call.given, call.returned) for call in survey().calls]
    assert ends() == [(0, 1)]
    _, values, grads, _ = capture_grads(loss, linear, x, where=everything)
    assert ends() == [(0, 1)]
    y = jax.vmap(linear)(x)
    assert_close((values, grads), ({"": y}, {"": 2 * y}))


@pytest.mark.parametrize(
    "around",
    [lambda f: f, pytest.param(jax.checkpoint, marks=pytest.mark.slow)],
    ids=["plain", "checkpoint"],
)
def test_what_fn_gives_away_is_there_afterwards(around, linear, getkey):
    x = normal(getkey(), (4, 3))
    double = around(jax.jit(lambda h: 2 * h, donate_argnums=0))
    fn = lambda linear, x: double(jax.vmap(linear)(x))
    _, values = capture(fn, linear, x, where=LINEAR)
    *_, grads, _ = capture_grads(lambda *args: jnp.sum(fn(*args)), linear, x, where=LINEAR)
    y = jax.vmap(linear)(x)
    assert_close((values, grads), ({"": y}, {"": jnp.full((4, 3), 2.0)}))


# Branches


def nested(depth, leaf):
    """`leaf`, in as many conds that stand in one another."""
    if depth == 0:
        return leaf
    inner = nested(depth - 1, leaf)
    return lambda linear, x: jax.lax.cond(x[0] > depth, inner, lambda _, x: x, linear, x)


def test_conds_that_stand_in_one_another_are_put_together_once(linear, monkeypatch):
    calls, switch = [], jax.lax.switch
    monkeypatch.setattr(jax.lax, "switch", lambda *args: calls.append(1) or switch(*args))
    fn = nested(6, lambda linear, x: linear(x))
    jax.make_jaxpr(lambda x: capture(fn, linear, x, where=LINEAR))(jnp.ones(3))
    assert len(calls) == 6  # not 2 ** 6


def test_nested_conds(linear):
    fn = nested(3, lambda linear, x: linear(x))
    for first, taken in ((3.5, True), (2.5, False)):
        x = jnp.array([first, 1.0, 1.0])
        out, values = jax.jit(lambda x: capture(fn, linear, x, where=LINEAR))(x)
        assert_close(out, linear(x) if taken else x)
        assert_close(values, {"": linear(x) if taken else jnp.full(3, jnp.nan)})


def test_debug_nans_stops_at_no_placeholder(linear):
    def fn(linear, x):
        return jax.lax.cond(x[0] > 0, lambda x: linear(x), lambda x: linear(2 * x), x)

    x = jnp.ones(3)
    loss = lambda *args: jnp.sum(fn(*args))
    for transform in (lambda f: f, jax.jit):
        with jax.debug_nans(True):
            out, values = transform(lambda x: capture(fn, linear, x, where=LINEAR))(x)
            _, _, grads, _ = transform(lambda x: capture_grads(loss, linear, x, where=LINEAR))(x)
        assert_close(out, linear(x))
        assert_close(values, {"": jnp.zeros(3), "#1": linear(x)})
        assert_close(grads, {"": jnp.zeros(3), "#1": jnp.ones(3)})


# Memory, and what is no array


class Scalar(eqx.Module):
    def __call__(self, x):
        return jnp.sum(x)


@pytest.mark.slow
def test_outside_jit_no_intermediate_outlives_its_last_use():
    shape, most = (7, 331), []

    def count():
        gc.collect()
        most.append(sum(a.shape == shape for a in jax.live_arrays()))

    def fn(scalar, x):
        for _ in range(10):
            x = jnp.tanh(x) + 1.0
            jax.debug.callback(count)
        return scalar(x), jnp.sum(x)

    fn(Scalar(), jnp.zeros(shape))
    jax.effects_barrier()
    plain, most[:] = max(most), []
    capture(fn, Scalar(), jnp.zeros(shape), where=Scalar)
    jax.effects_barrier()
    # One more than in the plain call: that of the equation which is being evaluated.
    assert len(most) == 10
    assert max(most) <= plain + 1


def test_a_shape_instead_of_an_array(linear):
    fn = lambda linear, x: linear(x)
    x = jax.ShapeDtypeStruct((3,), jnp.float32)
    with pytest.raises(TypeError, match=r"must hold arrays.*ShapeDtypeStruct.*filter_eval_shape"):
        capture(fn, linear, x, where=LINEAR)
    shapes = eqx.filter_eval_shape(lambda m, x: capture(fn, m, x, where=LINEAR), linear, x)
    assert shapes == (x, {"": x})
