"""One figure of all ratios: a dot for each rival and row, the targets as lines."""

import itertools
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from ._cases import DTYPES, NAMES, RIVALS, SINGLE, WORKS
from ._targets import by_case, speed_limit

COLOURS = dict(zip(RIVALS, ("C0", "C1", "C2", "C4", "C5", "C6", "C3", "0.6"), strict=True))
MARKERS = {"torch": "D", "copy": "|"}


def plot(results: dict, path: Path) -> bool:
    """Writes the figure; False if there is nothing to draw."""
    table = {case: row for case, row in by_case(results["speed"]).items() if case.work in SINGLE}
    if not table:
        return False
    works = [work for work in SINGLE if any(case.work == work for case in table)]
    dtypes = [dtype for dtype in DTYPES if any(case.dtype == dtype for case in table)]
    labels = list(dict.fromkeys(f"{c.layer} {c.rows}" for c in sorted(table, key=_layer_first)))
    size = 1.5 + 2.5 * len(dtypes), 1.3 + len(works) * (0.5 + 0.2 * len(labels))
    fig, axes = plt.subplots(
        len(works), len(dtypes), figsize=size, sharex="row", sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for work, row in zip(works, axes, strict=True):
        for dtype, ax in zip(dtypes, row, strict=True):
            _facet(ax, table, work, dtype, labels)
    handles = {h.get_label(): h for ax in axes.flat for h in ax.collections}
    fig.legend(
        handles.values(), handles, loc="outside upper center", frameon=False, fontsize=9,
        ncols=len(handles) if len(dtypes) > 2 else 4, columnspacing=1.2, handletextpad=0.3,
    )  # fmt: skip
    fig.supxlabel("our time / theirs: left of 1, ours is faster", fontsize=9)
    fig.savefig(path, dpi=150)
    plt.close(fig)
    return True


def _layer_first(case):
    return case.layer == "GroupNorm", case.layer == "RMSNorm"


def _facet(ax, table, work, dtype, labels):
    """One work in one dtype."""
    cases = {
        f"{c.layer} {c.rows}": r for c, r in table.items() if (c.work, c.dtype) == (work, dtype)
    }
    for rival in RIVALS:
        points = [(r[rival]["ratio"], labels.index(at)) for at, r in cases.items() if rival in r]
        if points:
            marker, colour = MARKERS.get(rival, "o"), COLOURS[rival]
            style = {"s": 22, "c": colour, "marker": marker, "zorder": 3}
            ax.scatter(*zip(*points, strict=True), label=NAMES[rival], **style)
    ax.axvline(1, color="0.3", linewidth=0.8)
    limits = speed_limit(work, "eqx")
    if limits and limits[0] != 1:
        ax.axvline(limits[0], color="C2", linewidth=1.2, linestyle="--")
        note = f"target {limits[0]:g} "
        ax.text(limits[0], -0.75, note, color="C2", fontsize=7, va="top", ha="right")
    for i, (above, below) in enumerate(itertools.pairwise(labels)):
        if above.split()[0] != below.split()[0]:
            ax.axhline(i + 0.5, color="0.7", linewidth=0.8)
    ax.set(xscale="log", ylim=(len(labels) - 0.4, -0.9))
    ax.set_title(f"{WORKS[work]}, {dtype}", fontsize=9)
    ax.set_yticks(range(len(labels)), labels, fontsize=8)
    ax.grid(axis="both", which="major", color="0.9")
    ax.set_axisbelow(True)
    ax.xaxis.set_major_locator(LogLocator(2))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _fraction(value)))
    ax.tick_params(axis="x", labelsize=8)


def _fraction(value: float) -> str:
    return f"{value:g}" if value >= 1 else f"1/{1 / value:g}"
