"""Draws docs/figures/partial.png: which steps four norms read, and what they make of a stream.

python docs/figures/partial.py
"""

import pathlib

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from matplotlib.colors import ListedColormap

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from eqx_norms import CumulativeNorm, GroupNorm, SegmentNorm

STEPS = 12
IDS = np.repeat([0, 1, 2], [4, 5, 3])

READS = {
    "GroupNorm of x.T": lambda x: GroupNorm(1, 2)(x.T).T,
    "CumulativeNorm": CumulativeNorm(2),
    "CumulativeNorm, window=4": CumulativeNorm(2, window=4),
    "SegmentNorm, 3 segments": lambda x: SegmentNorm(2)(x, IDS),
}


def by_two_sums(x):
    """As most libraries have it."""
    n = jnp.arange(1, len(x) + 1.0)[:, None]
    mean = jnp.cumsum(x, 0) / n
    square = jnp.cumsum(x**2, 0) / n - mean**2
    return (x - mean) / jnp.sqrt(jnp.maximum(square, 0) + 1e-5)


STREAMS = {
    "two cumulative sums, subtracted": by_two_sums,
    "CumulativeNorm": CumulativeNorm(1),
    "CumulativeNorm, decay=0.98": CumulativeNorm(1, decay=0.98),
    "CumulativeNorm, window=100": CumulativeNorm(1, window=100),
}


def main():
    """Writes the figure beside this script."""
    rng = np.random.default_rng(0)
    fig, axes = plt.subplots(2, 4, figsize=(13, 5.6), layout="constrained")
    x = jnp.asarray(rng.normal(size=(STEPS, 2)), jnp.float32)
    later = np.triu(np.ones((STEPS, STEPS), bool), 1)
    for (name, norm), ax in zip(READS.items(), axes[0], strict=True):
        read = (jax.jacobian(norm)(x) != 0).any((1, 3)) * (1 + later)
        colours = ListedColormap(["white", "#4a90c8", "#d9694a"])
        ax.pcolormesh(np.asarray(read), cmap=colours, vmin=0, vmax=2, edgecolor="0.7")
        ax.invert_yaxis()
        ax.set(title=name, xlabel="reads step", ylabel="output", aspect="equal")
        ax.set(xticks=[], yticks=[])

    # Its level rises by six of its spreads half way, and is 3000 of them away from 0.
    stream = rng.normal(size=(600, 1)) + 3000 + 6 * (np.arange(600) >= 300)[:, None]
    for (name, norm), ax in zip(STREAMS.items(), axes[1], strict=True):
        y = np.asarray(jax.jit(lambda x, norm=norm: norm(x))(stream.astype(np.float32)))[:, 0]
        ax.plot(y, linewidth=0.7, color="#4a90c8")
        ax.axvline(300, color="0.6", linewidth=0.8, linestyle=":")
        ax.set(title=name, xlabel="step", ylim=(-9, 9))
    axes[1, 0].set_ylabel("y")
    fig.savefig(pathlib.Path(__file__).with_suffix(".png"), dpi=90)


if __name__ == "__main__":
    main()
