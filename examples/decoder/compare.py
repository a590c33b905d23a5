"""Norms, what stands in their place, or where they stand: decoders trained over some seeds.

    python -m examples.decoder.compare                  # instead of a norm, at three rates
    python -m examples.decoder.compare --norm per-token --placement all
    python -m examples.decoder.compare --norm per-token dyt --rate 0.006 --steps 2500

Prints the held-out losses with their standard errors, and draws every seed. The seeds of a row are
trained side by side, in one program. Of the same seed are the matrices at the start and the order
of the names, so that differences between rows are taken seed by seed.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import matplotlib
import numpy as np
from jaxtyping import Float
from tqdm import tqdm

from ..arguments import figure_path
from ..names_data import read_names
from .data import Data, batch_at, split
from .instead import INSTEAD
from .model import NORMS, Decoder
from .settings import PLACEMENTS, Settings
from .train import evaluate, make_optimiser, make_step

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import MaxNLocator

SMALL = Settings(width=48, batch=64, steps=600)
AT_ONCE = 20  # steps in a call
# Of every row and learning rate the held-out loss of each seed, NaN where training diverged.
Losses = dict[tuple[str, float], Float[np.ndarray, " seeds"]]


def trained(settings: Settings, data: Data, seeds: int, bar: tqdm) -> Float[np.ndarray, " seeds"]:
    """The held-out losses; NaN where they are not below a guess's, log(symbols).

    A seed begins as the same seed of `python -m examples.decoder`.
    """
    symbols, optimiser = len(data.vocabulary), make_optimiser(settings)
    keys = jax.vmap(jr.key)(jnp.arange(seeds))
    models = eqx.filter_vmap(lambda key: Decoder(settings, symbols, key=key))(keys)
    opt_states = eqx.filter_vmap(optimiser.init)(eqx.filter(models, eqx.is_array))
    step = make_step(settings)

    @eqx.filter_jit
    @eqx.filter_vmap
    def go_on(model: Decoder, opt_state: Any, names):
        params, static = eqx.partition(model, eqx.is_array)

        def one(carry, names):
            model, opt_state, _ = step(eqx.combine(carry[0], static), carry[1], names)
            return (eqx.filter(model, eqx.is_array), opt_state), None

        (params, opt_state), _ = jax.lax.scan(one, (params, opt_state), names)
        return eqx.combine(params, static), opt_state

    for first in range(0, settings.steps, AT_ONCE):
        steps = range(first, min(first + AT_ONCE, settings.steps))
        batch = lambda seed, step: batch_at(data, step, size=settings.batch, seed=seed)
        names = np.array([[batch(seed, step) for step in steps] for seed in range(seeds)])
        models, opt_states = go_on(models, opt_states, names)
        jax.block_until_ready(opt_states)
        bar.update(len(steps))
    held_out = eqx.filter_vmap(evaluate, in_axes=(eqx.if_array(0), None))
    losses = np.asarray(held_out(models, data.held_out))
    return np.where(losses < np.log(symbols), losses, np.nan)


def mean_and_error(values: Float[np.ndarray, " seeds"]) -> tuple[float, float]:
    """And its standard error, of those that are finite; NaN for fewer than two."""
    found = values[np.isfinite(values)]
    if len(found) < 2:
        return np.nan, np.nan
    return found.mean(), found.std(ddof=1) / np.sqrt(len(found))


def diverged(values: Float[np.ndarray, " seeds"]) -> str:
    lost = np.sum(~np.isfinite(values))
    return f"{lost} of {len(values)} diverged" if lost else ""


def axes_of(losses: Losses) -> tuple[list[str], list[float]]:
    """Names and learning rates."""
    names, rates = ([*dict.fromkeys(keys)] for keys in zip(*losses, strict=True))
    return names, rates


def cell(values: Float[np.ndarray, " seeds"], sign: str = "") -> str:
    mean, error = mean_and_error(values)
    parts = [f"{mean:{sign}.4f} ± {error:.4f}"] if np.isfinite(error) else []
    return ", ".join([*parts, *filter(None, [diverged(values)])])


def tables(losses: Losses) -> str:
    """Markdown: the losses, and their differences from the first row, seed by seed."""
    (first, *others), rates = axes_of(losses)
    less = lambda name, rate: cell(losses[name, rate] - losses[first, rate], "+")
    return "\n\n".join(
        (
            table("held-out loss", [first, *others], rates, lambda *at: cell(losses[at])),
            table(f"less that of {first}", others, rates, less),
        )
    )


def table(title: str, names: Sequence[str], rates: Sequence[float], cell_at: Callable) -> str:
    lines = [
        f"| {title}, at a learning rate of | {' | '.join(f'{rate:g}' for rate in rates)} |",
        "|---|" + "---:|" * len(rates),
        *(f"| {name} | {' | '.join(cell_at(name, rate) for rate in rates)} |" for name in names),
    ]
    return "\n".join(lines)


def draw(losses: Losses, path: Path) -> None:
    names, rates = axes_of(losses)
    size = 1.2 + 2.35 * len(rates), 1 + 0.32 * len(names)
    figure, axes = plt.subplots(
        1, len(rates), figsize=size, dpi=150, sharex=True, sharey=True, squeeze=False
    )
    for ax, rate in zip(axes[0], rates, strict=True):
        for row, name in enumerate(names):
            values = losses[name, rate]
            mean, error = mean_and_error(values)
            ax.plot(values, np.full(len(values), row), "o", color="#56B4E9", ms=3.5, alpha=0.8)
            ax.errorbar(mean, row, xerr=error, color="#0072B2", marker="|", ms=11, capsize=3)
            if note := diverged(values):
                ax.annotate(note, (1, row), xycoords=("axes fraction", "data"), ha="right",
                            va="center", fontsize=8, color="#D55E00")  # fmt: skip
        ax.set_title(f"learning rate {rate:g}", loc="left", fontsize=9, weight="bold")
        ax.set_xlabel("held-out loss, nats a letter", loc="left", fontsize=9)
        ax.tick_params(labelsize=8)
        ax.xaxis.set_major_locator(MaxNLocator(5))
        ax.grid(axis="x", color="0.9")
        ax.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_yticks(range(len(names)), names)
    axes[0, 0].set_ylim(len(names) - 0.5, -0.5)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m examples.decoder.compare", description=(__doc__ or "").split("\n", 1)[0]
    )
    add = parser.add_argument
    norms, rates = ["per-token", *INSTEAD], [SMALL.rate, 0.02, 0.06]
    choices = [*NORMS, *INSTEAD]
    said = f"of {', '.join(choices)}; the first is what the others are compared with"
    add("--norm", nargs="+", default=norms, choices=choices, metavar="NORM", help=said)
    add("--placement", nargs="+", default=["pre"], choices=[*PLACEMENTS, "all"])
    add("--rate", nargs="+", type=float, default=rates, help="the highest learning rates")
    add("--seeds", type=int, default=5, help="by default %(default)s")
    for field in ("layers", "width", "batch", "steps"):
        add(f"--{field}", type=int, default=getattr(SMALL, field), help="by default %(default)s")
    add("--data", nargs="+", default=[], metavar="FILE", help="a name a line, or CSV")
    add("--out", type=figure_path, default="decoder/compare.png", help="the figure; %(default)s")
    return parser


def rows(norms: Sequence[str], placements: Sequence[str]) -> dict[str, dict[str, str]]:
    """What a row is called, by what differs, and the settings it has."""
    both = len(norms) > 1 and len(placements) > 1
    name = lambda norm, placement: (
        f"{norm}, {placement}" if both else placement if len(placements) > 1 else norm
    )
    return {name(n, p): {"norm": n, "placement": p} for n in norms for p in placements}


def main(argv: Sequence[str] | None = None) -> int:
    args = vars((commands := parser()).parse_args(argv))
    paths, out, seeds, rates = (args.pop(name) for name in ("data", "out", "seeds", "rate"))
    norms, placements = args.pop("norm"), args.pop("placement")
    placements = PLACEMENTS if "all" in placements else placements
    try:
        if seeds < 2:
            raise ValueError(f"a standard error needs at least 2 seeds, got {seeds}")
        chosen = {
            (name, rate): Settings(**row, rate=rate, **args)
            for name, row in rows(norms, placements).items()
            for rate in rates
        }
        first = next(iter(chosen.values()))
        data = split(read_names(paths), first.context)
        batch_at(data, 0, size=first.batch, seed=0)
    except (ValueError, ImportError, OSError) as error:
        commands.error(str(error))
    losses = {}
    with tqdm(total=len(chosen) * first.steps, unit="step", disable=None) as bar:
        for (name, rate), settings in chosen.items():
            bar.set_description(f"{name}, {rate:g}")
            losses[name, rate] = trained(settings, data, seeds, bar)
    print(tables(losses))
    draw(losses, out)
    print(f"\nfigure {out.resolve()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
