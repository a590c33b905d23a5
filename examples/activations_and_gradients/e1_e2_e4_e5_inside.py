"""E1, E2, E4, E5: inside a small ReLU network, at two learning rates, without and with LN."""

import numpy as np

from ._common import PARTS, RELU_GAIN, Architecture, Runs, activations_and_gradients
from ._plots import (
    BLUE,
    ORANGE,
    dead_over_time,
    draw_bands,
    draw_by_layer,
    draw_histograms,
    draw_losses,
    panels,
    percentile_bands,
)
from ._study import Result, Settings, less, run, summary

GAIN_LN = 3**-0.5
CONFIGS = {
    "none": {"E1": (RELU_GAIN, 0.1), "E2": (RELU_GAIN, 2.0)},
    "LN": {"E4": (GAIN_LN, 0.1), "E5": (RELU_GAIN, 2.0)},
}
TITLES = {
    "E1": "E1: lr .1",
    "E2": "E2: lr 2",
    "E4": "E4: LN, gain 1/√3, lr .1",
    "E5": "E5: LN, lr 2",
}


def looks_of(runs: Runs, config: int, part: str) -> np.ndarray:
    """Axes: seeds, looks, layers, and those of the values."""
    return runs.looks[part][config]


def draw_percentiles(settings: Settings, runs: Runs, names: list[str]) -> None:
    """Of all seeds together, for the two runs, layer by layer."""
    layers = runs.looks[PARTS[0]].shape[3]
    steps = np.arange(runs.looks[PARTS[0]].shape[2]) * runs.every
    fig, axes = panels(layers, len(PARTS), 2.4, 1.6, sharex=True)
    for column, part in enumerate(PARTS):
        for layer in range(layers):
            ax = axes[layer, column]
            for i, (name, colour) in enumerate(zip(names, (BLUE, ORANGE), strict=True)):
                seen = np.moveaxis(looks_of(runs, i, part)[:, :, layer], 1, 0)
                draw_bands(ax, steps, seen, colour, TITLES[name])
            ax.set_ylabel(f"layer {layer + 1}" if column == 0 else "")
        axes[0, column].set_title(part)
        axes[-1, column].set_xlabel("step")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside upper center", ncols=2)
    settings.save(fig, f"{'_'.join(names).lower()}_percentiles")


def draw_histograms_of(settings: Settings, runs: Runs, config: int, name: str) -> None:
    """Of all seeds together, layer by layer."""
    layers = runs.looks[PARTS[0]].shape[3]
    steps = np.arange(runs.looks[PARTS[0]].shape[2]) * runs.every
    fig, axes = panels(layers, len(PARTS), 2.4, 1.5, sharex=True)
    for column, part in enumerate(PARTS):
        seen = np.moveaxis(looks_of(runs, config, part), 1, 0)
        # The median over seeds, for one that diverges would leave nothing to see of the others.
        each = np.abs(looks_of(runs, config, part)).reshape(settings.seeds, -1)
        reach = np.nanmedian(np.percentile(each, 99.5, axis=1))
        low = 0 if part == "activations" else -reach
        edges = np.linspace(low, reach, 62, dtype=np.float32)
        for layer in range(layers):
            ax = axes[layer, column]
            draw_histograms(ax, steps, seen[:, :, layer], edges)
            ax.set_ylabel(f"layer {layer + 1}" if column == 0 else "")
        axes[0, column].set_title(part)
        axes[-1, column].set_xlabel("step")
    fig.suptitle(f"{TITLES[name]}: histograms over time, brighter is denser (log)")
    settings.save(fig, f"{name.lower()}_histograms")


def percentiles_by_layer(seen: np.ndarray) -> np.ndarray:
    """Of (seeds, layers, ...): 16, 50 and 84 for each layer."""
    return percentile_bands(np.moveaxis(seen, 1, 0)).T


def study(settings: Settings) -> Result:
    final, dead, numbers, losses = {}, {}, {}, {}
    fig, axes = panels(1, 4, 2.3, 2.2, sharey=True)
    for norm, configs in CONFIGS.items():
        runs = settings.train(
            Architecture(2, norm),
            list(configs.values()),
            steps=1000,
            look=activations_and_gradients,
        )
        for i, name in enumerate(configs):
            final[name], losses[name] = runs.final[i], runs.losses[i]
            dead[name] = dead_over_time(looks_of(runs, i, "activations"))
            numbers[name] = {
                "loss": summary(final[name]),
                "diverged": int((~(final[name] < np.log(len(settings.pairs.vocabulary)))).sum()),
                "dead units by layer, last look": dead[name][:, -1].mean(0),
                "percentiles 16 50 84 by layer, last look": {
                    part: percentiles_by_layer(looks_of(runs, i, part)[:, -1]) for part in PARTS
                },
            }
            draw_histograms_of(settings, runs, i, name)
            ax = axes.flat[len(final) - 1]
            steps = np.arange(dead[name].shape[1]) * runs.every
            draw_by_layer(
                ax, steps, dead[name], [f"layer {j + 1}" for j in range(dead[name].shape[-1])]
            )
            ax.set(title=TITLES[name])
        draw_percentiles(settings, runs, list(configs))
    axes[0, 0].set_ylabel("share of dead units")
    axes[0, 0].legend()
    settings.save(fig, "e1_e2_e4_e5_dead")

    fig, ((ax,),) = panels(1, 1, 5, 3)
    draw_losses(ax, np.stack(list(losses.values())), [TITLES[name] for name in losses])
    settings.save(fig, "e1_e2_e4_e5_loss")

    lively = lambda name: dead[name][:, -1].mean(-1)
    return Result(
        numbers,
        [
            less(
                "E1, E2",
                "lr .1 ends below lr 2, without LN",
                "2.558; 2.830",
                final["E1"],
                final["E2"],
            ),
            less("E2, E5", "at lr 2, LN ends below none", "2.575; 2.830", final["E5"], final["E2"]),
            less("E2, E5", "at lr 2, LN has fewer dead units", "seen", lively("E5"), lively("E2")),
            less(
                "E1, E4",
                "LN at gain 1/√3 ends below no LN",
                "2.537; 2.558",
                final["E4"],
                final["E1"],
            ),
            less(
                "E4, E5", "with LN, lr .1 ends below lr 2", "2.537; 2.575", final["E4"], final["E5"]
            ),
        ],
    )


if __name__ == "__main__":
    run(["e1_e2_e4_e5_inside"], doc=__doc__)
