"""Norms over part of an example beside eqx.nn.LayerNorm: forward and backward, time and bytes.

    python -m benchmarks.partial
    python -m benchmarks.partial accuracy  # of every form, up to a million steps
    pip install asteroid torch_geometric jraph && python -m benchmarks.partial peers  # on 3.11

Medians of interleaved rounds, so that a busy machine slows all alike.
"""

import functools as ft
import statistics
import sys
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from eqx_norms import CumulativeNorm, SegmentNorm, cumulative_norm, segment_norm

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
        "... a group a channel": (
            SegmentNorm(features, features),
            lambda norm, x: norm(x, ids, num_segments=32),
        ),
    }
    for how in ({}, {"decay": 0.99}, {"window": 100}):
        name = f"CumulativeNorm, a group a channel {how or ''}".strip()
        layers[name] = CumulativeNorm(features, features, **how), lambda norm, x: norm(x)

    def both(call):
        @jax.jit
        def forward_and_backward(norm, x, g):
            y, vjp = eqx.filter_vjp(call, norm, x)
            return y, vjp(g)

        return forward_and_backward

    return {name: (norm, both(call)) for name, (norm, call) in layers.items()}


CHANNELS, LENGTHS, OFFSETS = 4, (1, 1000, 1_000_000), (0, 1e3, 1e6)
FORMS = {
    "CumulativeNorm": {},
    "... groups=channels": {"groups": CHANNELS},
    "... decay=0.99": {"decay": 0.99},
    "... window=100": {"window": 100},
    "SegmentNorm, 3 segments": {"segments": 3},
    "... groups=channels ": {"segments": 3, "groups": CHANNELS},
}


def ours(x, weight, ids, segments=None, **form):
    if segments is None:
        return cumulative_norm(x, weight, **form)
    return segment_norm(x, ids, weight, num_segments=segments, **form)


def by_two_sums(x, weight, ids, segments=None, groups=1, decay=None, window=None):
    """The usual form, E[x^2] - E[x]^2. In float64 and without an offset it is the truth."""
    split = x.reshape(len(x), groups, -1)

    def over(a):
        a = a.sum(2, keepdims=True)
        if segments:
            return jax.ops.segment_sum(a, ids, segments)[ids]
        if decay:
            both = lambda one, other: (other[0] * one[0], other[0] * one[1] + other[1])
            return jax.lax.associative_scan(both, (jnp.full_like(a, decay), a))[1]
        so_far = jnp.cumsum(a, 0)
        gone = so_far[: len(a) - window] if window else so_far[:0]
        return so_far - jnp.pad(gone, ((len(a) - len(gone), 0), (0, 0), (0, 0)))

    count = over(jnp.ones_like(split))
    mean, square = over(split) / count, over(split**2) / count
    y = (split - mean) / jnp.sqrt(jnp.maximum(square - mean**2, 0) + 1e-5)
    return y.reshape(x.shape) * weight


@ft.partial(jax.jit, static_argnames=("f", "form"))
def outputs(f, x, g, weight, ids, *, form):
    y, vjp = jax.vjp(lambda x, weight: f(x, weight, ids, **dict(form)), x, weight)
    return y, y[-1], *vjp(g)


def errors(form: tuple, steps: int, offset: float) -> tuple[np.ndarray, np.ndarray]:
    """Ours and those of two sums, beside float64, relative to the largest entry of each array."""
    rng = np.random.default_rng(steps)
    drawn, g = rng.normal(size=(2, steps, CHANNELS)).astype(np.float32)
    weight = rng.normal(size=CHANNELS).astype(np.float32)
    ids, x = rng.integers(0, 3, steps, np.int32), drawn + np.float32(offset)
    with jax.enable_x64(True):
        wide = x - np.float64(offset), np.float64(g), np.float64(weight)
        truth = [np.asarray(a) for a in outputs(by_two_sums, *wide, ids, form=form)]
    both = [outputs(f, x, g, weight, ids, form=form) for f in (ours, by_two_sums)]
    largest = [max(np.abs(a).max(), 1) for a in truth]
    off = lambda got: [np.abs(a - b).max() / n for a, b, n in zip(got, truth, largest, strict=True)]
    return np.array(off(both[0])), np.array(off(both[1]))


def accuracy() -> None:
    """The largest errors over all lengths, of random cotangents, as a table."""
    print("| | y | y of the last step | dx | dweight | y by two sums, at 0 | at 1e3 | at 1e6 |")
    print("|---|" + "---|" * 7)
    for name, form in FORMS.items():
        found = [[errors((*form.items(),), n, at) for n in LENGTHS] for at in OFFSETS]
        own, usual = np.moveaxis(found, 2, 0)  # (offsets, lengths, arrays)
        row = [*own.max((0, 1)), *usual[..., 0].max(1)]
        print(f"| {name} |", *(f"{error:.0e} |" for error in row))


def peers() -> None:
    """The layers of others with the same weights, if they have some: errors beside float64."""
    import jraph
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

    def by_jraph(x):
        y = jraph.segment_normalize(jnp.asarray(x), jnp.asarray(ids), 3)
        return torch.tensor(np.asarray(y) * weight + bias)

    cases = (  # ours, theirs, the rows that each row is normalised over, over all channels?, eps
        (CumulativeNorm(channels, eps=1e-8), lambda x: cumulative(x.T[None])[0].T, so_far, True),
        (SegmentNorm(channels), lambda x: graph(x, index), of_segment, True),
        (SegmentNorm(channels, channels), lambda x: instance(x, index), of_segment, False),
        (SegmentNorm(channels, channels, eps=0), by_jraph, of_segment, False),
    )
    for norm, theirs, rows, over_all in cases:
        norm = eqx.tree_at(
            lambda n: (n.weight, n.bias), norm, tuple(map(jnp.asarray, (weight, bias)))
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
            name = f"{type(norm).__name__}({channels}, {norm.groups})"
            print(f"{name:<22}offset {offset:<10g}ours {errors[0]:.1e}, theirs {errors[1]:.1e}")

    x = torch.tensor(1e-3 * rng.normal(size=(50, channels)), dtype=torch.float32)
    plain = LayerNorm(channels, mode="graph")
    apart = (plain(x) - plain(x, torch.zeros(50, dtype=torch.long))).abs().max()
    print(f"torch_geometric without batch, at a spread of 0.001: off by {apart:.1f}")
    pair_norms(rng, ids, channels)


def pair_norms(rng: np.random.Generator, ids: np.ndarray, channels: int) -> None:
    """The recipe of docs/partial.md beside torch_geometric's."""
    import torch
    from torch_geometric.nn import PairNorm

    def ours(x):
        count = jax.ops.segment_sum(jnp.ones((len(x), 1)), ids, 3)
        centred = lambda x: x - (jax.ops.segment_sum(x, ids, 3) / count)[ids]
        y = segment_norm(centred(centred(x)), ids, num_segments=3, eps=1e-5 / channels)
        return y / channels**0.5

    def exact(x):
        xc = x - np.stack([x[ids == i].mean(0) for i in ids])
        square = (xc**2).sum(1)
        return xc / np.sqrt([[square[ids == i].mean() + 1e-5] for i in ids])

    for offset in (0, 1e3, 1e6):
        x = (rng.normal(size=(len(ids), channels)) + offset).astype(np.float32)
        theirs = PairNorm()(torch.tensor(x), torch.tensor(ids)).numpy()
        errors = [np.abs(y - exact(np.float64(x))).max() for y in (ours(x), theirs)]
        print(f"{'PairNorm':<22}offset {offset:<10g}ours {errors[0]:.1e}, theirs {errors[1]:.1e}")


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
