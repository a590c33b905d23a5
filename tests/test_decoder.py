"""The decoder of examples/decoder.

Oracles: the decoder again in float64 NumPy, losses and bigrams counted letter by letter in
Python, the count of forward passes as they run, and uninterrupted runs for interrupted ones.
"""

import contextlib
import dataclasses
import io
import itertools
import json
import math
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.colors
import matplotlib.image
import numpy as np
import pytest
from draws import normal, seed
from made_up_names import NAMES
from oracles import ulps

from eqx_norms.causality import CausalityError, assert_same as assert_same_function
from examples.decoder import (
    __main__ as cli,
    checkpoint,
    data,
    model,
    plot,
    report,
    sample,
    settings,
    train,
)

pytestmark = pytest.mark.usefixtures("optax_promotes")

ROOT = Path(__file__).parent.parent


Settings, State = settings.Settings, checkpoint.State

SMALL = Settings(width=8, layers=1, heads=2, context=10, steps=12, batch=8, rate=0.01, seed=seed())
DATA = data.split(NAMES, SMALL.context)
SYMBOLS = len(DATA.vocabulary)
EPS = 2.0**-23


def begin(settings):
    return State(*train.start(settings, SYMBOLS), 0, ())


def assert_same(a, b):
    """Bit for bit."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for one, two in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        if eqx.is_array(one):
            np.testing.assert_array_equal(one, two)


# ---- The names


def test_split_holds_names_out_once():
    split = data.split([*NAMES, *NAMES, "far_too_long_a_name"], 10)
    train_names, held_out = (data.as_text(rows, split.vocabulary) for rows in split[:2])
    assert split.too_long == 1
    assert sorted(train_names + held_out) == sorted(NAMES)
    assert len(held_out) == 1  # 5% of 25
    assert split.train.shape == (24, 10) and split.train.dtype == np.int32
    row = "".join(split.vocabulary.symbols[i] for i in split.train[0])
    assert row == train_names[0].ljust(10, ".")
    assert data.split(NAMES[::-1], 10).fingerprint() == data.split(NAMES, 10).fingerprint()
    assert data.split(NAMES[1:], 10).fingerprint() != data.split(NAMES, 10).fingerprint()


def test_every_epoch_has_every_name_once_in_its_own_order():
    def epoch(number, n=0):
        steps = range(3 * number, 3 * number + 3)  # 24 names in batches of 8
        rows = [data.batch_at(DATA, step, size=8, seed=seed(n)) for step in steps]
        return np.concatenate(rows)

    expected = sorted(map(tuple, DATA.train))
    for rows in (epoch(0), epoch(1), epoch(7), epoch(0, 1)):
        assert sorted(map(tuple, rows)) == expected
    assert not np.array_equal(epoch(0), epoch(1))
    assert not np.array_equal(epoch(0), epoch(0, 1))
    np.testing.assert_array_equal(epoch(1), epoch(1))


def test_what_is_read_and_counted():
    names = np.array([[3, 4, 5, 0, 0], [3, 0, 0, 0, 0], [0, 0, 0, 0, 0], [1, 2, 3, 4, 5]])
    reads = [[0, 3, 4, 5, 0], [0, 3, 0, 0, 0], [0, 0, 0, 0, 0], [0, 1, 2, 3, 4]]
    np.testing.assert_array_equal(data.shifted(names), reads)
    # Letters and one end mark; the last row was cut before its own.
    np.testing.assert_array_equal(data.counted(names).sum(1), [4, 2, 1, 5])
    np.testing.assert_array_equal(data.counted(names)[0], [True, True, True, True, False])


# ---- The losses


@pytest.mark.slow
def test_bigram_and_evaluate_letter_by_letter():
    marked = [f".{name}." for name in data.as_text(DATA.train, DATA.vocabulary)]
    pairs = Counter(pair for name in marked for pair in itertools.pairwise(name))
    firsts = Counter(letter for name in marked for letter in name[:-1])
    nats = lambda a, b: -math.log((pairs[a, b] + 1) / (firsts[a] + SYMBOLS))
    expected = [nats(*pair) for name in marked for pair in itertools.pairwise(name)]

    bigram = sample.Bigram(DATA.train, SYMBOLS)
    mean, rtol = np.mean(expected), ulps(len(expected)) * EPS  # 200 of them summed
    np.testing.assert_allclose(train.evaluate(bigram, DATA.train), mean, rtol=rtol)
    np.testing.assert_allclose(train.loss_fn(bigram, DATA.train), mean, rtol=rtol)


def layer_norm(x, layer):
    xc = x - x.mean(-1, keepdims=True)
    scaled = xc / np.sqrt((xc**2).mean(-1, keepdims=True) + layer.eps)
    return scaled * layer.weight + layer.bias


def oracle(decoder, letters):
    """The decoder with the per-token norm, its parameters float64 NumPy arrays."""
    x = decoder.embedding.weight[letters] + decoder.position[: len(letters)]
    for block in decoder.blocks:
        h, attention = layer_norm(x, block.norm1.layer), block.attention
        projections = attention.query_proj, attention.key_proj, attention.value_proj
        query, key, value = (
            (h @ projection.weight.T).reshape(len(h), attention.num_heads, -1)
            for projection in projections
        )
        scores = np.einsum("qhf,khf->hqk", query, key) / np.sqrt(query.shape[-1])
        scores = np.where(np.tri(len(h), dtype=bool), scores, -np.inf)
        weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
        mixed = np.einsum("hqk,khf->qhf", weights, value).reshape(len(h), -1)
        x = x + mixed @ attention.output_proj.weight.T
        first, second = block.mlp.layers
        h = layer_norm(x, block.norm2.layer) @ first.weight.T + first.bias
        h = h / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))  # gelu
        x = x + h @ second.weight.T + second.bias
    x = layer_norm(x, decoder.norm.layer)
    return x @ decoder.readout.weight.T + decoder.readout.bias


@pytest.mark.slow
def test_decoder_against_numpy(getkey):
    decoder = model.Decoder(dataclasses.replace(SMALL, layers=2), SYMBOLS, key=getkey())
    params, static = eqx.partition(decoder, eqx.is_array)
    params = jax.tree.map(lambda leaf: leaf + 0.1 * normal(getkey(), leaf.shape), params)
    letters = DATA.train[0]
    found = eqx.filter_jit(eqx.combine(params, static))(letters)
    wide = eqx.combine(jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params), static)
    expected = oracle(wide, letters)
    assert np.abs(expected).max() > 1
    # Some two hundred roundings one after the other, which two norms may magnify.
    np.testing.assert_allclose(found, expected, rtol=0, atol=400 * EPS * np.abs(expected).max())


@pytest.mark.slow
@pytest.mark.parametrize(
    "norm, option",
    [
        *((norm, {"norms": "eqx"}) for norm in model.NORMS),
        ("per-token", {"remat": True}),
        ("per-token", {"bf16": True}),
    ],
)
def test_options_change_how_not_what(norm, option):
    def loss_and_grads(**option):
        decoder, _ = train.start(dataclasses.replace(SMALL, norm=norm, **option), SYMBOLS)
        assert isinstance(decoder.norm.layer, model.LAYERS[option.get("norms", "ours")])
        both = eqx.filter_value_and_grad(train.loss_fn)
        return lambda names: jax.tree.leaves(both(decoder, names))

    plain, other = loss_and_grads(), loss_and_grads(**option)
    names = jnp.asarray(DATA.train[:8])
    assert {leaf.dtype for leaf in jax.eval_shape(other, names)} == {jnp.dtype(jnp.float32)}
    assert_same_function(plain, other, names, token_values=(0, SYMBOLS - 1), inputs=2)


@pytest.mark.slow
def test_bf16_computes_in_bfloat16_and_remat_recomputes():
    """As the traced program says: which dtypes its products have, what it keeps."""
    letters = jnp.asarray(DATA.train[0])

    def traced(**option):
        decoder, _ = train.start(dataclasses.replace(SMALL, **option), SYMBOLS)
        return str(eqx.filter_make_jaxpr(decoder)(letters)[0])

    products = lambda text: set(re.findall(r"(\w+)\[[\d,]*\] = dot_general", text))
    assert products(traced()) == {"f32"}
    assert products(traced(bf16=True)) == {"bf16"}
    recomputed = lambda text: len(re.findall(r"= (?:remat2?|checkpoint)\[", text))
    assert (recomputed(traced(remat=True)), recomputed(traced())) == (1, 0)


@pytest.mark.slow
def test_first_step_is_adams():
    """It moves every parameter by the learning rate, against the sign of its gradient."""
    chosen = dataclasses.replace(SMALL, warm_up=0, weight_decay=0)
    before, opt_state = train.start(chosen, SYMBOLS)
    names = DATA.train[:8]
    after, _, loss = train.make_step(chosen)(before, opt_state, names)
    expected, grads = eqx.filter_jit(eqx.filter_value_and_grad(train.loss_fn))(before, names)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)  # of two programs
    leaves = lambda tree: map(np.asarray, jax.tree.leaves(eqx.filter(tree, eqx.is_array)))
    for old, new, grad in zip(*map(leaves, (before, after, grads)), strict=True):
        large = np.abs(grad) > 1e-3  # beside Adam's eps, 1e-8, after clipping
        moved = -chosen.rate * np.sign(grad)
        np.testing.assert_allclose((new - old)[large], moved[large], rtol=1e-3)


# ---- What they write


class Chain(eqx.Module):
    """Writes its word whatever came before, by place alone."""

    word: jax.Array

    def __call__(self, letters):
        return jnp.log(jax.nn.one_hot(self.word, SYMBOLS))


def test_sample_writes_until_the_end_mark(getkey):
    word = DATA.vocabulary.encode("ber.son.an")
    rows = sample.sample(Chain(jnp.asarray(word)), getkey(), count=3, context=10)
    assert data.as_text(rows, DATA.vocabulary) == ["ber"] * 3
    assert not rows[:, 3:].any()  # end marks to the end


@pytest.mark.slow
def test_samples_follow_the_bigram(getkey):
    bigram = sample.Bigram(DATA.train, SYMBOLS)
    rows = np.asarray(sample.sample(bigram, getkey(), count=4000, context=10))
    expected = np.exp(bigram.scores[0])  # of the first letter
    found = np.bincount(rows[:, 0], minlength=SYMBOLS) / len(rows)
    # Five standard errors of a share, and the bigram's own loss is the mean of what it writes.
    assert (np.abs(found - expected) < 5 * np.sqrt(expected / len(rows))).all()
    after = np.asarray(bigram.scores)[np.asarray(data.shifted(rows))]
    entropy = -(np.exp(after) * after).sum(-1)[np.asarray(data.counted(rows))].mean()
    np.testing.assert_allclose(train.evaluate(bigram, rows), entropy, rtol=0.03)


@pytest.mark.slow
@pytest.mark.parametrize(
    "norm",
    [pytest.param(n, marks=[] if n == "per-token" else pytest.mark.slow) for n in model.NORMS],
)
def test_future_hidden(norm, getkey):
    """One letter at a time in Python; only the causal model does not notice."""
    decoder = eqx.filter_jit(
        model.Decoder(dataclasses.replace(SMALL, norm=norm), SYMBOLS, key=getkey())
    )
    letters = np.asarray(data.shifted(DATA.train[0]))
    blind = sample.FutureHidden(decoder)(letters)
    rows = [np.where(np.arange(10) <= place, letters, 0) for place in range(10)]
    expected = [decoder(row)[place] for place, row in enumerate(rows)]
    np.testing.assert_allclose(blind, expected, atol=1e-5)
    change = np.abs(blind - decoder(letters)).max()
    assert change < 1e-5 if norm == "per-token" else change > 1e-3


# ---- The check


@pytest.mark.slow
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("norm", model.NORMS)
def test_check_sees_every_leaking_pair(norm, bf16):
    chosen = dataclasses.replace(SMALL, norm=norm, bf16=bf16)
    report = train.check(chosen, begin(chosen).model, DATA)
    assert len(report.pairs()) == (0 if norm == "per-token" else 10 * 9 / 2)
    assert report.possible_splits == 9
    # What is causal is proved so, without an edit.
    assert (report.status, len(report.splits)) == (
        ("proved", 0) if norm == "per-token" else ("leak", 9)
    )


@pytest.mark.slow
def test_per_token_model_that_leaks_is_not_trained(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(model.NORMS, "per-token", model.OverTokens)
    with pytest.raises(CausalityError, match="per-token model is not trained"):
        train.check(SMALL, begin(SMALL).model, DATA)
    assert cli.main(["--quick", "--out", str(tmp_path)]) == 1
    assert "leak: an output reads a later position" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


class Counting(eqx.Module):
    """Counts every run of the model."""

    model: eqx.Module
    count: list = eqx.field(static=True)

    def __call__(self, letters):
        jax.debug.callback(lambda: self.count.append(1))
        return self.model(letters)


@pytest.mark.slow
def test_check_costs_less_than_2_percent_of_the_default_training():
    """In floating-point operations, as the compiler counts them, of the model as it is trained."""
    chosen = Settings()
    names = data.split(NAMES, chosen.context)
    symbols = 27  # of the census surnames
    decoder, opt_state = train.start(chosen, symbols)
    leaking = dataclasses.replace(chosen, norm="over-tokens")
    runs = []
    # Proved, where what the mask assumes of the scores is looked at; and found by the edits.
    for how, built in (chosen, decoder), (leaking, train.start(leaking, symbols)[0]):
        counting = Counting(built, [])
        train.check(how, counting, names)
        jax.effects_barrier()
        assert len(counting.count) > chosen.context
        runs += [len(counting.count)]

    batch = jnp.zeros((chosen.batch, chosen.context), jnp.int32)
    step = train.make_step(chosen).lower(decoder, opt_state, batch).compile().compiled
    forward = eqx.filter_jit(decoder).lower(jnp.zeros(chosen.context, jnp.int32)).compile().compiled
    flops = lambda compiled: compiled.cost_analysis()["flops"]
    # A forward pass is about 2 flops for every parameter and token.
    params = sum(leaf.size for leaf in jax.tree.leaves(eqx.filter(decoder, eqx.is_array)))
    assert flops(forward) > params * chosen.context
    share = max(runs) * flops(forward) / (chosen.steps * flops(step))
    assert 0 < share < 0.02


# ---- Stopping and going on


@pytest.mark.slow
def test_resumed_is_uninterrupted_bit_for_bit(tmp_path):
    """Twice N steps, and N through a file and N again, past epochs of 3 steps."""
    path = tmp_path / "new" / "a.eqx"
    whole = train.train(SMALL, DATA, begin(SMALL), tmp_path / "b.eqx")
    half = train.train(SMALL, DATA, begin(SMALL), path, until=6)
    assert half.step == 6
    resumed = checkpoint.load(path, begin(SMALL), SMALL, DATA)
    assert_same(half, resumed)
    resumed = train.train(SMALL, DATA, resumed, path)
    assert resumed.step == whole.step == 12
    assert_same(whole, resumed)
    assert path.read_bytes() == (tmp_path / "b.eqx").read_bytes()
    assert not np.array_equal(half.model.position, whole.model.position)
    assert train.train(SMALL, DATA, resumed, tmp_path / "none.eqx") is resumed
    assert not (tmp_path / "none.eqx").exists()

    steps, losses = zip(*whole.history, strict=True)
    assert steps == tuple(range(13))
    np.testing.assert_allclose(losses[-1], train.evaluate(whole.model, DATA.held_out))
    assert losses[-1] < losses[0] - 0.1


def names_file(tmp_path):
    """400 different names of six random letters."""
    every = list(itertools.product("abcde", repeat=6))
    chosen = np.random.default_rng(seed(0)).choice(len(every), 400, replace=False)
    path = tmp_path / "names.txt"
    path.write_text("\n".join("".join(every[number]) for number in chosen))
    return path


@pytest.mark.slow
def test_ctrl_c_saves_and_resume_ends_at_the_same_bits(tmp_path):
    """A real SIGINT, against the same command undisturbed."""
    size = f"--quick --width 8 --steps 1500 --context 8 --seed {seed(3)}".split()
    command = [sys.executable, "-m", "examples.decoder", "--data", str(names_file(tmp_path)), *size]
    start = lambda *more: subprocess.Popen(
        [*command, *more], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    with start("--out", str(stopped)) as run:
        while not (stopped / "per-token.eqx").exists():  # the first of 25 checkpoints
            assert run.poll() is None, run.communicate()
            time.sleep(0.01)
        run.send_signal(signal.SIGINT)
        printed, errors = run.communicate()
    assert run.returncode == 130, errors
    assert "Traceback" not in errors
    with (stopped / "per-token.eqx").open("rb") as file:
        step = json.loads(file.readline())["step"]
    assert 60 <= step < 1500
    assert f"Stopped at step {step} and saved. To go on:\n  python -m examples.decoder" in printed
    assert printed.endswith(" --resume\n")
    with start("--out", str(stopped), "--resume") as one, start("--out", str(whole)) as two:
        for run in (one, two):
            printed, errors = run.communicate()
            assert run.returncode == 0, errors
    assert (stopped / "per-token.eqx").read_bytes() == (whole / "per-token.eqx").read_bytes()


# ---- The command line


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory):
    """The command that trained all three on random letters, and what it printed."""
    folder = tmp_path_factory.mktemp("quick")
    size = "--quick --width 16 --steps 300 --context 8".split()
    command = ["--data", str(names_file(folder)), *size, "--out", str(folder / "new" / "out")]
    return [*command, "--norm", "all"], printed_by([*command, "--norm", "all"])


def printed_by(command, status=0):
    with jax.numpy_dtype_promotion("standard"), contextlib.redirect_stdout(io.StringIO()) as out:
        assert cli.main(command) == status
    return out.getvalue()


def rows(printed):
    """Of the table: the losses of each model, with the future in view and hidden."""
    found = re.findall(r"^(\S+) +(?:no|YES, 28 pairs)? +(\d\.\d+) +(\d\.\d+) ", printed, re.M)
    return {norm: (float(loss), float(hidden)) for norm, loss, hidden in found}


@pytest.mark.slow
def test_leaking_norms_beat_what_can_be_known(quick_run):
    """Six letters of five, drawn at random, and an end mark in its place: log(5) each, and 0."""
    losses = rows(quick_run[1])
    entropy = 6 / 7 * math.log(5)
    assert list(losses) == ["bigram", *model.NORMS]
    for fair in ("bigram", "per-token"):
        assert losses[fair][0] == losses[fair][1]
        assert losses[fair][0] > 0.97 * entropy  # 20 names are held out
    assert losses["per-token"][0] < 1.05 * entropy < losses["bigram"][0]
    for leaking in ("over-tokens-and-features", "over-tokens"):
        assert losses[leaking][0] < 0.9 * entropy < 1.05 * entropy < losses[leaking][1]


@pytest.mark.slow
def test_printed_losses_are_those_of_the_checkpoint(quick_run):
    command, printed = quick_run
    runs, names = cli.prepared(cli.parser().parse_args([*command, "--resume"]))
    for run in runs:
        loss = float(train.evaluate(run.state.model, names.held_out))
        assert rows(printed)[run.settings.norm][0] == round(loss, 4)
    bigram = sample.Bigram(names.train, len(names.vocabulary))
    assert rows(printed)["bigram"][0] == round(float(train.evaluate(bigram, names.held_out)), 4)


@pytest.mark.slow
def test_who_writes_with_a_cache_is_said(quick_run):
    printed = quick_run[1]
    assert "\nper-token writes with a cache, checked on 8 names: " in printed
    for norm in model.LEAKING:
        assert f"\n{norm} writes without a cache: a norm over tokens cannot have one" in printed


@pytest.mark.slow
def test_samples_are_looked_up_and_judged(getkey):
    decoder = begin(SMALL).model
    held_out, train_rows = DATA.held_out, DATA.train
    samples = np.concatenate([held_out, train_rows[:3], np.full((4, 10), 1, np.int32)])
    assert report.share(samples, held_out) == 1 / 8
    assert report.share(samples, train_rows) == 3 / 8
    one = report.outcome("per-token", decoder, DATA, seed=seed(0), judge=decoder)
    assert one.judged == float(train.evaluate(decoder, one.samples))
    assert one.samples.shape == (1000, 10)
    other = report.outcome("per-token", decoder, DATA, seed=seed(1))
    assert np.isnan(other.judged) and not np.array_equal(one.samples, other.samples)
    assert "--norm all" in report.legend([other]) and "--norm all" not in report.legend([one])


@pytest.mark.slow
def test_resume_of_what_is_finished_prints_the_same(quick_run):
    command, printed = quick_run
    again = printed_by([*command, "--resume"])
    after = lambda text: text[text.index("\nnorm  ") :]
    assert after(again) == after(printed)
    assert "memory" not in again  # nothing was compiled to train


@pytest.mark.slow
def test_figure(quick_run):
    command, printed = quick_run
    path = Path(command[command.index("--out") + 1]) / "decoder.png"
    assert f"figure {path.resolve()}" in printed
    image = matplotlib.image.imread(path)[..., :3]
    assert image.shape[1] > 1000
    colours = [matplotlib.colors.to_rgb(plot.COLOURS[norm]) for norm in model.NORMS]
    for colour in colours:  # a curve on the left, a heading on the right
        there = np.abs(image - colour).max(-1) < 0.1
        left, right = np.array_split(there, 2, axis=1)
        assert left.sum() > 500 and right.sum() > 500


@pytest.mark.slow
def test_one_leaking_norm_alone(tmp_path):
    """Is trained in spite of the verdict, and says how to judge what it writes."""
    command = ["--data", str(names_file(tmp_path)), "--quick", "--steps", "2", "--out"]
    printed = printed_by([*command, str(tmp_path), "--norm", "over-tokens", "--width", "8"])
    assert "READS THE FUTURE" in printed and "held-out loss" in printed
    assert "--norm all" in printed
    assert (tmp_path / "decoder.png").exists()
    assert sorted(path.name for path in tmp_path.glob("*.eqx")) == ["over-tokens.eqx"]


@pytest.mark.parametrize(
    "command, message",
    [
        ("--resume", r"cannot resume from .*per-token.eqx: No such file.*leave out --resume"),
        ("--width 30", "width must be a multiple of the 4 heads, got 30; try 32"),
        ("--steps 0", "steps must be at least 1, got 0"),
        ("--quick --batch 1000", "a batch of 1000 is more than the 380 names.*--batch 380 or less"),
        ("--context 5", "needs 11 different names of fewer than 5 letters, got 0 and 400 longer"),
        ("--norm per-batch", "invalid choice: 'per-batch'"),
    ],
)
def test_errors(command, message, tmp_path, capsys):
    names = ["--data", str(names_file(tmp_path)), "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as exit:
        cli.main([*names, *command.split()])
    assert exit.value.code == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.slow
def test_errors_of_resuming(tmp_path):
    path = tmp_path / "a.eqx"
    state = begin(SMALL)
    checkpoint.save(path, state, SMALL, DATA)
    assert_same(checkpoint.load(path, state, SMALL, DATA), state)
    wider = dataclasses.replace(SMALL, width=16, seed=seed(1))
    difference = f"a run with width 8, seed {seed()}, and this one has width 16, seed {seed(1)}"
    with pytest.raises(ValueError, match=difference):
        checkpoint.load(path, state, wider, DATA)
    others = data.split(NAMES[1:], SMALL.context)
    with pytest.raises(ValueError, match="trained on other names; give the same --data"):
        checkpoint.load(path, state, SMALL, others)
    whole = path.read_bytes()
    for length in (len(whole) - 1, len(whole) // 2, whole.index(b"\n") + 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"a\.eqx is damaged.*leave out --resume"):
            checkpoint.load(path, state, SMALL, DATA)
    for other in (b"", b"\x93NUMPY", b"[1]", whole[:20]):
        path.write_bytes(other)
        with pytest.raises(ValueError, match=r"a\.eqx is no checkpoint of this example"):
            checkpoint.load(path, state, SMALL, DATA)


@pytest.mark.slow
def test_loss_that_is_not_finite_ends_the_training(tmp_path):
    broken = eqx.tree_at(lambda m: m.position, begin(SMALL).model, jnp.full((10, 8), jnp.nan))
    with pytest.raises(FloatingPointError, match="loss is nan at step 0; give a lower --rate"):
        train.looked(begin(SMALL)._replace(model=broken), DATA)


@pytest.mark.slow
def test_default_run(tmp_path):
    """On the census surnames: better than 2.15 nats a letter, where a bigram has 2.57."""
    losses = rows(printed_by(["--out", str(tmp_path)]))
    assert losses["per-token"][0] < 2.15 and losses["per-token"] == losses["per-token"][:1] * 2
    assert 2.56 < losses["bigram"][0] < 2.58
