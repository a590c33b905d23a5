"""E6: how far a step moves the weights of each layer of a deeper network, without and with LN.

The notebook's caption says lr 1, its code .6; .6 gives its losses.
"""

import numpy as np

from ._common import RELU_GAIN, Architecture, weight_update_ratios
from ._plots import NORM_COLOURS, draw_by_layer, draw_losses, panels
from ._study import Result, Settings, less, run, second_half, summary


def study(settings: Settings) -> Result:
    final, losses, numbers = {}, {}, {}
    fig, axes = panels(1, 3, 3, 2.6)
    for ax, norm in zip(axes.flat[1:], ("none", "LN"), strict=True):
        runs = settings.train(
            Architecture(4, norm), [(RELU_GAIN, 0.6)], steps=2000, look=weight_update_ratios
        )
        final[norm], losses[norm] = runs.final[0], runs.losses[0]
        ratios = runs.looks[0]
        steps = np.arange(ratios.shape[1]) * runs.every
        draw_by_layer(ax, steps, ratios, [*map(str, range(1, ratios.shape[2])), "head"])
        ax.axhline(-3, color="0.6", lw=0.8, ls=":")
        ax.set(title=norm, ylabel="log10 |update| / |weight|")
        numbers[norm] = {
            "loss": summary(final[norm]),
            "log10 update ratio by layer, second half": second_half(ratios).mean((0, 1)),
        }
    axes[0, 1].legend(title="layer", ncols=2)
    axes[0, 1].sharey(axes[0, 2])
    draw_losses(
        axes[0, 0], np.stack(list(losses.values())), losses, [*map(NORM_COLOURS.get, losses)]
    )
    settings.save(fig, "e6_update_ratios")
    return Result(
        numbers, [less("E6", "LN ends below none", "2.503; 2.549", final["LN"], final["none"])]
    )


if __name__ == "__main__":
    run(["e6_update_ratios"], doc=__doc__)
