"""What norms are for in a deep decoder: the same one trained with them and without.

    python -m examples.decoder.depth    # census surnames, some minutes

Prints a table and draws a figure: how large the residual stream is behind every block, and how
large the loss's gradient there, before and after training.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from jaxtyping import Array, Float, Int
from tqdm import tqdm

from eqx_norms import is_norm
from eqx_norms.diagnostics import capture_grads

from ..arguments import figure_path
from ..names_data import read_names
from .data import Data, batch_at, split
from .model import Block, Decoder
from .settings import Settings
from .train import evaluate, loss_fn, make_optimiser, make_step, start

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib import ticker

DEEP = Settings(layers=12, width=48, batch=64, steps=400)
COLOURS = {"with norms": "#0072B2", "without": "#D55E00"}  # Okabe and Ito's


def without_norms(model: Decoder) -> Decoder:
    """Each of them replaced by the identity."""
    swap = lambda node: eqx.nn.Identity() if is_norm(node) else node
    return jax.tree.map(swap, model, is_leaf=is_norm)


class Spread(NamedTuple):
    """Root mean squares behind each block, over names, letters and features."""

    stream: Float[Array, " blocks"]
    gradient: Float[Array, " blocks"]  # of the mean loss of a letter


@eqx.filter_jit
def spread(model: Decoder, names: Int[Array, "batch context"]) -> Spread:
    _, values, grads, _ = capture_grads(loss_fn, model, names, where=Block)
    rms = lambda a: jnp.sqrt(jnp.mean(jnp.square(a)))
    # By name: jit returns dictionaries sorted by their keys, and [10] comes before [2].
    paths = [f"blocks[{number}]" for number in range(len(model.blocks))]
    return Spread(*(jnp.stack([rms(tree[path]) for path in paths]) for tree in (values, grads)))


class Trained(NamedTuple):
    before: Spread
    after: Spread
    losses: list[float]  # of the batch of each step
    held_out: float


def trained(name: str, settings: Settings, data: Data, model: Decoder) -> Trained:
    """To the last step, or to the first loss that is not finite."""
    opt_state = make_optimiser(settings).init(eqx.filter(model, eqx.is_array))
    step = make_step(settings)
    batch = lambda number: batch_at(data, number, size=settings.batch, seed=settings.seed)
    probe = jnp.asarray(data.held_out[:256])
    before, losses = spread(model, probe), []
    with tqdm(range(settings.steps), desc=name, unit="step", disable=None) as bar:
        for number in bar:
            model, opt_state, loss = step(model, opt_state, batch(number))
            losses.append(float(loss))
            if not np.isfinite(losses[-1]):
                break
    return Trained(before, spread(model, probe), losses, float(evaluate(model, data.held_out)))


def report(results: dict[str, Trained]) -> str:
    lines = ["|  | first block | last block |", "|---|---:|---:|"]
    for name, one in results.items():
        for what in Spread._fields:
            for when, found in (("before", one.before), ("after", one.after)):
                rms = getattr(found, what)
                lines.append(f"| {what}, {name}, {when} training | {rms[0]:.2g} | {rms[-1]:.2g} |")
    return "\n".join([*lines, "", *(ending(name, one) for name, one in results.items())])


def ending(name: str, one: Trained) -> str:
    if not np.isfinite(one.losses[-1]):
        return f"{name}: DIVERGED, a loss of {one.losses[-1]} at step {len(one.losses)}"
    highest = int(np.argmax(one.losses))
    return (
        f"{name}: held-out loss {one.held_out:.4f} after {len(one.losses)} steps; "
        f"highest training loss {one.losses[highest]:.3g}, at step {highest + 1}"
    )


def tidy(ax, title: str, below: str) -> None:
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter(ticker.NullFormatter())
    ax.set_title(title, loc="left", fontsize=10, weight="bold")
    ax.set_xlabel(below, loc="left")
    ax.spines[["top", "right"]].set_visible(False)


def draw(results: dict[str, Trained], path: Path) -> None:
    figure, axes = plt.subplots(1, 3, figsize=(9.5, 3.3), dpi=150, layout="constrained")
    for name, one in results.items():
        colour = COLOURS[name]
        for ax, what in zip(axes, Spread._fields, strict=False):
            blocks = 1 + np.arange(len(one.before.stream))
            ax.plot(blocks, getattr(one.before, what), color=colour, lw=1.2, ls="--")
            ax.plot(blocks, getattr(one.after, what), color=colour, lw=2, marker="o", ms=3)
            ax.set_xticks(blocks[::-1][::3][::-1])
        axes[2].plot(1 + np.arange(len(one.losses)), one.losses, color=colour, lw=1, label=name)
    titles = "residual stream", "gradient there", "training loss, nats a letter"
    for ax, title, below in zip(axes, titles, ("block", "block", "step"), strict=True):
        tidy(ax, title, below)
    axes[0].set_ylabel("root mean square")
    axes[0].plot([], [], color="0.3", lw=1.2, ls="--", label="before training")
    axes[0].plot([], [], color="0.3", lw=2, marker="o", ms=3, label="after")
    for ax in (axes[0], axes[2]):
        ax.legend(frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m examples.decoder.depth", description=(__doc__ or "").split("\n", 1)[0]
    )
    add = parser.add_argument
    add("--data", nargs="+", default=[], metavar="FILE", help="a name a line, or CSV")
    for field in ("layers", "width", "batch", "steps", "seed"):
        add(f"--{field}", type=int, default=getattr(DEEP, field), help="by default %(default)s")
    add("--rate", type=float, default=DEEP.rate, help="the highest learning rate, %(default)s")
    add("--out", type=figure_path, default="decoder/depth.png", help="the figure; %(default)s")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = vars((commands := parser()).parse_args(argv))
    paths, out = args.pop("data"), args.pop("out")
    try:
        settings = Settings(**args)
        data = split(read_names(paths), settings.context)
        batch_at(data, 0, size=settings.batch, seed=0)
    except (ValueError, ImportError, OSError) as error:
        commands.error(str(error))
    model, _ = start(settings, len(data.vocabulary))
    models = {"with norms": model, "without": without_norms(model)}
    results = {name: trained(name, settings, data, model) for name, model in models.items()}
    print(report(results))
    draw(results, out)
    print(f"\nfigure {out.resolve()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
