"""Norms over part of an example beside eqx.nn.LayerNorm: forward and backward, time and bytes.

    python -m benchmarks.partial
    python -m benchmarks.partial accuracy  # of SegmentNorm, a million tokens in one segment

Medians of interleaved rounds, so that a busy machine slows all alike.
"""

import statistics
import sys
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from eqx_norms import CumulativeNorm, SegmentNorm, segment_norm

SHAPES = (16000, 64), (4096, 768)
ROUNDS = 21


def programs(steps: int, features: int) -> dict:
    ids = jnp.arange(steps) * 32 // steps
    segments = SegmentNorm(features)
    layers = {
        "eqx.nn.LayerNorm": (eqx.nn.LayerNorm(features), lambda norm, x: jax.vmap(norm)(x)),
        "CumulativeNorm": (CumulativeNorm(features), lambda norm, x: norm(x)),
        "... decay=0.99": (CumulativeNorm(features, decay=0.99), lambda norm, x: norm(x)),
        "... window=100": (CumulativeNorm(features, window=100), lambda norm, x: norm(x)),
        "SegmentNorm": (segments, lambda norm, x: norm(x, ids, num_segments=32)),
    }

    def both(call):
        @jax.jit
        def forward_and_backward(norm, x, g):
            y, vjp = eqx.filter_vjp(call, norm, x)
            return y, vjp(g)

        return forward_and_backward

    return {name: (norm, both(call)) for name, (norm, call) in layers.items()}


def accuracy() -> None:
    """Beside float64, from which the offset has been taken off."""
    norm = jax.jit(lambda x, ids: segment_norm(x, ids, num_segments=1))
    for draw in range(3):
        for offset in (0, 1e4, 1e6):
            rng = np.random.default_rng(draw)
            x = (rng.normal(size=(1_000_000, 1)) + offset).astype(np.float32)
            wide = np.float64(x) - offset
            want = (wide - wide.mean()) / np.sqrt(wide.var() + 1e-5)
            error = np.abs(norm(x, np.zeros(len(x), np.int32)) - want).max()
            share = error / np.abs(want).max()
            print(
                f"draw {draw}, offset {offset:<10g}off by {error:.1e}, {share:.1e} of the largest"
            )


def main() -> None:
    if sys.argv[1:] == ["accuracy"]:
        return accuracy()
    rng = np.random.default_rng(0)
    for shape in SHAPES:
        x, g = (jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(2))
        timed = programs(*shape)
        seconds = {name: [] for name in timed}
        for i in range(ROUNDS + 1):
            for name, (norm, run) in timed.items():
                start = time.perf_counter()
                jax.block_until_ready(run(norm, x, g))
                if i:  # The first compiles.
                    seconds[name].append(time.perf_counter() - start)
        medians = {name: statistics.median(each) for name, each in seconds.items()}
        for name, (norm, run) in timed.items():
            memory = run.lower(norm, x, g).compile().memory_analysis()
            ratio = medians[name] / medians["eqx.nn.LayerNorm"]
            per = memory.temp_size_in_bytes / x.size
            print(f"{shape!s:<14}{name:<18}{ratio:6.2f} of its time {per:6.1f} bytes an element")


if __name__ == "__main__":
    main()
