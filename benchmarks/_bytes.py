"""Bytes an element of x, exact figures from XLA; and the time to trace and compile 12 layers."""

import time

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from ._cases import BYTES_ROWS, SCAN_LAYERS, STACK_LAYERS, shape_of
from ._rivals import Norm, make
from ._speed import summary

ROWS, N = shape_of(BYTES_ROWS[0])  # of the models


def bytes_of(rival: str, dtype: str) -> list[dict]:
    """All byte figures of one library: `bytes` an element of x, or a layer-element in a model."""
    figures = []
    for rows in BYTES_ROWS:
        norm = make(rival, "LayerNorm", *shape_of(rows), dtype)
        x = jnp.ones(shape_of(rows), dtype)
        figures.append(("residuals", rows, _residuals(norm, x) / x.size))
        figures.append(("one layer", rows, _temporaries(_one_layer(norm), x, x) / x.size))
    norm = make(rival, "LayerNorm", ROWS, N, dtype)
    for name, layers, model in (
        ("scan", SCAN_LAYERS, scanned),
        ("unrolled", STACK_LAYERS, unrolled),
    ):
        gradient, args = model(norm, dtype)
        elements = layers * ROWS * N
        figures.append((name, BYTES_ROWS[0], _temporaries(gradient, *args) / elements))
    return [
        {"rival": rival, "dtype": dtype, "measure": measure, "rows": rows, "bytes": round(value, 4)}
        for measure, rows, value in figures
    ]


def _residuals(norm: Norm, x) -> int:
    """What `jax.vjp` holds until the backward."""
    _, vjp = jax.vjp(jax.jit(norm.apply), norm.params, x)
    return sum(leaf.nbytes for leaf in jax.tree.leaves(vjp))


def _temporaries(f, *args) -> int:
    return jax.jit(f).lower(*args).compile().memory_analysis().temp_size_in_bytes


def _one_layer(norm: Norm):
    def run(x, g, params=norm.params):
        y, vjp = jax.vjp(norm.apply, params, x)
        return y, vjp(g)

    return run


def unrolled(norm: Norm, dtype):
    """The gradient of twelve [norm, matmul, tanh] layers, one after the other."""
    params = [norm.params] * STACK_LAYERS, list(_matrices(STACK_LAYERS, dtype))

    def loss(params, x):
        for scale, matrix in zip(*params, strict=True):
            x = jnp.tanh(norm.apply(scale, x) @ matrix)
        return jnp.sum(x.astype(jnp.float32) ** 2)

    return jax.grad(loss, (0, 1)), (params, jnp.ones((ROWS, N), dtype))


def scanned(norm: Norm, dtype):
    """The gradient of eight [norm, tanh] layers under `jax.lax.scan`, parameters stacked.

    Without the matmul, whose own residuals are half of all bytes there.
    """
    stacked = jax.tree.map(lambda p: jnp.stack([p] * SCAN_LAYERS), norm.params)

    def layer(x, scale):
        return jnp.tanh(norm.apply(scale, x)), None

    def loss(params, x):
        return jnp.sum(jax.lax.scan(layer, x, params)[0].astype(jnp.float32) ** 2)

    return jax.grad(loss, (0, 1)), (stacked, jnp.ones((ROWS, N), dtype))


def _matrices(layers: int, dtype):
    return jr.normal(jr.key(0), (layers, N, N), dtype) / N**0.5


def compile_times(rival: str, dtype: str, rounds: int) -> list[dict]:
    """Fresh traces and compilations of `unrolled`, ours and the rival's in turn, caches cleared."""
    models = [unrolled(make(name, "LayerNorm", ROWS, N, dtype), dtype) for name in ("ours", rival)]
    times = np.zeros((rounds + 1, 2, 2))  # round, ours or the rival's, trace or compile
    for i, both in enumerate(times):
        for side in (0, 1) if i % 2 else (1, 0):
            both[side] = _compile_once(*models[side])
    times = times[1:]  # The first imports and initialises.
    parts = {"trace": times[..., 0], "compile": times[..., 1], "both": times.sum(-1)}
    row = {"rival": rival, "dtype": dtype}
    return [row | {"part": part} | summary(seconds) for part, seconds in parts.items()]


def _compile_once(gradient, args) -> tuple[float, float]:
    jax.clear_caches()
    started = time.perf_counter()
    lowered = jax.jit(gradient).lower(*args)
    traced = time.perf_counter()
    lowered.compile()
    return traced - started, time.perf_counter() - traced
