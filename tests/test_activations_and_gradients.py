"""The studies of examples/activations_and_gradients.

Oracles: a network with its derivative written out in float64 NumPy, numpy's percentiles,
histograms and singular values, closed forms, and the numbers of the notebook.
"""

import functools as ft
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

from eqx_norms.diagnostics import activation_stats
from examples.activations_and_gradients import (
    _common as common,
    _plots as plots,
    _study as study,
    b_s_bias_and_directions as bias,
    d_data,
    e1_e2_e4_e5_inside as inside,
    e3_gain as gain,
    e6_update_ratios as e6,
    e7_activations as e7,
    e8_batch_norm as e8,
    e9_skips as e9,
    i_initialisation as initialisation,
    l_g_layer_norm_by_hand as layer_norm_by_hand,
)

ROOT = pathlib.Path(__file__).parent.parent


NAMES = ["ada", "grace", "barbara", "frances", "hedy"]
PAIRS = common.letter_pairs(NAMES)
RATE, GAIN = 0.5, 1.3


# ---- The oracle: [linear, LN or not, ReLU] blocks, a linear head, LN or not, cross-entropy.


def norm_forward(z, on):
    if not on:
        return z, None
    rstd = 1 / np.sqrt(z.var(1, keepdims=True) + 1e-5)
    xhat = (z - z.mean(1, keepdims=True)) * rstd
    return xhat, (xhat, rstd)


def norm_backward(dy, kept):
    if kept is None:
        return dy
    xhat, rstd = kept
    return rstd * (dy - dy.mean(1, keepdims=True) - xhat * (dy * xhat).mean(1, keepdims=True))


def oracle(embedding, weights, batch, norm):
    """The loss, what is seen on the way, and the derivatives of embedding and weights.

    Weight and bias of the norms are one and zero, biases of the linears zero.
    """
    contexts, letters = batch
    x = embedding[contexts].reshape(len(contexts), -1)
    tape, outputs, activations = [], [], []
    for i, w in enumerate(weights):
        z, kept = norm_forward(x @ w.T, norm)
        outputs.append(x @ w.T)
        tape.append((x, kept, z))
        x = np.maximum(z, 0) if i < len(weights) - 1 else z
        activations.append(x)
    shifted = x - x.max(1, keepdims=True)
    p = np.exp(shifted) / np.exp(shifted).sum(1, keepdims=True)
    loss = -np.log(p[np.arange(len(letters)), letters]).mean()

    g = (p - np.eye(p.shape[1])[letters]) / len(letters)
    dweights, gradients = [], []
    for i, (w, (x, kept, z)) in reversed([*enumerate(zip(weights, tape, strict=True))]):
        gradients.insert(0, g)
        g = g * (z > 0) if i < len(weights) - 1 else g
        g = norm_backward(g, kept)
        dweights.insert(0, g.T @ x)
        g = g @ w
    dembedding = np.zeros_like(embedding)
    np.add.at(dembedding, contexts, g.reshape(*contexts.shape, -1))
    return loss, (outputs, activations, gradients), dembedding, dweights


def parameters(network):
    """The embedding and the weights, in float64."""
    linears = [*(block.linear for block in network.blocks), network.head]
    return np.float64(network.embedding.weight), [np.float64(lin.weight) for lin in linears]


def make(norm="none", num_linear=2, **kwargs):
    architecture = common.Architecture(num_linear, norm, **kwargs)
    make = eqx.nn.make_with_state(common.make_network)
    network, state = make(architecture, len(PAIRS.vocabulary), jr.key(seed(0)))
    return common.with_gain(network, jnp.float32(GAIN)), state


def first_batch(count=16):
    return common.Batch(jnp.asarray(PAIRS.contexts[:count]), jnp.asarray(PAIRS.letters[:count]))


# ---- Data and model


def test_pairs_are_three_letters_and_the_next():
    pairs = common.letter_pairs(["ab", "b"])
    text = [pairs.vocabulary.decode(context) for context in pairs.contexts]
    assert text == ["...", "..a", ".ab", "...", "..b"]
    assert pairs.vocabulary.decode(pairs.letters) == "ab.b."


@pytest.mark.slow
def test_initial_weights_are_xavier_times_gain_and_no_two_layers_are_equal():
    network, _ = make(num_linear=4)
    _, weights = parameters(network)
    for w in weights:
        limit = GAIN * math.sqrt(6 / sum(w.shape))
        # Of 30 x 20 or more uniform draws, the largest is within 1% of the limit.
        assert 0.99 * limit < np.abs(w).max() <= limit
    assert len({w.tobytes() for w in weights}) == len(weights) == 6


@pytest.mark.slow
def test_batch_norm_is_over_the_batch():
    network, state = make("BN")
    batch = first_batch()
    # Running averages of another batch, which must not matter.
    other = common.Batch(batch.contexts[::-1] % 3, batch.letters)
    _, state = eqx.filter_jit(common.loss)(network, state, other)
    seen = eqx.filter_jit(common.activations_and_gradients)(network, state, batch, None)
    x = np.float64(seen["linear outputs"][0])
    y = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)
    np.testing.assert_allclose(
        seen["activations"][0], np.maximum(y, 0), atol=1e-5
    )  # of entries up to 4


@pytest.mark.slow
@pytest.mark.parametrize("skip", [True, False])
def test_a_block_of_zeros_passes_on_what_skips_pass_on(skip):
    network, state = make("LN", skip=skip)
    block = eqx.tree_at(lambda b: b.linear.weight, network.blocks[0], jnp.zeros((30, 30)))
    x = normal(jr.key(seed(1)), (30,))
    out, _ = block(x, state)
    np.testing.assert_array_equal(out, x if skip else 0)


@pytest.mark.slow
def test_pre_activation_normalises_first():
    network, state = make("LN", skip=False)
    x = 5 + normal(jr.key(seed(1)), (30,))
    out, _ = network.blocks[0](x, state)
    h, _ = norm_forward(np.float64(x)[None], True)
    want = np.maximum(h, 0) @ np.float64(network.blocks[0].linear.weight).T
    np.testing.assert_allclose(out[None], want, atol=1e-5)  # rounding, 30 terms
    assert network.first is not None and len(network.blocks) == 2


# ---- What is looked at


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["none", "LN"])
def test_captured_values_and_gradients_are_the_oracle_s(norm):
    network, state = make(norm)
    batch = first_batch()
    seen = eqx.filter_jit(common.activations_and_gradients)(network, state, batch, None)
    _, (outputs, activations, gradients), _, dweights = oracle(
        *parameters(network), [np.asarray(x) for x in batch], norm == "LN"
    )
    # Float32 rounding through three layers of 30; gradients are of the order of .01.
    for part, want, tolerance in (
        ("linear outputs", outputs, 1e-5),
        ("activations", activations, 1e-5),
        ("activation gradients", gradients, 2e-7),
        ("weight gradients", dweights, 2e-6),
    ):
        np.testing.assert_allclose(seen[part], np.stack(want[:-1]), atol=tolerance, err_msg=part)


@pytest.mark.slow
def test_update_ratios_are_rate_times_gradient_over_weight():
    network, state = make("LN")
    batch = first_batch()
    ratios = eqx.filter_jit(common.weight_update_ratios)(network, state, batch, optax.sgd(RATE))
    embedding, weights = parameters(network)
    *_, dweights = oracle(embedding, weights, [np.asarray(x) for x in batch], True)
    norm = np.linalg.norm
    want = [np.log10(RATE * norm(d) / norm(w)) for d, w in zip(dweights, weights, strict=True)]
    np.testing.assert_allclose(ratios, want, atol=2e-5)


@pytest.mark.slow
def test_direction_ratios_are_numpy_s_of_every_linear():
    network, state = make("none")
    batch = first_batch()
    ratios = eqx.filter_jit(common.direction_ratios)(network, state, batch, None)
    outputs = oracle(*parameters(network), [np.asarray(x) for x in batch], False)[1][0]
    singular = [np.linalg.svd(x, compute_uv=False) for x in outputs]
    np.testing.assert_allclose(ratios, [s[0] / s.sum() for s in singular], rtol=1e-5)


@pytest.mark.slow
def test_percentiles_histograms_and_dead_units_over_time(getkey):
    x = np.array(normal(getkey(), (3, 40, 8)))
    x[1, 2:, 3] = 0  # 38 of 40 is 95%: not dead yet
    x[2, 1:, 3] = 0
    bands = plots.percentile_bands(x)
    for look in range(3):
        want = activation_stats(x[look], (16, 50, 84)).percentiles
        np.testing.assert_allclose(bands[:, look], want, atol=1e-6)  # entries of size 1
    edges = np.linspace(-1, 1, 9, dtype=np.float32)
    counts = plots.histograms_over_time(x, edges)
    np.testing.assert_array_equal(counts.T, [np.histogram(look, edges)[0] for look in x])
    np.testing.assert_array_equal(plots.dead_over_time(x), np.float32([0, 0, 1 / 8]))


# ---- Training


def look_at_parameters(network, state, batch, optimiser):
    linears = [*(block.linear for block in network.blocks), network.head]
    return network.embedding.weight, [lin.weight for lin in linears], batch


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["none", "LN"])
def test_a_step_is_the_oracle_s(norm):
    runs = common.train(
        common.Architecture(2, norm),
        PAIRS,
        [(GAIN, RATE)],
        steps=2,
        seeds=1,
        every=1,
        look=look_at_parameters,
    )
    embeddings, weights, batch = jax.tree.map(lambda x: np.float64(x[0, 0]), runs.looks)
    batch = [x[0].astype(int) for x in batch]
    loss, _, dembedding, dweights = oracle(
        embeddings[0], [w[0] for w in weights], batch, norm == "LN"
    )
    assert runs.losses.shape == (1, 1, 2)
    np.testing.assert_allclose(runs.losses[0, 0, 0], loss, rtol=1e-5)
    # Rounding of weights of the order of .3.
    np.testing.assert_allclose(embeddings[1], embeddings[0] - RATE * dembedding, atol=1e-6)
    for w, dw in zip(weights, dweights, strict=True):
        assert np.abs(dw).max() > 1e-3
        np.testing.assert_allclose(w[1], w[0] - RATE * dw, atol=1e-6)


@pytest.mark.slow
def test_runs_together_are_runs_alone():
    configs = [(1.0, 0.1), (1.4, 0.5)]
    train = ft.partial(common.train, common.Architecture(1, "LN"), PAIRS, steps=6, every=3)
    together = train(configs, seeds=2)
    assert together.losses.shape == (2, 2, 6)
    for i, config in enumerate(configs):
        alone = train([config], seeds=1)
        # Not the same program, so not the same rounding; six steps magnify it.
        np.testing.assert_allclose(alone.losses[0, 0], together.losses[i, 0], rtol=1e-4)
    assert np.abs(together.losses[0, 0] - together.losses[0, 1]).min() > 1e-3
    # The seed stands for the batches too: the first losses differ by the gain alone.
    assert (together.losses[0] != together.losses[1]).all()


@pytest.mark.slow
def test_it_learns_and_batch_norm_s_state_goes_along():
    for norm in ("LN", "BN"):
        runs = common.train(
            common.Architecture(1, norm), PAIRS, [(1.4, 0.3)], steps=300, seeds=1, every=150
        )
        assert runs.losses[0, 0, 0] > 2.5 > 1.2 > runs.final[0, 0]


# ---- The studies without training


def test_slopes_are_flat_from_where_they_should_be():
    for name, (fn, notebook) in initialisation.NOTEBOOK_FLAT.items():
        np.testing.assert_allclose(initialisation.flat_from(fn), notebook, atol=1e-3, err_msg=name)
    # sech² x = .1, and selu's scale * alpha * exp(x) = .1
    np.testing.assert_allclose(initialisation.flat_from(jnp.tanh), [np.arccosh(10**0.5)], rtol=1e-9)
    selu = np.log(0.1 / (1.0507009873554805 * 1.6732632423543772))
    np.testing.assert_allclose(initialisation.flat_from(jax.nn.selu), [selu], rtol=1e-6)


@pytest.mark.slow
def test_spreads_at_initialisation():
    std = {name: float(x.std()) for name, x in initialisation.spreads(3).items()}
    # 20,000 weights: within 1%. 1000 x 100 inputs: 200,000 products share them.
    assert std["a library's weights"] == pytest.approx(1 / math.sqrt(300), rel=0.01)
    assert std["x w"] == pytest.approx(10, rel=0.03)
    assert std["x w / √n"] == pytest.approx(1, rel=0.03)
    assert std["tanh, gain 1"] == pytest.approx(0.6279, rel=0.03)  # by quadrature


def test_softmax_of_small_logits_is_flatter():
    sharp, flat = initialisation.softmax_bars(0).values()
    logits = np.log(sharp) - np.log(sharp).mean()
    assert float(logits.std()) == pytest.approx(1, rel=1e-5)
    np.testing.assert_allclose(flat, jax.nn.softmax(logits / math.sqrt(30)), rtol=1e-5)


@pytest.mark.slow
def test_derivatives_by_hand():
    args = layer_norm_by_hand.inputs(jr.key(seed(0)), 400)
    fns = layer_norm_by_hand.by_hand, layer_norm_by_hand.by_autodiff
    both = layer_norm_by_hand.in_both(lambda *args: [fn(*args) for fn in fns], *args)
    for dtype in ("float32", "float64"):
        hand, auto = both[dtype]
        assert set(hand) == {"v", "mean", "z", "w", "x"}
        assert hand["z"].dtype == dtype
        for name, row in layer_norm_by_hand.differences(hand, auto).items():
            # Two formulas, and sums of 400 examples. Found: up to 2.
            assert row["relative"] < 40 * jnp.finfo(dtype).eps, (dtype, name)
    # The measure itself: of an array that is off by one part in a thousand.
    row = layer_norm_by_hand.differences({"z": 1.001 * auto["z"]}, auto)["z"]
    assert row["relative"] == pytest.approx(1e-3, rel=1e-9)


@pytest.mark.slow
def test_the_bound_and_how_far_below_it_is():
    args = layer_norm_by_hand.inputs(jr.key(seed(0)), 400)
    rows = layer_norm_by_hand.in_both(layer_norm_by_hand.squares_and_bounds, *args)
    square, bound = rows["float64"]
    assert (square <= bound).all()
    x, w, weight, c = (np.float64(x) for x in args)
    z = x @ w
    xhat = (z - z.mean(1, keepdims=True)) / np.sqrt(z.var(1, keepdims=True) + 1e-5)
    g = weight * c
    # |dz|² / n = (var(g) - mean(g xhat)² (2 - mean(xhat²))) / (var(z) + eps).
    want = g.var(1) - (g * xhat).mean(1) ** 2 * (2 - (xhat**2).mean(1))
    gap = 1 - want / g.var(1) * z.var(1) / (z.var(1) + 1e-5)
    np.testing.assert_allclose(layer_norm_by_hand.relative_gap(square, bound), gap, atol=1e-12)
    assert 0.006 < gap.mean() < 0.01  # 1 / 128


@pytest.mark.slow
def test_studies_of_layer_norm_bias_and_directions(settings):
    by_hand = layer_norm_by_hand.study(settings)
    said = [claim.holds for claim in by_hand.claims]
    assert said == ["yes", "yes", "yes", "yes", "yes", "no"]
    assert by_hand.numbers["L largest difference"] < 1e-5
    assert by_hand.numbers["G1 allclose accepts derivatives off by .1%"]["z"]

    result = bias.study(settings)
    assert [claim.holds for claim in result.claims] == ["yes", "yes"]
    np.testing.assert_allclose(result.numbers["S singular values"], [2.75, 1.29], atol=0.005)
    shift = result.numbers["B mean |x · w|"]
    # Normal products: mean √(2 / π) * 10; all inputs + .2 adds 4% to the variance.
    assert shift["as it is"] == pytest.approx(7.98, rel=0.02)
    assert shift["shifted by .2"] / shift["as it is"] == pytest.approx(1.04**0.5, rel=0.005)
    assert figures(settings) == {"g2_gap", "s_ellipse"}


@pytest.mark.slow
def test_studies_of_data_and_initialisation(settings):
    data = d_data.study(settings)
    assert data.numbers["pairs"] == sum(map(len, NAMES)) + len(NAMES)
    assert data.claims[0].holds == "other data"
    begun = initialisation.study(settings)
    assert [claim.holds for claim in begun.claims] == ["yes", "yes"]
    assert begun.numbers["I2 share flat"]["tanh"] == pytest.approx(0.069, abs=0.003)


# ---- The studies that train, on runs that are made up: what they make of them is known.

NOISE = np.array([-0.03, 0.01, 0.0, 0.04])
EXTRA = {"none": 0.05, "LN": 0.0, "BN": -0.05}


@pytest.fixture
def settings(tmp_path):
    return study.Settings(PAIRS, len(NAMES), seeds=4, quick=True, out=tmp_path)


def figures(settings):
    return {path.stem for path in settings.out.glob("*.png")}


@pytest.fixture
def made_up(monkeypatch):
    """Losses of 2.5, plus .1 for lr 2 without LN, plus what the norm and the seed add."""

    def train(self, architecture, configs, *, steps, looks=50, look=None):
        layers = architecture.num_linear + (architecture.skip is None)
        rng = np.random.default_rng(seed(0))
        add = EXTRA[architecture.norm] - (0.07 if architecture.skip else 0)
        wobble = rng.normal(size=(len(configs), 4)) * 1e-3
        slow = [0.1 * (rate == 2 and architecture.norm == "none") for _, rate in configs]
        level = 2.5 + add + NOISE + wobble + np.array(slow)[:, None]
        losses = np.concatenate(
            [np.full((*level.shape, 100), 3.0), level[..., None].repeat(100, -1)], -1
        )
        draw = lambda *shape: rng.normal(size=(len(configs), 4, 3, *shape)).astype(np.float32)
        seen = {part: draw(layers, 8, 5) for part in common.PARTS}
        seen["activations"] = np.maximum(seen["activations"], 0)
        seen["activations"][..., 0] = 0  # one unit of five
        ratios = {"update ratios": -2 + 0 * draw(layers + 1)}
        # The first is the same for all, and only noise.
        linear = np.arange(layers + (architecture.skip is not None) + 1)
        directions = 0.1 + 0.02 * linear * (1 + EXTRA[architecture.norm] - bool(architecture.skip))
        directions = directions + 1e-4 * draw(len(linear))
        directions[:, :, 1:] = 0.3  # what training made of them
        found = {
            common.activations_and_gradients: seen,
            common.weight_update_ratios: ratios["update ratios"],
            common.direction_ratios: directions,
            e7.look: seen | ratios,
            None: None,
        }
        return common.Runs(losses, found[look], 50)

    monkeypatch.setattr(study.Settings, "train", train)


@pytest.mark.slow
def test_study_inside(settings, made_up):
    result = inside.study(settings)
    assert [claim.holds for claim in result.claims[:2]] == ["yes", "yes"]
    none, lr2 = result.numbers["E1"], result.numbers["E2"]
    assert none["loss"]["mean"] == pytest.approx(2.55 + NOISE.mean(), abs=2e-3)
    assert none["loss"]["spread"] == pytest.approx(NOISE.std(), abs=2e-3)
    assert lr2["loss"]["mean"] == pytest.approx(2.65 + NOISE.mean(), abs=2e-3)
    np.testing.assert_allclose(none["dead units by layer, last look"], [0.2] * 3, rtol=1e-6)
    bands = none["percentiles 16 50 84 by layer, last look"]["linear outputs"]
    # 160 standard normals: three standard errors.
    np.testing.assert_allclose(bands, [[-1, 0, 1]] * 3, atol=0.35)
    want = {f"e{i}_histograms" for i in (1, 2, 4, 5)} | {"e1_e2_percentiles", "e4_e5_percentiles"}
    assert want <= figures(settings)


def test_study_gain(settings, made_up):
    result = gain.study(settings)
    assert result.numbers["LN"]["gain 3"]["mean"] == pytest.approx(2.5 + NOISE.mean(), abs=2e-3)
    assert result.claims[-1].holds in ("yes", "no: worse")
    assert figures(settings) == {"e3_loss"}


def test_study_update_ratios(settings, made_up):
    result = e6.study(settings)
    ratios = result.numbers["LN"]["log10 update ratio by layer, second half"]
    np.testing.assert_allclose(ratios, [-2] * 6)
    assert result.claims[0].holds == "yes" and result.claims[0].ours.startswith("-0.050 ± 0.000")


@pytest.mark.slow
def test_study_activations(settings, made_up):
    result = e7.study(settings)
    assert [claim.holds for claim in result.claims] == ["yes"] * 4
    assert len(result.numbers) == 8
    # A rectified normal, one unit of five silent.
    std = result.numbers["relu, LN"]["std of activations by layer"]
    np.testing.assert_allclose(std, [0.55] * 7, atol=0.12)
    assert figures(settings) == {
        f"e7_{name}" for name in ("loss", "percentiles", "densities", "update_ratios")
    }


@pytest.mark.slow
def test_studies_of_directions(settings, made_up):
    result = e8.study(settings)
    assert [claim.holds for claim in result.claims] == ["yes"] * 4
    at_init = result.numbers["LN"]["singular value ratio by linear, at init"]
    np.testing.assert_allclose(at_init, 0.1 + 0.02 * np.arange(8), atol=1e-3)
    result = e9.study(settings)
    assert [claim.holds for claim in result.claims] == ["yes"] * 2
    assert result.claims[0].ours.startswith("-0.070 ± 0.000")


# ---- Judging


def test_pairing_finds_what_the_spread_hides():
    rng = np.random.default_rng(seed(0))
    seeds = 0.1 * rng.normal(size=16)
    a = 2.5 + seeds + 0.002 * rng.normal(size=16)
    difference = study.paired(a - 0.01, 2.5 + seeds)
    d = a - 0.01 - 2.5 - seeds
    assert difference.mean == pytest.approx(d.mean())
    assert difference.error == pytest.approx(d.std(ddof=1) / 4)
    assert study.verdict(difference) == "yes"
    assert study.verdict(study.paired(2.5 + seeds, a - 0.01)) == "no: opposite"
    assert abs(d.mean()) < a.std() / 4  # unpaired, it would be noise


@pytest.mark.parametrize(
    "mean, error, said",
    [(-0.1, 0.049, "yes"), (-0.1, 0.051, "no: a tie"), (0.1, 0.049, "no: opposite")],
)
def test_two_standard_errors_decide(mean, error, said):
    assert study.verdict(study.Difference(mean, error, 0)) == said


def test_diverged_seeds_are_left_out_and_counted():
    difference = study.paired([1.0, 2.0, np.nan, 3.0], [2.0, 3.0, 1.0, np.inf])
    assert difference == (-1.0, 0.0, 2)
    assert "2 diverged" in str(difference)
    assert study.verdict(study.paired([1.0], [2.0])) == "one seed"
    assert study.verdict(study.paired([np.nan], [2.0])) == "one seed"


def test_table_and_results_are_readable():
    claims = [
        study.less("E9", "skips", "2.4; 2.5", [2.4, 2.41], [2.5, 2.52]),
        ("", "x", "", "", ""),
    ]
    head, rule, row, _ = study.table(claims).split("\n")
    assert len(head) == len(rule) == len(row)
    assert row.split()[:2] == ["E9", "skips"] and row.rstrip().endswith("yes")
    assert "-0.105 ± 0.005 (2.405 ± 0.005; 2.510 ± 0.010)" in row
    text = json.dumps(study.plain({"a": np.float32([1.5, np.nan]), "b": (jnp.ones(2), 1 / 3)}))
    assert json.loads(text) == {"a": [1.5, None], "b": [[1.0, 1.0], 0.333333]}


def test_the_page_has_the_claims_of_the_run_beside_its_figures():
    text = (ROOT / "docs" / "activations_and_gradients.md").read_text()
    images = ROOT / "docs" / "images" / "activations_and_gradients"
    results = json.loads((images / "results.json").read_text())
    for claim in results["claims"]:
        cells = [claim[name].replace("|", "\\|") for name in study.Claim._fields]
        assert f"| {' | '.join(cells)} |" in text
    drawn = {path.name for path in images.glob("*.png")}
    assert drawn == set(re.findall(r"activations_and_gradients/(\w+\.png)", text))
    assert all((images / name).stat().st_size < 150_000 for name in drawn)


@pytest.mark.slow
def test_run_all(tmp_path, capsys):
    (tmp_path / "names.txt").write_text("\n".join(NAMES))
    argv = ["--data", str(tmp_path / "names.txt"), "--quick", "--out", str(tmp_path / "out")]
    study.run(study.STUDIES, argv)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert set(results["studies"]) == set(study.STUDIES)
    assert results["settings"]["names"] == len(NAMES) and results["settings"]["seeds"] == 2
    assert len(results["claims"]) == len(capsys.readouterr().out.splitlines()) - 2
    # It learned: a uniform guess has log(symbols).
    loss = results["studies"]["e9_skips"]["skips"]["loss"]["mean"]
    assert 0 < loss < math.log(results["settings"]["symbols"]) / 2
    assert all(path.stat().st_size < 150_000 for path in (tmp_path / "out").glob("*.png"))
