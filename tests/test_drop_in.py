"""Each layer stands where that of equinox.nn of the same name stood: the oracle is theirs."""

import dataclasses
import fractions
import io
import pickle

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import normal
from oracles import assert_alike
from refused import refused

import eqx_norms
from eqx_norms import GroupNorm, LayerNorm, RMSNorm

# Arguments for each layer, and the shape of an example for the first of them.
ARGUMENTS = {
    LayerNorm: [((2, 6), 1e-3), (4,), ((2, 3), 1e-3, False), (4, 1e-5, True, False, jnp.bfloat16)],
    RMSNorm: [((2, 6), 1e-3), (4,), ((2, 3), 1e-3, False), (4, 1e-5, True, False, jnp.bfloat16)],
    GroupNorm: [(2, 6, 1e-3), (3, 6), (2, None, 1e-5, False), (2, 4, 1e-5, True, jnp.bfloat16)],
}
SHAPES = {LayerNorm: (2, 6), RMSNorm: (2, 6), GroupNorm: (6, 3)}
pytestmark = pytest.mark.parametrize("layer", ARGUMENTS)
PARAMS = lambda module: (module.weight, module.bias)


def pair(layer, getkey):
    """Ours and theirs, as after training: weight and bias no longer ones and zeros."""
    args = ARGUMENTS[layer][0]
    ours, theirs = layer(*args), getattr(eqx.nn, layer.__name__)(*args)
    params = tuple(normal(getkey(), ours.weight.shape) for _ in range(2))
    return eqx.tree_at(PARAMS, ours, params), eqx.tree_at(PARAMS, theirs, params)


def assert_same(a, b):
    """Float64; small variances may magnify its rounding, 2e-16, some ten thousand times."""
    np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9 * np.abs(b).max())


def test_same_fields_and_leaves_in_the_same_order(layer):
    for args in ARGUMENTS[layer]:
        ours, theirs = layer(*args), getattr(eqx.nn, layer.__name__)(*args)
        names = lambda module: [field.name for field in dataclasses.fields(module)]
        assert names(ours)[: len(names(theirs))] == names(theirs)
        for name in names(theirs):
            got, value = getattr(ours, name), getattr(theirs, name)
            if eqx.is_array(value):
                assert got.dtype == value.dtype and jnp.array_equal(got, value)
            else:
                assert got == value
        assert len(jax.tree.leaves(ours)) == len(jax.tree.leaves(theirs))


def test_same_values_and_gradients(layer, x64, getkey):
    modules = pair(layer, getkey)
    x, g = normal(getkey(), (2, *SHAPES[layer]))
    run = eqx.filter_jit(eqx.filter_value_and_grad(lambda args: jnp.sum(g * args[0](args[1]))))
    ours, theirs = (jax.tree.leaves(run((module, x))) for module in modules)
    for a, b in zip(ours, theirs, strict=True):
        assert_same(a, b)


@pytest.mark.slow
def test_in_sequential_with_key(layer, x64, getkey):
    x, key = normal(getkey(), SHAPES[layer]), getkey()
    ours, theirs = (
        eqx.nn.Sequential([eqx.nn.Lambda(jnp.sin), module, eqx.nn.Dropout(0.5)])
        for module in pair(layer, getkey)
    )
    assert_same(ours(x, key=key), theirs(x, key=key))


@pytest.mark.slow
def test_in_sequential_with_state(layer, x64, getkey):
    x = normal(getkey(), (5, *SHAPES[layer]))
    out = []
    for module in pair(layer, getkey):
        norms = lambda module=module: eqx.nn.Sequential(
            [module, eqx.nn.BatchNorm(SHAPES[layer][0], "batch", mode="batch")]
        )
        model, state = eqx.nn.make_with_state(norms)()
        run = jax.vmap(model, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
        out.append(jax.jit(run)(x, state)[0])
    assert_same(*out)


@pytest.mark.slow
def test_state_is_passed_through(layer, getkey):
    module, _ = pair(layer, getkey)
    x = normal(getkey(), SHAPES[layer])
    y, state = module(x, "any state", key=getkey())
    assert state == "any state"
    assert_alike(y, module(x), x.size)
    assert module(x, None)[1] is None


@pytest.mark.parametrize("direction", (1, -1))
def test_checkpoints_load_both_ways(layer, direction, getkey):
    saved, _ = pair(layer, getkey)[::direction]
    args = ARGUMENTS[layer][0]
    _, blank = (layer(*args), getattr(eqx.nn, layer.__name__)(*args))[::direction]
    file = io.BytesIO()
    eqx.tree_serialise_leaves(file, saved)
    file.seek(0)
    loaded = eqx.tree_deserialise_leaves(file, blank)
    assert type(loaded) is type(blank) is not type(saved)
    np.testing.assert_array_equal(loaded.weight, saved.weight)
    np.testing.assert_array_equal(loaded.bias, saved.bias)


def test_pickles(layer, getkey):
    module, _ = pair(layer, getkey)
    assert eqx.tree_equal(pickle.loads(pickle.dumps(module)), module)


def test_inference_mode(layer, getkey):
    module, _ = pair(layer, getkey)
    assert eqx.tree_equal(eqx.nn.inference_mode(module), module)
    assert eqx.tree_equal(eqx.tree_inference(module, True), module)


def test_static_fields_hash_and_compare(layer):
    treedefs = [jax.tree.structure(layer(*args)) for args in ARGUMENTS[layer]]
    assert len(set(treedefs)) == len(treedefs)
    assert treedefs == [jax.tree.structure(layer(*args)) for args in ARGUMENTS[layer]]


def test_same_layer_is_traced_once(layer, getkey):
    traces = []

    @eqx.filter_jit
    def run(module, x):
        traces.append(1)
        return module(x)

    args = ARGUMENTS[layer][0]
    for _ in range(3):
        run(layer(*args), normal(getkey(), SHAPES[layer]))
    assert len(traces) == 1


def test_module_is_the_function(layer, getkey):
    module, _ = pair(layer, getkey)
    name = {"LayerNorm": "layer_norm", "RMSNorm": "rms_norm", "GroupNorm": "group_norm"}
    function = getattr(eqx_norms, name[layer.__name__])
    x = normal(getkey(), SHAPES[layer])
    args = (x, 2) if layer is GroupNorm else (x,)
    want = function(*args, module.weight, module.bias, eps=1e-3)
    assert_alike(module(x), want, x.size)


@pytest.mark.slow
def test_unit_offset(layer, x64, getkey):
    """Weight starts at zero and is one less; a bfloat16 weight keeps the digits near zero."""
    if layer is GroupNorm:
        with pytest.raises(TypeError, match="unit_offset"):
            layer(2, 6, unit_offset=True)
        return
    x, weight, g = normal(getkey(), (3, 5))
    fresh = layer(5, unit_offset=True)
    assert not fresh.weight.any() and fresh.weight.dtype == layer(5).weight.dtype
    assert_alike(fresh(x), layer(5)(x), 5)
    run = eqx.filter_value_and_grad(lambda args: jnp.sum(g * args[0](args[1])))
    at = lambda module, weight: run((eqx.tree_at(lambda m: m.weight, module, weight), x))
    got, want = at(fresh, weight), at(layer(5), 1 + weight)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert_same(a, b)
    small = jnp.full(5, 2.0**-12, jnp.bfloat16)
    y = eqx.tree_at(lambda m: m.weight, fresh, small)(x)
    assert_same(y, layer(5)(x) * (1 + 2.0**-12))


FLAGS = {
    LayerNorm: ("use_weight", "use_bias"),
    RMSNorm: ("use_weight", "use_bias"),
    GroupNorm: ("channelwise_affine",) * 2,
}


def calls(layer, getkey):
    module, _ = pair(layer, getkey)
    yield module, normal(getkey(), SHAPES[layer])
    if layer is not GroupNorm:
        yield layer(3, implementation="pallas"), jnp.ones(3)


def test_a_parameter_that_is_missing_is_an_error(layer, getkey):
    """It was dropped in silence: y came out unscaled."""
    for module, x in calls(layer, getkey):
        params, static = eqx.partition(module, eqx.is_array)
        with refused(ValueError, f"`{layer.__name__}` was made with a weight, which is None now"):
            static(x)
        no_bias = eqx.tree_at(lambda m: m.bias, module, None)
        with refused(ValueError, "with a bias, which is None .* eqx.combine"):
            no_bias(x)
        assert_alike(eqx.combine(params, static)(x), module(x), x.size)


def test_a_parameter_that_the_flags_deny_is_ignored(layer, x64, getkey):
    """As there, whoever set it: for both it is no part of the function."""
    args = {LayerNorm: (6, 1e-5, False, False), GroupNorm: (2, 6, 1e-5, False)}
    theirs = getattr(eqx.nn, layer.__name__)(*args.get(layer, args[LayerNorm]))
    set_all_the_same = tuple(normal(getkey(), (2, 6)))
    theirs = eqx.tree_at(PARAMS, theirs, set_all_the_same, is_leaf=lambda leaf: leaf is None)
    ours, x = eqx_norms.replace_norms(theirs), normal(getkey(), (6,))
    assert_same(ours(x), theirs(x))
    gradient = eqx.filter_grad(lambda module: jnp.sum(module(x) ** 3))(ours)
    assert not gradient.weight.any() and not gradient.bias.any()


def test_stacked_layers_without_their_vmap(layer):
    args = ARGUMENTS[layer][1]
    layers = eqx.filter_vmap(lambda _: layer(*args))(jnp.arange(3))
    x = jnp.ones(layers.weight.shape[1:])
    with refused(ValueError, "several layers, stacked, map over them: eqx.filter_vmap"):
        layers(x)
    assert eqx.filter_vmap(lambda layer: layer(x))(layers).shape == (3, *x.shape)


@pytest.mark.slow
@pytest.mark.parametrize("shape", ((), 0, (2, 0)))
def test_examples_of_one_entry_and_of_none(layer, shape):
    args = (1, 0) if layer is GroupNorm else (shape,)
    ours, theirs = layer(*args), getattr(eqx.nn, layer.__name__)(*args)
    x = jnp.full(ours.weight.shape, 3.0)
    run = eqx.filter_value_and_grad(lambda args: jnp.sum(args[0](args[1])))
    (got, _), (want, _) = run((ours, x)), run((theirs, x))
    assert ours(x).shape == x.shape
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_subclasses_that_set_the_fields_of_equinox_alone(layer, getkey):
    class Mine(layer):
        def __init__(self, module):
            names = (field.name for field in dataclasses.fields(module))
            for name in names:
                setattr(self, name, getattr(module, name))

    ours, theirs = pair(layer, getkey)
    x = normal(getkey(), SHAPES[layer])
    assert_alike(jax.jit(lambda x: Mine(theirs)(x))(x), ours(x), x.size)


@pytest.mark.slow
@pytest.mark.parametrize("affine", (True, False))
def test_elementwise_affine_is_deprecated_there_too(layer, affine):
    if layer is not LayerNorm:
        return
    with pytest.warns(UserWarning, match="elementwise_affine=...\\)` is deprecated"):
        ours = LayerNorm(4, elementwise_affine=affine)
    with pytest.warns(UserWarning, match="is deprecated"):
        theirs = eqx.nn.LayerNorm(4, elementwise_affine=affine)
    assert eqx.tree_equal(eqx_norms.replace_norms(theirs), ours)


def numbers():
    yield from (jnp.finfo(jnp.bfloat16).eps, jnp.float32(1e-3), np.asarray(1e-5), np.float16(1e-3))
    yield from (jnp.bfloat16(1e-3), np.int32(0), fractions.Fraction(1, 8), LikeTorch())


class LikeTorch:
    """A tensor without axes, as torch has it: its dtype is one by name alone."""

    shape, dtype = (), type("dtype", (), {"__repr__": lambda _: "torch.float32"})()
    __float__ = lambda _: 0.125


def test_numbers_of_any_library_as_eps(layer):
    args = (2, 4) if layer is GroupNorm else (4,)
    for eps in numbers():
        assert layer(*args, eps=eps).eps == float(eps)
    with pytest.warns(UserWarning, match="set as static"):  # Equinox's own, of its layers
        theirs = getattr(eqx.nn, layer.__name__)(*args, eps=jnp.float32(1e-3))
    assert eqx_norms.replace_norms(theirs).eps == float(jnp.float32(1e-3))
    with refused(ValueError, "traced, and its value must be known before"):
        jax.jit(lambda eps: layer(*args, eps=eps))(1e-3)
    with refused(ValueError, r"traced.* Type a number, .*`np.float32\(1e-3\)`, instead of"):
        jax.jit(lambda: layer(*args, eps=jnp.float32(1e-3)))()
    assert jax.jit(lambda: layer(*args, eps=np.float32(1e-3)).eps)() == np.float32(1e-3)
    with refused(ValueError, "finite number"):
        layer(*args, eps=np.complex64(1e-3))


def test_parameters_of_float8_are_cast_up(layer):
    """As there; checkpoints have them."""
    ours, theirs = (
        jax.tree.map(lambda p: (2 * p).astype(jnp.float8_e4m3fn), of(*ARGUMENTS[layer][0]))
        for of in (layer, getattr(eqx.nn, layer.__name__))
    )
    x = jnp.arange(12.0).reshape(6, 2) if layer is GroupNorm else jnp.arange(12.0).reshape(2, 6)
    assert_alike(ours(x), theirs(x), 12)
