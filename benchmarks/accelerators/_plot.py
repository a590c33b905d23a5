"""One figure: our cost over eqx.nn's, a dot for each model, the targets as lines."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from .._cases import LAYERS
from ._cases import DTYPES, MODELS, PLATFORMS
from ._targets import COST, WHOLE, by_case, ratio

COLOURS = dict(zip(DTYPES, ("C0", "C1"), strict=True))


def plot(results: dict, path: Path) -> bool:
    """Writes the figure; False if there is nothing to draw."""
    found = by_case(results["models"])
    ours = [case for case in found if case.library == "ours"]
    ours = [case for case in ours if ratio(found, case, "cost") is not None]
    if not ours:
        return False
    platforms = [p for p in PLATFORMS if any(case.platform == p for case in ours)]
    place = lambda case: (list(MODELS).index(case.work), LAYERS.index(case.layer))
    labels = list(dict.fromkeys(map(_label, sorted(ours, key=place))))
    fig, axes = plt.subplots(
        2, len(platforms), figsize=(2.6 + 2.4 * len(platforms), 1.8 + 0.36 * len(labels)),
        sharey=True, squeeze=False, layout="constrained",
    )  # fmt: skip
    for column, platform in zip(axes.T, platforms, strict=True):
        for key, ax in zip(("cost", "temporaries"), column, strict=True):
            _facet(ax, found, [c for c in ours if c.platform == platform], key, labels)
            what = key if key != "cost" else COST.get(platform, "estimated cycles")
            ax.set_title(f"{PLATFORMS[platform]}, {what}", fontsize=9)
    handles = {h.get_label(): h for ax in axes.flat for h in ax.collections}
    fig.legend(
        handles.values(), handles, loc="outside upper center", frameon=False, fontsize=9,
        ncols=4 if len(platforms) > 1 else 2,
    )  # fmt: skip
    fig.supxlabel("ours / eqx.nn's: left of 1, ours costs less", fontsize=9)
    fig.savefig(path, dpi=130)
    plt.close(fig)
    return True


def _label(case) -> str:
    return f"{MODELS[case.work]}, {case.layer}"


def _facet(ax, found, cases, key, labels):
    """One platform and measure: filled for whole programs, hollow for the norm's part."""
    for dtype in DTYPES:
        for part in (False, True):
            points = [
                (value, labels.index(_label(case)) + (0.15 if dtype == DTYPES[1] else -0.15))
                for case in cases
                if case.dtype == dtype and (value := ratio(found, case, key, part=part)) is not None
            ]
            if points:
                face = "none" if part else COLOURS[dtype]
                label = f"{dtype}, {'norm part' if part else 'whole program'}"
                ax.scatter(
                    *zip(*points, strict=True),
                    s=22,
                    facecolors=face,
                    edgecolors=COLOURS[dtype],
                    label=label,
                    zorder=3,
                )
    ax.axvline(1, color="0.3", linewidth=0.8)
    if key == "cost":
        ax.axvline(WHOLE, color="C2", linewidth=1, linestyle="--")
    ax.set_yticks(range(len(labels)), labels, fontsize=7)
    ax.set_ylim(len(labels) - 0.5, -0.5)
    ax.set_xlim(left=0)
    ax.grid(axis="both", color="0.9")
    ax.set_axisbelow(True)
    ax.tick_params(axis="x", labelsize=8)
