"""What the causality check costs, in units of one forward pass of the model it checks.

    python benchmarks/causality_cost.py

The model is a 2-layer, 128-wide transformer whose mask is the rule that it is checked for. A
forward pass and the check's own runs are timed in turn, and the median of the ratios is printed:
only ratios move little from one machine to the next, and on a busy one only those of processor
time. Memory is what XLA reserves: temporaries, inputs and outputs. A proof is timed once, traced.
"""

import argparse
import resource
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from eqx_norms.causality import rules
from eqx_norms.causality._edits import make_editor, mixing_edits, nothing
from eqx_norms.causality._probe import make_probe
from eqx_norms.causality._proof._prove import Question, prove
from eqx_norms.causality._trials import Rule
from eqx_norms.causality._widen import trace

WIDTH, BATCH_SIZE = 128, 8
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

    def __init__(self, key):
        first, second = jr.split(key)
        self.attention = eqx.nn.MultiheadAttention(4, WIDTH, key=first)
        self.mlp = eqx.nn.MLP(WIDTH, WIDTH, 4 * WIDTH, 1, key=second)
        self.norms = (eqx.nn.LayerNorm(WIDTH), eqx.nn.LayerNorm(WIDTH))

    def __call__(self, x, mask):
        h = jax.vmap(self.norms[0])(x)
        x = x + self.attention(h, h, h, mask=mask)
        return x + jax.vmap(self.mlp)(jax.vmap(self.norms[1])(x))


def seconds(run):
    """The wall-clock time and the processor time of one call of `run`."""
    wall, cpu = time.perf_counter(), time.process_time()
    jax.block_until_ready(run())
    return np.array([time.perf_counter() - wall, time.process_time() - cpu])


def reserved(jitted, *args):
    """Bytes that the compiled function needs at its peak, inputs and outputs included."""
    analysis = jitted.lower(*args).compile().memory_analysis()
    return (
        analysis.temp_size_in_bytes
        + analysis.output_size_in_bytes
        + analysis.argument_size_in_bytes
    )


def row(name, length, repeats):
    """The figures for one rule and one sequence length, as the row of a table."""
    layers, allowed = [Layer(key) for key in jr.split(jr.key(0))], RULES[name](length)
    x = jr.normal(jr.key(1), (length, WIDTH))

    def model(x):
        for layer in layers:
            x = layer(x, jnp.asarray(allowed))
        return (x,)

    # The edits of a check, through one probe that is already compiled.
    editor = make_editor((np.asarray(x),), (0,), (1.0, 10.0, 100.0), None, None)
    rule = Rule("causal" if name == "causal" else "reads", allowed)
    tried = rule.choose("auto", np.random.default_rng(0))
    trials = [*rule.edits(tried, editor.kinds), *mixing_edits(length, both=rule.kind == "reads")]
    edits = [nothing(editor), *trials, nothing(editor)]
    probe = make_probe(model, editor, (0,), 2.0**-23, BATCH_SIZE)
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
    question = Question(trace(model, (x,)), (x,), (0,), (0,))
    proof = seconds(lambda: prove(question, allowed, assume_bounded=True).connected)
    passes = proof[1] / np.median(forwards, 0)[1]
    counts = f"{length} | {len(tried)} | {len(trials)}"
    return f"{counts} | {wall:.0f} | {cpu:.0f} | {memory:.1f} | {passes:.0f} | {proof[0]:.1f}"


def main():
    """Prints a table with a row for every rule at T = 128 and at T = 1024."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--positions", type=int, nargs="+", default=[128, 1024])
    parser.add_argument("--rule", nargs="+", default=[*RULES], choices=[*RULES])
    options = parser.parse_args()
    print(f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|")
    for name in options.rule:
        for length in options.positions:
            print(f"| {name} | {row(name, length, options.repeats)} |", flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"\nThe process took {peak:.1f} GiB at its peak.")


if __name__ == "__main__":
    main()
