"""E3: how much the initial gain matters, without and with LN."""

import numpy as np

from ._common import RELU_GAIN, Architecture
from ._plots import draw_losses, panels
from ._study import Claim, Result, Settings, less, paired, run, spread, summary, verdict

GAINS = {"gain .3": 0.3, "gain 1.41": RELU_GAIN, "gain 3": 3.0}


def study(settings: Settings) -> Result:
    configs = [(gain, 0.1) for gain in GAINS.values()]
    final, numbers = {}, {}
    fig, axes = panels(1, 2, 3.6, 2.6, sharey=True)
    for ax, norm in zip(axes.flat, ("none", "LN"), strict=True):
        runs = settings.train(Architecture(2, norm), configs, steps=1000)
        final[norm] = runs.final
        numbers[norm] = {name: summary(runs.final[i]) for i, name in enumerate(GAINS)}
        draw_losses(ax, runs.losses, GAINS)
        ax.set(title=norm)
    settings.save(fig, "e3_loss")

    small, middle, large = final["LN"]
    span = {norm: np.ptp(final[norm], axis=0) for norm in final}
    # "Insensitive": no gain is off by more than the noise. Ours is a difference, either way.
    worst = paired(large, middle)
    same = "no: worse" if verdict(worst).startswith("no: opp") else verdict(worst)
    ours = f"{worst} ({spread(large)}; {spread(middle)})"
    return Result(
        numbers,
        [
            less("E3", "LN: loss spans less over the gains", "seen", span["LN"], span["none"]),
            less("E3", "LN: gain .3 ends below 1.41", "", small, middle),
            Claim(
                "E3",
                "LN: insensitive to the gain: 3 as good as 1.41",
                "seen",
                ours,
                "yes" if same == "no: a tie" else same,
            ),
        ],
    )


if __name__ == "__main__":
    run(["e3_gain"], doc=__doc__)
