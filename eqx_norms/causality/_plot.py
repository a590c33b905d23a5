"""The heat map of a dependency matrix."""

import numpy as np

_DECADES = 6
_CELLS = 96
_LABELS = 48


def heat_map(report, *, title: str, noun: str, ax=None):
    """Draws the matrix of a `CausalityReport`.

    Blue where reading is allowed, red for a leak, yellow for what must be read and is not.
    """
    try:
        from matplotlib.collections import LineCollection
        from matplotlib.colors import ListedColormap, LogNorm
    except ImportError as error:
        raise ImportError(
            'report.plot() needs matplotlib: pip install "eqx-norms[plot]"; '
            "report.heatmap() draws the same with characters"
        ) from error

    if ax is None:
        import matplotlib.pyplot as plt

        _, ax = plt.subplots(figsize=(5.2, 4.4), layout="constrained")
    matrix, allowed = report.matrix, report.allowed
    block = -(-max(allowed.shape) // _CELLS)
    bottom, right = (-(-size // block) * block - 0.5 for size in allowed.shape)
    largest = matrix[np.isfinite(matrix)].max(initial=0.0) or 1.0
    matrix = np.where(np.isposinf(matrix), largest, matrix)
    place = {"extent": (-0.5, right, bottom, -0.5), "interpolation": "nearest"}
    place["norm"] = LogNorm(vmin=largest / 10**_DECADES, vmax=largest, clip=True)

    ax.set_facecolor("0.92")
    # Blocks show their largest cell, so that a single pair among a thousand can be seen.
    measured = np.where(np.isnan(matrix), -1.0, matrix)
    nothing = np.where(block_max(measured, block) == 0, largest / 10**_DECADES, np.nan)
    ax.imshow(nothing, cmap="Greys", **place)
    layers = {}
    for cmap, cells in (("Blues", allowed), ("Reds", ~allowed)):
        changes = block_max(measured * cells, block)
        layers[cmap] = ax.imshow(np.where(changes > 0, changes, np.nan), cmap=cmap, **place)
    if report.blind:
        missing = np.where(block_max(report.missing(), block), largest, np.nan)
        ax.imshow(missing, cmap=ListedColormap(["gold"], "blind"), **place)
    width = 1 if max(allowed.shape) <= 64 else 0.4
    # One artist: the layout of a figure asks each of them for its extent.
    ax.add_collection(LineCollection(_outline(allowed), colors="black", linewidths=width))

    rows, columns = allowed.shape
    ax.set(xlim=(-0.5, columns - 0.5), ylim=(rows - 0.5, -0.5), title=title)
    _name_ticks(ax.xaxis, report.inputs, columns)
    _name_ticks(ax.yaxis, report.outputs, rows)
    ax.set(xlabel=f"input {noun} read", ylabel=f"output {noun}")
    if (matrix > 0).any():
        leak = (matrix[~allowed] > 0).any()
        bar = ax.figure.colorbar(layers["Reds" if leak else "Blues"], ax=ax, shrink=0.9)
        bar.set_label("largest change of the output")
    return ax


def _name_ticks(axis, positions, count: int) -> None:
    """Every label if they fit, else numbers at some."""
    from matplotlib.ticker import MaxNLocator

    if positions.labels and count <= _LABELS:
        axis.set_ticks(range(count), positions.labels)
        return
    axis.set_major_locator(MaxNLocator(integer=True))
    if positions.labels or len(positions.lengths) > 1:
        named = lambda place, _: positions.mark(int(place)) if 0 <= place < count else ""
        axis.set_major_formatter(named)


def _outline(allowed: np.ndarray) -> list[list[tuple[float, float]]]:
    """The segments between allowed and forbidden cells, each run of them as one."""
    edges = []
    for flip, cells in ((False, allowed), (True, allowed.T)):
        for row, differs in enumerate(cells[:-1] != cells[1:]):
            starts = np.flatnonzero(differs & ~np.r_[False, differs[:-1]])
            ends = np.flatnonzero(differs & ~np.r_[differs[1:], False])
            for start, end in zip(starts, ends, strict=True):
                segment = [(start - 0.5, row + 0.5), (end + 0.5, row + 0.5)]
                edges.append([(y, x) for x, y in segment] if flip else segment)
    return edges


def block_max(cells: np.ndarray, block: int) -> np.ndarray:
    """The largest of every `block` by `block` cells."""
    padded = np.pad(cells, [(0, -size % block) for size in cells.shape])
    rows, columns = (size // block for size in padded.shape)
    return padded.reshape(rows, block, columns, block).max((1, 3))
