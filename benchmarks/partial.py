"""Norms over part of an example beside eqx.nn.LayerNorm: forward and backward, time and bytes.

    python -m benchmarks.partial
    python -m benchmarks.partial accuracy  # of SegmentNorm, a million tokens in one segment
    pip install asteroid torch_geometric && python -m benchmarks.partial peers  # on Python 3.11

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


def peers() -> None:
    """The layers of asteroid and torch_geometric with the same weights: errors beside float64."""
    import torch
    from asteroid.masknn.norms import CumLN
    from torch_geometric.nn import InstanceNorm, LayerNorm

    steps, channels = 40, 6
    rng = np.random.default_rng(0)
    weight, bias = rng.normal(size=(2, channels)).astype(np.float32)
    ids = rng.integers(0, 3, steps)
    so_far, of_segment = np.tri(steps, dtype=bool), ids[:, None] == ids

    def given(layer, **params):
        for name, value in params.items():
            getattr(layer, name).data = torch.tensor(value)
        return layer

    cumulative = given(CumLN(channels), gamma=weight, beta=bias)
    graph = given(LayerNorm(channels, mode="graph"), weight=weight, bias=bias)
    instance = given(InstanceNorm(channels, affine=True), weight=weight, bias=bias)
    index = torch.tensor(ids)
    cases = (  # ours, theirs, the rows that each row is normalised over, over all channels?, eps
        (CumulativeNorm(channels, eps=1e-8), lambda x: cumulative(x.T[None])[0].T, so_far, True),
        (SegmentNorm(channels), lambda x: graph(x, index), of_segment, True),
        (SegmentNorm(channels, channels), lambda x: instance(x, index), of_segment, False),
    )
    for ours, theirs, rows, over_all in cases:
        norm = eqx.tree_at(
            lambda n: (n.weight, n.bias), ours, tuple(map(jnp.asarray, (weight, bias)))
        )
        more = (jnp.asarray(ids),) if rows is of_segment else ()
        for offset in (0, 1e3, 1e6):
            x = (rng.normal(size=(steps, channels)) + offset).astype(np.float32)
            axis = None if over_all else 0
            parts = [np.float64(x[row]) for row in rows]
            exact = [
                (one - a.mean(axis)) / np.sqrt(a.var(axis) + norm.eps) * weight + bias
                for one, a in zip(np.float64(x), parts, strict=True)
            ]
            got = np.asarray(norm(jnp.asarray(x), *more)), theirs(torch.tensor(x)).detach().numpy()
            errors = [np.abs(y - np.stack(exact)).max() for y in got]
            name = f"{type(ours).__name__}({channels}, {ours.groups})"
            print(f"{name:<22}offset {offset:<10g}ours {errors[0]:.1e}, theirs {errors[1]:.1e}")
    x = torch.tensor(1e-3 * rng.normal(size=(50, channels)), dtype=torch.float32)
    plain = LayerNorm(channels, mode="graph")
    apart = (plain(x) - plain(x, torch.zeros(50, dtype=torch.long))).abs().max()
    print(f"torch_geometric without batch, at a spread of 0.001: off by {apart:.1f}")


def main() -> None:
    if sys.argv[1:] == ["accuracy"]:
        return accuracy()
    if sys.argv[1:] == ["peers"]:
        return peers()
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
