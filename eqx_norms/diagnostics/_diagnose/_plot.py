"""The picture of a diagnosis: what each layer puts out, what comes back, and what moves."""

import math
from collections.abc import Sequence
from typing import Any

from ._survey import is_in

_LABELS = 40  # Of more rows than that, only some are named.
_BLUE, _ORANGE, _GREEN, _GREY, _RED = "#2a6fbb", "#d9822b", "#3b8f5a", "0.35", "#b8322a"

# Statistic, label, marker, colour.
_OF_OUTPUTS = [
    ("mean", "mean, absolute", "|", _BLUE),
    ("std", "std", "o", _BLUE),
    ("largest", "largest, absolute", ".", _ORANGE),
]
_OF_PARAMETERS = [
    ("rms", "rms", "o", _BLUE),
    ("grad_rms", "rms of the gradient", "o", _GREEN),
    ("update_ratio", "update ratio", "x", _RED),
]


def plot(diagnosis: Any):
    """Draws four panels with a line for each row, in their order, and returns the figure."""
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError(
            'diagnosis.plot() needs matplotlib: pip install "eqx-norms[plot]"; '
            "print(diagnosis) shows the same in characters"
        ) from error

    calls, parameters, findings = diagnosis.calls, diagnosis.parameters, diagnosis.findings
    height = 1.9 + 0.19 * min(max(len(calls), len(parameters)), 2 * _LABELS)
    figure, axes = plt.subplots(
        1, 4, figsize=(15, max(3.2, height)), layout="constrained", width_ratios=(1.1, 1, 0.8, 1.1)
    )
    _sizes(axes[0], "outputs", calls, _OF_OUTPUTS)
    _sizes(axes[1], "the loss's derivative there", calls, [("grad_rms", "rms", "o", _GREEN)])
    _shares(axes[2], calls)
    with_updates = any("update_ratio" in p.statistics for p in parameters)
    _sizes(axes[3], "parameters", parameters, _OF_PARAMETERS[: 3 if with_updates else 2])
    names = [row.name or "the model" for row in calls]
    bad_calls = [any(f.where == row.path for f in findings) for row in calls]
    for i, ax in enumerate(axes[:3]):
        _name_rows(ax, names if i == 0 else None, bad_calls)
    bad = [any(_concerns(finding, p.path) for finding in findings) for p in parameters]
    _name_rows(axes[3], [p.path for p in parameters], bad)
    for ax in axes:
        # Below the tick labels, in units of the font size.
        ax.legend(fontsize=7, ncols=3, loc="upper center", bbox_to_anchor=(0.5, 0), borderaxespad=3)
    count = len(findings)
    said = f"{count} finding{'s' if count > 1 else ''}, in red" if count else "nothing found"
    figure.suptitle(f"loss {diagnosis.loss:.4g}; {said}", fontsize=11)
    return figure


def _concerns(finding: Any, path: str) -> bool:
    return finding.where == path or (
        finding.kind == "no gradient" and finding.where != "" and is_in(path, finding.where)
    )


def _sizes(ax: Any, title: str, rows: Sequence[Any], series: list[tuple]) -> None:
    """On a logarithmic axis; zeros are crosses at its edge, and what is not finite is written."""
    columns = [[abs(row.statistics.get(name, math.inf)) for row in rows] for name, *_ in series]
    # A mean is around zero by chance: what is too small to see is left of the axis.
    wide = [column for column, (name, *_) in zip(columns, series, strict=True) if name != "mean"]
    known = [v for column in wide for v in column if 0 < v < math.inf] or [1.0]
    right = math.ceil(math.log10(max(known)) + 0.05)
    left = min(math.floor(math.log10(min(known)) - 0.05), right - 2)
    ax.set(xscale="log", xlim=(10.0**left, 10.0**right))
    for column, (name, label, marker, color) in zip(columns, series, strict=True):
        shown = [v if 0 < v < math.inf else math.nan for v in column]
        ax.plot(shown, range(len(rows)), marker, color=color, markersize=5, label=label)
        zeros = [i for i, v in enumerate(column) if v == 0]
        if zeros and name in ("grad_rms", "std"):
            ax.plot([10.0**left] * len(zeros), zeros, "X", color=_RED, markersize=6, clip_on=False)
        for i, row in enumerate(rows):
            value = row.statistics.get(name, 0)
            if name in ("grad_rms", "std") and not math.isfinite(value):
                place = ax.get_yaxis_transform()
                ax.text(0.02, i, f"{value:g}", transform=place, color=_RED, fontsize=7, va="center")
    ax.set_title(title, fontsize=10)


def _shares(ax: Any, rows: Sequence[Any]) -> None:
    at = range(len(rows))
    for name, color, label in (
        ("dead", _ORANGE, "dead units"),
        ("saturated", _BLUE, "saturated entries"),
    ):
        values = [row.statistics.get(name, math.nan) for row in rows]
        if any(math.isfinite(v) for v in values):
            ax.barh(at, values, color=color, alpha=0.7, height=0.6, label=label)
    ranks = [_rank_share(row) for row in rows]
    ax.plot(ranks, at, "D", color=_GREY, markersize=3, label="rank")
    ax.set(xlim=(-0.03, 1.03))
    ax.set_title("shares", fontsize=10)


def _rank_share(row: Any) -> float:
    """The effective rank, over the largest that a matrix of this shape can have."""
    most = min(math.prod(row.shape[:-1]), row.shape[-1]) if len(row.shape) > 1 else 1
    return row.statistics.get("effective_rank", math.nan) / most


def _name_rows(ax: Any, names: Sequence[str] | None, bad: Sequence[bool]) -> None:
    ax.set(ylim=(len(bad) - 0.5, -0.5))
    ax.grid(axis="y", color="0.93")
    ax.set_axisbelow(True)
    every = max(1, math.ceil(len(bad) / _LABELS))
    at = [i for i in range(len(bad)) if i % every == 0 or bad[i]]
    ax.set_yticks(at, ["" if names is None else names[i] for i in at], fontsize=7)
    for i, label in zip(at, ax.get_yticklabels(), strict=True):
        if bad[i]:
            label.set_color(_RED)
            ax.axhspan(i - 0.5, i + 0.5, color=_RED, alpha=0.07, linewidth=0)
