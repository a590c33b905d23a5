"""Draws docs/figures/causality.png: who reads whom under three layer norms.

python docs/figures/causality.py
"""

import dataclasses
import pathlib

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from eqx_norms.causality import check_causal, dependency_matrix

T, D = 16, 8


def decoder(norm):
    """One pre-norm attention layer."""
    attention = eqx.nn.MultiheadAttention(2, D, key=jr.key(0))
    mask = jnp.tri(T, dtype=bool)

    def run(x):
        h = norm(x)
        return x + attention(h, h, h, mask=mask)

    return run


NORMS = {
    "vmap(LayerNorm(D))": jax.vmap(eqx.nn.LayerNorm(D)),
    "LayerNorm((T, D))": eqx.nn.LayerNorm((T, D)),
    "vmap(LayerNorm(T)), a feature at a time": jax.vmap(eqx.nn.LayerNorm(T), 1, 1),
}


def main():
    """Writes the figure beside this script."""
    x = jr.normal(jr.key(1), (T, D))
    fig, axes = plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
    for (name, norm), ax in zip(NORMS.items(), axes, strict=True):
        fn = decoder(norm)
        report = check_causal(fn, x)
        dataclasses.replace(report, matrix=dependency_matrix(fn, x)).plot(ax)
        ax.set_title(f"{name}\n{ax.get_title()}", fontsize=10)
    path = pathlib.Path(__file__).with_suffix(".png")
    fig.savefig(path, dpi=110)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
