"""B, S: a shift of all inputs makes them alike, and what singular values are."""

import jax.numpy as jnp
import jax.random as jr
import numpy as np

from eqx_norms.diagnostics import singular_value_ratio

from ._plots import BLUE, ORANGE, panels
from ._study import Result, Settings, fact, run

MATRIX = ((-1.0, 2.2), (-1.8, 0.4))
DRAWS, EXAMPLES, FEATURES = 20, 1000, 100


def inner_products(key, shift: float) -> jnp.ndarray:
    """B: the mean |x · w| over normal inputs, plus `shift`, and normal weights."""
    key1, key2 = jr.split(key)
    x = jr.normal(key1, (EXAMPLES, FEATURES)) + shift
    return jnp.abs(x @ jr.normal(key2, (FEATURES, 2 * FEATURES))).mean()


def study(settings: Settings) -> Result:
    keys = jr.split(jr.key(0), DRAWS)
    before = np.array([inner_products(key, 0.0) for key in keys])
    after = np.array([inner_products(key, 0.2) for key in keys])

    matrix = np.array(MATRIX)
    left, values, _ = np.linalg.svd(matrix)
    angles = np.linspace(0, 2 * np.pi, 200)
    circle = np.stack([np.cos(angles), np.sin(angles)])
    fig, ((ax,),) = panels(1, 1, 3.2, 3.2)
    ax.plot(*circle, color="0.6", label="circle")
    ax.plot(*(matrix @ circle), color=BLUE, label="its image")
    # A singular vector's sign is free: both point up.
    for value, direction in zip(values, left.T * np.sign(left[1])[:, None], strict=True):
        ax.annotate("", value * direction, (0, 0), arrowprops={"arrowstyle": "->", "color": ORANGE})
        end = (value + 0.35) * direction
        ax.text(*end, f"{value:.2f}", color=ORANGE, ha="center", va="center")
    ax.set(aspect="equal", xlim=(-3.6, 3.6), ylim=(-3.2, 3.2))
    ax.legend(loc="upper left")
    settings.save(fig, "s_ellipse")

    rises = int((after > before).sum())
    numbers = {
        "B mean |x · w|": {
            "as it is": before.mean(),
            "shifted by .2": after.mean(),
            "rises": rises,
        },
        "S singular values": values,
        "S ratio": singular_value_ratio(matrix.astype(np.float32)),
    }
    ratio = 100 * (after / before - 1)
    ours = f"+{ratio.mean():.1f} ± {ratio.std():.1f}%, in {rises} of {DRAWS} draws"
    return Result(
        numbers,
        [
            fact(
                "B", "inputs + .2 raise mean |x · w|", "107.4 to 110.4: +2.8%", ours, rises == DRAWS
            ),
            fact(
                "S",
                "a 2x2 matrix's singular values",
                "2.75, 1.29",
                ", ".join(f"{value:.2f}" for value in values),
                [round(float(value), 2) for value in values] == [2.75, 1.29],
            ),
        ],
    )


if __name__ == "__main__":
    run(["b_s_bias_and_directions"], doc=__doc__)
