"""I1 to I3: how initial weights, flat activations and large logits decide where training starts."""

import functools as ft
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from eqx_norms.diagnostics import saturation_fraction

from ._plots import BLUE, ORANGE, panels
from ._study import Result, Settings, fact, run

INS, OUTS, EXAMPLES = 100, 200, 1000
gelu = ft.partial(jax.nn.gelu, approximate=False)
NOTEBOOK_FLAT = {
    "tanh": (jnp.tanh, [1.8183]),
    "selu": (jax.nn.selu, [-2.8668]),
    "gelu": (gelu, [-1.8611, -1.0775, -0.5534]),
}


def spreads(seed: int) -> dict[str, np.ndarray]:
    """I1: inputs times normal weights, scaled or not, and tanh of that."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(EXAMPLES, INS))
    product = x @ rng.normal(size=(INS, OUTS))
    scaled = product / np.sqrt(INS)
    return {
        "x": x,
        "x w": product,
        "x w / √n": scaled,
        "tanh, gain 1": np.tanh(scaled),
        "tanh, gain 5/3": np.tanh(5 / 3 * scaled),
        # Uniform on ±1/√n, torch's default as well.
        "a library's weights": np.asarray(eqx.nn.Linear(INS, OUTS, key=jr.key(seed)).weight),
    }


def flat_from(fn: Callable) -> np.ndarray:
    """I2: where |slope| crosses .1, by bisection in float64; of tanh the positive one."""
    with jax.enable_x64(True):
        slope = jax.jit(jax.vmap(jax.grad(fn)))
        excess = lambda x: np.abs(np.asarray(slope(x))) - 0.1
        x = np.linspace(-6, 6, 2400)  # even, so that no point is 0, where selu has a kink
        above = excess(x) > 0
        (left,) = np.nonzero(above[1:] != above[:-1])
        a, b = x[left], x[left + 1]
        for _ in range(40):
            middle = (a + b) / 2
            same = (excess(middle) > 0) == above[left]
            a, b = np.where(same, middle, a), np.where(same, b, middle)
    return a[a > 0] if fn is jnp.tanh else a


def softmax_bars(seed: int) -> dict[str, np.ndarray]:
    """I3: the same logits with standard deviation 1 and 1/√30."""
    logits = np.random.default_rng(seed).normal(size=30)
    logits = (logits - logits.mean()) / logits.std()
    softmax = lambda logits: np.exp(logits) / np.exp(logits).sum()
    return {"std 1": softmax(logits), "std 1/√30": softmax(logits / np.sqrt(30))}


def study(settings: Settings) -> Result:
    seen = spreads(0)
    stds = {name: float(x.std()) for name, x in seen.items()}
    fig, axes = panels(1, 2, 3.6, 2.6)
    for name in ("x", "x w", "x w / √n"):
        axes[0, 0].hist(
            np.ravel(seen[name]),
            np.linspace(-30, 30, 241),
            density=True,
            histtype="step",
            ls="--" if name == "x" else "-",  # it is hidden by the scaled product
            zorder=3 if name == "x" else 2,
            label=f"{name}: std {stds[name]:.2f}",
        )
    for name in ("tanh, gain 1", "tanh, gain 5/3"):
        axes[0, 1].hist(
            np.ravel(seen[name]),
            np.linspace(-1, 1, 81),
            density=True,
            histtype="step",
            label=f"{name[6:]}: std {stds[name]:.2f}",
        )
    axes[0, 0].set(title=f"{EXAMPLES}x{INS} @ {INS}x{OUTS}", ylabel="density")
    axes[0, 1].set(title="tanh of x w / √n", ylim=(0, 3))
    for ax in axes.flat:
        ax.legend()
    settings.save(fig, "i1_spreads")

    flat = {name: flat_from(fn) for name, (fn, _) in NOTEBOOK_FLAT.items()}
    fig, axes = panels(1, 3, 2.5, 2.3)
    x = np.linspace(-4, 4, 401)
    for ax, (name, (fn, _)) in zip(axes.flat, NOTEBOOK_FLAT.items(), strict=True):
        y = np.asarray(fn(jnp.asarray(x, jnp.float32)))
        slope = np.abs(np.gradient(y, x))
        ax.fill_between(
            x,
            0,
            1,
            where=slope < 0.1,
            transform=ax.get_xaxis_transform(),
            color=ORANGE,
            alpha=0.25,
            lw=0,
            label="|slope| < .1",
        )
        ax.plot(x, y, color=BLUE)
        ax.set(title=name)
    axes[0, 0].legend(loc="upper left")
    settings.save(fig, "i2_flat")

    bars = softmax_bars(1)
    fig, axes = panels(1, 2, 3.6, 2.2, sharey=True)
    for ax, (name, bar) in zip(axes.flat, bars.items(), strict=True):
        ax.bar(np.arange(30), bar)
        ax.axhline(1 / 30, color=ORANGE, lw=1)
        ax.set(title=f"softmax of logits, {name}")
    settings.save(fig, "i3_softmax")

    ours = stds["a library's weights"]
    worst = max(np.abs(flat[n] - np.array(want)).max() for n, (_, want) in NOTEBOOK_FLAT.items())
    texts = (f"{n} {' '.join(f'{x:.4f}' for x in flat[n])}" for n in flat)
    notebook = "tanh 1.8183, selu -2.8668, gelu -1.8611 -1.0775 -0.5534"
    numbers = {
        "I1 std": stds,
        "I1 1/√3n": 1 / np.sqrt(3 * INS),
        "I2 flat from": flat,
        # The share of a standard normal that is on the flat parts.
        "I2 share flat": {
            name: saturation_fraction(fn, jr.normal(jr.key(2), (100_000,)))
            for name, (fn, _) in NOTEBOOK_FLAT.items()
        },
        "I3 largest": {name: bar.max() for name, bar in bars.items()},
    }
    return Result(
        numbers,
        [
            fact(
                "I1",
                "default weights have std 1/√(3n) = .05774",
                ".0576",
                f"{ours:.4f}",
                abs(ours - 1 / np.sqrt(3 * INS)) < 5e-4,
            ),
            fact("I2", "slope below .1 from", notebook, ", ".join(texts), bool(worst < 1e-3)),
        ],
    )


if __name__ == "__main__":
    run(["i_initialisation"], doc=__doc__)
