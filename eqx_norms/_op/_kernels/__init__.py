"""Two Pallas kernels, forward and backward, each for GPUs (Triton) and for TPUs (Mosaic).

Each reads x once, and g, and writes y, or dx, once. All statistics of a row stay in registers: the
backward takes them again from the x it has read, so the forward keeps nothing.
"""

import jax.numpy as jnp
from jaxtyping import Array

from .._form import Batch, Form, Param
from . import _cpu, _cuda, _tpu

LARGEST = 2**15  # example: compiled for all of H100, v5e and v6e
_PLATFORMS = {"cpu": _cpu, "cuda": _cuda, "tpu": _tpu}


def exists_for(x, form: Form, platform: str) -> bool:
    """Whether there is a kernel for an x of this type."""
    if x.dtype.name not in _PLATFORMS[platform].DTYPES:
        return False
    if not all(isinstance(size, int) for size in x.shape):
        return False  # Sizes that an export leaves open are no ints.
    rows, n = form.rows(x)
    return rows > 0 and 0 < n <= getattr(_PLATFORMS[platform], 'LARGEST', LARGEST) and _PLATFORMS[platform].is_known()


def forward(x: Batch, *params: Param, form: Form, platform: str, interpret: bool = False) -> Batch:
    rows, n = form.rows(x)
    params = tuple(p.reshape(1, n) for p in params)
    y = _PLATFORMS[platform].forward(form, x.reshape(rows, n), params, interpret)
    return y.reshape(x.shape)


def backward(
    g: Batch, x: Batch, *params: Param, form: Form, platform: str, interpret: bool = False
) -> list[Array]:
    rows, n = form.rows(x)
    weight = [p.reshape(1, n) for p in params[: form.weight]]
    arrays = g.reshape(rows, n), x.reshape(rows, n), weight
    dx, *sums = _PLATFORMS[platform].backward(form, *arrays, interpret)
    dparams = [jnp.sum(s, axis=0).reshape(p.shape) for s, p in zip(sums, params, strict=True)]
    return [dx.reshape(x.shape), *dparams]
