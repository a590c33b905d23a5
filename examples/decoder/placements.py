"""Where the norms of a deep decoder stand, and how large its gradient is by depth at the start.

    python -m examples.decoder.placements    # census surnames; nothing is trained

Prints a table and draws a figure of what `--placement` does, beside no norms at all: the residual
stream behind every block, and the loss's gradient there.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
import matplotlib
import numpy as np
from tqdm import tqdm

from ..arguments import figure_path
from ..names_data import read_names
from .data import Data, split
from .depth import DEEP, Spread, spread, tidy
from .settings import PLACEMENTS, Settings
from .train import start

matplotlib.use("Agg")
import matplotlib.pyplot as plt

NONE = "no norms"
OKABE_ITO = "#0072B2", "#D55E00", "#009E73", "#56B4E9", "#E69F00", "#888888"
COLOURS: dict[str, str] = dict(zip((*PLACEMENTS, NONE), OKABE_ITO, strict=True))


def at_start(settings: Settings, data: Data, seeds: int) -> dict[str, Spread]:
    """The geometric means over the seeds, by placement."""
    ways = {name: {"placement": name} for name in PLACEMENTS} | {NONE: {"norm": "none"}}
    names, found = jnp.asarray(data.held_out[:256]), {}
    for way, options in tqdm(ways.items(), unit="placement", disable=None):
        of_seeds = []
        for seed in range(seeds):
            chosen = dataclasses.replace(settings, seed=seed, **options)
            of_seeds.append(spread(start(chosen, len(data.vocabulary))[0], names))
        mean = lambda *values: np.exp(np.mean(np.log(values), axis=0))
        found[way] = Spread(*map(mean, *of_seeds))
    return found


def table(found: dict[str, Spread]) -> str:
    lines = [
        "|  | stream, first block | last | gradient, first block | last |",
        "|---|---:|---:|---:|---:|",
    ]
    for way, (stream, gradient) in found.items():
        cells = f"{stream[0]:.2g} | {stream[-1]:.2g} | {gradient[0]:.2g} | {gradient[-1]:.2g}"
        lines.append(f"| {way} | {cells} |")
    return "\n".join(lines)


def draw(found: dict[str, Spread], path: Path) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(8.2, 3.3), dpi=150, layout="constrained")
    titles = "residual stream", "gradient there"
    blocks = 1 + np.arange(len(found[NONE].stream))
    for ax, what, title in zip(axes, Spread._fields, titles, strict=True):
        for way, one in found.items():
            rms = getattr(one, what)
            dashed = {"ls": "--"} if way in ("parallel", NONE) else {}  # one covers "pre"
            ax.plot(blocks, rms, color=COLOURS[way], lw=2, marker="o", ms=3, label=way, **dashed)
        ax.set_xticks(blocks[::-1][::3][::-1])
        tidy(ax, title, "block")
    axes[0].set_ylabel("root mean square")
    axes[1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m examples.decoder.placements", description=(__doc__ or "").split("\n", 1)[0]
    )
    add = parser.add_argument
    add("--data", nargs="+", default=[], metavar="FILE", help="a name a line, or CSV")
    for field in ("layers", "width"):
        add(f"--{field}", type=int, default=getattr(DEEP, field), help="by default %(default)s")
    add("--seeds", type=int, default=5, help="whose mean it is; by default %(default)s")
    add("--out", type=figure_path, default="decoder/placements.png", help="the figure; %(default)s")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = (commands := parser()).parse_args(argv)
    try:
        if args.seeds < 1:
            raise ValueError(f"seeds must be at least 1, got {args.seeds}")
        settings = dataclasses.replace(DEEP, layers=args.layers, width=args.width)
        data = split(read_names(args.data), settings.context)
    except (ValueError, ImportError, OSError) as error:
        commands.error(str(error))
    found = at_start(settings, data, args.seeds)
    print(table(found))
    draw(found, args.out)
    print(f"\nfigure {args.out.resolve()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
