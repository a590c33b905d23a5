"""Bytes an element that LayerNorm costs, ours and eqx.nn's. Exact figures from XLA, no timing.

Run as `python benchmarks/memory.py`.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr

from eqx_norms import LayerNorm

ROWS, N, LAYERS = 512, 256, 12


def residual_bytes(make, dtype):
    """What `jax.vjp` of a mapped layer holds until the backward, an element of x."""
    params, static = eqx.partition(make(N), eqx.is_array)
    run = jax.jit(lambda params, x: jax.vmap(eqx.combine(params, static))(x))
    _, vjp = jax.vjp(run, params, jnp.ones((ROWS, N), dtype))
    return sum(leaf.nbytes for leaf in jax.tree.leaves(vjp)) / (ROWS * N)


def temp_bytes(f, *args):
    return jax.jit(f).lower(*args).compile().memory_analysis().temp_size_in_bytes / (ROWS * N)


def layer_bytes(make, dtype):
    """Temporaries of one layer's forward and backward in one jit."""
    params, static = eqx.partition(make(N), eqx.is_array)

    def run(params, x, g):
        y, vjp = jax.vjp(lambda params, x: jax.vmap(eqx.combine(params, static))(x), params, x)
        return y, vjp(g)

    x = jnp.ones((ROWS, N), dtype)
    return temp_bytes(run, params, x, x)


def stack_bytes(make, dtype):
    """Temporaries of the gradient of twelve unrolled [norm, matmul, tanh] layers, a layer."""
    norms, static = eqx.partition([make(N) for _ in range(LAYERS)], eqx.is_array)
    matrices = jr.normal(jr.key(0), (LAYERS, N, N), dtype) / N**0.5

    def loss(norms, matrices, x):
        for norm, matrix in zip(eqx.combine(norms, static), matrices, strict=True):
            x = jnp.tanh(jax.vmap(norm)(x) @ matrix)
        return jnp.sum(x.astype(jnp.float32) ** 2)

    x = jnp.ones((ROWS, N), dtype)
    return temp_bytes(jax.grad(loss, (0, 1, 2)), norms, list(matrices), x) / LAYERS


def main():
    print(f"{ROWS} x {N}, float32 parameters: bytes an element of x (12 layers: a layer-element)\n")
    print("| | dtype | eqx.nn | eqx_norms |")
    print("|---|---|---|---|")
    for name, measure in (
        ("kept for the backward", residual_bytes),
        ("temporaries, one layer, forward + backward", layer_bytes),
        ("temporaries, gradient of 12 unrolled layers", stack_bytes),
    ):
        for dtype in (jnp.float32, jnp.bfloat16):
            eqxs, ours = measure(eqx.nn.LayerNorm, dtype), measure(LayerNorm, dtype)
            print(f"| {name} | {dtype.__name__} | {eqxs:.2f} | {ours:.2f} |")


if __name__ == "__main__":
    main()
