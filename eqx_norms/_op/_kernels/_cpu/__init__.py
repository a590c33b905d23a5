"""For CPUs: compiled by numba, if it is installed, and called by XLA as foreign functions.

A row is read into the cache, its sums are made in one pass, and it is written in a second. Rows are
shared out in chunks, of which each has sums of its own for dweight and dbias. How many chunks
there are is said by the shapes alone: so a result has the same bits at each call, whatever the
threads.
"""

import functools as ft
import importlib.metadata
import itertools
import math
import platform
import re
import struct
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ..._form import Form, Layout

DTYPES = ("float32", "bfloat16", "float16", "float64")
OLDEST = (0, 68, 1)  # numba that was tried
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
            f'`implementation="kernel"` takes the plain path on this CPU: {missing}',
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
    if tuple(map(int, re.findall(r"\d+", version)[:3])) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        return f"they need numba {oldest} or later, and this is {version}: {install}"
    try:
        _register("forward", "float32")
    except Exception as error:
        if "no locator" in str(error):
            return (
                "numba finds no folder that it may write to, for what it compiles. Name one in "
                "the environment, as NUMBA_CACHE_DIR"
            )
        return f"numba {version} does not compile them ({error})"
    return None


def has(dtype: str) -> bool:
    """Old x86 processors have no instructions for float16."""
    from ._compiled import has_half

    return dtype != "float16" or has_half()


@ft.cache
def _register(direction: str, dtype: str) -> str:
    """Its name as XLA knows it. What is compiled is kept for as long as the process lives."""
    from ._compiled import compiled

    handler, part = compiled(direction, dtype)
    _kept.append((handler, part))
    name = f"eqx_norms_{direction}_{dtype}"
    jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(handler.ctypes), platform="cpu")
    return name


_kept = []


class Plan(NamedTuple):
    """A `Layout` and its parts, in the order that `_compiled.py` reads."""

    outer: int
    params: int
    inner: int
    channels: int
    run: int
    centre: int
    by_outer: int  # into how many parts each of the first three is split
    by_params: int
    by_inner: int
    chunks: int
    block: int  # bytes of memory for a call
    partials: int  # where in it, if there are any
    scratch: int


_HEAD = 96 + 8 * len(Plan._fields)


def plan(layout: Layout, centre: bool, wide: int) -> Plan:
    """`wide`: bytes of a number of partial sums; 0 in a forward, which has none."""
    outer, params, inner, channels, run = layout
    wanted = max(1, min(_CHUNKS, math.prod(layout) // _CHUNK))
    # By outer and by inner the sums of a parameter are in parts.
    sums = max(1, outer * inner // _ROWS) if wide and run == 1 else wanted
    by_outer = min(outer, wanted, sums)
    by_params = min(params, -(-wanted // by_outer))
    by_inner = min(inner, max(1, wanted // (by_outer * by_params)), max(1, sums // by_outer))
    chunks, parts = by_outer * by_params * by_inner, by_outer * by_inner
    partials = 2 * parts * params * channels * wide if parts > 1 else 0
    scratch = 16 * channels * chunks if wide and run > 1 else 0
    return Plan(
        *layout,
        *(centre, by_outer, by_params, by_inner, chunks),
        block=_HEAD + partials + scratch,
        partials=_HEAD if partials else 0,
        scratch=_HEAD + partials,
    )


def _call(name: str, form: Form, layout: Layout, x: Array, results, *operands: Array):
    wide = operands[2].dtype.itemsize if name == "backward" else 0
    call = jax.ffi.ffi_call(_register(name, x.dtype.name), results)
    numbers = np.asarray(plan(layout, form.centre, wide), np.int64)
    return call(*operands, eps=np.float64(form.eps), plan=numbers)


def _known(form: Form, x: Array, params: Sequence[Array]) -> tuple[Layout, list[Array]]:
    """The layout, and both parameters: those that are not there are ones and zeros."""
    layout = form.layout(x, params)
    assert layout is not None
    if not params:
        wide = jnp.float64 if x.dtype == jnp.float64 else jnp.float32
        return layout, [jnp.ones(1, wide), jnp.zeros(1, wide)]
    fill = jnp.ones_like, jnp.zeros_like
    named = zip(form.named(params), fill, strict=True)
    return layout, [make(params[0]) if p is None else p for p, make in named]


def _like(a: Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(a.shape, a.dtype)


def forward(form: Form, x: Array, params: Sequence[Array]) -> Array:
    layout, (weight, bias) = _known(form, x, params)
    return _call("forward", form, layout, x, _like(x), x, weight, bias)


def backward(form: Form, g: Array, x: Array, params: Sequence[Array]) -> list[Array]:
    layout, (weight, bias) = _known(form, x, params)
    results = [*map(_like, [x, weight, bias] if form.bias else [x, weight])]
    dx, *sums = _call("backward", form, layout, x, results, g, x, weight)
    return [dx, *itertools.compress(sums, (form.weight, form.bias))]
