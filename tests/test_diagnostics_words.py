"""What `diagnose`, `Watch` and `capture` take of optimisers, functions and selections that people
have, and how they name things. Oracles: the optimiser's own update, JAX's own activation functions.
"""

import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from draws import normal
from refused import refused
from slow import few

from eqx_norms import LayerNorm, is_norm
from eqx_norms.diagnostics import Watch, capture, diagnose, effective_rank
from eqx_norms.diagnostics._capture._activations import recognised
from eqx_norms.diagnostics._diagnose._diagnose import Diagnosis
from eqx_norms.diagnostics._diagnose._measure import Row
from eqx_norms.diagnostics._diagnose._survey import Seen

LINEAR = eqx.nn.Linear


def loss_fn(model, x):
    return jnp.mean((jax.vmap(model)(x) - x) ** 2)


# Names


def made_up(rows=(), not_looked_at=None):
    return Diagnosis(1.0, (), tuple(rows), (), not_looked_at or {})


PROJECTIONS = [f"blocks.attention.{name}_proj" for name in ("query", "key", "value", "output")]


def test_projections_of_a_scanned_attention_are_told_apart():
    names = ("mean", "std", "rms", "largest", "dead", "saturated", "effective_rank", "grad_rms")
    statistics, shape = dict.fromkeys(names, 1.2e-5), (32, 128, 1024)
    rows = [
        Row(at, "Linear", 0, (i,), "", shape, "bfloat16", False, statistics, Seen(at, "", (3,)))
        for at in [*PROJECTIONS, "a" * 60 + "." + "b" * 60]
        for i in range(3)
    ]
    lines = str(made_up(rows)).splitlines()
    assert max(map(len, lines)) <= 88
    for at in PROJECTIONS:
        assert f"{at}{{i}} x3" in lines


def test_a_kind_that_is_wider_than_its_column():
    names = ("mean", "std", "rms", "largest", "dead", "saturated", "effective_rank", "grad_rms")
    kind = "MultiheadAttention", 0, (), "", (32, 128, 1024), "bfloat16", False
    rows = [Row("a", *kind, dict.fromkeys(names, -1.2e-5), Seen("a", "", (3,)))]
    *_, head, name, said, numbers = str(made_up(rows)).splitlines()
    assert (name, said) == ("a", "  MultiheadAttention bf16[32,128,1024]")
    assert len(head) == len(numbers) == 88 and numbers.split() == ["-1.2e-5"] * 8


def test_long_lists_of_what_was_not_looked_at_are_folded():
    steps = {f"cell#{i}{{{i}, 0}}": "its branch was not taken" for i in range(5000)}
    many = {f"layers[{i}]": "it is never called" for i in range(30)}
    lines = str(made_up(not_looked_at=steps | many)).splitlines()
    assert "not looked at: cell x5000: its branch was not taken" in lines
    assert len(lines) < 8 and " ".join(lines).replace("   ", " ").endswith(
        "and 18 more: it is never called"
    )


# What is selected


def test_a_selection_by_is_norm(getkey):
    model = eqx.nn.Sequential([LINEAR(3, 3, key=getkey()), LayerNorm(3), eqx.nn.LayerNorm(3)])
    run = lambda x: capture(lambda m, x: m(x), model, x, where=is_norm)[1]
    assert list(jax.eval_shape(run, jnp.ones(3))) == ["layers[1]", "layers[2]"]


def test_a_model_that_is_no_module(getkey):
    with refused(ValueError, "the second argument, the model, has none", "`equinox.Module`"):
        capture(LINEAR(3, 3, key=getkey()), jnp.ones(3), where=LINEAR)


# Activation functions


EXACT_GELU = lambda x: jax.nn.gelu(x, approximate=False)
NAMES = (
    *("relu", "relu6", "elu", "selu", "celu", "leaky_relu", "silu", "hard_silu", "gelu", "mish"),
    *("softplus", "sparse_plus", "squareplus", "log_sigmoid", "hard_tanh", "hard_sigmoid"),
    *("sparse_sigmoid", "soft_sign", "sigmoid", "tanh"),
)
PROGRAMS = {name: [(name, getattr(jax.nn, name))] for name in NAMES} | {
    "one after the other": [("gelu", jax.nn.gelu), ("tanh", jnp.tanh), ("gelu", EXACT_GELU)],
    "products": [(None, lambda x: x * (1 + jnp.tanh(x)) / 2 + 0.5 * x * x)],
    "an erfc": [(None, lambda x: 0.5 * x * jax.scipy.special.erfc(-x))],
    "softmax": [("softmax", jax.nn.softmax), (None, jax.nn.log_softmax)],
}


@pytest.mark.parametrize("name", few(PROGRAMS, ("one after the other", "products", "softmax")))
def test_which_functions_are_recognised(name):
    program = PROGRAMS[name]

    def run(x):
        for _, fn in program:
            x = fn(x)
        return x

    for dtype in (jnp.float32, jnp.bfloat16):
        jaxpr = jax.make_jaxpr(run)(jnp.ones((2, 3), dtype)).jaxpr
        found = [each for i in range(len(jaxpr.eqns)) if (each := recognised(jaxpr, i))]
        assert [activation.name for activation, _ in found] == [n for n, _ in program if n]


@pytest.mark.slow
@pytest.mark.parametrize("fn", [jax.nn.gelu, EXACT_GELU])
def test_a_gelu_has_a_row(fn, getkey):
    mlp = eqx.nn.MLP(4, 4, 8, 1, fn, key=getkey())
    mlp = eqx.tree_at(lambda m: m.layers[0].bias, mlp, jnp.full(8, -50.0).at[:2].set(0))
    found = diagnose(loss_fn, mlp, normal(getkey(), (32, 4)))
    [row] = [row for row in found.calls if row.is_function]
    assert row.name == "layers[0]:gelu" and row.statistics["dead"] == 0.75
    assert found.findings[0][:2] == ("dead", "layers[0]")


class Scaled(eqx.Module):
    weight: jax.Array

    def act(self, x):
        return jnp.tanh(self.weight * x)


@pytest.mark.slow
def test_functions_that_hold_arrays(getkey):
    """Of these no slope is known, but their rows are there."""
    acts = [eqx.nn.Lambda(eqx.nn.PReLU()), eqx.nn.Lambda(Scaled(jnp.ones(4)).act)]
    model = eqx.nn.Sequential([LINEAR(4, 4, key=getkey()), *acts])
    found = diagnose(loss_fn, model, normal(getkey(), (32, 4)))
    assert {"layers[1]", "layers[1].fn", "layers[2]"} <= {row.name for row in found.calls}


# Optimisers


OPTIMISERS = {
    "lbfgs": optax.lbfgs(),
    "polyak_sgd": optax.polyak_sgd(),
    "reduce_on_plateau": optax.chain(optax.sgd(0.01), optax.contrib.reduce_on_plateau()),
    "a small step": optax.chain(optax.sgd(1e-9), optax.contrib.reduce_on_plateau()),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMISERS)
def test_optimisers_that_need_the_loss(name, getkey):
    mlp, x = eqx.nn.MLP(4, 4, 8, 1, key=getkey()), normal(getkey(), (32, 4))
    optim = OPTIMISERS[name]
    params, static = eqx.partition(mlp, eqx.is_inexact_array)
    of_params = lambda params: loss_fn(eqx.combine(params, static), x)
    with jax.numpy_dtype_promotion("standard"):  # which Optax needs
        state = optim.init(params)
        value, grad = jax.value_and_grad(of_params)(params)
        more = {"value": value, "grad": grad, "value_fn": of_params}
        updates, _ = optim.update(grad, state, params, **more)
        found = diagnose(loss_fn, mlp, x, optimiser=(optim, state))
        watch = Watch(loss_fn, where=LINEAR, optimiser=optim)
        look = eqx.filter_jit(watch.measure)(mlp, x, opt_state=state)
    size = lambda x: np.sqrt(np.mean(np.square(np.float64(x))))
    for i, layer in enumerate(updates.layers):
        expected = size(layer.weight) / size(mlp.layers[i].weight)
        [row] = [row for row in found.parameters if row.path == f"layers[{i}].weight"]
        # A line search multiplies a gradient that another program has rounded otherwise.
        np.testing.assert_allclose(row.statistics["update_ratio"], expected, rtol=1e-3)
        np.testing.assert_allclose(look.params[row.path]["update_ratio"], expected, rtol=1e-3)
    raised = [finding for finding in found.findings if "raise" in finding.advice]
    assert len(raised) == (name == "a small step")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["polyak_sgd", "a small step"])
def test_optimisers_on_an_explicit_mesh(name, getkey):
    mlp, x = eqx.nn.MLP(4, 4, 8, 1, key=getkey()), normal(getkey(), (32, 4))
    optim = OPTIMISERS[name]
    with jax.numpy_dtype_promotion("standard"):
        optimiser = optim, optim.init(eqx.filter(mlp, eqx.is_inexact_array))
        expected = diagnose(loss_fn, mlp, x, optimiser=optimiser)
        with jax.set_mesh(jax.make_mesh((4,), ("batch",))):
            sharded = jax.device_put(x, jax.P("batch"))
            found = diagnose(loss_fn, mlp, sharded, optimiser=optimiser)
    assert [f[:2] for f in found.findings] == [f[:2] for f in expected.findings]
    for a, b in zip(found.parameters, expected.parameters, strict=True):
        ratios = a.statistics["update_ratio"], b.statistics["update_ratio"]
        np.testing.assert_allclose(*ratios, rtol=1e-3)


# Arrays


@pytest.mark.slow
def test_lapack_is_given_no_nan(capfd):
    assert np.isnan(effective_rank(jnp.full((4, 4), jnp.nan)))
    assert capfd.readouterr().err == ""


@pytest.mark.slow
@pytest.mark.skipif(
    sys.version_info < (3, 12), reason="the extra `test` has Quax from Python 3.12 on"
)
@pytest.mark.parametrize("allow", [True, False])
def test_parameters_that_quax_traces_as_one_array(allow, getkey):
    import quax
    from quax.examples import lora

    mlp, x = eqx.nn.MLP(4, 4, 8, 1, use_bias=False, key=getkey()), normal(getkey(), (32, 4))
    model = lora.loraify(mlp, rank=2, key=getkey(), allow_materialise=allow)
    fn = lambda model, x: jax.vmap(quax.quaxify(model))(x)
    _, values = capture(fn, model, x, where=LINEAR)
    _, expected = capture(lambda m, x: jax.vmap(m)(x), mlp, x, where=LINEAR)
    assert list(values) == list(expected)
    for key, value in values.items():  # The second factor starts as zeros.
        np.testing.assert_allclose(value, expected[key], rtol=1e-5, atol=1e-6)
    loss = lambda model, x: jnp.mean((fn(model, x) - x) ** 2)
    rows = [row.name for row in diagnose(loss, model, x).calls if row.type == "Linear"]
    assert rows == ["layers[0]", "layers[1]"]
