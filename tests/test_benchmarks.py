"""The benchmarks: that all libraries do the same work, and that what is written is one story.

Oracles: for LayerNorm the float64 formulas of benchmarks/_accuracy.py; for the other layers our
own, which their tests compare with float64. Nothing here looks at how long anything took.
"""

import json
import math
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from draws import seed
from oracles import assert_alike

from benchmarks.__main__ import BEGIN, END, PAGE, PAGE_FILES, filled, main
from benchmarks._accuracy import exact
from benchmarks._cases import JAX_RIVALS, LAYERS, is_installed
from benchmarks._child import child
from benchmarks._report import machine, report, targets
from benchmarks._targets import outcomes

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(scope="module")
def call():
    """Calls a function of the benchmarks as they do, in a process of its own."""
    with child() as call:
        yield call


# keras comes with the extra `bench`, torch on Python 3.11; the others come with `test`.
EVERY_RIVAL = [r for r in (*JAX_RIVALS, "torch") if r not in ("keras", "torch") or is_installed(r)]


# The other layers, each of which every rival has to compile, are slow.
@pytest.mark.slow
@pytest.mark.parametrize(
    "layer",
    [pytest.param(n, marks=[] if n == "LayerNorm" else pytest.mark.slow) for n in LAYERS],
)
@pytest.mark.parametrize("rival", EVERY_RIVAL)
def test_rivals_do_the_same_work(call, rival, layer):
    x, g = np.random.default_rng(seed(0)).standard_normal((2, 64, 32), np.float32)
    got = call("_accuracy.outputs", rival, x, g, layer)
    want = exact(x, g) if layer == "LayerNorm" else call("_accuracy.outputs", "ours", x, g, layer)
    assert list(got) == [*want]
    for name in want:  # float32, by formulas of their own: sums over 64 rows of 32
        assert_alike(np.float32(got[name]), want[name], 64 * 32)


@pytest.mark.slow
def test_quick_run_writes_one_story(tmp_path):
    chosen = "--only speed,accuracy --rival eqx --rows 64x32 --dtype float32 --work forward"
    command = [sys.executable, "-m", "benchmarks", "--quick", *chosen.split(), "--out", tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    results = json.loads((tmp_path / "results.json").read_text())
    (row,) = results["speed"]
    assert (row["layer"], row["rows"], row["rival"]) == ("LayerNorm", "64x32", "eqx")
    assert row["rounds"] >= 3
    for name in ("ours_ms", "rival_ms", "ratio"):
        low, high = row[f"{name}_quartiles"]
        assert 0 < low <= row[name] <= high
    assert {r["rival"] for r in results["accuracy"]} == {"ours", "eqx"}

    tables = (tmp_path / "tables.md").read_text()
    assert tables == f"# Benchmarks\n\n{report(results)}"
    assert report(results) in done.stdout
    cell = f"**{row['ratio']:.2f}**" if row["ratio"] > 1.05 else f"{row['ratio']:.2f}"
    assert f"| LayerNorm 64x32 | float32 | {row['ours_ms']:.3g} ms | {cell} |" in tables
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_script_for_a_gpu_runs_at_small_sizes(tmp_path):
    """Its numbers are right, every row is there and nothing failed; no time is looked at."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry", "--out", tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["failed"] == results["left_out"] == []
    assert all(error["right"] for error in results["errors"])
    rivals = {row["rival"] for row in results["rows"]}
    assert {"ours", "kernel", "eqx"} <= rivals
    # Three layers, two dtypes, both ways; and the decoder of three of them.
    singles = sum(row["work"] != "decoder" for row in results["rows"])
    assert singles >= 12 * len(rivals - {"tokamax"}) and len(results["rows"]) - singles == 6
    assert all(row["share"] > 0 for row in results["rows"] if row["work"] != "decoder")
    page = (tmp_path / "tables.md").read_text()
    assert "A dry run: its times say nothing." in page and page in done.stdout


def speed_row(rival, ratio, **changes):
    case = {"layer": "LayerNorm", "rows": "4096x768", "dtype": "float32", "work": "backward"}
    return case | {"rival": rival, "ratio": ratio, "ours_ms": 1.0} | changes


def results_of(*speed):
    return {"speed": list(speed), "bytes": [], "compile": [], "accuracy": []}


def test_ours_is_judged_by_the_fastest_jax_library():
    rows = speed_row("eqx", 0.5), speed_row("flax", 0.7), speed_row("torch", 0.9)
    against_jax, against_torch = outcomes(results_of(*rows))
    assert "flax" in against_jax.where
    assert (against_jax.value, against_jax.verdict) == (0.7, "missed")
    assert (against_torch.value, against_torch.verdict) == (0.9, "met")


@pytest.mark.parametrize("ratio, verdict", [(1.0, "met"), (1.04, "within noise"), (1.06, "missed")])
def test_noise_is_allowed_where_it_is_named(ratio, verdict):
    (outcome,) = outcomes(results_of(speed_row("eqx", ratio, work="forward")))
    assert outcome.verdict == verdict


def test_an_error_that_is_not_finite_misses():
    at = {"rival": "ours", "at": "scale", "value": 1e30}
    row = at | {"y": None, "dx": 0.0, "dweight": 0.0, "dbias": 0.0}
    (outcome,) = outcomes(results_of() | {"accuracy": [row]})
    assert (outcome.value, outcome.verdict) == (math.inf, "missed")
    assert "scale 1e+30 | not finite" in targets([outcome])


def test_the_page_shows_its_results():
    page = PAGE.read_text()
    assert page.count(BEGIN) == 1 and filled(page) == page
    assert all(f"({path.relative_to(PAGE.parent)})" in page for path in PAGE_FILES.glob("*.png"))


# ---- Several machines


def run_on(cpu, *speed, accuracy=()):
    env = {"date": "2026-01-01", "cores": 2, "cpu": cpu, "python": "3.11", "versions": {"jax": "1"}}
    about = {"minutes": 1, "interrupted": False, "left_out": [], "failed": []}
    return results_of(*speed) | about | {"environment": env, "accuracy": list(accuracy)}


@pytest.mark.parametrize(
    "cpu, name",
    [
        ("Intel(R) Xeon(R) Processor", "Intel Xeon"),
        ("AMD EPYC", "AMD EPYC"),
        ("Intel(R) Core(TM) i7-9750H CPU @ 2.60GHz", "Intel Core i7-9750H"),
    ],
)
def test_name_of_a_machine(cpu, name):
    assert machine(run_on(cpu)) == name


FOLDED = "<summary>{}</summary>"


@pytest.mark.slow
def test_machines_stand_beside_each_other():
    exact = {
        "rival": "ours",
        "at": "scale",
        "value": 1.0,
        "y": 0,
        "dx": 0,
        "dweight": 0,
        "dbias": 0,
    }
    ratios = {"64x128": 1.3, "4096x768": 0.2, "16384x1024": 0.4}
    rows = [speed_row("eqx", ratio, rows=shape) for shape, ratio in ratios.items()]
    one = run_on("One", *rows, accuracy=[exact])
    other = run_on("Other", *rows[:1], speed_row("eqx", 0.7), accuracy=[exact])
    text = report(one, other)

    # Over the shapes that both have, without the small one.
    assert "| LayerNorm, forward and backward | float32 | 0.20 | 0.70 |  |  |" in text
    assert "| LayerNorm, forward and backward | float32 | 0.20 to 0.40 |  |" in report(one)
    # What differs stands twice, by name; what is the same, once.
    section = text.split("## Forward and backward")[1].split("\n## ")[0]
    places = [section.index(part) for part in (FOLDED.format("One"), "0.20")]
    places += [section.index(part) for part in (FOLDED.format("Other"), "**0.70**")]
    assert places == sorted(places)
    assert text.count("y, at scale") == 1
    assert FOLDED.format("One") not in report(one)


@pytest.mark.slow
def test_a_run_takes_the_place_of_its_processors(tmp_path, monkeypatch):
    page, files = tmp_path / "page.md", tmp_path / "files"
    monkeypatch.setattr("benchmarks.__main__.PAGE", page)
    monkeypatch.setattr("benchmarks.__main__.PAGE_FILES", files)
    page.write_text(f"before\n{BEGIN}\n{END}\nafter\n")

    def add(*runs):
        paths = [tmp_path / f"{i}.json" for i in range(len(runs))]
        for path, results in zip(paths, runs, strict=True):
            path.write_text(json.dumps(results))
        main(["--page", *map(str, paths)])
        return page.read_text()

    assert "0.30" in add(run_on("One CPU", speed_row("eqx", 0.3)))
    both = add(run_on("One CPU", speed_row("eqx", 0.4)), run_on("Other", speed_row("eqx", 0.5)))
    assert both.startswith("before") and both.endswith("after\n")
    assert "0.30" not in both and "| 0.40 | 0.50 |" in both
    assert {path.name for path in files.iterdir()} == {
        f"{name}.{kind}" for name in ("one", "other") for kind in ("json", "png")
    }
    assert all(f"(files/{name}.png)" in both for name in ("one", "other"))
