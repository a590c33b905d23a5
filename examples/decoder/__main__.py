"""Trains a decoder on the letters of names, with the right norm or with one that reads the future.

    python -m examples.decoder                          # census surnames, some minutes
    python -m examples.decoder --norm all               # three norms: a table and a figure
    python -m examples.decoder --data FILE ... --quick  # your own names, in seconds

Ctrl-C saves; the same command with --resume goes on, bit for bit as if nothing had happened.
"""

import argparse
import dataclasses
import importlib.util
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a file, not with -m
    sys.path.insert(0, str(Path(__file__).parents[2]))
    __package__ = "examples.decoder"

if not all(map(importlib.util.find_spec, ("matplotlib", "optax", "tqdm"))):
    sys.exit('training needs matplotlib, optax and tqdm: pip install "eqx-norms[examples]"')

import equinox as eqx
import jax

from eqx_norms.causality import CausalityError, CausalityReport

from ..names_data import read_names
from .checkpoint import State, load
from .data import Data, batch_at, split
from .model import LAYERS, NORMS
from .plot import draw
from .report import LEGEND, bigram, outcome, some_names, table
from .settings import QUICK, Settings
from .train import check, start, train


def parser() -> argparse.ArgumentParser:
    """Flags named as a field of `Settings` have its default."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.decoder", description=(__doc__ or "").split("\n", 1)[0]
    )
    add = parser.add_argument
    add("--norm", nargs="+", default=["per-token"], choices=[*NORMS, "all"], help="its axes")
    add("--norms", choices=[*LAYERS], help="whose norm layers; by default ours")
    add("--data", nargs="+", default=[], metavar="FILE", help="a name a line, or CSV")
    add("--spanish", action="store_true", help="clean the names as Spanish surnames")
    for field, text in (
        ("width", "features of a token"),
        ("layers", "blocks"),
        ("context", "letters of the longest name, and one"),
        ("steps", "training steps"),
        ("batch", "names in a step"),
        ("seed", "of parameters, order of names, and samples"),
    ):
        add(f"--{field}", type=int, help=f"{text}; by default {getattr(Settings, field)}")
    add("--rate", type=float, help=f"the highest learning rate; by default {Settings.rate}")
    add("--bf16", action="store_true", default=None, help="bfloat16 activations")
    add("--remat", action="store_true", default=None, help="recompute blocks in the backward")
    add("--quick", action="store_true", help="a small model, seconds")
    add("--out", type=Path, default=Path("decoder"), help="for checkpoints and the figure")
    add("--resume", action="store_true", help="go on from the checkpoints in --out")
    return parser


def settings_of(args: argparse.Namespace) -> list[Settings]:
    """One for each norm, in the order of `NORMS`: the others are judged by the first."""
    fields = {field.name for field in dataclasses.fields(Settings)} - {"norm"}
    given = {key: v for key, v in vars(args).items() if key in fields and v is not None}
    chosen = {**(QUICK if args.quick else {}), **given}
    norms = NORMS if "all" in args.norm else [norm for norm in NORMS if norm in args.norm]
    return [Settings(norm=norm, **chosen) for norm in norms]


def checkpoint_path(out: Path, settings: Settings) -> Path:
    return out / f"{settings.norm}.eqx"


def prepared(args: argparse.Namespace) -> tuple[list[Settings], Data, list[State]]:
    """What to run, on which names, and from where on."""
    runs = settings_of(args)
    names = read_names(args.data, spanish=args.spanish)
    few = max(1, len(names) // 5000) if args.quick else 1
    data = split(names[::few], runs[0].context)
    batch_at(data, 0, size=runs[0].batch, seed=runs[0].seed)  # or an error, before any work
    states = [State(*start(settings, len(data.vocabulary)), 0, ()) for settings in runs]
    args.out.mkdir(parents=True, exist_ok=True)
    if args.resume:
        paths = [checkpoint_path(args.out, settings) for settings in runs]
        # Of several runs, the last may not have begun.
        begun = [path.exists() for path in paths] if any(p.exists() for p in paths) else [True]
        for number, there in enumerate(begun):
            if there:
                states[number] = load(paths[number], states[number], runs[number], data)
    return runs, data, states


def describe(settings: Settings, data: Data, state: State) -> None:
    names = len(data.train) + len(data.held_out)
    params = sum(leaf.size for leaf in jax.tree.leaves(eqx.filter(state.model, eqx.is_array)))
    print(f"""\
names     {names:,}, of which {len(data.held_out):,} held out; {len(data.vocabulary)} symbols
model     {settings.layers} blocks of width {settings.width}, {params:,} parameters
training  {settings.steps} steps of {settings.batch} names, up to {settings.context - 1} letters""")
    if data.too_long:
        print(f"left out  {data.too_long:,} names that are longer: --context takes them in")


def checked_and_trained(
    settings: Settings, data: Data, state: State, out: Path
) -> tuple[CausalityReport, State]:
    print(f"\n{settings.norm}")
    began = time.perf_counter()
    report = check(settings, state.model, data)
    checked = time.perf_counter()
    what = "READS THE FUTURE" if report.leak else "does not read the future"
    print(f"  check     {what}; {report.edits} edits, {checked - began:.1f} s", flush=True)
    state = train(settings, data, state, checkpoint_path(out, settings))
    step, loss = state.history[-1]
    print(
        f"  training  to step {state.step}, {time.perf_counter() - checked:.1f} s; "
        f"held-out loss {loss:.4f} at step {step}",
        flush=True,
    )
    return report, state


def summary(
    runs: Sequence[Settings], data: Data, states: Sequence[State], reports, figure: Path
) -> None:
    """The table, some names, and the figure."""
    judge = states[0].model if runs[0].norm == "per-token" else None
    how = {"seed": runs[0].seed, "judge": judge}
    outcomes = [bigram(data, **how)] + [
        outcome(run.norm, state.model, data, verdict=report, history=state.history, **how)
        for run, state, report in zip(runs, states, reports, strict=True)
    ]
    print(f"\n{table(outcomes, data)}\n\n{LEGEND}")
    if judge is None:
        print("judged     needs the per-token model: give --norm all")
    for one in outcomes:
        print(f"\n{one.norm} writes\n  {', '.join(some_names(one, data))}")
    draw(outcomes, data, figure)
    print(f"\nfigure {figure.resolve()}")


def main(argv: Sequence[str] | None = None) -> int:
    """0 at the end of training, 1 if it cannot be trained, 130 after Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    commands = parser()
    args = commands.parse_args(argv)
    try:
        runs, data, states = prepared(args)
    except (ValueError, ImportError, OSError) as error:
        commands.error(str(error))
    describe(runs[0], data, states[0])
    reports = []
    for number, settings in enumerate(runs):
        try:
            report, state = checked_and_trained(settings, data, states[number], args.out)
        except (CausalityError, FloatingPointError) as error:
            print(f"\n{error}")
            return 1
        if state.step < settings.steps:
            again = shlex.join([*argv, *([] if args.resume else ["--resume"])])
            print(f"\nStopped and saved. To go on:\n  {commands.prog} {again}")
            return 130
        states[number] = state
        reports.append(report)
    summary(runs, data, states, reports, args.out / "leak.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
