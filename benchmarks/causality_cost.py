"""What the causality check costs, in units of one forward pass of the model it checks.

    python benchmarks/causality_cost.py

The model is a 2-layer, 128-wide transformer. A forward pass and the check's own runs are
timed in turn, and the median of the ratios is printed: only ratios move little from one
machine to the next, and on a busy one only those of processor time. Memory is what XLA
reserves: temporaries, inputs and outputs.
"""

import argparse
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from eqx_norms.causality import assert_causal, rules
from eqx_norms.causality._edits import make_editor, mixing_edits, nothing
from eqx_norms.causality._probe import make_probe
from eqx_norms.causality._trials import Rule

WIDTH, BATCH_SIZE = 128, 8


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

    def __call__(self, x):
        h = jax.vmap(self.norms[0])(x)
        x = x + self.attention(h, h, h, mask=jnp.tri(len(x), dtype=bool))
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


def row(length, repeats):
    """Prints the figures for one sequence length."""
    layers = eqx.nn.Sequential([eqx.nn.Lambda(Layer(key)) for key in jr.split(jr.key(0))])
    x = jr.normal(jr.key(1), (length, WIDTH))
    forward = jax.jit(lambda x: layers(x))
    started = time.perf_counter()
    report = assert_causal(layers, x, batch_size=BATCH_SIZE)
    total = time.perf_counter() - started

    # The same edits through one probe that is already compiled.
    editor = make_editor((np.asarray(x),), (0,), (1.0, 10.0, 100.0), None, None)
    rule = Rule("causal", rules.causal(length))
    trials = [*rule.edits(report.splits, editor.kinds), *mixing_edits(length)]
    edits = [nothing(editor), *trials, nothing(editor)]
    probe = make_probe(lambda x: (layers(x),), editor, (0,), 2.0**-23, BATCH_SIZE)
    probe.measure(edits[:BATCH_SIZE])
    forward(x).block_until_ready()
    ratios, forwards = [], []
    for _ in range(repeats):
        forwards.append(sum(seconds(lambda: forward(x)) for _ in range(40)) / 40)
        ratios.append(seconds(lambda: probe.measure(edits)[0]) / forwards[-1])
    wall, cpu = np.median(ratios, 0) / len(report.splits)

    batch = (np.stack([np.asarray(x)] * BATCH_SIZE),)
    memory = reserved(probe.run, batch) / reserved(forward, x)
    print(
        f"T = {length}: {len(report.splits)} splits, {len(trials)} edits; "
        f"{wall:.2f} forward passes a split, {cpu:.2f} in processor time "
        f"(one takes {np.median(forwards, 0)[0] * 1e3:.1f} ms); "
        f"memory {memory:.2f} forward passes; first call with tracing and compiling {total:.1f} s"
    )


def main():
    """Prints a row for T = 128 and for T = 1024."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    for length in (128, 1024):
        row(length, repeats)


if __name__ == "__main__":
    main()
