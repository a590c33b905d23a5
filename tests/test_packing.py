"""Oracles: what a person packs by hand, the decoder itself, and each name read alone."""

import contextlib
import dataclasses
import importlib
import io
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import jax.random as jr
import matplotlib.image
import numpy as np
import pytest
from draws import seed

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
packing = importlib.import_module("packing")

NAMES = ["ada", "emmy", "grace", "wu", "katherine", "li"]
SYMBOLS = ".abcdefghijklmnopqrstuvwxyz"
SMALL = dataclasses.replace(packing.SETTINGS, width=8, layers=1)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Exit status, what was printed, and the figure, of smaller decoders."""
    out = tmp_path_factory.mktemp("figures") / "new" / "packing.png"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "SETTINGS", SMALL)
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            status = packing.main(["--out", str(out)])
    return status, printed.getvalue(), out


def test_rows_packed_by_hand():
    packed = packing.pack(NAMES, rows=2, length=12)
    assert packed.text == ["ada.emmy.wu.", "grace.li...."]
    assert packed.name.tolist() == [
        [0, 0, 0, 0, 1, 1, 1, 1, 1, 2, 2, 2],
        [4, 4, 4, 4, 4, 4, 5, 5, 5, 6, 6, 6],
    ]
    assert packed.place.tolist() == [
        [0, 1, 2, 3, 0, 1, 2, 3, 4, 0, 1, 2],
        [0, 1, 2, 3, 4, 5, 0, 1, 2, 0, 1, 2],
    ]


def test_few_names_leave_rows_of_end_marks():
    assert packing.pack(["wu"], rows=2, length=4).text == ["wu..", "...."]
    with pytest.raises(ValueError, match="packing needs names of fewer than 4 letters"):
        packing.pack(["grace"], rows=2, length=4)


@pytest.mark.slow
def test_every_verdict_is_as_expected(run):
    status, printed, out = run
    assert status == 0 and "verdicts all as expected" in printed
    assert f"figure   {out.resolve()}" in printed
    rows = [line for line in printed.splitlines() if re.fullmatch(r"[a-z]+\.[a-z.]+", line)]
    assert [len(row) for row in rows] == [packing.LENGTH] * packing.ROWS
    # Pairs across the borders of names, the reader later.
    lengths = [[*map(len, re.findall(r"[a-z]+\.|\.+", row))] for row in rows]
    across = sum(sum(row) ** 2 - sum(n * n for n in row) for row in lengths) // 2
    assert re.search(r"^segment mask +no, proved +no, proved +yes$", printed, re.MULTILINE)
    for title in ("mask forgotten", "positions reset, mask forgotten"):
        found = re.search(rf"^{title} +no, proved +YES, (\d+) of \d+ pairs +yes$", printed, re.M)
        assert int(found.group(1)) == across
    # Later letters of the same name, in either row.
    parts = [np.repeat(np.arange(len(row)), row) for row in lengths]
    within = np.triu(sum(part[:, None] == part for part in parts) > 0, 1).sum()
    last = rf"^segment mask, norms over names +YES, {within} of 190 pairs +no, proved +yes$"
    assert re.search(last, printed, re.MULTILINE)


@pytest.mark.slow
def test_figure(run):
    *_, out = run
    image = matplotlib.image.imread(out)[..., :3]
    red = image[..., 0] - image[..., 2] > 0.2
    panels = [panel for row in np.array_split(red, 2) for panel in np.array_split(row, 2, axis=1)]
    reddish = [panel.mean() for panel in panels]
    assert reddish[0] == reddish[3] == 0 and min(reddish[1:3]) > 0.01


# Scores of the decoder are rounded once, to float32: half an ulp of numbers below 16.
ROUNDED = 2.0**-21


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_under_the_mask_every_name_reads_as_if_alone(monkeypatch):
    """In float64, but for what the decoder rounds at its end. Names are of one length."""
    monkeypatch.setattr(packing, "SETTINGS", SMALL)
    names = "emmy ruth mary rosa lise irma inge anna".split()
    packed = packing.pack(names, packing.ROWS, packing.LENGTH)
    letters = np.array([[SYMBOLS.index(letter) for letter in row] for row in packed.text])
    models = [packing.make_model(case, packed, len(SYMBOLS)) for case in packing.CASES]
    masked, *unmasked, _ = (np.asarray(jax.jit(model)(letters)) for model in models)
    decoder = packing.Decoder(SMALL, len(SYMBOLS), key=jr.key(0))
    alone = jax.jit(jax.vmap(decoder))(letters.reshape(len(names), -1))
    alone = np.asarray(alone, np.float64).reshape(masked.shape)
    assert np.abs(masked - alone).max() <= ROUNDED
    for scores in unmasked:
        apart = np.abs(scores - alone).max(-1)
        assert apart[:, :5].max() <= ROUNDED  # nothing comes before the first of a row
        assert apart[:, 5:].min() > 1e-3


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_scores_are_those_of_the_decoder():
    """Given its own positions and mask."""
    decoder = packing.Decoder(SMALL, len(SYMBOLS), key=jr.key(seed(0)))
    letters = jr.randint(jr.key(seed(1)), (packing.LENGTH,), 0, len(SYMBOLS))
    place, mask = jnp.arange(len(letters)), jnp.tri(len(letters), dtype=bool)
    ours = jax.jit(lambda letters: packing.scores(decoder, letters, place, mask))(letters)
    theirs = jax.jit(lambda letters: decoder(letters))(letters)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=ROUNDED)
