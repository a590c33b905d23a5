"""E7: four activation functions in a deep network, without and with LN."""

import jax
import jax.numpy as jnp
import numpy as np

from ._common import RELU_GAIN, Architecture, activations_and_gradients, weight_update_ratios
from ._plots import (
    NORM_COLOURS,
    draw_by_layer,
    draw_losses,
    layer_colours,
    panels,
    percentile_bands,
)
from ._study import Result, Settings, less, run, second_half, summary


def gelu(x):
    return jax.nn.gelu(x, approximate=False)  # as torch's default


ACTIVATIONS = {
    "tanh": (jnp.tanh, 5 / 3, "2.479; 2.501"),
    "selu": (jax.nn.selu, 1.0, "2.484; 2.493"),
    "relu": (jax.nn.relu, RELU_GAIN, "2.560; 2.521"),
    "gelu": (gelu, RELU_GAIN, "2.493; 2.487"),
}


SHOWN = {"tanh": (-1, 1), "selu": (-2, 4), "relu": (-0.5, 4), "gelu": (-0.5, 4)}


def look(*args):
    seen = activations_and_gradients(*args)
    return {
        "linear outputs": seen["linear outputs"],
        "activations": seen["activations"],
        "update ratios": weight_update_ratios(*args),
    }


def draw_densities(ax, values, edges) -> None:
    """A line a layer, of all seeds together."""
    for layer, colour in enumerate(layer_colours(values.shape[1])):
        density, _ = np.histogram(values[:, layer], edges, density=True)
        ax.plot((edges[1:] + edges[:-1]) / 2, density, color=colour, lw=1.2, label=layer + 1)


def layer_names(count: int) -> list[str]:
    return [*map(str, range(1, count)), "head"]


def study(settings: Settings) -> Result:
    columns = len(ACTIVATIONS)
    figures = {
        "loss": panels(1, columns, 2.4, 2.3, sharey=True),
        "percentiles": panels(1, columns, 2.4, 2.2, sharey=True),
        "densities": panels(2, columns, 2.4, 1.9, sharex="col"),
        "update_ratios": panels(2, columns, 2.4, 2.0, sharex=True, sharey=True),
    }
    axes = {name: axes for name, (_, axes) in figures.items()}
    numbers, claims = {}, []
    for column, (name, (fn, gain, notebook)) in enumerate(ACTIVATIONS.items()):
        final, (start, stop) = {}, SHOWN[name]
        for row, norm in enumerate(("none", "LN")):
            runs = settings.train(
                Architecture(6, norm, fn), [(gain, 0.2)], steps=2000, looks=40, look=look
            )
            final[norm] = runs.final[0]
            outputs = runs.looks["linear outputs"][0, :, -1]
            activations = runs.looks["activations"][0, :, -1]
            ratios = runs.looks["update ratios"][0]
            low, middle, high = percentile_bands(np.moveaxis(outputs, 1, 0))
            layer = np.arange(1, len(middle) + 1)
            numbers[f"{name}, {norm}"] = {
                "loss": summary(final[norm]),
                "percentiles 16 50 84 of linear outputs by layer": np.stack([low, middle, high], 1),
                "std of activations by layer": activations.std((0, 2, 3)),
                "log10 update ratio by layer, second half": second_half(ratios).mean((0, 1)),
            }

            colour = NORM_COLOURS[norm]
            draw_losses(axes["loss"][0, column], runs.losses, [norm], [colour])
            axes["percentiles"][0, column].errorbar(
                layer + (row - 0.5) / 4, middle, (middle - low, high - middle), fmt="o", ms=3,
                capsize=2, color=colour, label=norm,
            )  # fmt: skip
            axes["percentiles"][0, column].set_xticks(layer)
            ax = axes["densities"][row, column]
            draw_densities(ax, activations, np.linspace(start, stop, 63))
            ax.set(title=f"{name}, {norm}", ylim=(0, 1.6))
            ax = axes["update_ratios"][row, column]
            steps = np.arange(ratios.shape[1]) * runs.every
            draw_by_layer(ax, steps, ratios, layer_names(ratios.shape[2]))
            ax.axhline(-3, color="0.6", lw=0.8, ls=":")
            ax.set(title=f"{name}, {norm}", xlabel="step" if row else "")
        for part in ("loss", "percentiles"):
            axes[part][0, column].set_title(name)
        axes["percentiles"][0, column].set_xlabel("layer")
        axes["densities"][1, column].set_xlabel("activation")
        claims.append(
            less("E7", f"{name}: LN ends below none", notebook, final["LN"], final["none"])
        )

    axes["percentiles"][0, 0].set_ylabel("linear output")
    for row in range(2):
        axes["densities"][row, 0].set_ylabel("density")
        axes["update_ratios"][row, 0].set_ylabel("log10 |update| / |weight|")
    for part, title in (("densities", "layer"), ("update_ratios", "layer"), ("percentiles", None)):
        fig, grid = figures[part]
        handles, labels = grid[0, 0].get_legend_handles_labels()
        fig.legend(handles, labels, loc="outside right center", title=title)
    for name, (fig, _) in figures.items():
        settings.save(fig, f"e7_{name}")
    return Result(numbers, claims)


if __name__ == "__main__":
    run(["e7_activations"], doc=__doc__)
