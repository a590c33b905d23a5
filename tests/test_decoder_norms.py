"""Where the norms of examples/decoder stand, what may stand in their place, and the comparisons.

Oracles: the blocks put together by hand, NumPy and `math.erf`, and every seed trained alone.
"""

import contextlib
import dataclasses
import inspect
import io
import math
import re
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import matplotlib.colors
import matplotlib.image
import numpy as np
import pytest
from draws import normal, seed
from made_up_names import NAMES

from eqx_norms import is_norm
from eqx_norms.causality import CausalityError
from examples.decoder import (
    __main__ as cli,
    compare,
    data,
    depth,
    instead,
    model,
    placements,
    train,
)
from examples.decoder.settings import PLACEMENTS, Settings

pytestmark = pytest.mark.usefixtures("optax_promotes")

SMALL = Settings(width=4, layers=2, heads=2, context=8, steps=5, batch=8, seed=seed())
DATA = data.split(NAMES, SMALL.context)
SYMBOLS = len(DATA.vocabulary)


def shapes_of(**options):
    """A decoder without numbers: nothing is compiled."""
    chosen = dataclasses.replace(SMALL, **options)
    return eqx.filter_eval_shape(model.Decoder, chosen, SYMBOLS, key=jr.key(seed(0)))


def decoder_of(**options):
    """With random numbers everywhere, so that no norm is any other."""
    rng = np.random.default_rng(seed(0))
    drawn = lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype)
    is_shape = lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct)
    return jax.tree.map(lambda leaf: drawn(leaf) if is_shape(leaf) else leaf, shapes_of(**options))


def count(node_is, tree):
    return sum(map(node_is, jax.tree.leaves(tree, is_leaf=node_is)))


# ---- Where the norms stand


@pytest.mark.slow
@pytest.mark.parametrize(
    "placement, norm",
    [
        pytest.param(*case, marks=[] if case == ("sandwich", "per-token") else pytest.mark.slow)
        for case in [*((name, "per-token") for name in PLACEMENTS), ("pre", "layer-scale")]
    ],
)
def test_placements_by_hand(placement, norm):
    """By the formulas of the recipes."""
    decoder = decoder_of(layers=1, placement=placement, norm=norm)
    block = decoder.blocks[0]
    mapped = lambda per_token: jax.vmap(per_token.layer)

    def block_by_hand(x):
        mask = jnp.tri(len(x), dtype=bool)
        attention, mlp = lambda h: block.attention(h, h, h, mask=mask), jax.vmap(block.mlp)
        if norm == "layer-scale":
            x = x + mapped(block.after1)(attention(x))
            return x + mapped(block.after2)(mlp(x))
        norm1 = mapped(block.norm1)
        if placement == "parallel":
            return x + attention(norm1(x)) + mlp(norm1(x))
        norm2 = mapped(block.norm2)
        if placement == "pre":
            x = x + attention(norm1(x))
            return x + mlp(norm2(x))
        if placement == "post":
            x = norm1(x + attention(x))
            return norm2(x + mlp(x))
        after1, after2 = mapped(block.after1), mapped(block.after2)
        x = x + after1(attention(norm1(x)))
        return x + after2(mlp(norm2(x)))

    def by_hand(letters):
        x = jax.vmap(decoder.embedding)(letters) + decoder.position
        x = mapped(decoder.norm_in)(x) if placement == "peri" else x
        x = block_by_hand(x)
        x = x if placement == "post" else mapped(decoder.norm)(x)
        return jax.vmap(decoder.readout)(x)

    letters = jnp.arange(8) % SYMBOLS
    found, expected = eqx.filter_jit(decoder)(letters), jax.jit(by_hand)(letters)
    # Norms of four entries magnify rounding; a norm that stands elsewhere changes everything.
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3 * np.ptp(expected))
    assert np.ptp(expected) > 1


def test_number_of_norms():
    counts = {name: count(is_norm, shapes_of(placement=name)) for name in PLACEMENTS}
    assert counts == {"pre": 5, "post": 4, "sandwich": 9, "peri": 10, "parallel": 3}
    for norm in instead.INSTEAD:
        decoder = shapes_of(norm=norm, placement="peri")
        assert count(is_norm, decoder) == 0
        scales = count(lambda node: isinstance(node, instead.LayerScale), decoder)
        assert scales == (2 * SMALL.layers if norm == "layer-scale" else 0)


def test_none_is_the_decoder_without_norms():
    """The same modules, with parameters of the same shapes."""
    assert eqx.tree_equal(shapes_of(norm="none"), depth.without_norms(shapes_of()))


def test_errors():
    with pytest.raises(ValueError, match=r"placement must be one of pre, post, .*, got 'mid'"):
        Settings(placement="mid")
    with pytest.raises(KeyError, match="layer"):
        shapes_of(norm="layer")


# ---- What may stand in their place


def test_modules_instead_of_a_norm_against_numpy(getkey):
    x, weight, bias = np.asarray(normal(getkey(), (3, 6)))
    alpha, shift = 0.7, -0.3
    change = lambda layer, **fields: eqx.tree_at(
        lambda layer: [getattr(layer, name) for name in fields],
        layer,
        [jnp.asarray(value, jnp.float32) for value in fields.values()],
    )
    erf = np.vectorize(math.erf)
    shared = {"weight": weight, "bias": bias, "alpha": alpha}
    expected = [
        (change(instead.DyT(6), **shared), weight * np.tanh(alpha * x) + bias),
        (
            change(instead.Derf(6), **shared, shift=shift),
            weight * erf(alpha * x + shift) + bias,
        ),
        # The paper's g is our weight times the root of the number of features. eps is 1e-5.
        (
            change(instead.ScaleNorm(6), weight=1.3),
            1.3 * np.sqrt(6) * x / np.sqrt(np.sum(x**2) + 6e-5),
        ),
        (change(instead.LayerScale(6), weight=weight), weight * x),
    ]
    for layer, y in expected:
        np.testing.assert_allclose(layer(jnp.asarray(x)), y, rtol=1e-5, atol=1e-6)
    # Strong types: a weak one would become the dtype of a gradient step and be traced again.
    for kind in (instead.DyT, instead.Derf, instead.ScaleNorm, instead.LayerScale):
        assert not any(leaf.weak_type for leaf in jax.tree.leaves(kind(6)))


def test_recipes_have_the_classes_of_the_example():
    page = (Path(__file__).parent.parent / "docs" / "recipes.md").read_text()
    for kind in (instead.DyT, instead.Derf, instead.ScaleNorm, instead.LayerScale):
        assert inspect.getsource(kind) in page


@pytest.mark.slow
def test_what_is_not_known_to_leak_must_not():
    options = {"norm": "derf", "placement": "peri", "bf16": True, "layers": 1}
    chosen = dataclasses.replace(SMALL, **options)
    assert not train.check(chosen, decoder_of(**options), DATA).leak
    with pytest.raises(CausalityError, match="derf model is not trained"):
        train.check(chosen, lambda letters: jnp.roll(letters, -1) * jnp.ones(()), DATA)


# ---- The commands


def printed_by(main, command):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main(command.split()) == 0
    return out.getvalue()


def test_settings_of_the_command_line():
    settings_of = lambda line: cli.settings_of(cli.parser().parse_args(line.split()))
    chosen = settings_of("--norm dyt per-token --placement post")
    assert [(one.norm, one.placement) for one in chosen] == [
        ("per-token", "post"),
        ("dyt", "post"),
    ]
    every = [one.norm for one in settings_of("--norm all none")]
    assert every == [*model.NORMS, "none"] and settings_of("")[0].placement == "pre"


@pytest.mark.slow
def test_compare_trains_every_seed_as_if_alone():
    bar = compare.tqdm(disable=True)
    chosen = dataclasses.replace(SMALL, layers=1, rate=0.02, steps=compare.AT_ONCE + 3)
    side_by_side = compare.trained(chosen, DATA, 2, bar)
    step = train.make_step(chosen)
    for run, loss in enumerate(side_by_side):
        alone = dataclasses.replace(chosen, seed=run)
        decoder, opt_state = train.start(alone, SYMBOLS)
        for number in range(chosen.steps):
            names = data.batch_at(DATA, number, size=8, seed=run)
            decoder, opt_state, _ = step(decoder, opt_state, names)
        np.testing.assert_allclose(loss, train.evaluate(decoder, DATA.held_out), rtol=1e-4)
    assert abs(side_by_side[0] / side_by_side[1] - 1) > 1e-3


NAN = math.nan
LOSSES = {
    ("a", 0.1): np.array([1.0, 2.0, 3.0]),
    ("a", 0.2): np.array([2.0, 2.0, NAN]),
    ("b", 0.1): np.array([1.5, 2.5, 3.5]),
    ("b", 0.2): np.array([NAN, NAN, NAN]),
}


def test_table_of_comparison():
    assert compare.tables(LOSSES).splitlines() == [
        "| held-out loss, at a learning rate of | 0.1 | 0.2 |",
        "|---|---:|---:|",
        "| a | 2.0000 ± 0.5774 | 2.0000 ± 0.0000, 1 of 3 diverged |",  # 1 / sqrt(3)
        "| b | 2.5000 ± 0.5774 | 3 of 3 diverged |",
        "",
        "| less that of a, at a learning rate of | 0.1 | 0.2 |",
        "|---|---:|---:|",
        "| b | +0.5000 ± 0.0000 | 3 of 3 diverged |",
    ]


def test_figure_of_comparison(tmp_path):
    compare.draw(LOSSES, tmp_path / "new" / "compare.png")
    image = matplotlib.image.imread(tmp_path / "new" / "compare.png")[..., :3]
    for colour in ("#56B4E9", "#D55E00"):  # the seeds; what diverged, on the right alone
        there = np.abs(image - matplotlib.colors.to_rgb(colour)).max(-1) < 0.1
        left, right = np.array_split(there, 2, axis=1)
        assert right.any() and left.any() == (colour == "#56B4E9")


def test_rows_are_called_by_what_differs():
    assert [*compare.rows(["dyt"], ["pre"])] == ["dyt"]
    assert [*compare.rows(["dyt"], ["pre", "post"])] == ["pre", "post"]
    both = compare.rows(["dyt", "none"], ["pre", "post"])
    assert both["none, post"] == {"norm": "none", "placement": "post"} and len(both) == 4


@pytest.mark.parametrize("main", [compare.main, placements.main])
def test_errors_of_the_commands(main, capsys):
    with pytest.raises(SystemExit) as exit:
        main(["--seeds", "0"])
    assert exit.value.code == 2
    assert re.search(r"at least \d( seeds)?, got 0", capsys.readouterr().err)
    for path in ("figure", "figure.xyz"):
        with pytest.raises(SystemExit):
            main(["--out", path])
        assert f"; got '{path}'" in capsys.readouterr().err


@pytest.mark.slow
def test_command_that_compares(tmp_path):
    names, out = tmp_path / "names.txt", tmp_path / "new" / "compare.png"
    names.write_text("\n".join(NAMES))
    size = "--layers 1 --width 8 --batch 8 --steps 60 --seeds 2 --rate 0.01"
    what = "--norm per-token dyt --placement pre post"
    printed = printed_by(compare.main, f"--data {names} --out {out} {size} {what}")
    rows = re.findall(r"^\| ([\w-]+), (\w+) \| (\d\.\d+) ± ", printed, re.M)
    assert len(rows) == 2 * 2 and f"figure {out.resolve()}" in printed and out.exists()


SPREADS = {
    way: depth.Spread(np.array([1.0, 2.0, 4.0]) * number, np.array([3e-5, 2e-5, 1.23e-5]) / number)
    for number, way in enumerate(placements.COLOURS, 1)
}


def test_table_and_figure_of_the_placements(tmp_path):
    lines = placements.table(SPREADS).splitlines()
    assert lines[3] == "| post | 2 | 8 | 1.5e-05 | 6.2e-06 |"
    assert [line.split(" | ")[0] for line in lines[2:]] == [f"| {way}" for way in SPREADS]
    placements.draw(SPREADS, tmp_path / "new" / "placements.png")
    image = matplotlib.image.imread(tmp_path / "new" / "placements.png")[..., :3]
    for colour in placements.COLOURS.values():  # a curve in each panel, right of which the legend
        there = np.abs(image - matplotlib.colors.to_rgb(colour)).max(-1) < 0.1
        left, right = np.array_split(there[:, : int(0.85 * there.shape[1])], 2, axis=1)
        assert left.sum() > 100 and right.sum() > 100


@pytest.mark.slow
def test_command_of_the_placements(tmp_path):
    """Against `depth.spread` of each seed, whose geometric mean it prints."""
    names, out = tmp_path / "names.txt", tmp_path / "new" / "placements.png"
    names.write_text("\n".join(NAMES))
    size = "--seeds 2 --layers 2 --width 8"
    printed = printed_by(placements.main, f"--data {names} --out {out} {size}")
    rows = dict(re.findall(r"^\| ([\w ]+) \| (.* \|)$", printed, re.M))
    assert [*rows] == [*placements.COLOURS] and f"figure {out.resolve()}" in printed
    assert out.exists()
    chosen = dataclasses.replace(depth.DEEP, layers=2, width=8, placement="post")
    probe = jnp.asarray(data.split(NAMES, chosen.context).held_out)
    one, two = (
        depth.spread(train.start(dataclasses.replace(chosen, seed=seed), SYMBOLS)[0], probe)
        for seed in (0, 1)
    )
    means = [np.sqrt(a * b) for a, b in zip(one, two, strict=True)]
    ends = [f"{mean[block]:.2g}" for mean in means for block in (0, -1)]
    assert rows["post"] == " | ".join(ends) + " |"
