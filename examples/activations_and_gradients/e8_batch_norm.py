"""E8: batch norm, LN and none in a deep network, and how many directions its layers keep."""

import numpy as np

from ._common import RELU_GAIN, Architecture, direction_ratios
from ._plots import NORM_COLOURS, draw_losses, panels
from ._study import Result, Settings, less, run, summary


def draw_ratios(ax, ratios, colour, label) -> None:
    """By linear, before training and at the last look: the mean over seeds, and one std."""
    layers = np.arange(1, ratios.shape[-1] + 1)
    for look, style in ((0, "o--"), (-1, "o-")):
        seen = ratios[:, look]
        when = "at the start" if look == 0 else "at the end"
        ax.plot(
            layers,
            seen.mean(0),
            style,
            ms=3,
            color=colour,
            label=f"{label}, {when}",
            mfc="white" if look == 0 else colour,
        )
        ax.fill_between(
            layers,
            *(seen.mean(0) + s * seen.std(0) for s in (-1, 1)),
            color=colour,
            alpha=0.12,
            lw=0,
        )
    names = [*map(str, layers[:-1]), "head"]
    ax.set_xticks(layers, names)
    ax.margins(x=0.07)
    ax.set(xlabel="linear", ylabel="σ₁ / Σσ of its outputs")


def study(settings: Settings) -> Result:
    final, losses, ratios, numbers = {}, {}, {}, {}
    fig, axes = panels(1, 2, 3.8, 3)
    for norm in ("BN", "LN", "none"):
        runs = settings.train(
            Architecture(6, norm), [(RELU_GAIN, 0.3)], steps=3000, looks=30, look=direction_ratios
        )
        final[norm], losses[norm], ratios[norm] = runs.final[0], runs.losses[0], runs.looks[0]
        draw_ratios(axes[0, 1], ratios[norm], NORM_COLOURS[norm], norm)
        numbers[norm] = {
            "loss": summary(final[norm]),
            "singular value ratio by linear, at init": ratios[norm][:, 0].mean(0),
            "singular value ratio by linear, last look": ratios[norm][:, -1].mean(0),
        }
    draw_losses(
        axes[0, 0], np.stack(list(losses.values())), losses, [*map(NORM_COLOURS.get, losses)]
    )
    axes[0, 0].set_ylim(2.4, 3)
    axes[0, 1].legend()
    settings.save(fig, "e8_batch_norm")
    at_init = lambda norm: ratios[norm][:, 0, -2]
    return Result(
        numbers,
        [
            less("E8", "batch norm ends below LN", "2.471; 2.493", final["BN"], final["LN"]),
            less("E8", "LN ends below none", "2.493; 2.500", final["LN"], final["none"]),
            less(
                "E8",
                "σ₁ / Σσ at init, last hidden: BN below LN",
                "seen",
                at_init("BN"),
                at_init("LN"),
            ),
            less(
                "E8",
                "σ₁ / Σσ at init, last hidden: LN below none",
                "",
                at_init("LN"),
                at_init("none"),
            ),
        ],
    )


if __name__ == "__main__":
    run(["e8_batch_norm"], doc=__doc__)
