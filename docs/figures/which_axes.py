"""Draws docs/figures/which_axes.png: the entries that one output reads, under four norms.

python docs/figures/which_axes.py
"""

import pathlib

import jax
import jax.numpy as jnp
import jax.random as jr
import matplotlib
import numpy as np
from matplotlib.colors import ListedColormap

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from eqx_norms import GroupNorm, LayerNorm

TOKENS, FEATURES = 6, 8
TOKEN, FEATURE = 2, 3

NORMS = {
    "of each token\nvmap(LayerNorm(features))": jax.vmap(LayerNorm(FEATURES)),
    "over tokens and features\nLayerNorm((tokens, features))": LayerNorm((TOKENS, FEATURES)),
    "over tokens\nvmap(LayerNorm(tokens), -1, -1)": jax.vmap(LayerNorm(TOKENS), -1, -1),
    "over tokens and half the features\nGroupNorm(2, features) of x.T": lambda x: (
        GroupNorm(2, FEATURES)(x.T).T
    ),
}


def entries_read(norm, x):
    """Whether the marked output changes when an entry of x does, for every entry."""
    edits = jnp.eye(x.size).reshape(-1, *x.shape)
    outputs = jax.vmap(norm)(jnp.concatenate([x[None], x + edits]))[:, TOKEN, FEATURE]
    return np.asarray(outputs[1:] != outputs[0]).reshape(x.shape)


def main():
    """Writes the figure beside this script."""
    x = jr.normal(jr.key(0), (TOKENS, FEATURES))
    later = np.arange(TOKENS)[:, None] > TOKEN
    colours = ListedColormap(["white", "#4a90c8", "#d9694a"])
    fig, axes = plt.subplots(1, len(NORMS), figsize=(10.5, 2.7), layout="constrained")
    for (name, norm), ax in zip(NORMS.items(), axes, strict=True):
        read = entries_read(norm, x) * (1 + later)
        ax.pcolormesh(read, cmap=colours, vmin=0, vmax=2, edgecolor="0.7", linewidth=1)
        ax.plot(FEATURE + 0.5, TOKEN + 0.5, "o", color="black", markersize=9)
        ax.invert_yaxis()
        ax.set(xticks=[], yticks=[], aspect="equal", xlabel="features")
        ax.set_title(name, fontsize=9.5)
    axes[0].set_ylabel("tokens")
    path = pathlib.Path(__file__).with_suffix(".png")
    fig.savefig(path, dpi=110, bbox_inches="tight")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
