"""LayerNorm: numbers that torch printed; and the errors of LayerNorm and RMSNorm, which share them.

Like eqx.nn's: test_drop_in.py. Like the other libraries': test_parity.py. Exact: test_normalize.py.
"""

import json
import math
import pathlib
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from draws import normal, seed
from oracles import assert_alike
from refused import refused
from slow import few

from eqx_norms import LayerNorm, RMSNorm, layer_norm, normalize_reference, rms_norm

GOLDEN = pathlib.Path(__file__).parent / "golden"
LAYERS = {LayerNorm: layer_norm, RMSNorm: rms_norm}
EACH_LAYER = pytest.mark.parametrize("layer", LAYERS)


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


@pytest.mark.parametrize("layer", few(LAYERS, (LayerNorm,)))
@pytest.mark.parametrize("shape, got, axes, call", CALLS)
def test_missing_vmap_error_ends_in_the_call_that_works(layer, shape, got, axes, call):
    module, x = layer(shape), normal(jr.key(seed(0)), got)
    name = LAYERS[layer].__name__
    call = call.replace("layer_norm", name)
    with pytest.raises(ValueError) as info:
        module(x)
    message = str(info.value)
    assert message.startswith(f"`{layer.__name__}` takes one example")
    assert message.endswith(call) and str(shape) in message and str(got) in message
    y = jax.jit(lambda x: eval(call, {"jax": jax, name: module, "x": x}))(x)
    x = np.float64(x)
    xc = x - x.mean(axes, keepdims=True) if layer is LayerNorm else x
    want = xc / np.sqrt((xc**2).mean(axes, keepdims=True) + 1e-5)
    assert_alike(y, want, math.prod(shape))


@EACH_LAYER
@pytest.mark.parametrize("got", ((767,), (), (2, 384), (2, 767)))
def test_wrong_shape_that_no_vmap_cures(layer, got):
    with pytest.raises(ValueError, match=r"expected \(768,\), got an array of shape") as info:
        layer(768)(jnp.ones(got))
    assert "vmap" not in str(info.value)


@EACH_LAYER
def test_shape_is_checked_without_parameters_and_under_jit(layer):
    module = layer(3, use_weight=False, use_bias=False)
    with pytest.raises(ValueError, match=re.escape(f"jax.vmap({LAYERS[layer].__name__})(x)")):
        jax.jit(module)(jnp.ones((2, 3)))


@EACH_LAYER
@pytest.mark.parametrize(
    "dtype",
    ("int32", "uint8", "bool", "complex64", "float8_e4m3fn", "float8_e8m0fnu", "float4_e2m1fn"),
)
def test_input_must_be_real_floating_point(layer, dtype):
    x = jnp.asarray(np.ones(3), dtype)
    function = LAYERS[layer]
    calls = layer(3), function, normalize_reference
    names = layer.__name__, function.__name__, "normalize_reference"
    for call, name in zip(calls, names, strict=True):
        what = f"`{name}` normalises real floating-point arrays"
        with refused(TypeError, what, jnp.dtype(dtype).name, "x.astype(jnp.float32)"):
            call(x)
    with refused(TypeError, "got a list"):
        function([1.0, 2.0])


BAD_ARGUMENTS = [
    (dict(shape=-1), ValueError, "sizes that are 0 or above; got -1"),
    (dict(shape=(3, -2)), ValueError, r"0 or above; got \(3, -2\)"),
    (dict(shape=2.5), TypeError, "takes an int or ints; got 2.5"),
    (dict(shape="768"), TypeError, "takes an int or ints; got '768'"),
    (dict(shape=3, eps=-1e-5), ValueError, "finite number, 0 or above; got -1e-05"),
    (dict(shape=3, eps=float("nan")), ValueError, "finite number, 0 or above; got nan"),
    (dict(shape=3, eps=float("inf")), ValueError, "finite number, 0 or above; got inf"),
    (dict(shape=3, eps="1e-5"), ValueError, "finite number, 0 or above; got '1e-5'"),
    (dict(shape=3, dtype="flaot32"), TypeError, "floating point, .* got 'flaot32'"),
    (dict(shape=3, eps=jnp.ones(1)), ValueError, "finite number, 0 or above; got Array"),
    (dict(shape=3, eps=np.complex64(1)), ValueError, "finite number, 0 or above"),
    (dict(shape=3, dtype=jnp.int32), TypeError, "must be floating point"),
    (dict(shape=3, dtype=jnp.float8_e4m3fn), TypeError, "one of float16, bfloat16, float32"),
]


@EACH_LAYER
@pytest.mark.parametrize("arguments, error, text", BAD_ARGUMENTS)
def test_bad_arguments(layer, arguments, error, text):
    with refused(error, text, f"`{layer.__name__}("):
        layer(**arguments)


@pytest.mark.parametrize("function", LAYERS.values())
def test_bad_parameters_of_the_function(function):
    x = jnp.ones(3)
    with refused(ValueError, r"bias that broadcasts .* got bias of shape \(4,\) and x"):
        function(x, bias=jnp.ones(4))
    # (2, 3) and (3,) do broadcast together, but to (2, 3): y would not have the shape of x.
    with refused(ValueError, r"got weight of shape \(2, 3\) and x of shape \(3,\)"):
        function(x, jnp.ones((2, 3)))
    with refused(TypeError, r"weight=\.\.\.\)` normalises .* dtype int32"):
        function(x, jnp.ones(3, int))
    with refused(ValueError, r"norm\(eps=\.\.\.\)` must be"):
        function(x, eps=-1)


@pytest.mark.parametrize("eps", (0, 0.0, np.float32(1e-5), 1))
def test_good_eps(eps):
    x = jnp.array([1.0, 3.0])
    y = (x - 2) / np.sqrt(1 + float(eps))
    assert_alike(LayerNorm(2, eps)(x), y, 2)


@pytest.mark.parametrize("layer", (LayerNorm, RMSNorm))
@pytest.mark.parametrize("unit_offset", (False, True))
def test_an_optimiser_step_is_traced_once(layer, unit_offset):
    """Weakly typed parameters would be other ones, to `jax.jit`, than those that Adam returns."""
    traces = 0
    optimiser = optax.adam(1e-2)

    @eqx.filter_jit
    def step(norm, state, x):
        nonlocal traces
        traces += 1
        grads = eqx.filter_grad(lambda norm: jnp.sum(norm(x) ** 3))(norm)
        updates, state = optimiser.update(grads, state)
        return eqx.apply_updates(norm, updates), state

    norm = layer(4, unit_offset=unit_offset)
    assert not norm.weight.weak_type and not norm.bias.weak_type
    state = optimiser.init(norm)
    with jax.numpy_dtype_promotion("standard"):  # For Optax.
        for _ in range(3):
            norm, state = step(norm, state, jnp.arange(4.0))
    assert traces == 1
