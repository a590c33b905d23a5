"""What the sweeps of published decoders share: questions, families in processes, the table."""

import argparse
import concurrent.futures
import contextlib
import importlib.metadata
import io
import json
import multiprocessing
import os
import pathlib
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

T, PIECE = 12, 5
FIRST, LAST = 4, 63  # the ids of the texts
IDS = range(FIRST, LAST + 1)
GOOD = ("clear", "clear (float noise)", "same bits", "rounding", "imprecise")


class Check(NamedTuple):
    """A question, and whether a report's answer is the one to be hoped for."""

    title: str
    ask: Callable[[Any], Any]


def text(examples: int = 1, seed: int = 0, length: int = T) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(FIRST, LAST + 1, (examples, length))


def answers(family: str, built: Callable, checks: Sequence[Check], verbose: bool) -> dict[str, str]:
    """Of every check a word: ok, another status, an error's name, - where it cannot be asked."""
    try:
        with quiet():
            decoder = built(family)
    except Exception as error:
        return {"not built": _words(error)}
    found = {}
    for number, check in enumerate(checks):
        try:
            with quiet():
                report = check.ask(decoder)
        except Exception as error:
            answer, told = type(error).__name__, str(error)
            if "different outputs for the same x" in told:
                answer = "differs from itself"
        else:
            answer = "-" if report is None else report.status
            answer, told = ("ok" if answer in GOOD else answer), str(report)
        found[str(number)] = answer
        if verbose and answer not in ("ok", "-"):
            print(f"\n{family}, {check.title}: {answer}\n{told}")
    return found


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:100]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


# In the table; any other word is the name of an error.
SIGNS = {"ok": "", "-": "-"} | dict.fromkeys(("leak", "different", "differs from itself"), "✗")


def table(
    found: dict[str, dict[str, str]],
    checks: Sequence[Check],
    why: dict[str, str],
    why_not_built: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[str]:
    """The page's: families that are as hoped for in a list, the others in rows, of those alike."""
    fine = [name for name, row in found.items() if {*row.values()} <= {"ok", "-"}]
    unbuilt = [name for name, row in found.items() if "not built" in row]
    yield f"Everything that can be asked holds in {len(fine)}: {', '.join(fine)}."
    yield ""
    yield from (f"{n}. {check.title}" for n, check in enumerate(checks, 1))
    yield ""
    yield "| family | " + " | ".join(map(str, range(1, 1 + len(checks)))) + " | |"
    yield "|---|" + "---|" * (len(checks) + 1)
    alike: dict[tuple[str, ...], list[str]] = {}
    for name in found.keys() - {*fine, *unbuilt}:
        # By the number of the check: files may have these in another order.
        words = (found[name][str(number)] for number in range(len(checks)))
        alike.setdefault((*words, why.get(name, "")), []).append(name)
    for names, row in sorted((sorted(names), row) for row, names in alike.items()):
        signs = (SIGNS.get(word, "E") for word in row[:-1])
        yield f"| {', '.join(names)} | " + " | ".join(signs) + f" | {row[-1]} |"
    for name in unbuilt:
        yield ""
        yield f"Not built: {name}, {why_not_built.get(name, found[name]['not built'])}."


def parser(words: str | None, names: Iterable[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(words or "").splitlines()[0])
    add = parser.add_argument
    add("--family", action="append", choices=sorted(names), metavar="FAMILY")
    add("--json", type=pathlib.Path, help="keep the answers, and go on from there")
    add("--against", type=pathlib.Path, help="answers to compare with")
    add("--jobs", type=int, default=os.cpu_count(), help="families at one time")
    return parser


def sweep(
    args: argparse.Namespace,
    names: Iterable[str],
    answers: Callable[[str, bool], dict[str, str]],
    prepare: Callable[[], None],
    table: Callable[[dict[str, dict[str, str]]], Iterable[str]],
    packages: Sequence[str],
) -> None:
    """All of the families, or those that are asked for; `prepare` runs in each process."""
    start = time.perf_counter()
    found = json.loads(args.json.read_text()) if args.json and args.json.exists() else {}
    asked = [one for one in args.family or sorted(names) if one not in found]
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(args.jobs, spawn, prepare) as pool:
        runs = {pool.submit(answers, one, bool(args.family)): one for one in asked}
        for run in tqdm(concurrent.futures.as_completed(runs), total=len(runs)):
            found[runs[run]] = run.result()
            if args.json:
                args.json.write_text(json.dumps(found, indent=1, sort_keys=True))
    found = dict(sorted(found.items()))
    took, processor = time.perf_counter() - start, sum(os.times()[:4])
    print(f"{took:.0f} s, {processor:.0f} s of processor time", *table(found), sep="\n")
    if args.against:
        before = json.loads(args.against.read_text())
        changed = [name for name, row in found.items() if before.get(name, row) != row]
        print(f"Others than in {args.against}: {', '.join(changed) or 'none'}.")
    print(*(f"{name} {importlib.metadata.version(name)}" for name in packages), sep=", ")
