"""For CPUs: compiled by numba, if it is installed, and called by XLA as foreign functions.

A row is read into the cache, its sums are made in one pass, and it is written in a second. Rows are
shared out in chunks, of which each has sums of its own for dweight and dbias. How many chunks
there are is said by the shapes alone: so a result has the same bits at each call, whatever the
threads.
"""

import functools as ft
import importlib.metadata
import platform
import struct
import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ..._form import Form
from .._formulas import result

DTYPES = ("float32", "bfloat16", "float16", "float64")
LARGEST = 2**40
OLDEST = (0, 63)  # numba that was tried
_MACHINES = ("x86_64", "amd64", "aarch64", "arm64")
_CHUNK = 2**15  # entries, at least: some ten microseconds
_CHUNKS = 64  # at most
_ROWS = 8  # for each partial sum, at least: what they write is an eighth of dx


def is_known() -> bool:
    return _missing() is None


@ft.cache
def _missing() -> str | None:
    """What keeps the kernels from running, said once."""
    missing = _what_is_missing()
    if missing is not None:
        warnings.warn(
            f'`implementation="kernel"` takes the plain path on this CPU: {missing}.',
            stacklevel=2,
        )
    return missing


def _what_is_missing() -> str | None:
    if platform.machine().lower() not in _MACHINES or struct.calcsize("P") != 8:
        return f"its kernels are for {', '.join(_MACHINES)}, and this is {platform.machine()!r}"
    install = 'pip install "eqx-norms[cpu]"'
    try:
        version = importlib.metadata.version("numba")
    except importlib.metadata.PackageNotFoundError:
        return f"they need numba: {install}"
    if tuple(map(int, version.split(".")[:2])) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        return f"they need numba {oldest} or later, and this is {version}: {install}"
    try:
        _register("forward_float32")
    except Exception as error:
        return f"numba {version} does not compile them ({error})"
    return None


@ft.cache
def _register(handler: str) -> str:
    """Its name as XLA knows it. What is compiled is kept for as long as the process lives."""
    from ._compiled import compiled

    function = compiled(handler)
    _kept.append(function)
    name = f"eqx_norms_{handler}"
    jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(function.ctypes), platform="cpu")
    return name


_kept = []


class Plan(NamedTuple):
    """Where rows and chunks are, in the order that `_compiled.py` reads.

    Rows are counted by three numbers: (outer, params, inner), the second of which says which
    weight is theirs. A row is of so many channels, each of a run of entries with one weight.
    """

    outer: int
    params: int
    inner: int
    channels: int
    run: int
    centre: int
    by_outer: int
    by_params: int
    by_inner: int
    chunks: int
    block: int  # bytes of memory for a call
    partials: int  # where in it, if there are any
    scratch: int


_HEAD = 96 + 8 * len(Plan._fields)


def plan(rows: tuple[int, int, int], channels: int, run: int, centre: bool, wide: int) -> Plan:
    """`wide`: bytes of a number of partial sums; 0 in a forward, which has none."""
    outer, params, inner = rows
    entries = outer * params * inner * channels * run
    wanted = max(1, min(_CHUNKS, entries // _CHUNK))
    sums = max(1, outer * inner // _ROWS) if wide and run == 1 else wanted
    by_outer = min(outer, wanted, sums)
    by_params = min(params, -(-wanted // by_outer))
    by_inner = min(inner, max(1, wanted // (by_outer * by_params)), max(1, sums // by_outer))
    chunks = by_outer * by_params * by_inner
    parts = by_outer * by_inner
    partials = 2 * parts * params * channels * wide if parts > 1 else 0
    scratch = 16 * channels * chunks if wide and run > 1 else 0
    start = _HEAD if partials else 0
    block = _HEAD + partials + scratch + 8
    return Plan(
        *(outer, params, inner, channels, run, centre, by_outer, by_params, by_inner, chunks),
        *(block, start, (_HEAD + partials + 7) // 8 * 8),
    )


def forward(form: Form, x: Array, params: tuple[Array, ...], interpret: bool) -> Array:
    rows, n = x.shape
    weight, bias = form.named(params)
    wide = jnp.float64 if x.dtype == jnp.float64 else jnp.float32
    weight = jnp.ones(n, wide) if weight is None else weight
    bias = jnp.zeros(n, wide) if bias is None else bias
    chunks = plan((1, 1, rows), n, 1, form.centre, 0)
    call = jax.ffi.ffi_call(_register(f"forward_{x.dtype.name}"), result(x, x.shape, x.dtype))
    return call(x, weight, bias, eps=np.float64(form.eps), plan=np.asarray(chunks, np.int64))


def backward(form: Form, g: Array, x: Array, weight, interpret: bool):
    rows, n = x.shape
    wide = jnp.dtype(jnp.float64 if x.dtype == jnp.float64 else jnp.float32)
    weight = weight[0] if weight else jnp.ones(n, wide)
    sums = [result(x, (1, n), wide)] * (2 if form.bias else 1)
    chunks = plan((1, 1, rows), n, 1, form.centre, wide.itemsize)
    call = jax.ffi.ffi_call(
        _register(f"backward_{x.dtype.name}"), [result(x, x.shape, x.dtype), *sums]
    )
    dx, *sums = call(g.astype(x.dtype), x, weight, eps=np.float64(form.eps), plan=np.asarray(chunks, np.int64))
    return [dx, *sums[0 if form.weight else 1 :]][: 1 + form.weight + form.bias]
