"""Watch: statistics while a model trains, and the figure of them.

Oracles: NumPy on the arrays that `capture_grads` returns, a step of gradient descent by hand.
"""

from collections import OrderedDict
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from draws import normal, seed
from oracles import ulps
from refused import refused

from eqx_norms.diagnostics import Look, Watch, capture_grads
from eqx_norms.diagnostics._watch._look import EDGES
from eqx_norms.diagnostics._watch._plot import courses, percentiles, spaced
from eqx_norms.diagnostics._watch._watch import _counts, stacked

EPS = 2.0**-23
RATE = 0.1


@pytest.fixture(autouse=True)
def optax_promotes():
    with jax.numpy_dtype_promotion("standard"):
        yield


def loss_fn(model, x):
    return jnp.mean(jax.vmap(model)(x) ** 2)


def network(getkey, layers):
    layers = [eqx.nn.Linear(5, 5, key=getkey()) for _ in range(layers)]
    layers[1] = eqx.nn.Lambda(lambda x: x.at[:2].set(0))  # two dead units of five
    return eqx.nn.Sequential(layers)


@pytest.fixture
def model(getkey):
    return network(getkey, 3)


WATCH = Watch(loss_fn, where=(eqx.nn.Linear, eqx.nn.Lambda), optimiser=optax.sgd(RATE))
OPT_STATE = WATCH.optimiser.init({})
measure = eqx.filter_jit(WATCH.measure)


def test_a_look_is_what_numpy_finds(model, getkey):
    x = normal(getkey(), (40, 5))
    look = measure(model, x, opt_state=OPT_STATE)
    loss, values, grads, model_grads = eqx.filter_jit(capture_grads)(
        loss_fn, model, x, where=WATCH.where
    )
    rtol = ulps(x.size) * EPS
    np.testing.assert_allclose(look.loss, loss, rtol=rtol)
    assert list(look.values) == [f"layers[{i}]" for i in range(3)] == list(look.grads)
    for measured, arrays in ((look.values, values), (look.grads, grads)):
        for key, found in measured.items():
            exact = np.float64(arrays[key])
            # Two programs: as many roundings again, in each of three layers and back.
            tolerance = {"rtol": 6 * rtol}
            np.testing.assert_allclose(found["rms"], np.sqrt(np.mean(exact**2)), **tolerance)
            np.testing.assert_allclose(found["largest"], np.abs(exact).max(), **tolerance)
            assert found["counts"].sum() == exact.size and found["non_finite"] == 0
    assert look.values["layers[1]"]["dead"] == np.float32(0.4)
    silent = look.grads["layers[0]"]["silent"]
    assert silent == np.float32(0.4)  # what comes after them takes no notice of two units
    assert look.values["layers[0]"]["dead"] == silent

    for i in (0, 2):
        found = look.params[f"layers[{i}].weight"]
        weight, grad = model.layers[i].weight, model_grads.layers[i].weight
        norms = [np.linalg.norm(np.float64(a)) for a in (weight, grad)]
        np.testing.assert_allclose(found["rms"], norms[0] / 5, rtol=rtol)
        np.testing.assert_allclose(found["grad_rms"], norms[1] / 5, rtol=6 * rtol)
        np.testing.assert_allclose(found["update_ratio"], RATE * norms[1] / norms[0], rtol=6 * rtol)


@pytest.mark.slow
def test_a_look_compiles_itself(model, getkey):
    """Where nothing is traced; else it is part of the program around, with or without arguments."""
    traced = []

    def counted(model, x):
        traced.append(x)
        return loss_fn(model, x)

    watch = Watch(counted, where=WATCH.where)
    x = normal(getkey(), (40, 5))
    look = watch.measure(model, x)
    count = len(traced)
    watch.measure(model, 2 * x)
    assert len(traced) == count
    as_argument = eqx.filter_jit(watch.measure)(model, x)
    for other in (as_argument, jax.jit(partial(watch.measure, model, x))()):
        # Three programs, of three layers and back.
        rtol = 6 * ulps(x.size) * EPS
        for name in look.values:
            for of, same in ((look.values, other.values), (look.grads, other.grads)):
                np.testing.assert_allclose(of[name]["rms"], same[name]["rms"], rtol=rtol)


def test_jit_keeps_the_order_of_the_calls(getkey):
    """It sorts dictionaries, "layers[10]" before "layers[2]"."""
    look = eqx.filter_eval_shape(
        measure, network(getkey, 11), jnp.ones((4, 5)), opt_state=OPT_STATE
    )
    assert list(look.values) == list(look.grads) == [f"layers[{i}]" for i in range(11)]
    assert list(look.params)[-1] == "layers[10].bias"


def test_counts_are_those_of_numpy(getkey):
    """Of what is not finite none; entries between two bins, as -1/2 is, are with the larger."""
    x = normal(getkey(), (50, 7)) * 10.0 ** normal(getkey(), (50, 7))
    largest = jnp.max(jnp.abs(x))
    counts = _counts(x, largest)
    # Those within a rounding of an edge may be on its other side.
    assert np.sum(np.abs(counts - np.histogram(np.float64(x), EDGES * float(largest))[0])) <= 4
    assert counts.sum() == x.size
    at = jnp.array([1, -1, 0.5, -0.5, 0, jnp.nan, jnp.inf])
    [places] = np.nonzero(_counts(at, jnp.ones(())))
    np.testing.assert_array_equal(EDGES[places], [-1, -(2**-0.75), -(2.0**-16), 0.5, 2**-0.25])
    assert _counts(jnp.zeros(3), jnp.zeros(()))[len(EDGES) // 2 - 1] == 3


@pytest.mark.parametrize("q", [(16, 50, 84), (2, 98)])
def test_percentiles_of_a_histogram(q):
    rng = np.random.default_rng(seed(0))
    draws = rng.normal(size=4000), rng.exponential(size=4000) ** 3, rng.normal(size=4000) - 5
    largest = np.array([np.abs(x).max() for x in draws])
    counts = np.stack(
        [np.histogram(x / size, EDGES)[0] for x, size in zip(draws, largest, strict=True)]
    )
    found = percentiles(counts, largest, q)
    for column, (x, size) in enumerate(zip(draws, largest, strict=True)):
        exact = np.percentile(x, q)
        # Each is in the right bin, or next to it: two of a fourth of a doubling.
        bound = np.maximum((2**0.5 - 1) * np.abs(exact), 2 * size * 2.0**-16)
        assert (np.abs(found[:, column] - exact) <= bound).all()
    nothing = percentiles(np.zeros((1, len(EDGES) - 1), int), np.array([np.nan]), q)
    assert np.isnan(nothing).all()


@pytest.mark.slow
def test_in_a_scan_and_under_vmap(model, getkey):
    xs = normal(getkey(), (3, 2, 10, 5))
    params, static = eqx.partition(model, eqx.is_array)

    def train(params, xs):
        def step(params, x):
            model = eqx.combine(params, static)
            look = WATCH.measure(model, x, opt_state=OPT_STATE)
            grads = eqx.filter_grad(loss_fn)(model, x)
            return eqx.apply_updates(params, jax.tree.map(lambda g: -RATE * g, grads)), look

        return jax.lax.scan(step, params, xs)

    _, looks = jax.jit(jax.vmap(train, in_axes=(None, 1)))(params, xs)
    assert looks.loss.shape == (2, 3)
    assert looks.values["layers[2]"]["counts"].shape == (2, 3, len(EDGES) - 1)
    one = jax.tree.map(lambda leaf: leaf[1], looks)
    first = measure(model, xs[0, 1], opt_state=OPT_STATE)
    # The same operations, fused differently; the largest entry decides the bins of all.
    np.testing.assert_allclose(one.loss[0], first.loss, rtol=100 * EPS)
    weight = "layers[0].weight"
    np.testing.assert_allclose(
        one.params[weight]["update_ratio"][0], first.params[weight]["update_ratio"], rtol=1e-4
    )
    assert one.loss[-1] < one.loss[0]
    history = [jax.tree.map(lambda leaf: leaf[i], one) for i in range(3)]  # noqa: B023
    for a, b in zip(jax.tree.leaves(stacked(history)), jax.tree.leaves(stacked(one)), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_layers_in_a_scan_are_measured_one_by_one(getkey):
    stack = eqx.filter_vmap(lambda key: eqx.nn.Linear(5, 5, key=key))(jr.split(getkey(), 3))

    def loss(stack, x):
        arrays, static = eqx.partition(stack, eqx.is_array)
        step = lambda x, layer: (jnp.tanh(jax.vmap(eqx.combine(layer, static))(x)), None)
        return jnp.mean(jax.lax.scan(step, x, arrays)[0] ** 2)

    x = normal(getkey(), (40, 5))
    look = eqx.filter_jit(Watch(loss, where=eqx.nn.Linear).measure)(stack, x)
    _, values, *_ = capture_grads(loss, stack, x, where=eqx.nn.Linear)
    rms = np.sqrt(np.mean(np.square(np.float64(values[""])), (1, 2)))
    np.testing.assert_allclose(look.values[""]["rms"], rms, rtol=ulps(200) * EPS)
    assert "update_ratio" not in look.params["weight"]
    assert [c.name for c in courses(stacked([look]).values)] == ["[0]", "[1]", "[2]"]


@pytest.mark.slow
def test_trees_integers_and_bfloat16(getkey):
    class Odd(eqx.Module):
        weight: jax.Array

        def __call__(self, x):
            return {"x": self.weight * x, "index": jnp.argmax(x)}

    odd = Odd(jnp.ones((), jnp.bfloat16))
    loss = lambda odd, x: jnp.sum(odd(x)["x"]).astype(jnp.float32)
    look = Watch(loss, where=Odd).measure(odd, normal(getkey(), (4,), jnp.bfloat16))
    assert list(look.values) == ["['x']"] and list(look.params) == ["weight"]
    assert look.values["['x']"]["rms"].dtype == jnp.float32


# The figure


def lines(ax):
    return [np.asarray(line.get_ydata()) for line in ax.lines]


def made_up(looks, names=("layers[0]", "layers[1]")):
    """Looks at outputs that are 1 and derivatives of 2^-step, with an update of 2^-step / 8."""
    where = np.argmax(EDGES[1:] >= 1)
    counts = np.zeros((looks, len(EDGES) - 1), np.int32)
    counts[:, where] = 7
    falling = 2.0 ** -np.arange(looks)
    one = {"counts": counts, "largest": np.ones(looks), "rms": np.ones(looks), "dead": falling}
    values = OrderedDict((name, one) for name in names)
    grads = OrderedDict((name, one | {"rms": falling, "largest": falling}) for name in names)
    params = {f"{name}.weight": {"update_ratio": falling / 8} for name in names}
    zeros = {f"{name}.bias": {"update_ratio": np.full(looks, np.inf)} for name in names}
    return Look(falling, values, grads, params | zeros)


def test_the_figure_has_what_was_measured():
    figure = WATCH.plot(made_up(4), every=50)
    *layers, loss, dead, gradient, update = figure.axes
    assert len(layers) == 4
    steps, falling = 50 * np.arange(4), 2.0 ** -np.arange(4)
    for ax in (loss, dead, gradient):
        for line in ax.lines:
            np.testing.assert_array_equal(line.get_xdata(), steps)
            np.testing.assert_array_equal(line.get_ydata(), falling)
    *ratios, _ = lines(update)
    for ratio in ratios:
        np.testing.assert_array_equal(ratio, falling / 8)  # without the infinity of the bias
    for ax, size in zip(layers, (1, falling, 1, falling), strict=True):
        [median] = lines(ax)
        # Spread over the uppermost bin, of which the middle is 8% below its end.
        np.testing.assert_allclose(median, (1 + 2**-0.25) / 2 * size, rtol=1e-12)
    assert layers[0].get_ylabel() == "layers[0]"


@pytest.mark.slow
def test_many_layers_histograms_and_a_single_look():
    look = made_up(1, [f"layers[{i}]" for i in range(12)])
    figure = WATCH.plot(look, layers=3)
    assert [ax.get_ylabel() for ax in figure.axes[:6:2]] == ["layers[0]", "layers[6]", "layers[11]"]
    figure.canvas.draw()
    WATCH.plot(made_up(3), histograms=True).canvas.draw()
    assert spaced(12, 3) == [0, 6, 11] and spaced(2, 3) == [0, 1] and spaced(5, 1) == [0]


@pytest.mark.slow
def test_a_run_that_blows_up_is_drawn(model, getkey):
    x = normal(getkey(), (40, 5))
    broken = eqx.tree_at(lambda m: m.layers[2].weight, model, jnp.full((5, 5), jnp.nan))
    looks = [measure(m, x, opt_state=OPT_STATE) for m in (model, broken)]
    assert looks[1].values["layers[2]"]["non_finite"] == 1
    assert looks[1].values["layers[0]"]["non_finite"] == 0
    for histograms in (False, True):
        WATCH.plot(looks, histograms=histograms).canvas.draw()


# Errors


def test_what_is_refused(model):
    x = jnp.ones((3, 5))
    with refused(ValueError, "state of the optimiser", "opt_state=opt_state"):
        WATCH.measure(model, x)
    with refused(ValueError, "state of the optimiser"):
        Watch(loss_fn, where=eqx.nn.Linear).measure(model, x, opt_state=OPT_STATE)
    with refused(ValueError, "at least one look"):
        WATCH.plot([])
    with refused(ValueError, "at one model"):
        WATCH.plot([made_up(1), made_up(1, ("a",))])
    seeds = jax.tree.map(lambda leaf: leaf[None], made_up(3))
    with refused(ValueError, "one after the other", "(1, 3)"):
        WATCH.plot(seeds)
    with pytest.raises(TypeError, match="floating-point scalar"):
        Watch(lambda m, x: jax.vmap(m)(x), where=eqx.nn.Linear).measure(model, x)
