"""Draws docs/figures/causality_cost.png: time and memory of a proof over the length.

python -m benchmarks.causality_cost --only lengths > costs.md
python docs/figures/causality_cost.py costs.md
"""

import pathlib
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLOURS = {"proved": "C0", "a leak, named": "C3"}


def rows(table):
    """What was asked, positions, seconds and GiB, of each row of numbers."""
    for line in table.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[0] in COLOURS:
            yield cells[0], *(float(cells[k]) for k in (1, 2, 3))


def main():
    """Writes the figure beside this script."""
    found = list(rows(pathlib.Path(sys.argv[1]).read_text()))
    fig, (time, memory) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for what, colour in COLOURS.items():
        mine = [row for row in found if row[0] == what]
        _, length, seconds, peak = zip(*mine, strict=True)
        time.plot(length, seconds, "o-", color=colour, label=what)
        memory.plot(length, peak, "o-", color=colour, label=what)
    time.set(ylabel="seconds of processor time", ylim=(0, None))
    memory.set(ylabel="GiB at the peak of the process", ylim=(0, None))
    for ax in (time, memory):
        ax.set(
            xlabel="positions",
            xscale="log",
            xticks=length,
            xticklabels=map("{:.0f}".format, length),
        )
        ax.minorticks_off()
        ax.grid(alpha=0.3)
        ax.legend(frameon=False)
    path = pathlib.Path(__file__).with_suffix(".png")
    fig.savefig(path, dpi=110)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
