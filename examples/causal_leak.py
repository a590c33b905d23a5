"""Does a decoder see the future? That depends on the axes of its norms.

    python examples/causal_leak.py                      # census surnames
    python examples/causal_leak.py --data FILE ...      # your own lines or CSV

Three decoders on real text differ only in what their norms average over. `eqx_norms.causality`
tells which of them reads the letters that it should predict, and which the other lines of the
batch. Then the same for a case from an issue tracker, where a gradient was the probe.
"""

import argparse
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from arguments import figure_path
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray
from names_data import Vocabulary, batches, read_names

import eqx_norms
from eqx_norms.causality import (
    CausalityReport,
    check_causal,
    check_independent,
    dependency_matrix,
)

# ---- Three norms. Each takes one line of text.


class PerToken(eqx.Module):
    """Every token on its own: what a decoder needs."""

    norm: eqx_norms.LayerNorm

    def __init__(self, batch: int, tokens: int, features: int):
        self.norm = eqx_norms.LayerNorm(features)

    def __call__(self, x: Float[Array, "tokens features"]) -> Float[Array, "tokens features"]:
        return jax.vmap(self.norm)(x)


class OverTokensAndFeatures(eqx.Module):
    """One mean and one variance for the whole line: the `jax.vmap` is missing."""

    norm: eqx_norms.LayerNorm

    def __init__(self, batch: int, tokens: int, features: int):
        self.norm = eqx_norms.LayerNorm((tokens, features))

    def __call__(self, x: Float[Array, "tokens features"]) -> Float[Array, "tokens features"]:
        return self.norm(x)


class OverBatch(eqx.Module):
    """Every entry over the lines of the batch.

    A model of one line has to fetch the others, which nobody does by accident. Where layers take
    the whole batch, it is one wrong number: `axis=0`.
    """

    norm: eqx_norms.LayerNorm

    def __init__(self, batch: int, tokens: int, features: int):
        self.norm = eqx_norms.LayerNorm(batch, use_weight=False, use_bias=False)

    def __call__(self, x: Float[Array, "tokens features"]) -> Float[Array, "tokens features"]:
        lines = jax.lax.all_gather(x, "batch", axis=2)
        return jax.vmap(jax.vmap(self.norm))(lines)[:, :, jax.lax.axis_index("batch")]


# ---- The decoder, written for one line of text. The batch is mapped once, outside.


class Sizes(NamedTuple):
    batch: int
    tokens: int
    features: int
    blocks: int


CONTEXT = 64  # the longest line
FULL = Sizes(batch=16, tokens=CONTEXT, features=64, blocks=3)
QUICK = Sizes(batch=4, tokens=16, features=16, blocks=1)
DRAWN = Sizes(batch=3, tokens=7, features=16, blocks=1)  # small enough to look at


class Block(eqx.Module):
    norm1: Callable
    attention: eqx.nn.MultiheadAttention
    norm2: Callable
    mlp: eqx.nn.MLP

    def __init__(self, norm: Callable, sizes: Sizes, *, key: PRNGKeyArray):
        key1, key2 = jr.split(key)
        batch, tokens, features, _ = sizes
        self.norm1 = norm(batch, tokens, features)
        self.attention = eqx.nn.MultiheadAttention(4, features, key=key1)
        self.norm2 = norm(batch, tokens, features)
        self.mlp = eqx.nn.MLP(features, features, features, 1, jax.nn.gelu, key=key2)

    def __call__(self, x: Float[Array, "tokens features"]) -> Float[Array, "tokens features"]:
        h = self.norm1(x)
        x = x + self.attention(h, h, h, mask=jnp.tri(len(x), dtype=bool))
        return x + jax.vmap(self.mlp)(self.norm2(x))


class Decoder(eqx.Module):
    embedding: eqx.nn.Embedding
    position: Float[Array, "context features"]
    blocks: list[Block]
    norm: Callable
    readout: eqx.nn.Linear

    def __init__(self, norm: Callable, symbols: int, sizes: Sizes, *, key: PRNGKeyArray):
        batch, tokens, features, blocks = sizes
        key1, key2, key3, *keys = jr.split(key, 3 + blocks)
        self.embedding = eqx.nn.Embedding(symbols, features, key=key1)
        self.position = jr.normal(key2, (CONTEXT, features))
        self.blocks = [Block(norm, sizes, key=key) for key in keys]
        self.norm = norm(batch, tokens, features)
        self.readout = eqx.nn.Linear(features, symbols, key=key3)

    def __call__(self, letters: Int[Array, " tokens"]) -> Float[Array, "tokens symbols"]:
        x = jax.vmap(self.embedding)(letters) + self.position[: len(letters)]
        for block in self.blocks:
            x = block(x)
        return jax.vmap(self.readout)(self.norm(x))


def make_model(norm: Callable, symbols: int, sizes: Sizes) -> Callable:
    """Takes letters (batch, tokens), returns scores (batch, tokens, symbols)."""
    decoder = Decoder(norm, symbols, sizes, key=jr.key(0))
    return jax.vmap(decoder, axis_name="batch")


def first_batch(
    names: list[str], vocabulary: Vocabulary, sizes: Sizes
) -> Int[np.ndarray, "batch tokens"]:
    # A few names are repeated until they fill the lines.
    enough = names * math.ceil(sizes.batch * sizes.tokens / len(names))
    return next(batches(enough, vocabulary, size=sizes.batch, length=sizes.tokens))


# ---- The checks, and what they should find.


class Case(NamedTuple):
    norm: Callable
    name: str
    reads_later: bool
    reads_others: bool


CASES = (
    Case(PerToken, "per token", reads_later=False, reads_others=False),
    Case(OverTokensAndFeatures, "over (tokens, features)", reads_later=True, reads_others=False),
    Case(OverBatch, "over the batch", reads_later=False, reads_others=True),
)


def check(
    model: Callable, letters: Int[np.ndarray, "batch tokens"], symbols: int
) -> tuple[CausalityReport, CausalityReport]:
    """Does an output read later letters? Does it read other lines?"""
    ids = (0, symbols - 1)  # edits are to draw from the whole alphabet
    later = check_causal(model, letters, axis=1, token_values=ids, prove=True)
    others = check_independent(model, letters, axis=0, token_values=ids, prove=True)
    return later, others


class Map(NamedTuple):
    """Who reads whom, from each letter of each line (a row) to each letter of each line."""

    change: Float[np.ndarray, "letters letters"]
    reads: Bool[np.ndarray, "letters letters"]
    allowed: Bool[np.ndarray, "letters letters"]


def draw_map(norm: Callable, letters: Int[np.ndarray, "batch tokens"], symbols: int) -> Map:
    """Edits one letter of the batch at a time, and measures how far each output moves."""
    model = make_model(norm, symbols, DRAWN)
    batch, tokens = letters.shape

    def flat(letters):
        return model(letters.reshape(batch, tokens)).reshape(batch * tokens, symbols)

    change = dependency_matrix(flat, letters.reshape(-1), token_values=(0, symbols - 1))
    rounding = 64 * np.finfo(np.float32).eps * change.max()
    allowed = np.kron(np.eye(batch, dtype=bool), np.tri(tokens, dtype=bool))
    return Map(change, change > rounding, allowed)


# ---- The case from an issue tracker: dm-haiku, issue 700.

POSITION = 4
THREAD = """\
-0.09  -0.21  -0.17  -0.17   1.03  -0.21  -0.17
-0.15  -0.24  -0.15  -0.19   0.98  -0.11  -0.17
-0.17  -0.11  -0.19  -0.14   0.99  -0.20  -0.15"""


def thread_input() -> Float[Array, "batch positions"]:
    # The numbers in the thread come from the random bits that were JAX's default at the time.
    with jax.threefry_partitionable(False):
        return jr.normal(jr.PRNGKey(42), (3, 7))


def thread_probe(norm: Callable, x: Float[Array, "batch positions"]) -> np.ndarray:
    """The gradient of the sum of the outputs at one position, to two decimals."""
    gradient = jax.jit(jax.grad(lambda x: norm(x)[:, POSITION].sum()))(x)
    return np.round(np.asarray(gradient), 2) + 0.0  # no "-0.00"


def table(gradient: np.ndarray) -> str:
    return "\n".join("  ".join(f"{entry:5.2f}" for entry in row) for row in gradient)


# ---- What is printed.

BOLD, FAINT, FINE, LEAK = "1", "2", "38;5;33", "1;38;5;202"


def paint(text: str, style: str) -> str:
    colours = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    return f"\033[{style}m{text}\033[0m" if colours else text


def answer(report: CausalityReport) -> str:
    if not report.leak:
        return paint(f"{'no, proved' if report.status == 'proved' else 'no':<25}", FINE)
    pairs = f"YES, {len(report.pairs())} of {(~report.allowed).sum()} pairs"
    return paint(f"{pairs:<25}", LEAK)


def print_maps(maps: Sequence[Map], text: Sequence[str]) -> None:
    letters, tokens = "".join(text), len(text[0])

    def cell(drawn: Map, output: int, source: int) -> str:
        if not drawn.reads[output, source]:
            return paint("·", FAINT)
        return paint("o", FINE) if drawn.allowed[output, source] else paint("X", LEAK)

    def spaced(cells: Sequence[str]) -> str:
        return " ".join("".join(cells[i : i + tokens]) for i in range(0, len(cells), tokens))

    def show(margin: str, *parts: str) -> None:
        print(f"  {margin} {'   '.join(parts)}".rstrip())

    width = len(spaced(letters))
    show(" ", *(paint(f"{case.name:<{width}}", BOLD) for case in CASES))
    show(" ", *[spaced(letters)] * len(maps))
    for output, letter in enumerate(letters):
        if output and output % tokens == 0:
            print()
        rows = ([cell(drawn, output, source) for source in range(len(letters))] for drawn in maps)
        show(letter, *map(spaced, rows))


def indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())


# ---- What is drawn.

BLUES, ORANGES = ("#d3e4f4", "#08407a"), ("#ffdcb8", "#b53000")  # safe for the colour-blind


def draw_figure(
    maps: Sequence[Map], leaks: Sequence[Sequence[str]], text: Sequence[str], out: Path
) -> None:
    """A heat map for every model; `leaks` tells what it should not have read."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, LogNorm

    may = LinearSegmentedColormap.from_list("may", BLUES)
    must_not = LinearSegmentedColormap.from_list("must not", ORANGES)
    changes = np.concatenate([drawn.change[drawn.reads] for drawn in maps])
    scale = LogNorm(changes.min(), changes.max())
    letters = list("".join(text))

    width, height, side = 8.2, 3.6, 2.3  # inches
    figure = plt.figure(figsize=(width, height), dpi=150)

    def panel(left: float, bottom: float, wide: float, high: float):
        return figure.add_axes((left / width, bottom / height, wide / width, high / height))

    def write(x: float, y: float, words: str, **style) -> None:
        figure.text(x / width, y / height, words, **style)

    for number, (case, drawn, found) in enumerate(zip(CASES, maps, leaks, strict=True)):
        left = 0.5 + 2.6 * number
        ax = panel(left, 0.8, side, side)
        for cells, colours in ((drawn.allowed, may), (~drawn.allowed, must_not)):
            seen = np.where(cells & drawn.reads, drawn.change, np.nan)
            ax.imshow(seen, cmap=colours, norm=scale)
        for border in np.arange(len(text[0]), len(letters), len(text[0])) - 0.5:
            ax.axhline(border, color="0.8", lw=0.6, zorder=0)
            ax.axvline(border, color="0.8", lw=0.6, zorder=0)
        outline(ax, drawn.allowed)
        ax.set_xticks(range(len(letters)), letters, fontsize=7)
        ax.set_yticks(range(len(letters)), letters, fontsize=7)
        ax.tick_params(length=0, pad=2)
        ax.set_xlabel("input letter", fontsize=8, labelpad=2)
        verdict = f"LEAK: reads {' and '.join(found)}" if found else "no leak"
        ax.set_title(verdict, fontsize=8.5, color=(ORANGES if found else BLUES)[1], pad=4)
        write(left + side / 2, 3.36, f"norm {case.name}", ha="center", fontsize=10, weight="bold")
    figure.axes[0].set_ylabel("output at letter", fontsize=8)

    write(0.5, 0.3, "change of the output:", va="center", fontsize=8)
    for left, colours, label in (
        (2.4, may, "allowed"),
        (6.0, must_not, "forbidden (outside the line)"),
    ):
        cax = panel(left, 0.26, 1.4, 0.09)
        figure.colorbar(ScalarMappable(scale, colours), cax=cax, orientation="horizontal")
        cax.tick_params(labelsize=6.5)
        write(left - 0.1, 0.3, label, ha="right", va="center", fontsize=8)
    figure.savefig(out)
    plt.close(figure)


def outline(ax, allowed: Bool[np.ndarray, "letters letters"]) -> None:
    """A line round what may be read: all the rest is forbidden."""
    wide = np.pad(allowed, 1)
    for output, source in np.argwhere(wide[1:] != wide[:-1]) - 0.5:
        ax.plot([source - 1, source], [output, output], "k", lw=0.9, clip_on=False)
    for output, source in np.argwhere(wide[:, 1:] != wide[:, :-1]) - 0.5:
        ax.plot([source, source], [output - 1, output], "k", lw=0.9, clip_on=False)


# ---- The run.


class Surprises(list[str]):
    """What did not come out as expected."""

    def expect(self, what: str, expected: bool, found: bool) -> None:
        if found != expected:
            self.append(f"{what}: expected {expected}, found {found}")


def compare_norms(names: list[str], sizes: Sizes, out: Path, surprises: Surprises) -> None:
    """Checks the three decoders, prints the verdicts and the maps, draws the figure."""
    vocabulary = Vocabulary.of(names)
    symbols = len(vocabulary)
    letters = first_batch(names, vocabulary, sizes)
    few_letters = first_batch(names, vocabulary, DRAWN)
    print(f"""\
  text     {len(names):,} names, {symbols} symbols
  models   causal decoders, {sizes.blocks} x {sizes.features}, untrained: the leak is in the axes
  check    {sizes.batch} lines of {sizes.tokens} letters; edits what an output must not read

  {"norm":<27}{"reads later letters?":<25}reads other lines?""")
    maps, leaks = [], []
    for case in CASES:
        later, others = check(make_model(case.norm, symbols, sizes), letters, symbols)
        print(f"  {case.name:<27}{answer(later)}{answer(others)}".rstrip(), flush=True)
        surprises.expect(f"norm {case.name} reads later letters", case.reads_later, later.leak)
        surprises.expect(f"norm {case.name} reads other lines", case.reads_others, others.leak)
        leaks.append(["the future"] * later.leak + ["other lines"] * others.leak)
        maps.append(draw_map(case.norm, few_letters, symbols))

    text = [vocabulary.decode(line) for line in few_letters]
    title, small = paint("Who reads whom", BOLD), f"{DRAWN.blocks} x {DRAWN.features}"
    print(f"""
{title} in smaller decoders, {small}: rows are outputs, columns inputs
o reads it, and may    X reads it, and must not    · does not read it
""")
    print_maps(maps, text)
    draw_figure(maps, leaks, text, out)


def revisit_thread(surprises: Surprises) -> None:
    """Repeats what the thread saw and concluded, and checks the same functions."""
    x = thread_input()
    both, batch = eqx_norms.layer_norm, jax.vmap(eqx_norms.layer_norm, 1, 1)
    before, after = thread_probe(both, x), thread_probe(batch, x)
    same = table(before) == THREAD
    verdict = "Digit for digit the thread's table." if same else "NOT the thread's table."
    surprises.expect("the digits are those of the thread", True, same)
    surprises.expect("the gradient sees the norm over axis 0", False, bool(after.any()))
    print(f"""\
Somebody normalised 3 examples of 7 positions over both axes, took the gradient of the
summed outputs at position {POSITION}, and found positions 5 and 6 in it:

{indented(table(before))}

{verdict} With a norm over axis 0 instead, all was well:

{indented(table(after))}

Was it? Position {POSITION} is not in it either, though each output reads its own input. What a
norm returns has a fixed sum, and the gradient of that sum is 0 whatever the norm reads.
And axis 0 is the batch:

  {"norm":<27}{"reads later positions?":<25}reads other examples?""")
    for name, norm, reads_later in (("over both axes", both, True), ("over axis 0", batch, False)):
        later = check_causal(norm, x, axis=1, prove=True)
        others = check_independent(norm, x, axis=0, prove=True)
        print(f"  {name:<27}{answer(later)}{answer(others)}".rstrip(), flush=True)
        surprises.expect(f"the norm {name} reads later positions", reads_later, later.leak)
        surprises.expect(f"the norm {name} reads other examples", True, others.leak)


def main(argv: Sequence[str] | None = None) -> int:
    """0 if every verdict is as expected, 1 if not."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--data", nargs="+", default=[], metavar="FILE", help="lines, or CSV")
    parser.add_argument("--out", type=figure_path, default="causal_leak.png", help="the figure")
    parser.add_argument("--quick", action="store_true", help="shorter lines, a smaller model")
    args = parser.parse_args(argv)
    start = time.perf_counter()
    try:
        names = read_names(args.data)
        args.out.parent.mkdir(parents=True, exist_ok=True)
    except (ValueError, ImportError, OSError) as error:
        parser.error(str(error))

    surprises = Surprises()
    print(paint("\nDoes the model see the future?\n", BOLD))
    compare_norms(names, QUICK if args.quick else FULL, args.out, surprises)
    print(paint("\nThe gradient that missed a leak: dm-haiku, issue 700\n", BOLD))
    revisit_thread(surprises)

    print(f"\nfigure   {args.out.resolve()}")
    print("verdicts", paint("NOT as expected:", LEAK) if surprises else "all as expected", end="")
    print(f" ({time.perf_counter() - start:.0f} s)")
    for surprise in surprises:
        print(f"         {surprise}")
    return 1 if surprises else 0


if __name__ == "__main__":
    sys.exit(main())
