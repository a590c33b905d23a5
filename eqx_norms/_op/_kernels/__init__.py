"""Two kernels, forward and backward, for each platform: Triton's, Mosaic's, and numba's for CPUs.

Each reads x once, and g, and writes y, or dx, once. All statistics of a row stay in registers, or
the row in the cache: the backward takes them again from the x it has read, so the forward keeps
nothing.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array

from .._form import Batch, Form, Param
from . import _cpu, _cuda, _tpu

LARGEST = 2**15  # example: compiled for all of H100, v5e and v6e
_PLATFORMS = {"cpu": _cpu, "cuda": _cuda, "tpu": _tpu}


def exists_for(x, params: Sequence, form: Form, platform: str) -> bool:
    """Whether there is a kernel for an x and parameters of these types."""
    if x.dtype.name not in _PLATFORMS[platform].DTYPES:
        return False
    if not all(isinstance(size, int) for size in x.shape):
        return False  # Sizes that an export leaves open are no ints.
    rows, n = form.rows(x)
    layout = form.layout(x, params)
    if rows == 0 or n == 0 or layout is None:
        return False
    if platform != "cpu" and (n > LARGEST or layout.params > 1):
        return False
    known = _PLATFORMS[platform].is_known()
    return known and (platform != "cpu" or _cpu.has(x.dtype.name))


def forward(x: Batch, *params: Param, form: Form, platform: str, interpret: bool = False) -> Batch:
    if platform == "cpu":
        return _cpu.forward(form, x, params)
    rows, n = form.rows(x)
    params = tuple(_row(x, form, p) for p in params)
    y = _PLATFORMS[platform].forward(form, x.reshape(rows, n), params, interpret)
    return y.reshape(x.shape)


def backward(
    g: Batch, x: Batch, *params: Param, form: Form, platform: str, interpret: bool = False
) -> list[Array]:
    if platform == "cpu":
        return _cpu.backward(form, g, x, params)
    rows, n = form.rows(x)
    weight = [_row(x, form, p) for p in params[: form.weight]]
    arrays = g.reshape(rows, n), x.reshape(rows, n), weight
    dx, *sums = _PLATFORMS[platform].backward(form, *arrays, interpret)
    dparams = [_param(x, form, s, p) for s, p in zip(sums, params, strict=True)]
    return [dx.reshape(x.shape), *dparams]


def _row(x: Batch, form: Form, param: Param) -> Array:
    """One entry for each of a row's."""
    shape = x.shape[x.ndim - form.rank :]
    return jnp.broadcast_to(param.reshape(param.shape[x.ndim - form.rank :]), shape).reshape(1, -1)


def _param(x: Batch, form: Form, sums: Array, param: Param) -> Array:
    """The transpose of `_row`, of sums that are to be added up."""
    of_entries = jnp.sum(sums, axis=0).reshape(x.shape[x.ndim - form.rank :])
    shape = param.shape[x.ndim - form.rank :]
    shared = [i for i, n in enumerate(shape) if n != of_entries.shape[i]]
    return of_entries.sum(shared).reshape(param.shape)
