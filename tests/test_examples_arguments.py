"""What the examples refuse before they begin. The oracle is argparse's exit status, 2."""

import importlib
import os
import re
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path[:0] = [str(EXAMPLES), str(EXAMPLES.parent)]

arguments = importlib.import_module("examples.arguments")
decoder, compare, depth, placements = (
    importlib.import_module(f"examples.decoder.{name}").main
    for name in ("__main__", "compare", "depth", "placements")
)
causal_leak, packing = (importlib.import_module(name).main for name in ("causal_leak", "packing"))
run = importlib.import_module("examples.activations_and_gradients._study").run
study = lambda argv: run(["e3_gain"], argv)

FIGURES = {"causal_leak": causal_leak, "packing": packing, "compare": compare}
FIGURES |= {"depth": depth, "placements": placements}
FOLDERS = {"decoder": decoder, "study": study}


def refused(main, argv, capsys, monkeypatch):
    """The message, of a command that has not even read its data."""

    def work(*args, **kwargs):
        raise AssertionError("it began to work")

    for name, module in [*sys.modules.items()]:
        if name.startswith(("examples.", "causal_leak", "packing")) and hasattr(
            module, "read_names"
        ):
            monkeypatch.setattr(module, "read_names", work)
    with pytest.raises(SystemExit) as exit:
        main(argv)
    assert exit.value.code == 2
    return capsys.readouterr().err


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file.txt").write_text("")
    return tmp_path


@pytest.mark.parametrize("main", FIGURES.values(), ids=FIGURES)
@pytest.mark.parametrize(
    "out, message",
    [
        ("fig", r"a figure ends in \.\w+, .*; got 'fig'"),
        ("fig.xyz", r"a figure ends in \.\w+, .*; got 'fig\.xyz'"),
        ("fig.pgf", r"a figure ends in \.\w+, .*; got 'fig\.pgf'"),
        (".", r"a figure ends in .*; got '\.'"),
        ("folder.png", "a figure is a file, and 'folder.png' is a directory"),
        ("file.txt/fig.png", r"file\.txt is a file, not a directory"),
    ],
)
def test_figures_that_could_not_be_written(main, out, message, here, capsys, monkeypatch):
    assert re.search(message, refused(main, ["--out", out], capsys, monkeypatch))
    assert sorted(path.name for path in here.iterdir()) == ["file.txt", "folder.png"]


@pytest.mark.parametrize("main", FOLDERS.values(), ids=FOLDERS)
@pytest.mark.parametrize("out", ["file.txt", "file.txt/new"])
def test_folders_that_could_not_be_made(main, out, here, capsys, monkeypatch):
    message = refused(main, ["--out", out], capsys, monkeypatch)
    assert "file.txt is a file, not a directory" in message


def test_folder_without_permission(here, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(arguments.argparse.ArgumentTypeError, match="cannot be written to"):
        arguments.figure_path("new/fig.png")


def test_paths_that_can(here):
    for text in ("fig.png", "new/fig.SVG", str(here / "a" / "b" / "c.pdf")):
        assert arguments.figure_path(text) == Path(text)
    for text in ("new/one", ".", "folder.png"):
        assert arguments.folder_path(text) == Path(text)
    assert {path.name for path in here.iterdir()} == {"file.txt", "folder.png"}


@pytest.mark.parametrize("main", [decoder, depth], ids=["decoder", "depth"])
@pytest.mark.parametrize("seed", ["-1", str(2**32)])
def test_seeds(main, seed, here, capsys, monkeypatch):
    message = refused(main, ["--seed", seed], capsys, monkeypatch)
    assert f"seed must be from 0 to 4294967295, got {seed}" in message


@pytest.mark.parametrize("main", [decoder, depth, compare], ids=["decoder", "depth", "compare"])
@pytest.mark.parametrize("rate", ["0", "-0.1", "nan", "inf"])
def test_rates(main, rate, here, capsys, monkeypatch):
    message = refused(main, ["--rate", rate], capsys, monkeypatch)
    assert "rate must be positive and finite, got" in message


@pytest.mark.parametrize(
    "main", [study, compare, placements], ids=["study", "compare", "placements"]
)
@pytest.mark.parametrize("seeds", ["0", "-3"])
def test_numbers_of_seeds(main, seeds, here, capsys, monkeypatch):
    message = refused(main, ["--seeds", seeds], capsys, monkeypatch)
    assert re.search(rf"at least \d( seeds)?, got {seeds}", message)
