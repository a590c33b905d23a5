"""Norms over part of an example beside eqx.nn.LayerNorm: forward and backward, time and bytes.

    python -m benchmarks.partial

Medians of interleaved rounds, so that a busy machine slows all alike.
"""

import statistics
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from eqx_norms import CumulativeNorm, SegmentNorm

SHAPES = (16000, 64), (4096, 768)
ROUNDS = 21


def programs(steps: int, features: int) -> dict:
    ids = jnp.arange(steps) * 32 // steps
    segments = SegmentNorm(features)
    layers = {
        "eqx.nn.LayerNorm": (eqx.nn.LayerNorm(features), lambda norm, x: jax.vmap(norm)(x)),
        "CumulativeNorm": (CumulativeNorm(features), lambda norm, x: norm(x)),
        "SegmentNorm": (segments, lambda norm, x: norm(x, ids, num_segments=32)),
    }

    def both(call):
        @jax.jit
        def forward_and_backward(norm, x, g):
            y, vjp = eqx.filter_vjp(call, norm, x)
            return y, vjp(g)

        return forward_and_backward

    return {name: (norm, both(call)) for name, (norm, call) in layers.items()}


def main() -> None:
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
