"""replace_norms: the model before is the oracle for the model after."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from draws import normal, seed

from eqx_norms import GroupNorm, LayerNorm, RMSNorm, replace_norms
from eqx_norms.causality import assert_same as assert_same_function

OURS, THEIRS = (LayerNorm, RMSNorm, GroupNorm), (eqx.nn.LayerNorm, eqx.nn.RMSNorm, eqx.nn.GroupNorm)


def norms(model, types=OURS + THEIRS):
    leaves = jax.tree.leaves(model, is_leaf=lambda node: isinstance(node, types))
    return [leaf for leaf in leaves if isinstance(leaf, types)]


def train(model, key):
    """Random numbers for all parameters, so that ones and zeros hide nothing."""
    params, static = eqx.partition(model, eqx.is_inexact_array)
    leaves, treedef = jax.tree.flatten(params)
    keys = jr.split(key, len(leaves))
    drawn = [normal(k, p.shape, p.dtype) for k, p in zip(keys, leaves, strict=True)]
    return eqx.combine(jax.tree.unflatten(treedef, drawn), static)


class Model(eqx.Module):
    embed: eqx.nn.Linear
    norms: dict
    channels: eqx.nn.GroupNorm
    free: eqx.nn.GroupNorm

    def __init__(self, key):
        self.embed = eqx.nn.Linear(6, 6, key=key)
        self.norms = {"a": [eqx.nn.LayerNorm(6, eps=1e-3)], "b": eqx.nn.RMSNorm(6, use_bias=False)}
        self.channels = eqx.nn.GroupNorm(2, 6)
        self.free = eqx.nn.GroupNorm(3, channelwise_affine=False)

    def __call__(self, x):
        x = self.norms["b"](self.norms["a"][0](self.embed(x)))
        return self.free(self.channels(x))


@pytest.fixture
def model(x64, getkey):
    return train(Model(getkey()), getkey())


def assert_same(a, b):
    """Float64, so that groups of two close entries may magnify its rounding a millionfold."""
    np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9 * np.abs(b).max())


def test_every_norm_is_exchanged_and_the_outputs_stay(model, getkey):
    new = replace_norms(model)
    assert [type(norm) for norm in norms(new)] == [LayerNorm, RMSNorm, GroupNorm, GroupNorm]
    assert [type(norm) for norm in norms(model)] == [THEIRS[i] for i in (0, 1, 2, 2)]
    assert (
        new.norms["a"][0].eps == 1e-3 and new.norms["b"].bias is None and new.channels.groups == 2
    )
    x = normal(getkey(), (9, 6))
    assert_same(jax.vmap(new)(x), jax.vmap(model)(x))


def test_leaves_are_the_same_objects_in_the_same_order(model):
    old, new = jax.tree.leaves(model), jax.tree.leaves(replace_norms(model))
    assert len(old) == len(new) and all(a is b for a, b in zip(old, new, strict=True))


def test_where_is_asked_with_the_path(model):
    asked = []
    new = replace_norms(
        model, where=lambda path, norm: asked.append((path, norm)) or path == "free"
    )
    assert [path for path, _ in asked] == ["norms['a'][0]", "norms['b']", "channels", "free"]
    assert asked[2][1] is model.channels
    assert [type(norm) for norm in norms(new)] == [*THEIRS, GroupNorm]


def test_nothing_found_is_no_error_unless_asked_for(model):
    """Running a notebook's cell twice does no harm; `at_least` is for those who want to know."""
    without = eqx.nn.MLP(2, 2, 2, 1, key=jr.key(seed(0)))
    new = replace_norms(model, at_least=4)
    for nothing in (without, new):
        assert eqx.tree_equal(replace_norms(nothing), nothing)
    with pytest.raises(ValueError, match=r"at_least=1\)` found 0 of equinox.nn.LayerNorm, RMSNorm"):
        replace_norms(without, at_least=1)
    with pytest.raises(ValueError, match=r"found 1 of .* for which `where\(path, norm\)` is true"):
        replace_norms(model, where=lambda path, norm: path == "free", at_least=2)


def test_a_layer_at_two_places_is_one_layer_still(getkey):
    norm = eqx.nn.LayerNorm(4)
    first, second = replace_norms([norm, norm])
    assert first is second and type(first) is LayerNorm


def test_shared_layers_stay_shared(x64, getkey):
    """In eqx.nn.Shared one place holds the layer, the other a marker that is filled in."""
    pair = [eqx.nn.LayerNorm(4), eqx.nn.Linear(4, 4, key=getkey()), eqx.nn.LayerNorm(4)]
    shared = train(eqx.nn.Shared(pair, where=lambda m: m[2], get=lambda m: m[0]), getkey())
    new = replace_norms(shared)
    arrays = lambda m: jax.tree.leaves(eqx.filter(m, eqx.is_array))
    assert len(arrays(new)) == len(arrays(shared)) == 4

    def run(shared, x):
        first, linear, second = shared()
        return second(linear(first(x)))

    x = normal(getkey(), (4,))
    assert_same(run(new, x), run(shared, x))
    assert {type(layer) for layer in new()} == {LayerNorm, eqx.nn.Linear}


@pytest.mark.slow
def test_models_with_state(x64, getkey):
    def make():
        batch_norm = eqx.nn.BatchNorm(4, "batch", mode="batch")
        return eqx.nn.Sequential([eqx.nn.LayerNorm(4), batch_norm, eqx.nn.RMSNorm(4)])

    model, state = eqx.nn.make_with_state(make)()
    model = train(model, getkey())
    new = replace_norms(model)
    x = normal(getkey(), (5, 4))
    mapped = lambda m: jax.vmap(m, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
    run = eqx.filter_jit(lambda m: mapped(m)(x, state))
    (y, after), (want, want_after) = run(new), run(model)
    assert_same(y, want)
    stored = zip(jax.tree.leaves(after), jax.tree.leaves(want_after), strict=True)
    for a, b in stored:
        assert_same(a, b)


@pytest.mark.slow
def test_ensembles_keep_their_leading_axes(x64, getkey):
    keys = jr.split(getkey(), 3)
    ensemble = train(eqx.filter_vmap(Model)(keys), getkey())
    new = replace_norms(ensemble)
    assert new.norms["a"][0].weight.shape == (3, 6) and new.norms["a"][0].shape == (6,)
    x = normal(getkey(), (3, 6))
    run = eqx.filter_jit(eqx.filter_vmap(lambda model, x: model(x)))
    assert_same(run(new, x), run(ensemble, x))


def test_subclasses_are_left_alone(getkey):
    class Louder(eqx.nn.LayerNorm):
        def __call__(self, x):
            return 2 * super().__call__(x)

    louder, plain = replace_norms([Louder(4), eqx.nn.LayerNorm(4)])
    assert type(louder) is Louder and type(plain) is LayerNorm


@pytest.mark.slow
def test_partitioned_models(model):
    """Where the parameters are None, or only shapes, they stay so."""
    params, static = eqx.partition(model, eqx.is_array)
    both = eqx.combine(replace_norms(params), replace_norms(static))
    assert eqx.tree_equal(both, replace_norms(model))
    shapes = replace_norms(eqx.filter_eval_shape(Model, jr.key(seed(0))))
    assert shapes.channels.weight == jax.ShapeDtypeStruct((6,), jnp.float64)


@pytest.mark.slow
def test_an_optimiser_state_goes_on_to_fit(model, getkey):
    import optax

    optimiser = optax.sgd(1e-2, momentum=0.9)
    x, g = normal(getkey(), (2, 9, 6))
    grad = eqx.filter_jit(eqx.filter_grad(lambda model: jnp.mean(g * jax.vmap(model)(x))))
    state = optimiser.init(eqx.filter(model, eqx.is_array))
    new = replace_norms(model)
    new_state = replace_norms(state)
    with jax.numpy_dtype_promotion("standard"):  # optax asks for it.
        updates, _ = optimiser.update(grad(new), new_state)
        want, _ = optimiser.update(grad(model), state)
    for a, b in zip(jax.tree.leaves(updates), jax.tree.leaves(want), strict=True):
        assert_same(a, b)


OPTIMISERS = {
    "sgd": lambda optax: optax.sgd(0.1),
    "adam": lambda optax: optax.adam(0.1),
    "masked": lambda optax: optax.masked(
        optax.adam(0.1), lambda params: jax.tree.map(lambda p: p.ndim > 1, params)
    ),
    "by labels": lambda optax: optax.multi_transform(
        {"matrices": optax.adam(0.1), "others": optax.sgd(0.1)},
        lambda params: jax.tree.map(lambda p: "matrices" if p.ndim > 1 else "others", params),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMISERS)
def test_in_the_middle_of_a_run(name, getkey):
    """A state has the classes of its model in its structure: it is exchanged with the model."""
    import optax

    optimiser = OPTIMISERS[name](optax)
    x = normal(getkey(), (6, 4))

    @eqx.filter_jit
    def step(model, state):
        loss = lambda model: jnp.sum(jax.vmap(model[1])(jax.vmap(model[0])(x)) ** 3)
        grads = eqx.filter_grad(loss)(model)
        updates, state = optimiser.update(grads, state, eqx.filter(model, eqx.is_array))
        return eqx.apply_updates(model, updates), state

    with jax.numpy_dtype_promotion("standard"):  # optax asks for it.
        model = [eqx.nn.LayerNorm(4), eqx.nn.Linear(4, 4, key=getkey())]
        run = step(model, optimiser.init(eqx.filter(model, eqx.is_array)))
        if name == "adam":
            with pytest.raises(ValueError):
                step(replace_norms(run[0]), run[1])
        got, want = step(*replace_norms(run)), step(*run)
    assert type(got[0][0]) is LayerNorm
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        # Two steps in float32, of which Adam's divide by the size of a gradient.
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * max(np.abs(b).max(), 1))


@pytest.mark.slow
@pytest.mark.parametrize("cast", [np.float32, np.float64])
def test_numpy_numbers_as_eps_and_sizes(cast):
    """As `jnp.finfo(dtype).eps` is; the layers themselves take them."""
    size = np.int64(8)
    with pytest.warns(UserWarning, match="set as static"):  # Equinox's own, of its layers
        layers = [
            eqx.nn.LayerNorm((size,), eps=cast(1e-3)),
            eqx.nn.RMSNorm((size,), eps=cast(1e-3)),
            eqx.nn.GroupNorm(np.int32(2), size, eps=cast(1e-3)),
        ]
    x = jnp.linspace(-1, 1, 8)
    for layer in layers:
        new = replace_norms(layer)
        assert new.eps == layer.eps and type(new) in OURS
        assert_same_function(new, layer, x, inputs=1)
