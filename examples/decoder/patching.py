"""Which head or block of a trained decoder carries the next letter?

    python -m examples.decoder.patching    # census surnames; trains first, some minutes

Names are read once more, where what one head or one layer returns is taken from another name. How
much worse the next letter is predicted says how much of it went through there. Prints a table and
draws two heat maps: by the place of the letter, and by how far before it the output was taken.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int
from tqdm import tqdm

from eqx_norms.diagnostics import capture

from ..arguments import figure_path
from ..names_data import read_names
from .checkpoint import State, load
from .data import Data, counted, shifted, split
from .model import Decoder
from .settings import QUICK, Settings
from .train import start, train

matplotlib.use("Agg")
import matplotlib.pyplot as plt

NAMES = 512  # held-out ones that are read
FURTHEST = 6  # letters back

# ---- Reading a name with another one's outputs.


def letter_nats(
    model: Callable, names: Int[Array, "names context"]
) -> Float[Array, "names context"]:
    scores = jax.vmap(lambda name: model(shifted(name)))(names)
    return optax.softmax_cross_entropy_with_integer_labels(scores, names)


Outputs = dict[str, Float[Array, "names tokens features"]]
Masks = dict[str, Bool[np.ndarray, "tokens features"]]
HEAD = "attention.query_proj", "attention.key_proj", "attention.value_proj"
LAYERS = "attention", "mlp"


@eqx.filter_jit
def outputs_of(model: Decoder, names: Int[Array, "names context"]) -> Outputs:
    """What every part returns."""
    ends = tuple(f".{part}" for part in (*HEAD, *LAYERS))
    return capture(letter_nats, model, names, where=lambda path, _: path.endswith(ends))[1]


@eqx.filter_jit
def patched_nats(
    model: Decoder, names: Int[Array, "names context"], other: Outputs, masks: Masks
) -> Float[Array, "names context"]:
    """The nats of every letter, where what a mask is true for comes from `other`."""
    mix = lambda key: lambda value: jnp.where(masks[key], other[key], value)
    replace = {key: mix(key) for key in other}
    return capture(letter_nats, model, names, where=(), replace=replace)[0]


# ---- What is taken from the other name.


class Part(NamedTuple):
    """A layer of a block, or one of its heads: the features of the outputs that it is."""

    block: int
    name: str
    outputs: tuple[str, ...]
    features: slice = slice(None)

    def masks(self, other: Outputs, tokens: slice | int = slice(None)) -> Masks:
        """True there alone."""
        masks = {key: np.zeros(value.shape[1:], bool) for key, value in other.items()}
        for output in self.outputs:
            masks[f"blocks[{self.block}].{output}"][tokens, self.features] = True
        return masks


def parts_of(settings: Settings) -> Iterator[Part]:
    """A head is what its query, key and value are made of: its output is the other name's then."""
    size = settings.width // settings.heads
    for block in range(settings.layers):
        for head in range(settings.heads):
            features = slice(head * size, (head + 1) * size)
            yield Part(block, f"head {head + 1}", HEAD, features)
        yield Part(block, "attention", LAYERS[:1])
        yield Part(block, "MLP", LAYERS[1:])


class Effects(NamedTuple):
    """How much the nats of a letter grow, on average."""

    clean: float  # the nats as they are
    total: Float[np.ndarray, " parts"]
    by_place: Float[np.ndarray, "parts context"]  # of the letter that is predicted
    by_distance: Float[np.ndarray, "parts distances"]  # of the one token whose output is taken


def effects(model: Decoder, names: Int[Array, "names context"], parts: Sequence[Part]) -> Effects:
    """The other name of each is the one before it."""
    other = outputs_of(model, jnp.roll(names, 1, axis=0))
    read = lambda masks: np.asarray(patched_nats(model, names, other, masks))
    nothing = {key: np.zeros(value.shape[1:], bool) for key, value in other.items()}
    clean, there = read(nothing), np.asarray(counted(names))
    # Where no name is so long, 0.
    letters = lambda axis: np.maximum(there.sum(axis), 1)
    mean = lambda nats, axis=None: np.sum(nats - clean, axis, where=there) / letters(axis)
    tokens = names.shape[1]
    total, by_place, by_distance = [], [], []
    for part in tqdm(parts, unit="part", disable=None):
        nats = read(part.masks(other))
        total.append(mean(nats))
        by_place.append(mean(nats, 0))
        one_token = [read(part.masks(other, token)) - clean for token in range(tokens)]
        by_distance.append(means_by_distance(np.stack(one_token), there))
    return Effects(
        float(np.mean(clean, where=there)), *map(np.stack, (total, by_place, by_distance))
    )


def means_by_distance(
    change: Float[np.ndarray, "taken names context"], there: Bool[np.ndarray, "names context"]
) -> Float[np.ndarray, " distances"]:
    """The mean over pairs of a letter and the token so many before the one it is read off."""
    tokens = len(change)
    distance = np.arange(tokens)[None] - np.arange(tokens)[:, None]  # of [taken, letter]
    weight = there[None].astype(float)
    mean = lambda d: np.average(
        change, weights=np.broadcast_to(weight * (distance == d)[:, None], change.shape)
    )
    return np.array([mean(d) for d in range(min(FURTHEST + 1, tokens))])


# ---- The table and the figure.


def table(parts: Sequence[Part], found: Effects) -> str:
    """Markdown: a row a block."""
    blocks = {part.block for part in parts}
    names = [part.name for part in parts if part.block == 0]
    totals = dict(zip(((part.block, part.name) for part in parts), found.total, strict=True))
    lines = [f"| nats a letter more than {found.clean:.3f} | {' | '.join(names)} |"]
    lines.append("|---|" + "---:|" * len(names))
    for block in blocks:
        cells = [f"{totals[block, name]:.2f}" for name in names]
        lines.append(f"| block {block + 1} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(parts: Sequence[Part], found: Effects, path: Path) -> None:
    longest = 10  # letters; few names are longer
    by_place = found.by_place[:, :longest]
    size = 8.6, 1.2 + 0.21 * len(parts)
    figure, axes = plt.subplots(
        1, 2, figsize=size, dpi=150, sharey=True, layout="constrained", width_ratios=(10, 7)
    )
    panels = (
        (by_place, 1, "place of the letter", "taken at all letters"),
        (found.by_distance, 0, "letters between", "taken at one letter"),
    )
    for ax, (values, first, below, title) in zip(axes, panels, strict=True):
        top = np.nanmax(values)
        image = ax.imshow(values, cmap="magma_r", vmin=0, vmax=top, aspect="auto")
        for (row, column), value in np.ndenumerate(values):
            colour = "white" if value > 0.55 * top else "black"
            text = f"{value:.1f}" if value >= 0.05 else ""
            ax.text(column, row, text, color=colour, ha="center", va="center", fontsize=6.5)
        ax.set_xticks(range(values.shape[1]), range(first, first + values.shape[1]))
        ax.set_xlabel(below, loc="left", fontsize=9)
        ax.set_title(title, loc="left", fontsize=9, weight="bold")
        ax.tick_params(length=0, labelsize=8)
        ax.spines[:].set_visible(False)
        for row, part in enumerate(parts):
            if row and part.block != parts[row - 1].block:
                ax.axhline(row - 0.5, color="white", lw=3)
        figure.colorbar(image, ax=ax, pad=0.02, aspect=40).ax.tick_params(labelsize=7)
    labels = [f"block {part.block + 1}  {part.name}" if part.name == "head 1" else part.name
              for part in parts]  # fmt: skip
    axes[0].set_yticks(range(len(parts)), labels)
    figure.suptitle("nats by which the letter is predicted worse", fontsize=9, x=0.01, ha="left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)


# ---- The command.


def trained(settings: Settings, data: Data, path: Path) -> State:
    """From the checkpoint, which is made first where there is none."""
    state = State(*start(settings, len(data.vocabulary)), 0, ())
    if path.exists():
        state = load(path, state, settings, data)
    return train(settings, data, state, path)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m examples.decoder.patching", description=(__doc__ or "").split("\n", 1)[0]
    )
    add = parser.add_argument
    add("--data", nargs="+", default=[], metavar="FILE", help="a name a line, or CSV")
    add("--steps", type=int, help=f"of training; by default {Settings.steps}")
    add("--seed", type=int, help=f"by default {Settings.seed}")
    add("--quick", action="store_true", help="a small model, seconds")
    checkpoint = Path("decoder/per-token.eqx")
    add(
        "--checkpoint", type=Path, default=checkpoint, help="of the decoder; by default %(default)s"
    )
    add("--out", type=figure_path, default="decoder/patching.png", help="the figure; %(default)s")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = (commands := parser()).parse_args(argv)
    given = {key: v for key in ("steps", "seed") if (v := getattr(args, key)) is not None}
    try:
        settings = Settings(**({**QUICK, **given} if args.quick else given))
        data = split(read_names(args.data), settings.context)
        state = trained(settings, data, args.checkpoint)
    except (ValueError, ImportError, OSError) as error:
        commands.error(str(error))
    if state.step < settings.steps:
        print(f"Stopped at step {state.step} and saved; the same command goes on.")
        return 130
    parts = list(parts_of(settings))
    found = effects(state.model, jnp.asarray(data.held_out[:NAMES]), parts)
    print(table(parts, found))
    draw(parts, found, args.out)
    print(f"\nfigure {args.out.resolve()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
