"""The work that is timed: forward, forward + backward, the gradient of a stack.

Whatever the library, `runner` gives one function of (x, g). Forward + backward is a single jitted
function, or two eager calls in torch, that returns y, dx and (dweight, dbias): a training step
needs them all. The cotangent g is random and an argument: a constant one cancels in a norm, and
XLA would fold it away.
"""

import functools as ft
import warnings
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ._cases import EPS, GROUPS, STACK_LAYERS, Case
from ._environment import cores
from ._rivals import Norm, example_shape, make


def thunk(rival: str, case: Case) -> Callable[[], object]:
    """Runs the case once, to its end; its arrays are made here, once."""
    work = work_of(rival, case)
    x, g = map(work.take, normal(*case.shape, layer=case.layer))
    return lambda: work.wait(work.run(x, g))


class Work(NamedTuple):
    """A function of (x, g), and how its library takes NumPy arrays, gives them and waits."""

    run: Callable
    take: Callable
    give: Callable = np.asarray
    wait: Callable = jax.block_until_ready


@ft.lru_cache(maxsize=1)
def _normal(rows: int, n: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((2, rows, n), np.float32)


def normal(rows: int, n: int, layer: str = "LayerNorm") -> np.ndarray:
    """The x and g of the case, channels first; cases come shape by shape, so the last is kept."""
    return _normal(rows, n).reshape(2, *example_shape(layer, rows, n))


def work_of(rival: str, case: Case) -> Work:
    """The work of `case`, done by `rival`."""
    if rival in ("torch", "torch.compile"):
        return _torch(case, is_compiled=rival == "torch.compile")
    take = lambda a: jnp.asarray(a).astype(case.dtype)
    if rival == "copy":
        return Work(_copy(case), take)
    if case.work == "decoder":
        return Work(_decoder(rival, case), lambda a: a)
    norm = make(rival, case.layer, *case.shape, case.dtype)
    run = _JAX[case.work](norm, case)
    if not norm.channels_last:
        return Work(run, take)
    swap = lambda a: a.swapaxes(1, 2) if a.ndim > 1 else a
    return Work(run, lambda a: swap(take(a)), lambda a: np.asarray(swap(a)))


def _forward(norm: Norm, case: Case):
    run = jax.jit(norm.apply)
    return lambda x, g: run(norm.params, x)


def _backward(norm: Norm, case: Case):
    @jax.jit
    def run(params, x, g):
        y, vjp = jax.vjp(norm.apply, params, x)
        dparams, dx = vjp(g)
        return y, dx, norm.pair(dparams)

    return lambda x, g: run(norm.params, x, g)


def _stack(norm: Norm, case: Case):
    """The gradient of 12 blocks x + gelu(norm(x) @ up) @ down with respect to all parameters."""
    matrices = [(jnp.asarray(up), jnp.asarray(down)) for up, down in stack_matrices(case.shape[1])]
    params = [(norm.params, *pair) for pair in matrices]

    @jax.jit
    def run(params, x):
        def loss(params):
            h = x
            for scale, up, down in params:
                h = h + jax.nn.gelu(norm.apply(scale, h) @ up.astype(x.dtype)) @ down.astype(
                    x.dtype
                )
            return jnp.mean(jnp.square(h.astype(jnp.float32)))

        return jax.value_and_grad(loss)(params)

    return lambda x, g: run(params, x)


def stack_matrices(n: int):
    """The float32 matrices of the 12 blocks, four times as wide inside."""
    rng = np.random.default_rng(1)
    draw = lambda *shape: rng.standard_normal(shape, np.float32) / shape[0] ** 0.5
    return [(draw(n, 4 * n), draw(4 * n, n)) for _ in range(STACK_LAYERS)]


def _decoder(norms: str, case: Case):
    """A whole training step of examples/decoder, always from the same state."""
    from examples.decoder.settings import Settings
    from examples.decoder.train import make_step, start

    settings, symbols = Settings(norms=norms, bf16=case.dtype == "bfloat16"), 27
    model, opt_state = start(settings, symbols)
    step = make_step(settings)
    names = np.random.default_rng(0).integers(0, symbols, (settings.batch, settings.context))
    names = jnp.asarray(names, jnp.int32)
    return lambda x, g: step(model, opt_state, names)


def _copy(case: Case):
    """The floor: a change of sign, of x for the forward, of x and g for forward + backward.

    That reads x and writes y, or reads x and g and writes y and dx, each once.
    """
    run = jax.jit(lambda *arrays: [-a for a in arrays])
    return (lambda x, g: run(x)) if case.work == "forward" else lambda x, g: run(x, g)


def _torch(case: Case, is_compiled: bool = False) -> Work:
    import torch

    torch.set_num_threads(cores())
    # RMSNorm's note that float32 weights are not fused; ours are cast.
    warnings.filterwarnings("ignore", message="Mismatch dtype", category=UserWarning)
    channels = example_shape(case.layer, *case.shape)[1]
    dtype = getattr(torch, case.dtype)
    params = [torch.ones(channels, requires_grad=True), torch.zeros(channels, requires_grad=True)]
    params = params[: 1 if case.layer == "RMSNorm" else 2]
    apply = ft.partial(_torch_apply, case.layer)
    apply = torch.compile(apply) if is_compiled else apply

    def forward(x, g):
        with torch.no_grad():
            return apply(x, *params)

    def backward(x, g):
        x = x.detach().requires_grad_()
        y = apply(x, *params)
        dx, *dparams = torch.autograd.grad(y, (x, *params), g)
        return y, dx, tuple(dparams)

    def stack(x, g):
        h = x
        for up, down in matrices:
            inner = torch.nn.functional.gelu(apply(h, *params) @ up.to(dtype), approximate="tanh")
            h = h + inner @ down.to(dtype)
        return torch.autograd.grad(h.float().square().mean(), leaves)

    if case.work == "stack":
        weights = stack_matrices(case.shape[1])
        matrices = [[torch.from_numpy(m).requires_grad_() for m in pair] for pair in weights]
        leaves = [*params, *(m for pair in matrices for m in pair)]
    run = {"forward": forward, "backward": backward, "stack": stack}[case.work]
    take = lambda a: torch.from_numpy(a).to(dtype)
    return Work(run, take, lambda a: a.detach().numpy(), lambda result: result)


def _torch_apply(layer: str, x, weight, bias=None):
    from torch.nn import functional

    if layer == "LayerNorm":
        return functional.layer_norm(x, x.shape[-1:], weight, bias, EPS)
    if layer == "RMSNorm":
        return functional.rms_norm(x, x.shape[-1:], weight.to(x.dtype), EPS)
    return functional.group_norm(x, GROUPS, weight, bias, EPS)


_JAX = {"forward": _forward, "backward": _backward, "stack": _stack}
