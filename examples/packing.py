"""Packed rows: does one name read another?

    python examples/packing.py                      # census surnames
    python examples/packing.py --data FILE ...      # your own lines or CSV

Short texts are packed into rows, so that little is lost to padding. Each should be read as if it
were alone, and that takes a mask. Four decoders, untrained: with the mask, without it, without it
but with positions that begin again at each name, which is not enough, and with the mask and norms
over each name. All but the last are causal: a norm by segment keeps names apart, and reads all of
its own.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from arguments import figure_path
from decoder.model import Decoder
from decoder.settings import Settings
from jaxtyping import Array, Bool, Float, Int
from names_data import END, Vocabulary, read_names

from eqx_norms import segment_norm
from eqx_norms.causality import CausalityReport, check_causal, check_reads, rules

ROWS, LENGTH = 2, 20
SETTINGS = Settings(context=LENGTH, width=32, layers=2)

# ---- Rows of whole names.


class Packed(NamedTuple):
    text: list[str]
    name: Int[np.ndarray, "rows length"]  # a number for each name, the same at all its letters
    place: Int[np.ndarray, "rows length"]  # of the letter in its name


def pack(names: Sequence[str], rows: int, length: int) -> Packed:
    """Each row takes the next names that fit; end marks fill it up, and count as one name more."""
    rest = [name + END for name in names if len(name) < length]
    if not rest:
        raise ValueError(f"packing needs names of fewer than {length} letters")
    parts = []
    for _ in range(rows):
        row = ""
        for name in list(rest):
            if len(row) + len(name) <= length:
                row += name
                parts.append(name)
                rest.remove(name)
        parts.append(END * (length - len(row)))
    text = "".join(parts)
    name = np.repeat(np.arange(len(parts)), [*map(len, parts)])
    place = np.concatenate([np.arange(len(part)) for part in parts])
    lines = [text[start : start + length] for start in range(0, len(text), length)]
    return Packed(lines, name.reshape(rows, length), place.reshape(rows, length))


# ---- Four decoders.


def scores(
    decoder: Decoder,
    letters: Int[Array, " tokens"],
    place: Int[Array, " tokens"],
    mask: Bool[Array, "tokens tokens"],
    norm_over: Int[Array, " tokens"] | None = None,
) -> Float[Array, "tokens symbols"]:
    """What the decoder says of one row, with positions and a mask that are not its own.

    Its norms are of each token, or over the tokens that have the same number in `norm_over`.
    """

    def norm_by(norm: Any, x: Array) -> Array:
        if norm_over is None:
            return norm(x)
        weight, bias = norm.layer.weight, norm.layer.bias
        return segment_norm(x, norm_over, weight, bias, num_segments=len(letters))

    x = jax.vmap(decoder.embedding)(letters) + decoder.position[place]
    for block in decoder.blocks:
        h = norm_by(block.norm1, x)
        x = x + block.attention(h, h, h, mask=mask)
        x = x + jax.vmap(block.mlp)(norm_by(block.norm2, x))
    return jax.vmap(decoder.readout)(norm_by(decoder.norm, x))


class Case(NamedTuple):
    title: str
    resets: bool  # whether positions begin again at each name
    masked: bool
    norms_over_names: bool = False


CASES = (
    Case("segment mask", resets=True, masked=True),
    Case("mask forgotten", resets=False, masked=False),
    Case("positions reset, mask forgotten", resets=True, masked=False),
    Case("segment mask, norms over names", resets=True, masked=True, norms_over_names=True),
)


def make_model(case: Case, packed: Packed, symbols: int) -> Callable:
    """Takes letters (rows, length), returns scores (rows, length, symbols)."""
    decoder = Decoder(SETTINGS, symbols, key=jr.key(0))
    place = packed.place if case.resets else np.broadcast_to(np.arange(LENGTH), packed.place.shape)
    same = packed.name[:, :, None] == packed.name[:, None, :]
    mask = np.tri(LENGTH, dtype=bool) & (same if case.masked else np.ones_like(same))
    # Numbers from 0 on in each row, of which there are no more than letters.
    first = packed.name[:, :1]
    names = jnp.asarray(packed.name - first) if case.norms_over_names else None
    row = jax.vmap(scores, in_axes=(None, 0, 0, 0, 0))
    return lambda letters: row(decoder, letters, jnp.asarray(place), jnp.asarray(mask), names)


# ---- The checks, and what they should find.


def check(case: Case, packed: Packed, vocabulary: Vocabulary) -> list[CausalityReport]:
    """Does an output read later letters? Does it read other names, and all of its own so far?

    Of its own name one with norms over names may read the rest as well.
    """
    model = make_model(case, packed, len(vocabulary))
    letters = np.stack([vocabulary.encode(line) for line in packed.text])
    how = {"token_values": (0, len(vocabulary) - 1), "prove": True}  # edits have the whole alphabet
    own = rules.segments(packed.name.reshape(-1))
    so_far = rules.causal(letters.size) & own
    rule = own if case.norms_over_names else so_far
    return [
        check_causal(model, letters, axis=1, **how),
        check_reads(model, letters, rule, required=so_far, axis=(0, 1), labels=packed.text, **how),
    ]


def answer(report: CausalityReport) -> str:
    if report.leak:
        return f"YES, {len(report.pairs())} of {(~report.allowed).sum()} pairs"
    return "no, proved" if report.status == "proved" else "no"


def main(argv: Sequence[str] | None = None) -> int:
    """0 if every verdict is as expected, 1 if not."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--data", nargs="+", default=[], metavar="FILE", help="lines, or CSV")
    parser.add_argument("--out", type=figure_path, default="packing.png", help="the figure")
    args = parser.parse_args(argv)
    start = time.perf_counter()
    try:
        names = read_names(args.data)
        packed = pack(names, ROWS, LENGTH)
        args.out.parent.mkdir(parents=True, exist_ok=True)
    except (ValueError, ImportError, OSError) as error:
        parser.error(str(error))
    from matplotlib.figure import Figure

    print("\nPacked into rows, does one name read another?\n")
    print(*packed.text, sep="\n", end="\n\n")
    print(f"{'decoder':<33}{'reads later letters?':<22}{'reads other names?':<24}reads its own?")
    expected, figure = True, Figure(figsize=(11, 10), dpi=100, layout="constrained")
    for case, ax in zip(CASES, figure.subplots(2, 2).flat, strict=True):
        later, others = check(case, packed, Vocabulary.of(names))
        own = "NO" if others.blind else "yes"
        print(f"{case.title:<33}{answer(later):<22}{answer(others):<24}{own}", flush=True)
        verdict = later.leak, others.leak, others.blind
        expected &= verdict == (case.norms_over_names, not case.masked, False)
        found = f"LEAK: {len(others.pairs())} pairs" if others.leak else "no leak"
        others.plot(ax).set_title(f"{case.title}\n{found}")
        ax.tick_params(labelsize=7, length=0)
    figure.savefig(args.out)
    print(f"\nfigure   {args.out.resolve()}")
    verdicts = "all as expected" if expected else "NOT as expected"
    print(f"verdicts {verdicts} ({time.perf_counter() - start:.0f} s)")
    return 0 if expected else 1


if __name__ == "__main__":
    sys.exit(main())
