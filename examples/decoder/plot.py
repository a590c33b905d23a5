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
}


def draw(outcomes: Sequence[Outcome], data: Data, path: Path) -> None:
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(8.5, 3.7), dpi=150, width_ratios=(1, 1.1), layout="constrained"
    )
    draw_losses(left, outcomes)
    write_names(right, outcomes, data)
    figure.savefig(path)
    plt.close(figure)


def draw_losses(ax, outcomes: Sequence[Outcome]) -> None:
    """Curves, and beside them the loss of the same models where the future is hidden."""
    bigram, *trained = outcomes
    end = trained[0].history[-1][0]
    hidden = 1.13 * end
    for one in trained:
        colour = COLOURS[one.norm]
        steps, losses = np.array(one.history).T
        ax.plot(steps, losses, color=colour, lw=2)
        ax.plot([end, hidden], [losses[-1], one.blind], color=colour, lw=1, ls=":")
        ax.plot(hidden, one.blind, "o", color=colour, ms=6)
        ax.annotate(f"{losses[-1]:.2g}", (end, losses[-1]), (-2, 4), **TEXT, color=colour)
        ax.annotate(f"{one.blind:.2g}", (hidden, one.blind), (7, -3), **TEXT, color=colour)
    ax.axhline(bigram.loss, color=COLOURS["bigram"], lw=1, ls="--", zorder=0)
    ax.annotate("bigram model", (0, bigram.loss), (2, 3), **TEXT, color=COLOURS["bigram"])
    ax.set_yscale("log")
    ticks = np.linspace(0, end, 6)[:-1]
    ax.set_xticks([*ticks, hidden], [*(f"{tick:,.0f}" for tick in ticks), "future\nhidden"])
    ax.set_xlim(0, 1.25 * end)
    ax.set_xlabel("training step", loc="left")
    ax.set_title("held-out loss, nats a letter", loc="left", fontsize=10, weight="bold")
    ax.spines[["top", "right"]].set_visible(False)


TEXT = {"textcoords": "offset points", "fontsize": 8}


def write_names(ax, outcomes: Sequence[Outcome], data: Data) -> None:
    """For every norm: does it read the future, and what does it write?"""
    trained = outcomes[1:]
    ax.set_title("what they write", loc="left", fontsize=10, weight="bold")
    ax.axis("off")
    for number, one in enumerate(trained):
        write_some(ax, 1 - number / len(trained), one, data)


def write_some(ax, top: float, one: Outcome, data: Data) -> None:
    def write(x: float, down: float, words: str, **style) -> None:
        ax.text(x, top - down, words, transform=ax.transAxes, va="top", **style)

    leak = one.verdict is not None and one.verdict.leak
    verdict = "LEAK: reads the future" if leak else "does not read the future"
    colour = COLOURS[one.norm]
    norm = f"norm {one.norm.replace('-', ' ')}"
    write(0, 0.02, norm, fontsize=9, color=colour, weight="bold")
    write(1, 0.02, verdict, fontsize=8, color=colour, ha="right")
    names = textwrap.wrap(", ".join(some_names(one, data, 24)), 58)[:2]
    write(0, 0.1, "\n".join(names), fontsize=8.5, linespacing=1.3)
    found = share(one.samples, data.held_out)
    write(0, 0.24, f"{found:.1%} of its names are in the held-out list", fontsize=7.5)
