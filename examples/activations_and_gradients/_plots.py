"""One style for all figures, and the panels that several of them have."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from eqx_norms.diagnostics import dead_unit_fraction, histogram

try:
    import matplotlib
except ImportError:
    raise ImportError('the figures need matplotlib: pip install "eqx-norms[examples]"') from None

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from cycler import cycler

# Okabe and Ito's, which colour-blind readers can tell apart.
BLUE, ORANGE, GREEN, PURPLE, SKY, BLACK = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#56B4E9",
    "#000000",
)
NORM_COLOURS = {"none": ORANGE, "LN": BLUE, "BN": GREEN}

plt.rcParams.update(
    {
        "figure.dpi": 110,
        "font.size": 9,
        "axes.titlesize": 9.5,
        "axes.labelsize": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.prop_cycle": cycler(color=[BLUE, ORANGE, GREEN, PURPLE, SKY, BLACK]),
        "legend.frameon": False,
        "legend.fontsize": 8,
        "image.cmap": "cividis",
    }
)


def panels(rows: int, columns: int, width: float, height: float, **kwargs) -> tuple[Any, Any]:
    """A figure of panels of `width` by `height` inches; the axes as an array of two axes."""
    size = (columns * width, rows * height)
    return plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False, **kwargs)


def layer_colours(layers: int):
    """From dark to light, the first to the last layer."""
    return matplotlib.colormaps["viridis"](np.linspace(0, 0.9, layers))


def draw_losses(ax, losses: Float[np.ndarray, "configs seeds steps"], labels, colours=None) -> None:
    """Smoothed, the mean over seeds and one standard deviation to either side."""
    steps = losses.shape[-1]
    window = max(steps // 40, 1)
    smooth = losses[..., : steps // window * window]
    smooth = smooth.reshape(*losses.shape[:2], -1, window).mean(-1)
    x = (np.arange(smooth.shape[-1]) + 0.5) * window
    for i, label in enumerate(labels):
        mean, std = smooth[i].mean(0), smooth[i].std(0)
        (line,) = ax.plot(x, mean, label=label, color=colours[i] if colours else None)
        ax.fill_between(x, mean - std, mean + std, color=line.get_color(), alpha=0.2, lw=0)
    ax.set(xlabel="step", ylabel="loss")
    ax.set_ylim(top=min(ax.get_ylim()[1], 3.6))
    ax.legend()


def percentile_bands(values: Float[np.ndarray, "looks ..."]) -> Float[np.ndarray, "3 looks"]:
    """The percentiles 16, 50 and 84 of all that was seen at each look."""
    return np.percentile(values.reshape(len(values), -1), (16, 50, 84), axis=1)


def draw_bands(ax, steps, values, colour, label=None) -> None:
    low, middle, high = percentile_bands(values)
    ax.fill_between(steps, low, high, color=colour, alpha=0.25, lw=0)
    ax.plot(steps, middle, color=colour, label=label)


def histograms_over_time(
    values: Float[np.ndarray, "looks ..."], edges: Float[np.ndarray, " edges"]
) -> Float[np.ndarray, "bins looks"]:
    flat = values.reshape(len(values), -1)
    return np.asarray(_histograms(flat, edges)).T


# Named, for a jit that is made anew at each call compiles anew.
_histograms = jax.jit(jax.vmap(histogram, (0, None)))
_dead = jax.jit(jax.vmap(dead_unit_fraction))


def draw_histograms(ax, steps, values, edges) -> None:
    counts = histograms_over_time(values, edges)
    step = steps[1] - steps[0] if len(steps) > 1 else 1
    extent = (steps[0], steps[-1] + step, edges[0], edges[-1])
    density = np.log10(np.maximum(counts, 0.5) / counts.sum().clip(1) * counts.shape[1])
    ax.imshow(density, origin="lower", aspect="auto", extent=extent, interpolation="nearest")


def dead_over_time(
    activations: Float[np.ndarray, "... layers batch units"],
) -> Float[np.ndarray, "... layers"]:
    flat = activations.reshape(-1, *activations.shape[-2:])
    return np.asarray(_dead(flat)).reshape(activations.shape[:-2])


def draw_by_layer(ax, steps, values: Float[np.ndarray, "seeds looks layers"], names: Sequence[str]):
    """A line for each layer: the mean over seeds."""
    colours = layer_colours(len(names))
    for layer, (name, colour) in enumerate(zip(names, colours, strict=True)):
        ax.plot(steps, values[..., layer].mean(0), color=colour, label=name)
    ax.set_xlabel("step")
