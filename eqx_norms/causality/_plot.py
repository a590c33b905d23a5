"""The heat map of a report."""

import numpy as np

from ._report import CausalityReport, block_max

_DECADES = 6
_CELLS = 96


def plot_report(report: CausalityReport, ax=None):
    """Draws `report.matrix` on `ax`: blue where reading is allowed, red where it is a leak."""
    try:
        import matplotlib.pyplot as plt
        from matplotlib.colors import LogNorm
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise ImportError(
            'report.plot() needs matplotlib: pip install "eqx-norms[plot]"; '
            "report.heatmap() draws the same with characters"
        ) from error

    if ax is None:
        _, ax = plt.subplots(figsize=(5.2, 4.4), layout="constrained")
    size = len(report.allowed)
    block = -(-size // _CELLS)
    edge = -(-size // block) * block
    largest = report.matrix[np.isfinite(report.matrix)].max(initial=0.0) or 1.0
    matrix = np.where(np.isposinf(report.matrix), largest, report.matrix)
    place = {"extent": (-0.5, edge - 0.5, edge - 0.5, -0.5), "interpolation": "nearest"}
    place["norm"] = LogNorm(vmin=largest / 10**_DECADES, vmax=largest, clip=True)

    ax.set_facecolor("0.92")
    # Blocks show their largest cell, so that a single pair among a thousand can be seen.
    measured = np.where(np.isnan(matrix), -1.0, matrix)
    nothing = np.where(block_max(measured, block) == 0, largest / 10**_DECADES, np.nan)
    ax.imshow(nothing, cmap="Greys", **place)
    layers = {}
    for cmap, cells in (("Blues", report.allowed), ("Reds", ~report.allowed)):
        changes = block_max(measured * cells, block)
        layers[cmap] = ax.imshow(np.where(changes > 0, changes, np.nan), cmap=cmap, **place)
    for x, y in _outline(report.allowed):
        ax.plot(x, y, color="black", linewidth=1 if size <= 64 else 0.4)

    ax.set(xlim=(-0.5, size - 0.5), ylim=(size - 0.5, -0.5), title=_title(report))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    noun = "example" if report.kind == "independent" else "position"
    ax.set(xlabel=f"input {noun} read", ylabel=f"output {noun}")
    if (matrix > 0).any():
        bar = ax.figure.colorbar(layers["Reds" if report.leak else "Blues"], ax=ax, shrink=0.9)
        bar.set_label("largest change of the output")
    return ax


def _title(report: CausalityReport) -> str:
    if not report.leak:
        return report.status + " (grey: not measured)" * bool(np.isnan(report.matrix).any())
    count = len(report.pairs())
    pairs = "pair" if count == 1 else "pairs"
    return f"leak: {count} forbidden {pairs} (red)"


def _outline(allowed: np.ndarray) -> list[tuple[list[float], list[float]]]:
    """The line segments between allowed and forbidden cells, each run of them as one."""
    edges = []
    for flip, cells in ((False, allowed), (True, allowed.T)):
        for row, differs in enumerate(cells[:-1] != cells[1:]):
            starts = np.flatnonzero(differs & ~np.r_[False, differs[:-1]])
            ends = np.flatnonzero(differs & ~np.r_[differs[1:], False])
            for start, end in zip(starts, ends, strict=True):
                along, across = [start - 0.5, end + 0.5], [row + 0.5, row + 0.5]
                edges.append((across, along) if flip else (along, across))
    return edges
