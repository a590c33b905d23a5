"""What the causality check and its proof cost: for several rules, and over the length.

    python -m benchmarks.causality_cost
    python -m benchmarks.causality_cost --only rules --rule causal --positions 128
    python -m benchmarks.causality_cost --only masks
    python -m benchmarks.causality_cost --only lengths --before ../checkout --positions 512 1024

The table of rules is of a 2-layer, 128-wide transformer whose mask is the rule, in forward passes
of it. A forward pass and the check's own runs are timed in turn, and the median of the ratios is
printed: only ratios move little from one machine to the next, and on a busy one only those of
processor time. Memory is what XLA reserves: temporaries, inputs and outputs. A proof is timed
once, traced.

The table of masks is of one layer of attention at 16 positions that is proved, in seconds of
processor time, compiling included: masks of large numbers need a look at the scores.

The table of lengths is of 4 layers, 4 heads, width 64, with a causal mask, and of the same where
one layer has none, in seconds of processor time. Each row is a process of its own, which compiles
what it runs; with `--before` it stands beside those of other checkouts of this library, in the same
run. "Proved" and "a leak, named" are the proof alone, the others whole checks.
"""

import argparse
import os
import resource
import subprocess
import sys
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from eqx_norms.causality import check_causal, rules
from eqx_norms.causality._edits import make_editor, mixing_edits, nothing
from eqx_norms.causality._probe import make_probe
from eqx_norms.causality._trials import Rule
from eqx_norms.causality._widen import trace

try:
    from eqx_norms.causality._proof import Question, prove
except ImportError:  # a checkout from before the proof had a room of its own
    from eqx_norms.causality._prove import Question, prove

BATCH_SIZE = 8
RULES = {
    "causal": rules.causal,
    "causal, in documents of 16": lambda n: rules.causal(n) & rules.segments(np.arange(n) // 16),
    "causal, in a window of 32": lambda n: rules.causal(n) & rules.window(n, 32),
    "causal, behind a prefix of 32": lambda n: rules.prefix(n, 32),
    "blocks of 16": lambda n: rules.blocks(n, 16),
    "a quarter is padding": lambda n: rules.unpadded(np.arange(n) < 3 * n // 4),
}
COLUMNS = (
    "rule",
    "positions",
    "distinct rows tried",
    "edited inputs",
    "forward passes, by the clock",
    "in processor time",
    "memory, in forward passes",
    "a proof, in forward passes",
    "in seconds",
)


class Layer(eqx.Module):
    """A pre-norm transformer layer for one sequence."""

    attention: eqx.nn.MultiheadAttention
    mlp: eqx.nn.MLP
    norms: tuple[eqx.nn.LayerNorm, eqx.nn.LayerNorm]

    def __init__(self, width, key):
        first, second = jr.split(key)
        self.attention = eqx.nn.MultiheadAttention(4, width, key=first)
        self.mlp = eqx.nn.MLP(width, width, 4 * width, 1, key=second)
        self.norms = (eqx.nn.LayerNorm(width), eqx.nn.LayerNorm(width))

    def __call__(self, x, mask):
        h = jax.vmap(self.norms[0])(x)
        x = x + self.attention(h, h, h, mask=mask)
        return x + jax.vmap(self.mlp)(jax.vmap(self.norms[1])(x))


def transformer(width, masks):
    """A layer for each mask; one that is `None` hides nothing."""
    layers = [Layer(width, key) for key in jr.split(jr.key(0), len(masks))]

    def model(x):
        for layer, mask in zip(layers, masks, strict=True):
            x = layer(x, None if mask is None else jnp.asarray(mask))
        return x

    return model


def proved(model, x, allowed):
    """What the structure says of the model: traced, gone through, and what is in the way named."""
    question = Question(trace(model, (x,)), (x,), (0,), (0,))
    return prove(question, allowed, assume_bounded=True)


# Rules


def seconds(run):
    """The wall-clock time and the processor time of one call of `run`."""
    wall, cpu = time.perf_counter(), time.process_time()
    jax.block_until_ready(run())
    return np.array([time.perf_counter() - wall, time.process_time() - cpu])


def reserved(fn, *args):
    """Bytes that the compiled function needs at its peak, inputs and outputs included."""
    analysis = jax.jit(fn).lower(*args).compile().memory_analysis()
    return (
        analysis.temp_size_in_bytes
        + analysis.output_size_in_bytes
        + analysis.argument_size_in_bytes
    )


def row(name, length, repeats):
    """The figures for one rule and one sequence length, as the row of a table."""
    width, allowed = 128, RULES[name](length)
    model = transformer(width, [allowed, allowed])
    x = jr.normal(jr.key(1), (length, width))

    # The edits of a check, through one probe that is already compiled.
    editor = make_editor((np.asarray(x),), (0,), (1.0, 10.0, 100.0), None, None)
    rule = Rule("causal" if name == "causal" else "reads", allowed)
    tried = rule.choose("auto", np.random.default_rng(0))
    trials = [*rule.edits(tried, editor.kinds), *mixing_edits(length, both=rule.kind == "reads")]
    edits = [nothing(editor), *trials, nothing(editor)]
    probe = make_probe(lambda x: (model(x),), editor, (0,), 2.0**-23, BATCH_SIZE)
    probe.measure(edits[:BATCH_SIZE])
    forward = jax.jit(model)
    jax.block_until_ready(forward(x))
    ratios, forwards = [], []
    for _ in range(repeats):
        forwards.append(sum(seconds(lambda: forward(x)) for _ in range(40)) / 40)
        ratios.append(seconds(lambda: probe.measure(edits)[0]) / forwards[-1])
    wall, cpu = np.median(ratios, 0)

    batch = (np.stack([np.asarray(x)] * BATCH_SIZE),)
    memory = reserved(probe.run, batch) / reserved(forward, x)
    proof = seconds(lambda: proved(model, x, allowed).connected)
    passes = proof[1] / np.median(forwards, 0)[1]
    counts = f"{length} | {len(tried)} | {len(trials)}"
    return f"{counts} | {wall:.0f} | {cpu:.0f} | {memory:.1f} | {passes:.0f} | {proof[0]:.1f}"


def of_rules(names, positions, repeats):
    """Prints a row for every rule and length."""
    print(f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|")
    for name in names:
        for length in positions:
            print(f"| {name} | {row(name, length, repeats)} |", flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"\nThe process took {peak:.1f} GiB at its peak.\n")


# Masks

MASKS = {"minus infinity": -np.inf, "finfo.min": float(jnp.finfo(jnp.float32).min), "-1e9": -1e9}


def of_masks(length=16, width=8):
    """Prints a row for every mask."""
    x, weights = jr.normal(jr.key(1), (length, width)), jr.normal(jr.key(0), (width, width))
    allowed = np.tri(length, dtype=bool)
    print("| mask | s |\n|---|---|")
    for name, hidden in MASKS.items():
        taken = []
        for _ in range(5):
            scores = lambda h, hidden=hidden: jnp.where(allowed, h @ h.T, hidden)
            model = lambda x, scores=scores: x + jax.nn.softmax(scores(x @ weights)) @ x
            taken += [seconds(lambda f=model: check_causal(f, x, prove="required").matrix)[1]]
        print(f"| {name} | {np.median(taken):.2g} |", flush=True)
    print()


# Lengths: for each row whether it leaks, the lengths that are tried by default, and what is run.

PROOFS, CHECKS = (512, 1024, 2048, 4096, 8192), (128, 512, 1024, 2048)
LENGTHS = {
    "proved": (False, PROOFS, lambda f, x: proved(f, x, rules.causal(len(x))).holds),
    "a leak, named": (True, PROOFS, lambda f, x: proved(f, x, rules.causal(len(x))).holds),
    "a check": (False, CHECKS, lambda f, x: not check_causal(f, x).leak),
    "the check of a leak": (True, CHECKS, lambda f, x: not check_causal(f, x).leak),
    "the same, `prove=True`": (True, CHECKS, lambda f, x: not check_causal(f, x, prove=True).leak),
}


def child(what, length):
    """Prints the seconds of what is asked, those of a forward pass, and the peak in GiB."""
    leaks, _, run = LENGTHS[what]
    masks = [np.tri(length, dtype=bool)] * 4
    masks[1] = None if leaks else masks[1]
    model, x = transformer(64, masks), jr.normal(jr.key(1), (length, 64))
    start = time.process_time()
    holds = run(model, x)
    taken = time.process_time() - start
    assert holds != leaks
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    forward = jax.jit(model)
    jax.block_until_ready(forward(x))
    passes = 10 if length < 4096 else 2
    once = np.mean([seconds(lambda: forward(x))[1] for _ in range(passes)])
    print(taken, once, peak)


def measured(what, length, root):
    """The child's three numbers, with the package of the checkout at `root`."""
    command = [sys.executable, __file__, "--child", what, str(length)]
    environment = {**os.environ, "PYTHONPATH": root, "JAX_ENABLE_COMPILATION_CACHE": "false"}
    out = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return tuple(map(float, out.stdout.split()))


def of_lengths(names, positions, before):
    """Prints a row for every question and length, the other checkouts' figures first."""
    here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    roots = [*map(os.path.abspath, before), here]
    columns = [f"{what}, {os.path.basename(root)}" for root in roots[:-1] for what in ("s", "GiB")]
    columns += ["s", "GiB", "forward passes"]
    print(f"| | positions | {' | '.join(columns)} |\n{'|---' * (2 + len(columns))}|")
    for name in names:
        for length in positions or LENGTHS[name][1]:
            found = [measured(name, length, root) for root in roots]
            cells = [f"{taken:.2g} | {peak:.2f}" for taken, _, peak in found]
            taken, once, _ = found[-1]
            print(f"| {name} | {length} | {' | '.join(cells)} | {taken / once:.0f} |", flush=True)


def main():
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", choices=("rules", "masks", "lengths"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--positions", type=int, nargs="+")
    parser.add_argument("--rule", nargs="+", default=[*RULES], choices=[*RULES])
    parser.add_argument("--what", nargs="+", default=[*LENGTHS], choices=[*LENGTHS])
    parser.add_argument("--before", nargs="+", default=[], help="other checkouts")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child[0], int(options.child[1]))
        return
    if options.only in (None, "rules"):
        of_rules(options.rule, options.positions or (128, 1024), options.repeats)
    if options.only in (None, "masks"):
        of_masks()
    if options.only in (None, "lengths"):
        of_lengths(options.what, options.positions, options.before)


if __name__ == "__main__":
    main()
