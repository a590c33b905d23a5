"""Oracles: what each norm averages over, the printed table of dm-haiku's issue 700, and for
the names what a person would make of each line by hand."""

import contextlib
import importlib
import io
import json
import re
import sys
from pathlib import Path

import jax
import matplotlib.image
import numpy as np
import pytest
from draws import seed

EXAMPLES = Path(__file__).parent.parent / "examples"
GOLDEN = Path(__file__).parent / "golden" / "haiku_issue_700.json"

sys.path.insert(0, str(EXAMPLES))
causal_leak = importlib.import_module("causal_leak")
names_data = importlib.import_module("names_data")


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory):
    """Exit status, what was printed, and the figure."""
    out = tmp_path_factory.mktemp("figures") / "new" / "leak.png"
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        status = causal_leak.main(["--quick", "--out", str(out)])
    return status, printed.getvalue(), out


# The run


@pytest.mark.slow
def test_every_verdict_is_as_expected(quick_run):
    status, printed, _ = quick_run
    assert status == 0
    # 4 lines of 16 letters: 16 * 15 / 2 pairs look ahead, 4 * 3 pairs of lines.
    for row in (
        "per-token +no, proved +no, proved",
        "over-tokens-and-features +YES, 120 of 120 pairs +no, proved",
        "over-batch +no, proved +YES, 12 of 12 pairs",
    ):
        assert re.search(rf"^  {row}$", printed, re.MULTILINE), row
    assert "verdicts all as expected" in printed


@pytest.mark.slow
def test_character_map(quick_run):
    _, printed, _ = quick_run
    assert "smaller decoders of 3 lines with 7 letters each" in printed
    rows = [re.findall(r"[a-z.] +([oX.]{21})(?: |$)", line) for line in printed.splitlines()]
    rows = [row for row in rows if len(row) == 3]
    assert len(rows) == 21
    own, future, earlier = (np.tri(7, dtype=bool), ~np.tri(7, dtype=bool), np.tri(7, dtype=bool))
    same, other = np.eye(3, dtype=bool), ~np.eye(3, dtype=bool)
    leaks = np.zeros((21, 21), bool), np.kron(same, future), np.kron(other, earlier)
    for drawn, forbidden in zip(zip(*rows, strict=True), leaks, strict=True):
        cells = np.array([list(row) for row in drawn])
        np.testing.assert_array_equal(cells == "o", np.kron(same, own))
        np.testing.assert_array_equal(cells == "X", forbidden)


@pytest.mark.slow
def test_table_of_the_thread_digit_for_digit(quick_run):
    _, printed, _ = quick_run
    golden = json.loads(GOLDEN.read_text())["input_gradient"]
    digits = [" ".join(f"{entry:.2f}" for entry in row) for row in golden]
    blind = [" ".join(["0.00"] * 7)] * 3
    lines = [" ".join(line.split()) for line in printed.splitlines()]
    assert [line for line in lines if re.fullmatch(r"(-?\d\.\d\d ?){7}", line)] == digits + blind
    assert "Digit for digit" in printed
    assert re.search(r"over both axes +YES, 21 of 21 pairs +YES, 6 of 6 pairs", printed)
    assert re.search(r"over axis 0 +no, proved +YES, 6 of 6 pairs", printed)


def test_random_bits_of_the_thread_are_switched_back(monkeypatch):
    monkeypatch.setattr(causal_leak, "examine", lambda *args: None)
    before = jax.config.jax_threefry_partitionable
    assert causal_leak.revisit_thread() == []
    assert jax.config.jax_threefry_partitionable == before


@pytest.mark.slow
def test_figure(quick_run):
    _, printed, out = quick_run
    assert f"figure   {out.resolve()}" in printed
    image = matplotlib.image.imread(out)[..., :3]
    height, width, _ = image.shape
    assert width > 1000 and height > 400
    red, blue = image[..., 0], image[..., 2]
    panels = np.array_split(np.arange(width), 3)
    reddish = [(red[:, p] - blue[:, p] > 0.2).mean() for p in panels]
    bluish = [(blue[:, p] - red[:, p] > 0.05).mean() for p in panels]
    assert all(share > 0.02 for share in bluish)
    # 0, 63 and 168 of 441 cells are leaks.
    assert reddish[0] == 0 and 0.01 < reddish[1] < reddish[2]


@pytest.mark.slow
def test_unexpected_verdict_own_lines_and_csv(tmp_path, monkeypatch, capsys):
    """A norm that is not expected to leak does; the text is the user's, in two files."""
    monkeypatch.setattr(causal_leak, "READS", {"over-tokens-and-features": ""})
    monkeypatch.setattr(causal_leak, "revisit_thread", lambda: [])
    (tmp_path / "lines.txt").write_text("Ada Lovelace\nEmmy\nGrace\n", encoding="utf-8")
    (tmp_path / "table.csv").write_text("id,surname\n1,Noether\n2,Hopper\n", encoding="utf-8")
    files = [str(tmp_path / "lines.txt"), str(tmp_path / "table.csv")]
    out = tmp_path / "leak.png"
    assert causal_leak.main(["--quick", "--out", str(out), "--data", *files]) == 1
    printed = capsys.readouterr().out
    assert "verdicts NOT as expected" in printed
    assert "over-tokens-and-features reads the future, expected: neither" in printed
    assert "5 names" in printed
    assert "ada_lov" in printed
    assert out.exists()


def test_bad_data_ends_with_a_message(tmp_path, capsys):
    with pytest.raises(SystemExit) as exit:
        causal_leak.main(["--quick", "--data", str(tmp_path / "absent.txt")])
    assert exit.value.code == 2
    assert "cannot read" in capsys.readouterr().err


# The names

SPANISH = """\
surname,frequency
GARCIA,1473189
DE LA CRUZ,80000
DE LA  FUENTE,70000
MUÑOZ,60000
 PEREZ ,50000
,40000
NAN,30
NULL,29
O'BRIEN,28
GONÇALVES,27
N,26
LI,25
LI,24
"SAN, JUAN",23
"""
KEPT = "garcia dela_cruz dela_fuente muñoz perez nan null li li san,_juan".split()


def test_spanish_cleaning(tmp_path):
    (tmp_path / "surnames.csv").write_text(SPANISH, encoding="utf-8")
    assert names_data.read_names(tmp_path / "surnames.csv", spanish=True) == KEPT


def test_cleaning_keeps_what_it_can(tmp_path):
    (tmp_path / "surnames.csv").write_text(SPANISH, encoding="utf-8")
    names = names_data.read_names(tmp_path / "surnames.csv")
    assert [name for name in names if name not in KEPT] == [
        "de_la_cruz",
        "de_la_fuente",
        "o'brien",
        "gonçalves",
    ]


def test_census():
    names = names_data.read_names()
    assert names[:3] == ["smith", "johnson", "williams"]
    assert len(names) > 80_000
    assert names_data.Vocabulary.of(names).symbols == ".abcdefghijklmnopqrstuvwxyz"


@pytest.mark.parametrize(
    "name, text",
    [
        ("header.csv", "rank;Last Name\n1;Ng\n2;\n3;Wu\n"),
        ("first.csv", "who,rank\nNg,1\nWu,2\n"),
        ("short.csv", "rank,name\n1,Ng\n2\n3,Wu\n"),
        ("tabs.tsv", "rank\tnames\n1\tNg\n2\tWu\n"),
        ("bom.csv", "\ufeffNAMES,rank\r\nNg,1\r\nWu,2\r\n"),
        ("lines.txt", "Ng\n\n  \nX\nWu."),
        ("lines.names", "\ufeffNG\r\nWU\r\n"),
    ],
)
def test_files(tmp_path, name, text):
    (tmp_path / name).write_bytes(text.encode())
    assert names_data.read_names([tmp_path / name]) == ["ng", "wu"]


def test_files_one_after_the_other(tmp_path):
    (tmp_path / "a.txt").write_text("Mun\u0303oz\n", encoding="utf-8")  # n and a tilde
    (tmp_path / "b.txt").write_text("Wu\n", encoding="utf-8")
    assert names_data.read_names([tmp_path / "b.txt", tmp_path / "a.txt"]) == ["wu", "muñoz"]


def test_errors_of_reading(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"cannot read .*absent\.txt: No such file"):
        names_data.read_names([tmp_path / "absent.txt"])
    for name in ("empty.txt", "empty.csv"):
        (tmp_path / name).write_text("")
        with pytest.raises(ValueError, match=rf"{name} has no names: give one name of two"):
            names_data.read_names([tmp_path / name])
    (tmp_path / "latin.txt").write_bytes("Muñoz".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.txt is not UTF-8 text"):
        names_data.read_names([tmp_path / "latin.txt"])
    monkeypatch.setitem(sys.modules, "names", None)
    with pytest.raises(ImportError, match=r'pip install "eqx-norms\[examples\]".*--data'):
        names_data.read_names()


def test_vocabulary():
    vocabulary = names_data.Vocabulary.of(["wu", "ng"])
    assert vocabulary.symbols == ".gnuw" and len(vocabulary) == 5
    ids = vocabulary.encode("ng.wu.")
    assert ids.dtype == np.int32
    np.testing.assert_array_equal(ids, [2, 1, 0, 4, 3, 0])
    assert vocabulary.decode(ids) == "ng.wu."
    with pytest.raises(ValueError, match=r"'x' is not one of the symbols '\.gnuw'"):
        vocabulary.encode("nx")


def test_batches():
    names = ["ada", "emmy", "grace", "wu"]
    vocabulary = names_data.Vocabulary.of(names)
    assert list(names_data.lines(names, 6)) == ["ada.em", "grace."]
    (batch,) = names_data.batches(names, vocabulary, size=2, length=6)
    assert [vocabulary.decode(line) for line in batch] == ["ada.em", "grace."]
    assert not list(names_data.batches(names, vocabulary, size=3, length=6))

    def shuffled(n):
        batches = names_data.batches(names * 5, vocabulary, size=1, length=6, seed=n)
        return [vocabulary.decode(batch[0]) for batch in batches]

    assert shuffled(seed(0)) == shuffled(seed(0)) != shuffled(seed(1))
