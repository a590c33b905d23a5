"""E9: pre-activation blocks with LN, with and without skip connections."""

import numpy as np

from ._common import RELU_GAIN, Architecture, direction_ratios
from ._plots import BLUE, ORANGE, draw_losses, panels
from ._study import Result, Settings, less, run, summary
from .e8_batch_norm import draw_ratios


def study(settings: Settings) -> Result:
    final, losses, ratios, numbers = {}, {}, {}, {}
    fig, axes = panels(1, 2, 3.8, 3)
    for name, skip, colour in (("skips", True, BLUE), ("no skips", False, ORANGE)):
        runs = settings.train(
            Architecture(6, "LN", skip=skip),
            [(RELU_GAIN, 0.3)],
            steps=3000,
            looks=30,
            look=direction_ratios,
        )
        final[name], losses[name], ratios[name] = runs.final[0], runs.losses[0], runs.looks[0]
        draw_ratios(axes[0, 1], ratios[name], colour, name)
        numbers[name] = {
            "loss": summary(final[name]),
            "singular value ratio by linear, at init": ratios[name][:, 0].mean(0),
            "singular value ratio by linear, last look": ratios[name][:, -1].mean(0),
        }
    draw_losses(axes[0, 0], np.stack(list(losses.values())), losses, [BLUE, ORANGE])
    axes[0, 0].set_ylim(2.3, 3)
    axes[0, 1].legend()
    settings.save(fig, "e9_skips")
    at_init = lambda name: ratios[name][:, 0, -2]
    return Result(
        numbers,
        [
            less(
                "E9", "skips end below no skips", "2.423; 2.486", final["skips"], final["no skips"]
            ),
            less(
                "E9",
                "σ₁ / Σσ at init, last hidden: skips below none",
                "seen",
                at_init("skips"),
                at_init("no skips"),
            ),
        ],
    )


if __name__ == "__main__":
    run(["e9_skips"], doc=__doc__)
