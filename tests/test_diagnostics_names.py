"""capture, capture_grads and replace of values that are named, and of Equinox's attention weights,
against hand computation.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import normal
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core.primitives import name_p
from refused import refused

from eqx_norms.diagnostics import capture, capture_grads, diagnose

SAVED = jax.checkpoint_policies.save_only_these_names("remat")


def total(w, x, mark=checkpoint_name):
    """The sum of the sines of all that is marked, under every transformation. `w` is a scalar, `x`
    of shape (2, 3, 5), of which vmap leaves the last axes last.
    """
    sines = lambda name: lambda x: jnp.sin(mark(w * x, name)).sum()
    summed = lambda name: (
        lambda x: jax.lax.scan(lambda carry, x: (carry, sines(name)(x)), 0.0, x, reverse=True)[
            1
        ].sum()
    )
    return sum(
        [
            sines("twice")(x),
            sines("twice")(x[0]),
            jax.jit(sines("jit"))(x),
            jax.vmap(jax.jit(sines("vmap")), in_axes=2)(x).sum(),
            jax.vmap(jax.vmap(sines("vmaps"), in_axes=0), in_axes=2)(x).sum(),
            jax.vmap(jax.vmap(sines("in turn"), in_axes=1), in_axes=1)(x).sum(),
            jax.checkpoint(jax.vmap(sines("remat"), in_axes=1), policy=SAVED)(x).sum(),
            summed("scan")(x),
            jax.vmap(summed("vmap of scan"), in_axes=2)(x).sum(),
            jax.lax.cond(x.sum() > x.sum() - 1, sines("taken"), lambda x: 0 * x.sum(), x),
        ]
    )


def marked_by_hand(w, x):
    v = np.float64(w) * np.float64(x)
    return {
        "twice": v,
        "twice#1": v[0],
        "jit": v,
        "vmap": v.transpose(2, 0, 1),
        "vmaps": v.transpose(2, 0, 1),
        "in turn": v.transpose(1, 2, 0),
        "remat": v.transpose(1, 0, 2),
        "scan": v,
        "vmap of scan": v.transpose(0, 2, 1),
        "taken": v,
    }


NAMES = tuple(key for key in marked_by_hand(1.0, np.ones((2, 3, 5))) if "#" not in key)


@pytest.fixture
def w_and_x(x64, getkey):
    return normal(getkey(), ()), normal(getkey(), (2, 3, 5))


def test_named_values_and_their_derivatives(w_and_x):
    """In float64, sums of 300 terms of order one: a millionfold of their rounding is allowed."""
    w, x = w_and_x
    loss, values, grads, _ = eqx.filter_jit(capture_grads)(total, w, x, names=NAMES)
    expected = marked_by_hand(w, x)
    assert set(values) == set(grads) == set(expected)
    np.testing.assert_allclose(loss, sum(np.sin(v).sum() for v in expected.values()), atol=1e-9)
    for name, value in expected.items():
        np.testing.assert_allclose(values[name], value, rtol=0, atol=1e-9, err_msg=name)
        np.testing.assert_allclose(grads[name], np.cos(value), rtol=0, atol=1e-9, err_msg=name)


@pytest.mark.slow
def test_named_values_are_replaced(w_and_x):
    """By functions, and by arrays, which are those of all steps and examples."""
    w, x = w_and_x
    expected = marked_by_hand(w, x)
    steps = {"scan": lambda value, step: jnp.where(step == 1, 0 * value, value)}
    halves = {name: lambda value: value / 2 for name in ("jit", "vmap", "remat", "twice#1")}
    arrays = {name: 3 * expected[name] for name in ("vmaps", "vmap of scan", "in turn", "taken")}
    replace = steps | halves | arrays
    out, values = capture(total, w, x, names=NAMES, replace=replace)
    assert list(values) == list(expected)  # in the order of the calls
    expected["scan"] = expected["scan"] * np.array([1, 0])[:, None, None]
    expected |= {name: expected[name] / 2 for name in halves} | arrays
    np.testing.assert_allclose(out, sum(np.sin(v).sum() for v in expected.values()), atol=1e-9)
    for name, value in expected.items():
        np.testing.assert_allclose(values[name], value, rtol=0, atol=1e-9, err_msg=name)


def test_a_derivative_in_the_function_is_no_second_value(w_and_x):
    w, x = w_and_x
    slopes = lambda w, x: jax.vmap(jax.grad(lambda x: sum_of_sines(w, x)))(x)
    out, values = capture(slopes, w, x, names="v")
    assert list(values) == ["v"]
    np.testing.assert_allclose(values["v"], w * x, rtol=1e-12)
    np.testing.assert_allclose(out, w * jnp.cos(w * x), rtol=1e-9, atol=1e-12)
    with refused(NotImplementedError, "'v' cannot be replaced", "takes a derivative"):
        capture(slopes, w, x, names="v", replace={"v": jnp.zeros_like})
    outside = jax.grad(lambda w: capture(sum_of_sines, w, x, names="v", replace=HALF)[0])(w)
    np.testing.assert_allclose(outside, jnp.sum(x * jnp.cos(w * x / 2) / 2), rtol=1e-9)


HALF = {"v": lambda value: value / 2}


def sum_of_sines(w, x):
    return jnp.sin(checkpoint_name(w * x, "v")).sum()


def test_names_in_a_model_and_in_a_capture_within_another(getkey):
    model = eqx.nn.Lambda(lambda x: checkpoint_name({"a": x, "b": 2 * x}, "pair")["b"])
    x = normal(getkey(), (3, 2))

    def inner(model, x):
        return capture(lambda m, x: jax.vmap(m)(x), model, x, names="pair")[1]["pair#1"]

    inside, values = capture(inner, model, x, where=eqx.nn.Lambda, names="pair")
    np.testing.assert_array_equal(inside, 2 * x)
    assert list(values) == ["pair", "pair#1", ""]
    for key, factor in {"pair": 1, "pair#1": 2, "": 2}.items():
        np.testing.assert_array_equal(values[key], factor * x)


def test_nothing_is_changed_where_no_name_is_asked_for(getkey):
    """A jitted function has a trace of its own in a capture with names, and so outside of it."""
    named = jax.jit(lambda x: checkpoint_name(x, "v"))
    columns = lambda x: jax.vmap(named, in_axes=1, out_axes=1)(x)
    x = normal(getkey(), (2, 3))
    before = str(jax.make_jaxpr(columns)(x))
    _, values = capture(lambda _, x: columns(x), None, x, names="v")
    np.testing.assert_array_equal(values["v"], x.T)
    assert str(jax.make_jaxpr(columns)(x)) == before
    assert "transpose" not in before and name_p.name in before


def test_bad_names(getkey):
    model, x = eqx.nn.Linear(2, 2, key=getkey()), normal(getkey(), (2,))
    fn = lambda model, x: checkpoint_name(model(x), "out")
    with refused(ValueError, "none the name 'oout'", "It gives 'out'"):
        capture(fn, model, x, names=("out", "oout"))
    with refused(ValueError, "It names nothing"):
        capture(lambda model, x: model(x), model, x, names="out")
    with refused(TypeError, "but it is 3", "`names=('scores', 'hidden')`"):
        capture(fn, model, x, names=3)
    with refused(ValueError, "at 'out' there is none", "must be in `names` as well"):
        capture(fn, model, x, replace={"out": jnp.zeros_like})
    with refused(ValueError, "`where` must match at least one"):
        capture(fn, model, x)
    named = lambda model, x: checkpoint_name(model.layers[0](x), "layers[0]")
    with refused(ValueError, "'layers.0.' is both"):
        capture(named, eqx.nn.Sequential([model]), x, where=eqx.nn.Linear, names="layers[0]")
    loop = lambda m, x: jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: fn(m, x) + 5, x)
    with refused(NotImplementedError, "'out' cannot be captured", "`while`"):
        capture(loop, model, x, names="out")
    with refused(ValueError, "must be as the value of that name"):
        capture(fn, model, x, names="out", replace={"out": jnp.zeros(3)})


@pytest.mark.slow
@pytest.mark.parametrize("heads", [1, 3])
def test_attention_weights_are_the_output_of_the_dropout(heads, x64, getkey):
    """As docs/diagnosis.md says; queries and keys of different number, a mask for each head.

    In float64, sums of six terms of order one: a millionfold of their rounding is allowed.
    """
    model = eqx.nn.MultiheadAttention(heads, 5, 4, 2, 3 * heads, qk_size=3, vo_size=3, key=getkey())
    sizes = (2, 4, 5), (2, 6, 4), (2, 6, 2)
    q, k, v = (normal(getkey(), shape) for shape in sizes)
    mask = normal(getkey(), (heads, 4, 6)) > -0.5
    mask = mask.at[..., 0].set(True)
    cotangent = normal(getkey(), (2, 4, 3 * heads))

    def loss_fn(model, *inputs):
        outs = jax.vmap(lambda q, k, v: model(q, k, v, mask=mask))(*inputs)
        return jnp.sum(outs * cotangent)

    found = eqx.filter_jit(capture_grads)(loss_fn, model, q, k, v, where=eqx.nn.Dropout)
    loss, values, grads, _ = found
    split = lambda layer, x: (x @ layer.weight.T).reshape(2, -1, heads, 3)
    projections = model.query_proj, model.key_proj, model.value_proj
    q, k, v = map(split, projections, (q, k, v))
    scores = np.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(3)
    expected = np.exp(np.where(mask, scores, -np.inf))
    expected /= expected.sum(-1, keepdims=True)
    np.testing.assert_allclose(values["dropout"], expected, rtol=0, atol=1e-9)
    of_heads = (cotangent @ model.output_proj.weight).reshape(2, 4, heads, 3)
    slope = np.einsum("bqhd,bkhd->bhqk", of_heads, v)
    np.testing.assert_allclose(grads["dropout"], slope, rtol=0, atol=1e-9)
    np.testing.assert_allclose(loss, np.sum(expected * slope), rtol=1e-9)


# ---- Functions in between.


def test_functions_in_between():
    """Between the layers of an MLP: their values, their derivatives, others in their place."""
    x, mlp = normal(jax.random.key(0), (3, 2)), eqx.nn.MLP(2, 1, 4, 2, key=jax.random.key(1))
    loss = lambda mlp, x: jnp.sum(jax.vmap(mlp)(x))
    _, values, grads, _ = capture_grads(loss, mlp, x, where=eqx.nn.Linear, functions="relu")
    relus = ["layers[0]:relu", "layers[1]:relu"]
    assert [*values] == ["layers[0]", relus[0], "layers[1]", relus[1], "layers[2]"]
    for key in relus:
        np.testing.assert_array_equal(values[key], np.maximum(values[key[:9]], 0))
        alive = np.asarray(values[key]) > 0
        np.testing.assert_array_equal(grads[key[:9]], np.where(alive, grads[key], 0))
    last = mlp.layers[2]
    assert last.bias is not None
    weight = np.tile(np.asarray(last.weight), (3, 1))
    np.testing.assert_allclose(grads[relus[1]], weight, rtol=1e-6)
    silent, shown = capture(loss, mlp, x, functions="relu", replace={relus[1]: jnp.zeros_like})
    np.testing.assert_allclose(silent, 3 * np.asarray(last.bias)[0], rtol=1e-6)
    assert [*shown] == relus and not shown[relus[1]].any()
    with refused(ValueError, "must be among 'relu', .* but one is 'cube'"):
        capture(loss, mlp, x, functions="cube")
    with refused(ValueError, "none has the key 'layers\\[2\\]:relu'. It is not called"):
        capture(loss, mlp, x, functions="relu", replace={"layers[2]:relu": jnp.zeros_like})


class Encoder(eqx.Module):
    attention: eqx.nn.MultiheadAttention
    up: eqx.nn.Linear
    down: eqx.nn.Linear

    def __init__(self, key):
        self.attention = eqx.nn.MultiheadAttention(2, 4, key=key)
        self.up, self.down = (eqx.nn.Linear(4, 4, key=k) for k in jax.random.split(key))

    def __call__(self, x):
        x = x + self.attention(x, x, x)
        return x + jax.vmap(lambda y: self.down(jax.nn.gelu(self.up(y))))(x)


@pytest.mark.slow
def test_functions_in_a_scan_over_layers():
    """By the paths that `diagnose` gives them, and equal to those computed by hand."""
    layers = eqx.filter_vmap(Encoder)(jax.random.split(jax.random.key(2), 3))
    x = normal(jax.random.key(3), (2, 5, 4))
    arrays, static = eqx.partition(layers, eqx.is_array)

    def loss(arrays, x):
        step = lambda x, arrays: (eqx.combine(arrays, static)(x), None)
        each = lambda x: jax.lax.scan(jax.checkpoint(step), x, arrays)[0]
        return jnp.sum(jnp.sin(jax.vmap(each)(x)))

    where = lambda path, module: path == "up"
    _, values, grads, _ = capture_grads(loss, arrays, x, where=where, functions=("softmax", "gelu"))
    assert [*values] == ["attention:softmax", "up", "up:gelu"]
    # Scans are ahead of vmap, heads behind.
    assert values["attention:softmax"].shape == (3, 2, 2, 5, 5)
    np.testing.assert_allclose(values["attention:softmax"].sum(-1), 1, rtol=1e-5)
    np.testing.assert_allclose(values["up:gelu"], jax.nn.gelu(values["up"]), atol=1e-6)
    slope = jax.vmap(jax.grad(jax.nn.gelu))(values["up"].ravel()).reshape(values["up"].shape)
    np.testing.assert_allclose(grads["up"], slope * grads["up:gelu"], atol=1e-5)
    listed = {(call.path, call.type) for call in diagnose(loss, arrays, x).calls}
    assert {("attention", "softmax"), ("up", "gelu")} <= listed


@pytest.mark.slow
def test_the_newer_checkpoint():
    """What `jax_remat3` switches on is another primitive, and so is a named value under it."""
    x, mlp = normal(jax.random.key(0), (2,)), eqx.nn.MLP(2, 1, 4, 1, key=jax.random.key(1))
    saved = jax.checkpoint_policies.save_only_these_names("out")

    def loss(mlp, x):
        body = lambda x: checkpoint_name(mlp(x), "out")
        return jnp.sum(jax.checkpoint(body, policy=saved)(x) ** 2)

    asked = {"where": eqx.nn.Linear, "names": "out", "functions": "relu"}
    want = capture_grads(loss, mlp, x, **asked)
    jax.config.update("jax_remat3", True)
    try:
        got = capture_grads(loss, mlp, x, **asked)
    finally:
        jax.config.update("jax_remat3", False)
    assert [*got[1]] == ["layers[0]", "layers[0]:relu", "layers[1]", "out"]
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5) if eqx.is_array(a) else None
