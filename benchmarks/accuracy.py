"""Worst error of LayerNorm and of its gradient against float64, at growing offsets.

Run as `python benchmarks/accuracy.py`; a library that is not installed is left out, and said so.
"""

import importlib.util

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from eqx_norms import layer_norm

ROWS, N, EPS = 64, 1024, 1e-5


def exact(x, g):
    """The output y and the gradient dx, in float64."""
    x, g = np.float64(x), np.float64(g)
    mean = lambda a: a.mean(-1, keepdims=True)
    xc = x - mean(x)
    rstd = 1 / np.sqrt(mean(xc**2) + EPS)
    xhat = xc * rstd
    return xhat, rstd * (g - mean(g) - xhat * mean(g * xhat))


def with_jax(norm):
    def run(x, g):
        y, vjp = jax.vjp(jax.vmap(norm), x)
        return y, *vjp(g)

    return jax.jit(run)


def rivals():
    yield "eqx_norms", with_jax(lambda x: layer_norm(x, eps=EPS))
    yield "eqx.nn", with_jax(eqx.nn.LayerNorm(N, EPS, use_weight=False, use_bias=False))
    if importlib.util.find_spec("flax"):
        import flax.linen as linen

        for fast, name in ((True, "flax, default"), (False, "flax, two-pass")):
            layer = linen.LayerNorm(EPS, use_bias=False, use_scale=False, use_fast_variance=fast)
            yield name, with_jax(lambda x, layer=layer: layer.apply({}, x))
    if importlib.util.find_spec("haiku"):
        import haiku as hk

        layer = hk.transform(lambda x: hk.LayerNorm(-1, False, False, EPS)(x))
        yield "haiku", with_jax(lambda x: layer.apply({}, None, x))
    if importlib.util.find_spec("torch"):
        yield "torch", with_torch


def with_torch(x, g):
    import torch

    x = torch.tensor(np.asarray(x), requires_grad=True)
    y = torch.nn.functional.layer_norm(x, (N,), eps=EPS)
    y.backward(torch.tensor(np.asarray(g)))
    return y.detach().numpy(), x.grad.numpy()


def main():
    rng = np.random.default_rng(0)
    g = rng.normal(size=(ROWS, N)).astype(np.float32)
    offsets = (0, 1e2, 1e4, 1e6)
    print(
        f"float32, x ~ N(offset, 1), {ROWS} x {N}: worst |y error|, and worst |dx error| / |dx|\n"
    )
    print("| offset |" + "".join(f" {offset:g} |" for offset in offsets))
    print("|---|" + "---|" * len(offsets))
    for name, run in rivals():
        row = []
        for offset in offsets:
            x = (rng.normal(size=(ROWS, N)) + offset).astype(np.float32)
            want_y, want_dx = exact(x, g)
            y, dx = (np.asarray(a, np.float64) for a in run(jnp.asarray(x), jnp.asarray(g)))
            y_error = np.abs(y - want_y).max()
            dx_error = np.abs(dx - want_dx).max() / np.abs(want_dx).max()
            row.append(f" {y_error:.0e}, {dx_error:.0e} |")
        print(f"| {name} |" + "".join(row))
    for library in ("flax", "haiku", "torch"):
        if not importlib.util.find_spec(library):
            print(f'\n{library} is not installed; pip install -e ".[parity]" brings it.')


if __name__ == "__main__":
    main()
