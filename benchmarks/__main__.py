"""Compares eqx_norms with what a user would pick instead: speed, bytes, compile time, accuracy.

python -m benchmarks            # everything: about a quarter of an hour on two idle cores
python -m benchmarks --quick    # a minute or two
python -m benchmarks --only speed --rival eqx,torch --rows 4096x768 --dtype bfloat16
python -m benchmarks --page     # no measuring: the results in --out go into docs/benchmarks.md
python -m benchmarks --page one.json other.json     # ... these results, of several machines
"""

import argparse
import re
import sys
import time
from pathlib import Path

from tqdm import tqdm

from ._cases import (
    DTYPES,
    JAX_RIVALS,
    LAYERS,
    MODEL_DTYPES,
    NAMES,
    RIVALS,
    ROWS,
    SECTIONS,
    WORKS,
    is_installed,
    speed_cases,
)
from ._child import child
from ._environment import environment
from ._page import dumps, fill, keep
from ._report import machine, report

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "benchmarks.md"
PAGE_FILES = ROOT / "docs" / "images" / "benchmarks"
BEGIN, END = "<!-- written by python -m benchmarks --page -->", "<!-- end of it -->"
QUICK = {
    "layer": ["LayerNorm"],
    "rows": ["64x128", "4096x768"],
    "dtype": ["float32", "bfloat16"],
    "work": ["forward", "backward"],
}


def main(argv: list[str] | None = None) -> None:
    """Measures, prints the tables, and writes results.json, tables.md and speed.png."""
    to = options(argv)
    if to.page is not None:
        return write_page(to.page or [to.out / "results.json"])
    started = time.perf_counter()
    results = {"environment": environment(), "interrupted": False, "failed": []}
    results |= {section: [] for section in SECTIONS}
    results["left_out"] = [rival for rival in to.rival if not is_installed(rival)]
    try:
        measure(to, results)
    except KeyboardInterrupt:
        results["interrupted"] = True
    finally:
        results["minutes"] = round((time.perf_counter() - started) / 60, 1)
        write(results, to.out)
    print(f"\n{report(results)}")
    print(f"Wrote {', '.join(sorted(path.name for path in to.out.iterdir()))} to {to.out}")
    if results["failed"]:
        sys.exit(f"{len(results['failed'])} rows failed; the end of tables.md says which.")


# ---- What was asked for.


def options(argv):
    parser = argparse.ArgumentParser(
        "python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for name, choices in (
        ("only", SECTIONS),
        ("rival", RIVALS),
        ("layer", LAYERS),
        ("dtype", DTYPES),
        ("work", tuple(WORKS)),
    ):
        parser.add_argument(f"--{name}", type=one_or_more(choices), help=", ".join(choices))
    parser.add_argument("--rows", type=shapes, help=f"default {','.join(ROWS)}")
    parser.add_argument("--seconds", type=float, help="for a row of the speed tables, about")
    parser.add_argument("--quick", action="store_true", help="fewer rows, fewer rounds")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument(
        "--page", type=Path, nargs="*", metavar="JSON", help="write the page, measure nothing"
    )
    to = parser.parse_args(argv)
    everything = {"layer": LAYERS, "rows": ROWS, "dtype": DTYPES, "work": tuple(WORKS)}
    defaults = {"only": SECTIONS, "rival": RIVALS} | everything | (QUICK if to.quick else {})
    for name, default in defaults.items():
        if getattr(to, name) is None:
            setattr(to, name, list(default))
    to.seconds = to.seconds or (0.2 if to.quick else 0.4)
    return to


def one_or_more(choices):
    def parse(text):
        for one in (chosen := text.split(",")):
            if one not in choices:
                raise argparse.ArgumentTypeError(f"{one!r} is none of {', '.join(choices)}")
        return chosen

    return parse


def shapes(text):
    for shape in (chosen := text.split(",")):
        if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", shape):
            raise argparse.ArgumentTypeError(f"{shape!r} is no shape such as 4096x768")
    return chosen


# ---- Measuring.


def measure(to, results: dict) -> None:
    """Goes through all tasks, rival by rival, each in a process of its own."""
    plan = {rival: tasks(to, rival) for rival in ("ours", *to.rival) if is_installed(rival)}
    with tqdm(total=sum(map(len, plan.values())), unit="row", dynamic_ncols=True) as bar:
        for rival, todo in plan.items():
            with child() as call:
                for section, what, function, args in todo:
                    bar.set_description(f"{NAMES[rival]}, {what}")
                    try:
                        results[section] += call(function, *args)
                    except Exception as error:
                        text = f"{type(error).__name__}: {str(error)[:300]}"
                        results["failed"].append({"rival": rival, "what": what, "error": text})
                    bar.update()


def tasks(to, rival: str) -> list[tuple]:
    """`(section, description, function, arguments)` of all that is measured of one rival."""
    found = []
    if rival != "ours":
        for case in speed_cases(rival, to.layer, to.rows, to.dtype, to.work):
            found.append(("speed", " ".join(case), "_speed.speed", (rival, case, to.seconds)))
    for dtype in [dtype for dtype in MODEL_DTYPES if dtype in to.dtype]:
        if rival in JAX_RIVALS:
            rounds = 3 if to.quick else 7
            found.append(
                ("compile", f"compile {dtype}", "_bytes.compile_times", (rival, dtype, rounds))
            )
        if rival in ("ours", *JAX_RIVALS):
            found.append(("bytes", f"bytes {dtype}", "_bytes.bytes_of", (rival, dtype)))
    if rival != "copy":
        for name in [rival, "flax, two-pass"] if rival == "flax" else [rival]:
            found.append(("accuracy", "accuracy", "_accuracy.accuracy_of", (name,)))
    return [task for task in found if task[0] in to.only]


# ---- Writing.


def write(results: dict, out: Path) -> None:
    from ._plot import plot

    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(dumps(results))
    (out / "tables.md").write_text("# Benchmarks\n\n" + report(results))
    plot(results, out / "speed.png")


def write_page(files: list[Path]) -> None:
    """Puts the runs into docs/benchmarks.md, each in the place of one on the same processor."""
    from ._plot import plot

    keep(files, PAGE_FILES, lambda results: machine(results).lower(), plot)
    PAGE.write_text(filled(PAGE.read_text()))
    print(f"Wrote {PAGE} and {PAGE_FILES}")


def filled(page: str) -> str:
    caption = lambda results: f"Our time over theirs on {machine(results)}, a dot for each library"
    return fill(page, (BEGIN, END), PAGE_FILES, PAGE.parent, caption, report)


if __name__ == "__main__":
    main()
