"""LayerNorm as a module: others' printed numbers, a drop-in for eqx.nn, and its errors."""

import io
import json
import pathlib
import pickle
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from eqx_norms import LayerNorm, layer_norm

GOLDEN = pathlib.Path(__file__).parent / "golden"


@pytest.mark.parametrize("table", json.loads((GOLDEN / "torch_layer_norm.json").read_text()))
def test_tables_that_torch_printed(table):
    """Inputs and outputs as printed, with four decimals, in questions about nn.LayerNorm.

    `normalized_shape` counts axes from the end, so all before them are mapped.
    """
    x, y = (np.asarray(table[k], np.float32) for k in "xy")
    norm = LayerNorm(table["normalized_shape"], table["eps"])
    for _ in range(x.ndim - len(norm.shape)):
        norm = jax.vmap(norm)
    # Input and output are each off by half of 1e-4; the slope 1 / sigma is up to 2.2 here.
    np.testing.assert_allclose(norm(x), y, rtol=0, atol=2e-4)


@pytest.fixture
def trained(getkey):
    """A layer as after training: weight and bias are no longer ones and zeros."""
    weight, bias = jr.normal(getkey(), (2, 2, 3))
    return eqx.tree_at(lambda m: (m.weight, m.bias), LayerNorm((2, 3), eps=1e-3), (weight, bias))


def theirs(ours):
    layer = eqx.nn.LayerNorm(ours.shape, ours.eps, ours.use_weight, ours.use_bias)
    return eqx.tree_at(lambda m: (m.weight, m.bias), layer, (ours.weight, ours.bias))


class TestDropIn:
    def test_same_signature_fields_and_leaves(self):
        for args in ((4,), ((2, 3), 1e-3, False, True), (4, 1e-5, True, False, jnp.bfloat16)):
            ours, eqxs = LayerNorm(*args), eqx.nn.LayerNorm(*args)
            assert list(vars(ours)) == list(vars(eqxs))
            for name, value in vars(eqxs).items():
                got = getattr(ours, name)
                assert eqx.tree_equal(got, value) if eqx.is_array(value) else got == value

    def test_in_sequential_with_key(self, getkey):
        linear = eqx.nn.Linear(4, 6, key=getkey())
        x = jr.normal(getkey(), (4,))
        ours = eqx.nn.Sequential([linear, LayerNorm(6), eqx.nn.Dropout(0.5)])
        eqxs = eqx.nn.Sequential([linear, eqx.nn.LayerNorm(6), eqx.nn.Dropout(0.5)])
        key = getkey()
        np.testing.assert_allclose(ours(x, key=key), eqxs(x, key=key), rtol=1e-5, atol=1e-6)

    def test_in_sequential_with_state(self, getkey):
        make = lambda norm: eqx.nn.make_with_state(
            lambda: eqx.nn.Sequential([norm(3), eqx.nn.BatchNorm(3, "batch", mode="batch")])
        )()
        x = jr.normal(getkey(), (5, 3))
        out = []
        for norm in (LayerNorm, eqx.nn.LayerNorm):
            model, state = make(norm)
            run = jax.vmap(model, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
            out.append(run(x, state)[0])
        np.testing.assert_allclose(*out, rtol=1e-5, atol=1e-6)

    def test_state_is_passed_through(self, trained, getkey):
        x = jr.normal(getkey(), (2, 3))
        y, state = trained(x, "any state", key=getkey())
        assert state == "any state"
        np.testing.assert_array_equal(y, trained(x))
        assert trained(x, None)[1] is None

    @pytest.mark.parametrize("ours_first", (True, False))
    def test_checkpoints_load_both_ways(self, trained, ours_first):
        saved, blank = trained, eqx.nn.LayerNorm((2, 3), 1e-3)
        if not ours_first:
            saved, blank = theirs(trained), LayerNorm((2, 3), 1e-3)
        file = io.BytesIO()
        eqx.tree_serialise_leaves(file, saved)
        file.seek(0)
        loaded = eqx.tree_deserialise_leaves(file, blank)
        assert type(loaded) is type(blank)
        np.testing.assert_array_equal(loaded.weight, saved.weight)
        np.testing.assert_array_equal(loaded.bias, saved.bias)

    def test_pickles(self, trained):
        assert eqx.tree_equal(pickle.loads(pickle.dumps(trained)), trained)

    def test_inference_mode(self, trained):
        assert eqx.tree_equal(eqx.nn.inference_mode(trained), trained)

    def test_static_fields_hash_and_compare(self):
        treedef = lambda *args: jax.tree.structure(LayerNorm(*args))
        assert hash(treedef((2, 3))) == hash(treedef([2, 3])) and treedef((2, 3)) == treedef([2, 3])
        assert treedef(6) != treedef(6, 1e-3) and treedef(6) != treedef((2, 3))

    def test_same_layer_is_traced_once(self, getkey):
        traces = []

        @eqx.filter_jit
        def run(layer, x):
            traces.append(1)
            return layer(x)

        for layer in (LayerNorm(3), LayerNorm(3, eps=1e-5), LayerNorm([3])):
            run(layer, jr.normal(getkey(), (3,)))
        assert len(traces) == 1

    def test_module_is_the_function(self, trained, getkey):
        x = jr.normal(getkey(), (2, 3))
        want = layer_norm(x, trained.weight, trained.bias, eps=1e-3)
        np.testing.assert_array_equal(trained(x), want)
        bare = LayerNorm((2, 3), use_weight=False, use_bias=False)
        np.testing.assert_array_equal(bare(x), layer_norm(x))


# The layer's shape, the input's, at which of its axes the layer's shape stands, the cure.
CALLS = [
    ((768,), (2, 768), (1,), "jax.vmap(layer_norm)(x)"),
    ((768,), (2, 3, 768), (2,), "jax.vmap(jax.vmap(layer_norm))(x)"),
    ((768,), (768, 5), (0,), "jax.vmap(layer_norm, in_axes=-1, out_axes=-1)(x)"),
    ((8,), (2, 8, 5), (1,), "jax.vmap(jax.vmap(layer_norm, in_axes=-1, out_axes=-1))(x)"),
    ((4, 6), (4, 6, 2), (0, 1), "jax.vmap(layer_norm, in_axes=-1, out_axes=-1)(x)"),
    ((4, 6), (2, 4, 6), (1, 2), "jax.vmap(layer_norm)(x)"),
    ((4,), (4, 4), (1,), "jax.vmap(layer_norm)(x)"),
]


@pytest.mark.parametrize("shape, got, axes, call", CALLS)
def test_missing_vmap_error_ends_in_the_call_that_works(shape, got, axes, call):
    layer, x = LayerNorm(shape), jr.normal(jr.key(0), got)
    with pytest.raises(ValueError) as info:
        layer(x)
    message = str(info.value)
    assert message.endswith(call) and str(shape) in message and str(got) in message
    y = eval(call, {"jax": jax, "layer_norm": layer, "x": x})
    xc = x - x.mean(axes, keepdims=True)
    want = xc / jnp.sqrt((xc**2).mean(axes, keepdims=True) + 1e-5)
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("got", ((767,), (), (2, 384), (2, 767)))
def test_wrong_shape_that_no_vmap_cures(got):
    with pytest.raises(ValueError, match=r"expected \(768,\), got an array of shape") as info:
        LayerNorm(768)(jnp.ones(got))
    assert "vmap" not in str(info.value)


def test_shape_is_checked_without_parameters_and_under_jit():
    layer = LayerNorm(3, use_weight=False, use_bias=False)
    with pytest.raises(ValueError, match=re.escape("jax.vmap(layer_norm)(x)")):
        jax.jit(layer)(jnp.ones((2, 3)))


@pytest.mark.parametrize("dtype", (jnp.int32, jnp.uint8, jnp.bool_, jnp.complex64))
def test_input_must_be_real_floating_point(dtype):
    x = jnp.ones(3, dtype)
    for call, name in ((LayerNorm(3), "LayerNorm"), (layer_norm, "layer_norm")):
        with pytest.raises(TypeError, match=f"`{name}` normalises real floating-point arrays") as e:
            call(x)
        assert jnp.dtype(dtype).name in str(e.value) and "x.astype(jnp.float32)" in str(e.value)
    with pytest.raises(TypeError, match="got a list"):
        layer_norm([1.0, 2.0])


BAD_ARGUMENTS = [
    (dict(shape=()), ValueError, r"one or more sizes, each at least 1; got \(\)"),
    (dict(shape=-1), ValueError, "each at least 1; got -1"),
    (dict(shape=(3, 0)), ValueError, r"each at least 1; got \(3, 0\)"),
    (dict(shape=2.5), TypeError, "takes an int or ints; got 2.5"),
    (dict(shape="768"), TypeError, "takes an int or ints; got '768'"),
    (dict(shape=3, eps=-1e-5), ValueError, "finite number, 0 or above; got -1e-05"),
    (dict(shape=3, eps=float("nan")), ValueError, "finite number, 0 or above; got nan"),
    (dict(shape=3, eps=float("inf")), ValueError, "finite number, 0 or above; got inf"),
    (dict(shape=3, eps="1e-5"), ValueError, "finite number, 0 or above; got '1e-5'"),
    (dict(shape=3, dtype="flaot32"), TypeError, "floating point, .* got 'flaot32'"),
    (dict(shape=3, dtype=jnp.int32), TypeError, "must be floating point"),
]


@pytest.mark.parametrize("arguments, error, text", BAD_ARGUMENTS)
def test_bad_arguments(arguments, error, text):
    with pytest.raises(error, match=text):
        LayerNorm(**arguments)


def test_bad_parameters_of_the_function():
    x = jnp.ones(3)
    with pytest.raises(ValueError, match=r"bias that broadcasts .* got bias of shape \(4,\) and x"):
        layer_norm(x, bias=jnp.ones(4))
    # (2, 3) and (3,) do broadcast together, but to (2, 3): y would not have the shape of x.
    with pytest.raises(ValueError, match=r"got weight of shape \(2, 3\) and x of shape \(3,\)"):
        layer_norm(x, jnp.ones((2, 3)))
    with pytest.raises(TypeError, match=r"weight=\.\.\.\)` normalises .* dtype int32"):
        layer_norm(x, jnp.ones(3, int))
    with pytest.raises(ValueError, match=r"`layer_norm\(eps=\.\.\.\)` must be"):
        layer_norm(x, eps=-1)


@pytest.mark.parametrize("eps", (0, 0.0, np.float32(1e-5), 1))
def test_good_eps(eps):
    x = jnp.array([1.0, 3.0])
    y = (x - 2) / np.sqrt(1 + float(eps))
    np.testing.assert_allclose(LayerNorm(2, eps)(x), y, rtol=1e-6)
