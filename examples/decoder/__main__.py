"""Trains a decoder on the letters of names, with the right norm or with one that reads the future.

    python -m examples.decoder                          # census surnames, some minutes
    python -m examples.decoder --norm all               # three norms: a table and a figure
    python -m examples.decoder --data FILE ... --quick  # your own names, in seconds
    python -m examples.decoder --mesh 4x2               # on eight devices, or a CPU as if it were
    python -m examples.decoder --memory                 # what a step takes, nothing is trained

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
from typing import NamedTuple

if not __package__:  # run as a file, not with -m
    sys.path.insert(0, str(Path(__file__).parents[2]))
    __package__ = "examples.decoder"

if not all(map(importlib.util.find_spec, ("matplotlib", "optax", "tqdm"))):
    sys.exit('training needs matplotlib, optax and tqdm: pip install "eqx-norms[examples]"')

import equinox as eqx
import jax

from eqx_norms.causality import CausalityError, CausalityReport

from ..arguments import folder_path
from ..names_data import read_names
from .cache import writer
from .checkpoint import State, load
from .data import Data, batch_at, split
from .instead import INSTEAD
from .memory import memory_table
from .mesh import Mesh, check_fits, make_mesh
from .model import LAYERS, NORMS
from .plot import draw
from .report import legend, outcome, some_names, table
from .sample import Bigram
from .settings import PLACEMENTS, QUICK, Settings
from .train import check, start, train
from .watching import Watching

QUICK_SAYS_LITTLE = """\
--quick shows that everything runs, and no more: after so short a training all norms are near the
bigram, and the leaking ones may even be judged better. Train without it to compare them."""


def parser() -> argparse.ArgumentParser:
    """Flags named as a field of `Settings` have its default."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.decoder", description=(__doc__ or "").split("\n", 1)[0]
    )
    add = parser.add_argument
    axes = f"its axes, all {len(NORMS)} of these, or what stands in its place: {', '.join(INSTEAD)}"
    choices = [*NORMS, "all", *INSTEAD]
    add("--norm", nargs="+", default=["per-token"], choices=choices, metavar="NORM", help=axes)
    add("--norms", choices=[*LAYERS], help="whose norm layers; by default ours")
    add("--placement", choices=PLACEMENTS, help="of the norms in a block; by default pre")
    add("--data", nargs="+", default=[], metavar="FILE", help="a name a line, or CSV")
    add("--spanish", action="store_true", help="clean the names as Spanish surnames")
    for field, text in (
        ("width", "features of a token"),
        ("layers", "blocks"),
        ("context", "letters of the longest name, and one more"),
        ("steps", "training steps"),
        ("batch", "names in a step"),
        ("seed", "of parameters, order of names, and samples"),
    ):
        add(f"--{field}", type=int, help=f"{text}; by default {getattr(Settings, field)}")
    add("--rate", type=float, help=f"the highest learning rate; by default {Settings.rate}")
    add("--bf16", action="store_true", default=None, help="bfloat16 activations")
    add("--remat", action="store_true", default=None, help="recompute blocks in the backward")
    add("--mesh", help="devices, as 8 or 4x2: the batch over 4, the features over 2")
    add("--memory", action="store_true", help="print what a training step takes, and end")
    add("--watch", action="store_true", help="look inside every 100 steps, and draw it")
    add("--quick", action="store_true", help="a small model, seconds; too little to compare")
    add("--out", type=folder_path, default="decoder", help="for checkpoints and the figure")
    add("--resume", action="store_true", help="go on from the checkpoints in --out")
    return parser


def settings_of(args: argparse.Namespace) -> list[Settings]:
    """One for each norm, per-token first if it is there: the others are judged by it."""
    fields = {field.name for field in dataclasses.fields(Settings)} - {"norm"}
    given = {key: v for key, v in vars(args).items() if key in fields and v is not None}
    chosen = {**(QUICK if args.quick else {}), **given}
    wanted = {*args.norm, *(NORMS if "all" in args.norm else ())}
    norms = [norm for norm in (*NORMS, *INSTEAD) if norm in wanted]
    return [Settings(norm=norm, **chosen) for norm in norms]


class Run(NamedTuple):
    settings: Settings
    state: State
    path: Path  # of its checkpoint
    report: CausalityReport | None = None


def mesh_of(args: argparse.Namespace) -> Mesh | None:
    """Before anything is computed: JAX makes its devices once."""
    if args.mesh is None:
        return None
    mesh = make_mesh(args.mesh)
    check_fits(mesh, settings_of(args)[0])
    return mesh


def prepared(args: argparse.Namespace) -> tuple[list[Run], Data]:
    """What to train, from where on, and on which names."""
    chosen = settings_of(args)
    names = read_names(args.data, spanish=args.spanish)
    few = max(1, len(names) // 5000) if args.quick else 1
    data = split(names[::few], chosen[0].context)
    batch_at(data, 0, size=chosen[0].batch, seed=0)  # so that what is too large says so now
    args.out.mkdir(parents=True, exist_ok=True)
    runs = []
    for settings in chosen:
        state = State(*start(settings, len(data.vocabulary)), 0, ())
        runs.append(Run(settings, state, args.out / f"{settings.norm}.eqx"))
    return (resumed(runs, data) if args.resume else runs), data


def resumed(runs: Sequence[Run], data: Data) -> list[Run]:
    """Each from its checkpoint. Of several runs, the last may not have begun yet."""
    begun = [run.path.exists() for run in runs]
    begun[0] |= not any(begun)  # or none has: an error
    return [
        run._replace(state=load(run.path, run.state, run.settings, data)) if there else run
        for run, there in zip(runs, begun, strict=True)
    ]


def describe(run: Run, data: Data) -> None:
    settings, names = run.settings, len(data.train) + len(data.held_out)
    params = sum(leaf.size for leaf in jax.tree.leaves(eqx.filter(run.state.model, eqx.is_array)))
    print(f"""\
names     {names:,}, {len(data.held_out):,} of them held out; {len(data.vocabulary)} symbols
model     {settings.layers} blocks of width {settings.width}, {params:,} parameters
training  {settings.steps} steps of {settings.batch} names""")
    if data.too_long:
        longest = settings.context - 1
        print(f"left out  {data.too_long:,} names of over {longest} letters: see --context")


def checked_and_trained(run: Run, data: Data, mesh: Mesh | None, watch: bool) -> Run:
    print(f"\n{run.settings.norm}")
    began = time.perf_counter()
    report = check(run.settings, run.state.model, data)
    checked = time.perf_counter()
    what = "READS THE FUTURE" if report.leak else "does not read the future"
    how = "proved" if report.status == "proved" else f"by {report.edits} edits"
    print(f"  check     {checked - began:.1f} s: {what}, {how}", flush=True)
    watching = Watching(run.settings, run.path, run.state.step, mesh) if watch else None
    look = watching or (lambda *_: None)
    state = train(run.settings, data, run.state, run.path, mesh=mesh, look=look)
    step, loss = state.history[-1]
    seconds = time.perf_counter() - checked
    print(f"  training  {seconds:.1f} s: held-out loss {loss:.4f} at step {step}", flush=True)
    if watching is not None:
        print(f"  inside    {watching.draw()}", flush=True)
    return run._replace(state=state, report=report)


def summary(runs: Sequence[Run], data: Data, figure: Path) -> None:
    """The table, some names, and the figure."""
    settings, state, *_ = runs[0]
    how = {"seed": settings.seed, "judge": state.model if settings.norm == "per-token" else None}
    outcomes = [outcome("bigram", Bigram(data.train, len(data.vocabulary)), data, **how)]
    for settings, state, _, report in runs:
        write, said = writer(state.model, data)
        print(f"\n{settings.norm} {said}", flush=True)
        seen = {"verdict": report, "history": state.history, "write": write}
        outcomes.append(outcome(settings.norm, state.model, data, **seen, **how))
    print(f"\n{table(outcomes, data)}\n\n{legend(outcomes)}")
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
        if args.memory:
            print(memory_table(settings_of(args)[0]))
            return 0
        mesh = mesh_of(args)
        runs, data = prepared(args)
    except (ValueError, ImportError, OSError) as error:
        commands.error(str(error))
    describe(runs[0], data)
    for number, run in enumerate(runs):
        try:
            runs[number] = run = checked_and_trained(run, data, mesh, args.watch)
        except (CausalityError, FloatingPointError) as error:
            print(f"\n{error}")
            return 1
        if run.state.step < run.settings.steps:
            again = shlex.join([*argv, *([] if args.resume else ["--resume"])])
            print(f"\nStopped at step {run.state.step} and saved. To go on:")
            print(f"  {commands.prog} {again}")
            return 130
    summary(runs, data, args.out / "decoder.png")
    if args.quick:
        print(f"\n{QUICK_SAYS_LITTLE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
