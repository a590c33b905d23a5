"""diagnose: the zoo of sick and healthy models, and its figures against capture_grads and NumPy.

What a sick model must have is a finding of its illness at its place; others, which follow from it,
may be there too. A healthy one has none.
"""

import diagnosis_architectures
import diagnosis_models
import diagnosis_more
import diagnosis_zoo as zoo
import draws
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import optax
import pytest
from draws import normal
from refused import refused
from slow import few, slow

from eqx_norms.diagnostics import capture_grads, diagnose
from eqx_norms.diagnostics._diagnose._numbers import of_parameter
from eqx_norms.diagnostics._diagnose._scores import of_scores, pooled

# The cheapest; one more is in `test_under_debug_nans`, another in `test_plot`.
QUICK_SICK = ("the_sum_of_a_norm",)


# Of those in `diagnosis_more` a few that compile soon: `python -m benchmarks.diagnosis --states`
# asks them all, in every state.
SOON = ("clip_with_its_temperature", "deep_sets", "hypernetwork", "actions_that_are_forbidden")
ASKED = [
    name
    for name, make in zoo.HEALTHY.items()
    if make.__module__ != "diagnosis_more" or name in SOON
]


@pytest.fixture(autouse=True)
def as_their_owners_have_it():
    """The models of the zoo, and Optax, promote ranks and dtypes."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def of(case):
    return diagnose(case.loss_fn, case.model, *case.args, **case.options)


@pytest.mark.parametrize("name", few(zoo.SICK, QUICK_SICK))
def test_sick(name, getkey):
    case = zoo.SICK[name](getkey())
    found = of(case).findings
    assert {(finding.kind, finding.where) for finding in found} & set(case.illness), found


@pytest.mark.slow  # but for the one in `test_nothing_found_is_one_line`
@pytest.mark.parametrize("name", ASKED)
def test_healthy(name, getkey):
    """Each in one state, and with the next `--draw` in the next one: all four take too long."""
    which = draws.shift + [*zoo.HEALTHY].index(name)
    state = [*zoo.STATES][which % len(zoo.STATES)]
    found = of(zoo.STATES[state](zoo.HEALTHY[name](getkey()))).findings
    assert found == (), state


BATCHES = [("decoder", 1), ("convnet", 255), ("gru_language_model", 256), ("shifted_deltas", 256)]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "batch"), BATCHES)
def test_healthy_in_batches_of_any_size(name, batch, getkey, monkeypatch):
    for module in (zoo, diagnosis_models, diagnosis_architectures, diagnosis_more):
        monkeypatch.setattr(module, "BATCH", batch)
    assert of(zoo.HEALTHY[name](getkey())).findings == ()


# Which example, which step


class Roots(eqx.Module):
    """One root in a scan over the steps of a sequence, forwards or backwards."""

    root: eqx.nn.Lambda
    reverse: bool = eqx.field(static=True)

    def __call__(self, x):
        return jax.lax.scan(lambda c, x: (c, self.root(x)), 0.0, x, reverse=self.reverse)[1]


@pytest.mark.parametrize("reverse", [False, slow(True)])
def test_which_example_and_step_is_nan_first(reverse):
    """Examples 3 and 5 of 7 are NaN from step 2 of 4 on, and 5 alone in step 3, by hand."""
    x = jnp.ones((7, 4)).at[jnp.array([3, 5]), 2].set(-1).at[5, 3].set(-1)
    model, sums = Roots(eqx.nn.Lambda(jnp.sqrt), reverse), lambda m, x: jax.vmap(m)(x).sum()
    [finding] = diagnose(sums, model, x).findings
    assert finding[:2] == ("non-finite", "root")
    # In reverse the last step is the first.
    step, example, bad = ((3,), (5,), 1) if reverse else ((2,), (3,), 2)
    assert (finding.step, finding.example) == (step, example)
    assert round(7 * finding.share) == bad
    words = f"First in step {step[0]}, in example {example[0]}; {bad} of 7 examples."
    assert words in finding.advice


@pytest.mark.slow
@pytest.mark.parametrize("reverse", [False, True])
def test_which_step_is_nan_first_in_the_backward(reverse):
    """Steps 1 and 2 of example 3 are: the backward pass goes through a loop in the other order."""
    x = jnp.ones((5, 4)).at[3, 1].set(0).at[3, 2].set(0)
    model = Roots(eqx.nn.Lambda(lambda x: jnp.sqrt(x) ** 2), reverse), jnp.ones(())
    sums = lambda m, x: jax.vmap(m[0])(m[1] * x).sum()
    finding = diagnose(sums, model, x).findings[0]
    assert finding[:2] == ("non-finite", "[0].root")
    assert (finding.step, finding.example, round(5 * finding.share)) == (
        (1 + (not reverse),),
        (3,),
        1,
    )


@pytest.mark.slow
def test_which_example_is_nan_in_the_backward_and_in_the_data():
    """The root of 0 is 0, and its slope is infinite: times 0, of the square behind it, NaN."""
    x = jnp.ones((2, 3, 5)).at[1, 0, 4].set(0).at[1, 2, 0].set(0)
    linear = eqx.nn.Linear(5, 5, use_bias=False, key=jr.key(0))
    linear = eqx.tree_at(lambda linear: linear.weight, linear, jnp.eye(5))
    model = linear, eqx.nn.Lambda(lambda x: jnp.sqrt(x) ** 2)
    sums = lambda m, x: jax.vmap(jax.vmap(lambda x: m[1](m[0](x))))(x).sum()
    [finding] = diagnose(sums, model, x).findings
    assert finding[:2] == ("non-finite", "[1]")
    assert (finding.example, round(6 * finding.share)) == ((1, 0), 2)
    assert finding.advice.endswith("First in example (1, 0); 2 of 6 examples.")
    [finding] = diagnose(sums, model, x.at[1, 1, 2].set(jnp.nan)).findings[:1]
    assert finding.where == "args"
    assert "First in `args[0]` at [1, 1, 2]; 1 of 2 along its first axis." in finding.advice


# The figures


class Net(eqx.Module):
    first: eqx.nn.Linear
    act: eqx.nn.Lambda
    second: eqx.nn.Linear
    last: eqx.nn.Linear

    def __init__(self, key):
        one, two, three = jr.split(key, 3)
        self.first = eqx.nn.Linear(6, 5, key=one)
        self.act = eqx.nn.Lambda(jnp.tanh)
        self.second = eqx.nn.Linear(5, 3, key=two)
        self.last = eqx.nn.Linear(3, 2, key=three)

    def __call__(self, x):
        return self.last(jax.nn.relu(self.second(self.act(4 * self.first(x)))))


def loss_fn(model, x):
    return jnp.mean(jax.vmap(model)(x) ** 2)


@pytest.mark.slow
def test_rows_are_what_capture_grads_gives(getkey):
    model, x = Net(getkey()), normal(getkey(), (40, 6))
    optim = optax.sgd(0.5)
    found = diagnose(loss_fn, model, x, optimiser=(optim, optim.init(model)))
    loss, values, grads, model_grads = capture_grads(
        loss_fn, model, x, where=lambda path, module: True
    )
    np.testing.assert_allclose(found.loss, loss, rtol=1e-5)
    assert [row.name for row in found.calls] == [
        "",
        "first",
        "act",
        "second",
        "second:relu",
        "last",
    ]
    types = ["Net", "Linear", "Lambda", "Linear", "relu", "Linear"]
    assert [row.type for row in found.calls] == types
    by_name = {row.name: row for row in found.calls}
    for path, value in values.items():
        row = by_name[path]
        exact, grad = np.asarray(value, np.float64), np.asarray(grads[path], np.float64)
        assert (row.shape, row.dtype) == (value.shape, "float32")
        expected = {
            "mean": exact.mean(),
            "std": exact.std(),
            "rms": np.sqrt(np.mean(exact**2)),
            "largest": np.abs(exact).max(),
            "grad_rms": np.sqrt(np.mean(grad**2)),
            "grad_silent": np.mean((grad == 0).all(0)),
        }
        for name, number in expected.items():
            # Two programs of some ten roundings each, on sums of 200 terms.
            np.testing.assert_allclose(row.statistics[name], number, rtol=1e-4, atol=1e-6)
    slope = 1 - np.tanh(4 * np.asarray(values["first"], np.float64)) ** 2
    near = np.mean(np.abs(slope - 0.1) < 1e-4)  # what rounding may put on either side
    assert abs(by_name["act"].statistics["saturated"] - np.mean(slope < 0.1)) <= near + 1e-6
    silent = (np.asarray(values["second"]) <= 0).all(axis=0)
    np.testing.assert_allclose(by_name["second:relu"].statistics["dead"], silent.mean(), rtol=1e-6)
    for row in found.parameters:
        layer, name = row.path.split(".")
        param, grad = (np.float64(getattr(getattr(m, layer), name)) for m in (model, model_grads))
        size, step = np.sqrt(np.mean(param**2)), np.sqrt(np.mean(grad**2))
        np.testing.assert_allclose(row.statistics["rms"], size, rtol=1e-5)
        np.testing.assert_allclose(row.statistics["grad_rms"], step, rtol=1e-4)
        np.testing.assert_allclose(row.statistics["update_ratio"], 0.5 * step / size, rtol=1e-4)


@pytest.mark.slow
def test_a_scan_has_a_row_for_each_step(getkey):
    case = zoo.no_residuals_in_a_scan(getkey())
    found = of(case)
    rows = [row for row in found.calls if row.path == "layers" and not row.is_function]
    assert [row.name for row in rows] == [f"layers{{{i}}}" for i in range(24)]
    h = case.args[0]
    for i, row in enumerate(rows):
        layer = jax.tree.map(lambda leaf: leaf[i], case.model.layers)  # noqa: B023
        value = jax.vmap(layer)(h)
        assert row.shape == value.shape
        np.testing.assert_allclose(row.statistics["rms"], jnp.sqrt(jnp.mean(value**2)), rtol=1e-3)
        h = jnp.tanh(value)
    assert "layers{i} x24" in str(found)
    assert ("vanishing gradient", "layers") in {f[:2] for f in found.findings}


class Loops(eqx.Module):
    inside: eqx.nn.Linear
    outside: eqx.nn.Linear
    unused: eqx.nn.Linear

    def __call__(self, x):
        looped = jax.lax.while_loop(
            lambda c: c[0] < 3, lambda c: (c[0] + 1, self.inside(c[1])), (0, x)
        )[1]
        return self.outside(x + jax.lax.stop_gradient(looped))


@pytest.mark.slow
def test_what_is_refused_is_listed_and_the_rest_is_there(getkey):
    layers = [eqx.nn.Linear(4, 4, key=getkey()) for _ in range(3)]
    found = diagnose(loss_fn, Loops(*layers), normal(getkey(), (20, 4)))
    assert found.not_looked_at == {
        "inside": "it is called inside `while`",
        "unused": "it is never called",
    }
    assert [row.name for row in found.calls] == ["", "outside"]
    assert [finding[:2] for finding in found.findings] == [
        ("no gradient", "inside"),
        ("no gradient", "unused"),
    ]
    assert "not looked at: inside: it is called inside `while`" in str(found)


@pytest.mark.slow
def test_a_branch_that_is_not_taken_is_not_nan(getkey):
    layers = [eqx.nn.Linear(4, 4, key=getkey()) for _ in range(2)]

    def branches(layers, x, first):
        one, two = (jax.vmap(layer) for layer in layers)
        return jnp.mean(jax.lax.cond(first, one, two, x) ** 2)

    x = normal(getkey(), (20, 4))
    found = diagnose(branches, layers, x, jnp.asarray(True))
    assert found.not_looked_at == {"[1]": "its branch was not taken"}
    assert [row.name for row in found.calls] == ["[0]"]
    assert [finding[:2] for finding in found.findings] == [("no gradient", "[1]")]


@pytest.mark.slow
def test_a_taken_branch_may_be_nan_and_what_is_no_branch_is_always_taken(getkey):
    model = eqx.nn.MLP(4, 4, 8, 1, key=getkey())
    x = normal(getkey(), (20, 4)) * jnp.nan
    found = diagnose(lambda model, x: jnp.mean(jax.vmap(model)(x)), model, x)
    assert found.not_looked_at == {}
    assert [finding[:2] for finding in found.findings] == [("non-finite", "args")]


@pytest.mark.slow
def test_a_nan_where_nothing_can_be_looked_at(getkey):
    """The finding says what was not looked at."""

    def loss(model, x):
        looped = jax.lax.while_loop(
            lambda c: c[0] < 3, lambda c: (c[0] + 1, jnp.log(-(model(c[1]) ** 2))), (0, x)
        )[1]
        return jnp.sum(jax.lax.stop_gradient(looped)) + jnp.sum(model.weight**2)

    found = diagnose(loss, eqx.nn.Linear(4, 4, key=getkey()), normal(getkey(), (4,)))
    [finding] = found.findings
    assert finding[:2] == ("non-finite", "loss_fn")
    assert "Or in what was not looked at: ''" in finding.advice


@pytest.mark.slow
@pytest.mark.parametrize("count", [0, 1000])
def test_the_ends_of_a_schedule_are_no_finding(count, getkey):
    """Of a warm-up the first step is small on purpose, and of a decay the last."""
    case = zoo.plain_mlp(getkey())
    rate = optax.warmup_cosine_decay_schedule(1e-9, 1e-2, 100, 1000, 1e-9)
    optim = optax.sgd(rate)
    state = jax.tree.map(lambda x: jnp.full_like(x, count), optim.init(zoo.weights(case.model)))
    assert of(case._replace(options={"optimiser": (optim, state)})).findings == ()


@pytest.mark.slow
def test_a_rate_that_is_far_too_small_is_one_finding(getkey):
    case = zoo.plain_mlp(getkey())
    optim = optax.sgd(1e-9)
    options = {"optimiser": (optim, optim.init(zoo.weights(case.model)))}
    [finding] = of(case._replace(options=options)).findings
    assert finding.kind == "update ratio" and "raise the learning rate" in finding.advice


@pytest.mark.slow
def test_a_step_that_only_accumulates_is_no_finding(getkey):
    """Nor one of a warm-up from zero: another step moves the parameters."""
    case = zoo.plain_mlp(getkey())
    rate = optax.linear_schedule(0.0, 1e-3, 100)
    optim = optax.MultiSteps(optax.adam(rate), 5)
    options = {"optimiser": (optim, optim.init(zoo.weights(case.model)))}
    assert of(case._replace(options=options)).findings == ()


def test_what_does_no_harm_in_a_model_that_has_learnt(getkey):
    """Its targets are its own outputs, all but exactly. With others, 14 of 16 units are missed."""
    model, x = eqx.nn.MLP(4, 3, 16, 1, key=getkey()), normal(getkey(), (32, 4))
    bias = model.layers[0].bias.at[:14].set(-20.0)
    model = eqx.tree_at(lambda m: m.layers[0].bias, model, bias)
    y, optim = jax.vmap(model)(x), optax.sgd(1e-6)
    loss = lambda model, x, y: jnp.mean((jax.vmap(model)(x) - y) ** 2)
    found = [
        diagnose(loss, model, x, target, optimiser=(optim, optim.init(zoo.weights(model)))).findings
        for target in (y + 1e-3, y + normal(getkey(), y.shape))
    ]
    assert [{finding.kind for finding in each} for each in found] == [
        set(),
        {"dead", "update ratio"},
    ]


@pytest.mark.slow
def test_the_actions_of_an_actor_may_be_at_their_limits(getkey):
    """A critic reads them: as outputs of a network they are not judged, its hidden units are."""
    actor = eqx.nn.MLP(4, 2, 16, 1, jnp.tanh, jnp.tanh, key=getkey())
    critic = eqx.nn.MLP(2, "scalar", 16, 1, key=getkey())
    values = lambda models, x: -jnp.mean(jax.vmap(lambda x: models[1](models[0](x)))(x))
    x, last = normal(getkey(), (32, 4)), lambda m: m.layers[1].weight
    sharp = eqx.tree_at(last, actor, replace_fn=lambda w: 1e3 * w)
    found = diagnose(values, (sharp, critic), x)
    assert "saturated" not in {finding.kind for finding in found.findings}
    [share] = [
        row.statistics["saturated"] for row in found.calls if row.name == "[0].layers[1]:tanh"
    ]
    assert share > 0.9
    blunt = eqx.tree_at(lambda m: m.layers[0].weight, actor, replace_fn=lambda w: 1e3 * w)
    kinds = {finding[:2] for finding in diagnose(values, (blunt, critic), x).findings}
    assert ("saturated", "[0].layers[0]") in kinds


@pytest.mark.slow
@pytest.mark.parametrize("mask", [None, -1e9, -jnp.inf])
def test_a_mask_saturates_no_softmax(mask, getkey):
    """In the first row it leaves one score. By hand: of rows 1 to 3 all that are 100 apart do."""
    scores = normal(getkey(), (4, 4))
    if mask is not None:
        scores = jnp.where(jnp.tril(jnp.ones((4, 4), bool)), scores, mask)
    saturated = lambda x: pooled(np.asarray(of_scores(x, -1)[None]), x.shape, -1)["saturated"]
    assert saturated(scores) == 0
    assert saturated(scores.at[2, 1].set(100.0)) == (1 / 3 if mask is not None else 1 / 4)


@pytest.mark.slow
def test_the_variance_of_a_batch_norm_is_no_activation(getkey):
    found = of(zoo.HEALTHY["resnet_batch_norm"](getkey()))
    names = [row.name for row in found.calls if row.is_function]
    blocks = [f"blocks[{i}].{norm}:relu" for i in range(3) for norm in ("bn1", "bn2")]
    assert names == ["bn:relu", *blocks]


@pytest.mark.slow
def test_a_nan_in_a_shard_map_is_said_to_be_in_what_was_not_looked_at(getkey):
    [finding] = of(zoo.SICK["a_log_of_less_than_zero_in_a_shard_map"](getkey())).findings
    assert finding.advice.endswith("Or in what was not looked at: '', 'linear'.")


@pytest.mark.slow
def test_the_last_bias_of_an_energy_is_no_finding(getkey):
    """Of a Hamiltonian network: its derivatives alone are in the loss."""
    energy, x = eqx.nn.MLP(2, "scalar", 16, 1, jnp.tanh, key=getkey()), normal(getkey(), (32, 2))
    loss = lambda energy, x: jnp.mean((jax.vmap(jax.grad(energy))(x) - x[:, ::-1]) ** 2)
    assert diagnose(loss, energy, x).findings == ()


@pytest.mark.slow
def test_outputs_in_large_units_do_not_grow(getkey):
    """The data are as large, so nothing has grown on the way."""

    class Frequencies(eqx.Module):
        mlp: eqx.nn.MLP

        def __call__(self, x):
            return 5e14 * self.mlp(x)

    model, x = Frequencies(eqx.nn.MLP(4, 1, 16, 1, key=getkey())), normal(getkey(), (32, 4))
    loss = lambda model, x, y: jnp.mean(((jax.vmap(model)(x) - y) / 5e14) ** 2)
    assert diagnose(loss, model, x, 5e14 * x[:, :1]).findings == ()


@pytest.mark.parametrize("used", [20, 5])
def test_rows_that_get_no_gradient_are_no_measure(used):
    """Of an embedding, those that the batch does not hold are as they were drawn."""
    rows = np.full((40, 3), 1e-3, np.float32)
    rows[:used] = 1.0
    grads = np.zeros_like(rows)
    grads[:used] = 1e-2
    found = of_parameter(jnp.asarray(rows), jnp.asarray(grads), 0)
    assert found["outlier"] == (1 if used == 20 else 0)
    rows[2] = 300
    found = of_parameter(jnp.asarray(rows), jnp.asarray(grads), 0)
    assert found["outlier"] == (300 if used == 20 else 0)  # of fewer than 8, none is told apart


@pytest.mark.parametrize("depth", [2, slow(20)])
def test_the_table_fits_a_terminal(depth, getkey):
    layers = [eqx.nn.Linear(4, 4, key=getkey()) for _ in range(depth)]
    model = {"a_path_that_is_longer_than_its_column_has_room_for": eqx.nn.Sequential(layers)}
    loss = lambda model, x: jnp.mean(jax.vmap(*model.values())(x) ** 2)
    found = diagnose(loss, model, normal(getkey(), (20, 4)))
    text = str(found)
    assert max(map(len, text.splitlines())) <= 88
    assert ("x20" in text) == (depth == 20)


@pytest.mark.slow
def test_scalars_are_flat_and_complete(getkey):
    model, x = Net(getkey()), normal(getkey(), (40, 6))
    found = diagnose(loss_fn, model, x)
    scalars = found.scalars()
    assert all(isinstance(number, float) for number in scalars.values())
    assert scalars["loss"] == found.loss
    assert scalars["first/rms"] == found.calls[1].statistics["rms"]
    assert scalars["first.weight/grad_rms"] == found.parameters[0].statistics["grad_rms"]
    count = sum(len(row.statistics) for row in (*found.calls, *found.parameters))
    assert len(scalars) == count + 2


def test_nothing_found_is_one_line(getkey):
    found = of(zoo.plain_mlp(getkey()))
    assert str(found).splitlines()[0].endswith("; nothing found in 6 calls, 6 parameters")


@pytest.mark.slow
def test_under_debug_nans(getkey):
    case = zoo.root_of_zero_in_the_backward(getkey())
    with jax.debug_nans(True):
        found = of(case)
    assert found.findings[0][:2] == ("non-finite", "length")


def test_bad_input(getkey):
    model, x = Net(getkey()), normal(getkey(), (40, 6))
    with refused(ValueError, "outside `jax.jit`", "`capture_grads`"):
        jax.jit(lambda x: diagnose(loss_fn, model, x))(x)
    with refused(TypeError, "pair of an optax optimiser", "`optimiser=(optim, opt_state)`"):
        diagnose(loss_fn, model, x, optimiser=optax.sgd(1.0).update)
    with refused(ValueError, "`classes` must be above 1, but it is 1"):
        diagnose(loss_fn, model, x, classes=1)
    with refused(TypeError, "one floating-point scalar"):
        diagnose(lambda model, x: jax.vmap(model)(x), model, x)
    with refused(ValueError, "`where` must match at least one"):
        diagnose(loss_fn, model, x, where=eqx.nn.GRUCell)


@pytest.mark.slow
def test_plot(getkey):
    matplotlib.use("Agg")
    found = of(zoo.a_stop_gradient_too_many(getkey()))
    figure = found.plot()
    outputs, derivatives, _, parameters = figure.axes
    names = [label.get_text() for label in outputs.get_yticklabels()]
    assert names == [row.name or "the model" for row in found.calls]
    red = [label.get_text() for label in parameters.get_yticklabels() if label.get_color() != "k"]
    assert [name for name in red if name.startswith("first")] == ["first.weight", "first.bias"]
    shown = derivatives.lines[0].get_xdata()
    expected = [row.statistics.get("grad_rms", np.nan) or np.nan for row in found.calls]
    np.testing.assert_array_equal(shown, expected)
    zeros = derivatives.lines[1].get_ydata()
    assert [names[i] for i in zeros] == ["first"]
    assert figure.get_suptitle() == f"loss {found.loss:.4g}; 1 finding, in red"
    plt.close(figure)
