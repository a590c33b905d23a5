"""Compiles norms, ours and others', for an H100 and TPUs, and reads what they cost.

python -m benchmarks.accelerators            # everything
python -m benchmarks.accelerators --quick    # a minute or two
python -m benchmarks.accelerators --only models --platform h100 --layer LayerNorm
python -m benchmarks.accelerators --resume   # goes on where an interrupted run has stopped
python -m benchmarks.accelerators --page     # no compiling: the results in --out go into the page
python -m benchmarks.accelerators --page one.json other.json    # ... these, of several versions

No device is needed, and nothing is timed. The packages: `pip install -e ".[accelerators]"`.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from concurrent.futures import as_completed
from pathlib import Path

from tqdm import tqdm

from ..__main__ import ROOT, one_or_more, shapes
from .._cases import LAYERS
from .._child import children
from .._environment import cores, environment
from .._page import dumps, fill, keep
from ._cases import (
    DTYPES,
    LAYER_ROWS,
    LIBRARIES,
    PLATFORMS,
    SECTIONS,
    Case,
    Split,
    layer_cases,
    model_cases,
    split_cases,
)
from ._report import name, report

PAGE = ROOT / "docs" / "accelerators.md"
PAGE_FILES = ROOT / "docs" / "images" / "accelerators"
BEGIN = "<!-- written by python -m benchmarks.accelerators --page -->"
END = "<!-- end of it -->"
QUICK = {
    "platform": ["h100"],
    "layer": ["LayerNorm"],
    "rows": ["4096x768"],
    "library": ["ours", "eqx"],
}
PACKAGES = ("jax", "jaxlib", "jax-cuda12-plugin", "libtpu", "equinox", "flax")


def main(argv: list[str] | None = None) -> None:
    """Compiles, prints the tables, and writes results.json, tables.md and ratios.png."""
    to = options(argv)
    if to.page is not None:
        return write_page(to.page or [to.out / "results.json"])
    started = time.perf_counter()
    results = {"environment": environment(PACKAGES), "minutes": 0}
    results |= {section: [] for section in SECTIONS}
    if to.resume:
        results |= _left(to.out / "results.json", results["environment"])
    results |= {"interrupted": True, "failed": []}  # until it has come to its end
    before = results["minutes"]
    to.out.mkdir(parents=True, exist_ok=True)
    try:
        for _ in measured(to, results):
            results["minutes"] = round(before + (time.perf_counter() - started) / 60, 1)
            (to.out / "results.json").write_text(dumps(results))
        results["interrupted"] = False
    except KeyboardInterrupt:
        pass
    finally:
        write(results, to.out)
    print(f"\n{report(results)}")
    print(f"Wrote {', '.join(sorted(path.name for path in to.out.iterdir()))} to {to.out}")
    if results["failed"]:
        sys.exit(f"{len(results['failed'])} programs failed; the end of tables.md says which.")


# ---- What was asked for.


def options(argv):
    parser = argparse.ArgumentParser(
        "python -m benchmarks.accelerators",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    everything = {
        "only": SECTIONS,
        "platform": tuple(PLATFORMS),
        "library": LIBRARIES,
        "layer": LAYERS,
        "dtype": DTYPES,
    }
    for option, choices in everything.items():
        parser.add_argument(f"--{option}", type=one_or_more(choices), help=", ".join(choices))
    parser.add_argument("--rows", type=shapes, help=f"of one layer; default {','.join(LAYER_ROWS)}")
    parser.add_argument("--quick", action="store_true", help="one platform, LayerNorm, one shape")
    parser.add_argument("--resume", action="store_true", help="keep what --out has already")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "benchmarks" / "results" / "accelerators"
    )
    parser.add_argument(
        "--page", type=Path, nargs="*", metavar="JSON", help="write the page, compile nothing"
    )
    to = parser.parse_args(argv)
    for option, default in (
        everything | {"rows": LAYER_ROWS} | (QUICK if to.quick else {})
    ).items():
        if getattr(to, option) is None:
            setattr(to, option, list(default))
    return to


def _left(path: Path, environment: dict) -> dict:
    """What an earlier run has written, with the same packages."""
    if not path.exists():
        return {}
    results = json.loads(path.read_text())
    if (theirs := results["environment"]["versions"]) != environment["versions"]:
        sys.exit(f"{path} is of other versions, {theirs}: take another --out, or no --resume.")
    return results | {"environment": environment}


# ---- Compiling.


def measured(to, results: dict) -> Iterator[Case | Split]:
    """Goes through all programs, as many at a time as there are cores; each as it is done."""
    todo = [task for task in tasks(to) if not _is_there(results[task[0]], task[2])]
    with (
        children(cores()) as submit,
        tqdm(total=len(todo), unit="program", dynamic_ncols=True) as bar,
    ):
        waiting = {submit(function, case): (section, case) for section, function, case in todo}
        for done in as_completed(waiting):
            section, case = waiting[done]
            bar.set_description(" ".join(filter(None, case)))
            try:
                results[section].append(done.result())
            except Exception as error:
                text = f"{type(error).__name__}: {str(error)[:300]}"
                results["failed"].append({"what": " ".join(case), "error": text})
            bar.update()
            yield case


def tasks(to) -> list[tuple[str, str, Case | Split]]:
    """`(section, function, case)` of all that is compiled."""
    which = to.platform, to.library, to.layer, to.dtype
    found = [("layers", "accelerators._compile.cost_of", c) for c in layer_cases(*which, to.rows)]
    found += [("models", "accelerators._compile.cost_of", c) for c in model_cases(*which)]
    found += [
        ("collectives", "accelerators._compile.collectives_of", c) for c in split_cases(*which[:2])
    ]
    return [task for task in found if task[0] in to.only]


def _is_there(rows: list[dict], case: Case | Split) -> bool:
    return any(case._asdict().items() <= row.items() for row in rows)


# ---- Writing.


def write(results: dict, out: Path) -> None:
    from ._plot import plot

    (out / "results.json").write_text(dumps(results))
    (out / "tables.md").write_text("# Accelerators\n\n" + report(results))
    plot(results, out / "ratios.png")


def write_page(files: list[Path]) -> None:
    """Puts the runs into docs/accelerators.md, each in the place of one with the same jax."""
    from ._plot import plot

    keep(files, PAGE_FILES, name, plot)
    PAGE.write_text(filled(PAGE.read_text()))
    print(f"Wrote {PAGE} and {PAGE_FILES}")


def filled(page: str) -> str:
    caption = lambda results: f"Our cost over eqx.nn's, {name(results)}"
    return fill(page, (BEGIN, END), PAGE_FILES, PAGE.parent, caption, report)


if __name__ == "__main__":
    main()
