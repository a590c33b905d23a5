"""The figure of a training run: percentiles or histograms by layer, and what all layers share."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from ..._real import Real
from ._look import EDGES, Look

BANDS = 16, 50, 84
BLUE, ORANGE = "#0072B2", "#D55E00"  # Okabe and Ito's, which colour-blind readers can tell apart


class Course(NamedTuple):
    """What was measured of one array, or of it in one step of a loop, over the looks."""

    name: str
    array: str
    statistics: dict[str, Any]


def courses(measured: Mapping[str, dict[str, Any]]) -> list[Course]:
    """In the order of the calls; those of a loop step by step."""
    found = []
    for name, statistics in measured.items():
        loops = statistics["rms"].shape[1:]
        for at in np.ndindex(loops):
            label = name + "".join(f"[{i}]" for i in at)
            here = {key: x[(slice(None), *at)] for key, x in statistics.items()}
            found.append(Course(label, name, here))
    return found


def percentiles(
    counts: Int[np.ndarray, "looks bins"], largest: Float[np.ndarray, " looks"], q: Sequence[Real]
) -> Float[np.ndarray, "percentiles looks"]:
    """Of the entries in the histograms, as if they were spread evenly in each bin; NaN for none."""
    found = np.full((len(q), len(counts)), np.nan)
    for look, (here, size) in enumerate(zip(counts, largest, strict=True)):
        if here.any():
            below = np.concatenate([[0], np.cumsum(here)])
            found[:, look] = np.interp([float(p) * below[-1] / 100 for p in q], below, EDGES * size)
    return found


def draw(look: Look, *, every: int, histograms: bool, layers: int):
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError('watch.plot() needs matplotlib: pip install "eqx-norms[plot]"') from error

    steps = every * np.arange(len(look.loss))
    values, grads = courses(look.values), {course.name: course for course in courses(look.grads)}
    shown = [values[i] for i in spaced(len(values), layers)]
    draw_one = draw_histograms if histograms else draw_bands
    rows = max(len(shown), 4)
    figure = plt.figure(figsize=(10, 1 + 1.15 * rows), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(3, 2))  # pyright: ignore
    axes = left.subplots(len(shown), 2, sharex=True, squeeze=False)
    for (at_value, at_grad), course in zip(axes, shown, strict=True):
        draw_one(at_value, steps, course.statistics, BLUE)
        draw_one(at_grad, steps, grads[course.name].statistics, ORANGE)
        at_value.set_ylabel(course.name or "model", rotation=0, ha="right", va="center", fontsize=8)
    what = "histogram" if histograms else "percentiles 16, 50, 84"
    axes[0, 0].set_title(f"outputs: {what}", loc="left", fontsize=9, weight="bold")
    axes[0, 1].set_title("derivatives there", loc="left", fontsize=9, weight="bold")
    draw_summary(right.subplots(4, 1, sharex=True), steps, look, shown, grads)
    for ax in figure.axes:
        ax.tick_params(which="both", labelsize=7)
        ax.yaxis.get_offset_text().set_fontsize(7)
        ax.spines[["top", "right"]].set_visible(False)
        ax.margins(x=0)
    for ax in (*axes[-1], figure.axes[-1]):
        ax.set_xlabel("step", fontsize=8)
    return figure


def spaced(count: int, most: int) -> list[int]:
    """So many of them at most, with the first and the last."""
    if count <= most:
        return list(range(count))
    return [round(i) for i in np.linspace(0, count - 1, most)] if most > 1 else [0]


def draw_bands(ax, steps, statistics, colour) -> None:
    low, middle, high = percentiles(statistics["counts"], statistics["largest"], BANDS)
    ax.fill_between(steps, low, high, color=colour, alpha=0.25, lw=0)
    ax.plot(steps, middle, color=colour, lw=1.2, marker="" if len(steps) > 1 else "o", ms=3)


def draw_histograms(ax, steps, statistics, colour) -> None:
    """The share of entries a bin, in blue: one scale for all looks, the bins of each its own."""
    finite = np.isfinite(statistics["largest"])
    largest = np.where(finite, statistics["largest"], np.nan)
    top = np.nanmax(largest, initial=0) or 1.0
    width = steps[1] - steps[0] if len(steps) > 1 else 1
    for step, size, counts in zip(steps, largest, statistics["counts"], strict=True):
        if counts.sum() and size > 0:
            # Not of the zeros in the middle, which would outshine all; the root, for what is rare.
            most = np.delete(counts, len(counts) // 2).max(initial=1)
            share = np.sqrt(np.minimum(counts / most, 1))[:, None]
            edges = np.array([step, step + width])
            ax.pcolormesh(edges, EDGES * size, share, cmap="Blues", vmin=0, vmax=1, rasterized=True)
    ax.set_yscale("symlog", linthresh=top / 100)
    ax.set_ylim(-top, top)
    ax.set_yticks([-top / 10, 0, top / 10], [f"{-top / 10:.1g}", "0", f"{top / 10:.1g}"])


def draw_summary(axes, steps, look: Look, shown: Sequence[Course], grads) -> None:
    import matplotlib

    loss, dead, gradient, update = axes
    loss.plot(steps, look.loss, color="0.2", lw=1.2)
    colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.9, len(shown)))
    for course, colour in zip(shown, colours, strict=True):
        style = {"color": colour, "lw": 1.2}
        dead.plot(steps, course.statistics["dead"], **style)
        gradient.plot(steps, positive(grads[course.name].statistics["rms"]), **style)
        update.plot(steps, update_ratios(look, course), **style)
    titles = {
        loss: "loss",
        dead: "share of dead units; dark: the first layer",
        gradient: "rms of the derivatives",
        update: "|update| / |parameter|, a layer's median",
    }
    for ax, title in titles.items():
        ax.set_title(title, loc="left", fontsize=9, weight="bold")
    dead.set_ylim(-0.02, 1.02)
    for ax in (gradient, update):
        if any(np.isfinite(line.get_ydata()).any() for line in ax.lines):
            ax.set_yscale("log")
    update.axhline(1e-3, color="0.6", lw=0.8, ls=":")  # a common rule of thumb


def positive(x: np.ndarray) -> np.ndarray:
    """NaN for what a logarithmic axis cannot show."""
    return np.where(np.isfinite(x) & (x > 0), x, np.nan)


def update_ratios(look: Look, course: Course) -> Float[np.ndarray, " looks"]:
    """The median over the parameters of the submodule; NaN where it has none, or all are zero."""
    owner = re.sub(r"#\d+", "", course.array) + "."
    ratios = [
        positive(statistics["update_ratio"])
        for name, statistics in look.params.items()
        if name.startswith(owner.removeprefix(".")) and "update_ratio" in statistics
    ]
    known = np.stack(ratios) if ratios else np.full((1, len(look.loss)), np.nan)
    return np.ma.median(np.ma.masked_invalid(known), axis=0).filled(np.nan)
