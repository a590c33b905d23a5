"""The figure: what the loss says, and what the model writes."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from .data import Data
from .report import Outcome, share, some_names

# Okabe and Ito's, which colour-blind readers can tell apart.
COLOURS = {
    "bigram": "#555555",
    "per-token": "#0072B2",
    "over-tokens-and-features": "#D55E00",
    "over-tokens": "#B0578C",
    "scale-norm": "#56B4E9",
    "dyt": "#009E73",
    "derf": "#E69F00",
    "layer-scale": "#8C6D31",
    "none": "#999999",
}


LOSS, NAMES, VERDICT = "held-out loss, nats a letter", "what it writes", "check before training"


def draw(outcomes: Sequence[Outcome], data: Data, path: Path) -> None:
    with plt.rc_context({"font.size": 8, "axes.spines.top": False, "axes.spines.right": False}):
        rows = max(3, len(outcomes) - 1)  # on the right
        size = 8.2, 3.5 * rows / 3
        figure, (left, right) = plt.subplots(
            1, 2, figsize=size, dpi=150, width_ratios=(1, 1.1), layout="constrained"
        )
        draw_losses(left, outcomes)
        write_names(right, outcomes, data, rows)
        figure.savefig(path)
        plt.close(figure)


def draw_losses(ax, outcomes: Sequence[Outcome]) -> None:
    """Curves, and to their right the loss of the same models where the future is hidden."""
    bigram, *trained = outcomes
    end = trained[0].history[-1][0]
    hidden = 1.17 * end
    worst = max(one.blind for one in trained)
    labelled = []

    def label(x: float, loss: float, place: tuple[int, int], colour: str, **style) -> None:
        if any(x == there and abs(loss / other - 1) < 0.05 for there, other in labelled):
            return  # they would cover each other, and the table has all
        labelled.append((x, loss))
        text = f"{loss:.2f}" if loss >= 1 else f"{loss:.1g}"
        ax.annotate(text, (x, loss), place, textcoords="offset points", color=colour, **style)

    for one in trained:
        colour = COLOURS[one.norm]
        steps, losses = np.array(one.history).T
        ax.plot(steps, losses, color=colour, lw=2)
        ax.plot([end, hidden], [losses[-1], one.blind], color=colour, lw=1, ls=":")
        ax.plot(hidden, one.blind, "o", color=colour, ms=6)
        label(end, losses[-1], (0, -11), colour, ha="right")
        label(hidden, one.blind, (6, -1 if one.blind == worst else -5), colour)
    ax.axhline(bigram.loss, color=COLOURS["bigram"], lw=1, ls="--", zorder=0)
    place = {"xytext": (0, 3), "textcoords": "offset points"}
    name = f"bigram model, {bigram.loss:.2f}"
    ax.annotate(name, (0.3 * end, bigram.loss), **place, color=COLOURS["bigram"])
    if min(one.loss for one in trained) < 1:
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter("{x:g}")
    ax.margins(y=0.1)
    ax.set_xlim(0, 1.35 * end)
    ticks = np.linspace(0, end, 6)
    ax.set_xticks([*ticks, hidden], [*(f"{tick:,.0f}" for tick in ticks), "future\nhidden"])
    ax.annotate("training step", (0, 0), (0, -24), "axes fraction", "offset points", va="top")
    ax.set_title(LOSS, loc="left", fontsize=9, weight="bold")


def write_names(ax, outcomes: Sequence[Outcome], data: Data, rows: int) -> None:
    """For every norm: does it read the future, and what does it write?"""
    trained = outcomes[1:]
    ax.set_title(NAMES, loc="left", fontsize=9, weight="bold")
    ax.set_title(VERDICT, loc="right", fontsize=9, weight="bold")
    ax.axis("off")
    for number, one in enumerate(trained):
        top, lines = 1.08 * number / rows, 2 if len(trained) > 1 else 10
        write_some(ax, top, 3 / rows, one, data, lines)


def write_some(ax, top: float, unit: float, one: Outcome, data: Data, lines: int) -> None:
    """From `top` on downwards; a length of 1 is `unit` of the height."""

    def write(x: float, down: float, words: str, **style) -> None:
        y = 1 - top - unit * down
        ax.text(x, y, words, transform=ax.transAxes, va="top", **style)

    leak = one.verdict is not None and one.verdict.leak
    verdict = "LEAK: reads the future" if leak else "does not read the future"
    heading = {"color": COLOURS[one.norm], "weight": "bold"}
    write(0, 0.02, f"norm {one.norm.replace('-', ' ')}", **heading)
    write(1, 0.02, verdict, ha="right", **heading)
    names = textwrap.wrap(", ".join(some_names(one, data, 12 * lines)), 56)[:lines]
    write(0, 0.095, "\n".join(names).rstrip(","), fontsize=8.5, linespacing=1.3)
    found = f"{share(one.samples, data.held_out):.1%} are held-out names"
    if np.isfinite(one.judged):
        found += f"; {one.judged:.2f} nats a letter under the per-token model"
    write(0, 0.095 + 0.065 * lines, found, fontsize=7.5, color="#555555")
