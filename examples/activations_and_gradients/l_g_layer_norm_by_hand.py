"""L, G1, G2: LN's formula, its derivative by hand, and a bound on that derivative."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

import eqx_norms

from ._plots import BLUE, ORANGE, panels
from ._study import Result, Settings, fact, run

EXAMPLES, INS, OUTS, EPS = 10_000, 256, 128, 1e-5


def formula(x):
    """LN in NumPy, one row an example."""
    return (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + EPS)


def inputs(key, examples: int = EXAMPLES):
    """Examples, the weights of a linear and of LN, and what to multiply LN's outputs with."""
    key1, key2, key3, key4 = jr.split(key, 4)
    x = jr.normal(key1, (examples, INS))
    w = jr.normal(key2, (INS, OUTS))
    weight = 1 + 0.1 * jr.normal(key3, (OUTS,))
    return x, w, weight, jr.normal(key4, (examples, OUTS))


def by_hand(x, w, weight, c) -> dict[str, jax.Array]:
    """The derivative of mean(c * LN(x @ w)), with respect to every intermediate."""
    z = x @ w
    mean, v = z.mean(1, keepdims=True), z.var(1, keepdims=True)
    rstd = jax.lax.rsqrt(v + EPS)
    dy = c / c.size
    g = weight[None] * dy
    # The whole of LN's derivative is the layer's own rule, hand-written as well.
    _, pullback = jax.vjp(jax.vmap(lambda z: eqx_norms.layer_norm(z, weight, eps=EPS)), z)
    (dz,) = pullback(dy)
    return {
        "v": (g * (z - mean)).sum(1, keepdims=True) * -0.5 * rstd**3,
        "mean": -(g * rstd).sum(1, keepdims=True),
        "z": dz,
        "w": x.T @ dz,
        "x": dz @ w.T,
    }


def by_autodiff(x, w, weight, c) -> dict[str, jax.Array]:
    """The same from plain operations. A zero added to an intermediate has its derivative."""

    def loss(shift):
        z = (x + shift["x"]) @ (w + shift["w"]) + shift["z"]
        mean, v = z.mean(1, keepdims=True), z.var(1, keepdims=True)
        y = (z - (mean + shift["mean"])) / jnp.sqrt(v + shift["v"] + EPS)
        return (c * weight[None] * y).mean()

    like = {"v": (len(x), 1), "mean": (len(x), 1), "z": c.shape, "w": w.shape, "x": x.shape}
    return jax.grad(loss)({name: jnp.zeros(shape, x.dtype) for name, shape in like.items()})


def differences(hand: dict, auto: dict) -> dict[str, dict[str, Any]]:
    """The largest one, and the norm of all of them relative to that of the derivatives."""
    norm = np.linalg.norm
    return {
        name: {
            "absolute": np.abs(hand[name] - auto[name]).max(),
            "relative": norm(hand[name] - auto[name]) / norm(auto[name]),
        }
        for name in hand
    }


def squares_and_bounds(x, w, weight, c) -> tuple[jax.Array, jax.Array]:
    """Of each example, |dz|² / n and var(weight * dy) / var(z), which is to bound it."""
    z = x @ w
    _, pullback = jax.vjp(jax.vmap(lambda z: eqx_norms.layer_norm(z, weight, eps=EPS)), z)
    dy = c / c.size
    (dz,) = pullback(dy)
    return (dz**2).mean(1), (weight[None] * dy).var(1) / z.var(1)


def aligned_rows(x, w, weight, c):
    """The same for a loss whose derivative is in part along LN's own outputs."""
    y = jax.vmap(lambda z: eqx_norms.layer_norm(z, weight, eps=EPS))(x @ w)
    return squares_and_bounds(x, w, weight, c + y / 2)


def relative_gap(square, bound):
    """Negative where the bound is broken."""
    return 1 - square / bound


def in_both(fn: Callable, *args) -> dict[str, dict]:
    """In float32 and float64, from the same numbers."""
    out = {}
    for name in ("float32", "float64"):
        with jax.enable_x64(name == "float64"):
            cast = [jnp.asarray(x, name) for x in args]
            out[name] = jax.tree.map(np.asarray, jax.jit(fn)(*cast))
    return out


def study(settings: Settings) -> Result:
    x = jr.normal(jr.key(0), (3, 5))
    ours = jax.vmap(eqx_norms.LayerNorm(5))(x)
    library = jax.vmap(eqx.nn.LayerNorm(5))(x)
    off = max(np.abs(ours - y).max() for y in (library, formula(np.asarray(x))))

    args = inputs(jr.key(1), 500 if settings.quick else EXAMPLES)
    both = in_both(lambda *args: (by_hand(*args), by_autodiff(*args)), *args)
    derivatives = {dtype: differences(*pair) for dtype, pair in both.items()}
    worst = {d: max(row["relative"] for row in rows.values()) for d, rows in derivatives.items()}
    # np.allclose asks for |a - b| <= atol + rtol |b|: where |b| < atol / rtol, atol decides.
    right = both["float32"][1]
    decided = {name: (np.abs(right[name]) < 1e-8 / 1e-5).mean() for name in right}
    wrong = {name: bool(np.allclose(1.001 * right[name], right[name])) for name in right}

    rows = in_both(squares_and_bounds, *args)
    share = {dtype: (square <= bound).mean() for dtype, (square, bound) in rows.items()}
    square, bound = rows["float32"]
    rounded = (square <= bound * (1 + 1e-6)).mean()
    square, bound = rows["float64"]
    exact = relative_gap(square, bound)
    quantiles = np.quantile(exact, (0.05, 0.5, 0.95, 1))
    # A loss that follows LN's own outputs has derivatives along them, which LN takes out.
    aligned = relative_gap(*in_both(aligned_rows, *args)["float64"])
    fig, ((ax,),) = panels(1, 1, 5, 2.6)
    ax.hist(100 * exact, np.geomspace(1e-6, 100, 81), color=BLUE)
    ax.axvline(100 * exact.mean(), color=ORANGE, label=f"mean {100 * exact.mean():.1f}%")
    ax.set(xscale="log", xlabel="|dz|² / n below its bound, in % of the bound", ylabel="examples")
    ax.legend()
    settings.save(fig, "g2_gap")

    numbers = {
        "L largest difference": off,
        "G1": derivatives,
        "G1 share of entries where allclose's atol decides": decided,
        "G1 allclose accepts derivatives off by .1%": wrong,
        "G2 share that holds": share,
        "G2 relative gap": {"mean": exact.mean(), "5 50 95 100%": quantiles},
        "G2 relative gap, cotangent along the outputs": {
            "mean": aligned.mean(),
            "largest": aligned.max(),
        },
        "G2 largest absolute gap": (bound - square).max(),
    }
    text = lambda dtype: f"{worst[dtype]:.1e}"
    span = f"mean {100 * exact.mean():.1f}%, largest {100 * exact.max():.0f}%"
    return Result(
        numbers,
        [
            fact(
                "L",
                "the formula equals a library's LN",
                "equal",
                f"within {off:.0e}",
                bool(off < 1e-6),
            ),
            fact(
                "G1",
                "by hand = autodiff, relative, float32",
                "2e-10 absolute",
                text("float32"),
                worst["float32"] <= 3e-7,
            ),
            fact(
                "G1",
                "by hand = autodiff, relative, float64",
                "",
                text("float64"),
                worst["float64"] <= 5e-16,
            ),
            fact(
                "G2",
                "the bound holds, share in float64",
                "1.0",
                f"{share['float64']:.4f}",
                share["float64"] == 1,
            ),
            fact(
                "G2",
                "the bound holds in float32, to rounding",
                "1.0",
                f"{share['float32']:.4f}; to 1e-6, {rounded:.4f}",
                rounded == 1,
            ),
            fact(
                "G2", "the bound is super tight: gap under .1%", "seen", span, exact.mean() < 1e-3
            ),
        ],
    )


if __name__ == "__main__":
    run(["l_g_layer_norm_by_hand"], doc=__doc__)
