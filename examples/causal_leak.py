"""Does a decoder see the future? That depends on the axes of its norms.

    python examples/causal_leak.py                      # census surnames
    python examples/causal_leak.py --data FILE ...      # your own lines or CSV

Three decoders on real text differ only in what their norms average over. `eqx_norms.causality`
tells which of them reads the letters that it should predict, and which the other lines of the
batch. Then the same for a case from an issue tracker, where a gradient was the probe.
"""

import argparse
import dataclasses
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from arguments import figure_path
from decoder.model import Decoder, PerToken
from decoder.settings import Settings
from jaxtyping import Array, Float, Int
from names_data import Vocabulary, batches, read_names

import eqx_norms
from eqx_norms import causality

# ---- Three decoders: that of examples/decoder, but for what its norms average over.

# What each is expected to read, and must not.
READS = {"per-token": "", "over-tokens-and-features": "the future", "over-batch": "other lines"}
# How many lines of text, and the decoder of each.
FULL = 8, Settings(context=32, width=64)
QUICK = 4, Settings(context=16, width=16, layers=1)
DRAWN = 3, Settings(context=7, width=16, layers=1)  # small enough to look at
MAP = """
Who reads whom, in smaller decoders of {lines} lines with {letters} letters each. A row is an
output, which stands at the letter on its left. A column is a letter that it might read.

  o  reads it, and may      X  reads it, and must not      .  does not read it
"""


class OverBatch(eqx.Module):
    """Every entry over the lines: where a layer takes the whole batch, one wrong `axis=0`."""

    norm: eqx_norms.LayerNorm

    def __call__(self, x: Float[Array, "tokens features"]) -> Float[Array, "tokens features"]:
        lines = jax.lax.all_gather(x, "batch", axis=2)
        return jax.vmap(jax.vmap(self.norm))(lines)[:, :, jax.lax.axis_index("batch")]


def drawn(shapes: Decoder) -> Decoder:
    """With parameters from NumPy: JAX would compile a program for each of their shapes."""
    rng = np.random.default_rng(0)
    entries = lambda leaf: rng.normal(0, leaf.shape[-1] ** -0.5, leaf.shape)
    draw = lambda leaf: jnp.asarray(entries(leaf).astype(leaf.dtype))
    is_shape = lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct)
    return jax.tree.map(lambda leaf: draw(leaf) if is_shape(leaf) else leaf, shapes)


def make_model(norm: str, symbols: int, lines: int, settings: Settings) -> Callable:
    """Takes letters (lines, tokens), returns scores (lines, tokens, symbols)."""
    settings = dataclasses.replace(settings, norm="per-token" if norm == "over-batch" else norm)
    decoder = drawn(eqx.filter_eval_shape(Decoder, settings, symbols, key=jr.key(0)))
    if norm == "over-batch":
        other = OverBatch(eqx_norms.LayerNorm(lines, use_weight=False, use_bias=False))
        is_norm = lambda node: isinstance(node, PerToken)
        decoder = jax.tree.map(lambda x: other if is_norm(x) else x, decoder, is_leaf=is_norm)
    return jax.jit(jax.vmap(decoder, axis_name="batch"))  # traced once for all that asks


def first_lines(names, vocabulary, lines: int, tokens: int) -> Int[np.ndarray, "lines tokens"]:
    enough = names * math.ceil(lines * tokens / len(names))  # a few are repeated
    return next(batches(enough, vocabulary, size=lines, length=tokens))


# ---- The two questions, and who reads whom.


def answer(report: causality.CausalityReport) -> str:
    if report.leak:
        return f"YES, {len(report.pairs())} of {(~report.allowed).sum()} pairs"
    return "no, proved" if report.status == "proved" else "no"


def examine(name: str, fn: Callable, x, expected: str, surprises: list, ids=None) -> str:
    """Does an output read what comes later? Does it read other lines? Prints the row of a table,
    piece by piece, so that it can be seen what is being checked."""
    # Proved is what is expected not to be read: of a leak, the proof would look for its operations.
    how = lambda what: {"token_values": ids, "prove": what not in expected}
    # Some of the norms, by themselves, act on each letter alone: no warning of that.
    print(f"  {name:<27}", end="", flush=True)
    later = causality.check_causal(fn, x, axis=1, pointwise=True, **how("the future"))
    print(f"{answer(later):<25}", end="", flush=True)
    others = causality.check_independent(fn, x, axis=0, **how("other lines"))
    print(answer(others), flush=True)
    read = " and ".join(["the future"] * later.leak + ["other lines"] * others.leak)
    if read != expected:
        surprises.append(f"{name} reads {read or 'neither'}, expected: {expected or 'neither'}")
    return f"LEAK: reads {read}" if read else "no leak"


def who_reads_whom(
    norm: str, names: list[str], vocabulary: Vocabulary
) -> causality.CausalityReport:
    """From each letter of each line to each letter of each line, in a small decoder."""
    lines, settings = DRAWN
    letters = first_lines(names, vocabulary, lines, settings.context)
    model = make_model(norm, len(vocabulary), lines, settings)
    rule = causality.rules.each(lines, causality.rules.causal(settings.context))
    labels, ids = map(vocabulary.decode, letters), (0, len(vocabulary) - 1)
    how = {"axis": (0, 1), "labels": labels, "token_values": ids}
    # What is required is measured: else a check that finds no leak leaves open what may be read.
    return causality.check_reads(model, letters, rule, required=rule, **how)


def compare_norms(names: list[str], lines: int, settings: Settings, out: Path) -> list[str]:
    """Checks the three decoders, prints the verdicts and the maps, draws the figure."""
    from matplotlib.figure import Figure

    vocabulary = Vocabulary.of(names)
    letters = first_lines(names, vocabulary, lines, settings.context)
    print(f"""\
  text     {len(names):,} names, {len(vocabulary)} symbols
  models   causal decoders, {settings.layers} x {settings.width}, untrained: the leak is in the axes
  check    {lines} lines of {settings.context} letters; edits what an output must not read

  {"norm":<27}{"reads later letters?":<25}reads other lines?""")
    ids = (0, len(vocabulary) - 1)  # edits are to draw from the whole alphabet
    surprises, reports, figure = [], [], Figure(figsize=(15, 4.8), dpi=100)
    figure.subplots_adjust(left=0.04, right=0.98, bottom=0.1, top=0.88, wspace=0.25)
    axes = figure.subplots(1, len(READS), squeeze=False)[0]
    for ax, (norm, expected) in zip(axes, READS.items(), strict=True):
        model = make_model(norm, len(vocabulary), lines, settings)
        verdict = examine(norm, model, letters, expected, surprises, ids)
        reports.append(who_reads_whom(norm, names, vocabulary))
        reports[-1].plot(ax).set_title(f"norm {norm}\n{verdict}")
    figure.savefig(out)
    print(MAP.format(lines=DRAWN[0], letters=DRAWN[1].context))
    named = zip(READS, reports, strict=True)
    maps = [[f"  {norm}", *report.heatmap().splitlines()[1:]] for norm, report in named]
    for number, row in enumerate(zip(*maps, strict=True)):
        between = number > 2 and (number - 2) % DRAWN[1].context == 0
        print("\n" * between + "".join(f"{part:<29}" for part in row).rstrip())
    return surprises


# ---- The case from an issue tracker: dm-haiku, issue 700.

THREAD = """\
    -0.09  -0.21  -0.17  -0.17   1.03  -0.21  -0.17
    -0.15  -0.24  -0.15  -0.19   0.98  -0.11  -0.17
    -0.17  -0.11  -0.19  -0.14   0.99  -0.20  -0.15"""


def thread_probe(norm: Callable, x: Float[Array, "batch positions"]) -> str:
    """The gradient of the sum of the outputs at one position, to two decimals."""
    gradient = jax.jit(jax.grad(lambda x: norm(x)[:, 4].sum()))(x)
    rounded = np.round(np.asarray(gradient), 2) + 0.0  # no "-0.00"
    return "\n".join("    " + "  ".join(f"{entry:5.2f}" for entry in row) for row in rounded)


def revisit_thread() -> list[str]:
    """Repeats what the thread saw and concluded, and checks the same functions."""
    # The numbers in the thread come from the random bits that were JAX's default at the time.
    with jax.threefry_partitionable(False):
        x = jr.normal(jr.PRNGKey(42), (3, 7))
    both, batch = eqx_norms.layer_norm, jax.vmap(eqx_norms.layer_norm, 1, 1)
    before, after = thread_probe(both, x), thread_probe(batch, x)
    same = before == THREAD and set(after) <= set("0. \n")
    surprises = [] if same else ["the gradients are not those of the thread"]
    print(f"""\
Somebody normalised 3 examples of 7 positions over both axes, took the gradient of the
summed outputs at position 4, and found positions 5 and 6 in it:

{before}

{"Digit for digit" if same else "NOT"} the thread's table. With a norm over axis 0, all was well:

{after}

Was it? Position 4 is not in it either, though each output reads its own input. What a
norm returns has a fixed sum, and the gradient of that sum is 0 whatever the norm reads.
And axis 0 is the batch:

  {"norm":<27}{"reads later positions?":<25}reads other examples?""")
    examine("over both axes", both, x, "the future and other lines", surprises)
    examine("over axis 0", batch, x, "other lines", surprises)
    return surprises


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
    print("\nDoes the model see the future?\n")
    surprises = compare_norms(names, *(QUICK if args.quick else FULL), args.out)
    print("\nThe gradient that missed a leak: dm-haiku, issue 700\n")
    surprises += revisit_thread()
    verdicts = f"{'NOT' if surprises else 'all'} as expected ({time.perf_counter() - start:.0f} s)"
    print(f"\nfigure   {args.out.resolve()}\nverdicts {verdicts}", *surprises, sep="\n  ")
    return 1 if surprises else 0


if __name__ == "__main__":
    sys.exit(main())
