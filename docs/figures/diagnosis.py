"""Draws and prints what diagnose says of the six models of docs/diagnosis.md.

python docs/figures/diagnosis.py
"""

import pathlib
import sys

import jax.random as jr
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from eqx_norms.diagnostics import diagnose

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE.parent.parent / "tests"))
import diagnosis_zoo as zoo  # noqa: E402

MODELS = (
    "dead_relus",
    "no_residuals_in_24_layers",
    "zero_over_zero_in_a_masked_softmax",
    "a_stop_gradient_too_many",
    "bfloat16_updates_that_vanish",
    "learning_rate_100_times_too_large",
)


def main():
    """Writes the figures beside this script."""
    for name in MODELS:
        case = zoo.SICK[name](jr.key(0))
        found = diagnose(case.loss_fn, case.model, *case.args, **case.options)
        print(f"\n== {name}\n{found}", flush=True)
        figure = found.plot()
        figure.savefig(HERE / f"diagnosis_{name}.png", dpi=80)
        plt.close(figure)


if __name__ == "__main__":
    main()
