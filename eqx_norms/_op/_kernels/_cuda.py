"""For GPUs (Triton): tensors are powers of two in size, and a program has some rows in registers.

In a backward it goes over several of these blocks, and adds up: so there are few sums to add after.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array

from .._form import Form
from . import _formulas
from ._formulas import Only, Rows, like, result

DTYPES = ("float32", "bfloat16", "float16")
_GPU_ENTRIES = 2**12  # of a block, if rows are shorter than that: 16 for a thread
_GPU_PROGRAMS = 4 * 132  # of an H100, four for each of its processors
_GPU_ROWS = 16  # for a program of the backward, at least: its sums are a sixteenth of x


def is_known() -> bool:
    """From 0.12 on JAX compiles Triton only for a GPU that is there, or named by the mesh."""
    get_gpu_info = getattr(plt, "get_gpu_info", None)
    try:
        return get_gpu_info is None or bool(get_gpu_info())
    except ValueError:
        return False


def _gpu_block(rows: int, n: int) -> tuple[int, int]:
    width = pl.next_power_of_2(n)
    return min(max(1, _GPU_ENTRIES // width), pl.next_power_of_2(rows)), width


def _gpu_params(block: tuple[int, int]) -> plt.CompilerParams:
    warps = block[0] * block[1] // 512
    return plt.CompilerParams(num_warps=min(max(warps, 1), 32), num_stages=1)


def _inside(shape: tuple[int, ...], block: tuple[int, int], first):
    row, column = (jax.lax.broadcasted_iota(jnp.int32, block, axis) for axis in (0, 1))
    return (first + row < shape[0]) & (column < shape[1])


def _only(n: int, block: tuple[int, int]) -> Only:
    if n == block[1]:
        return lambda a: a
    return lambda a: jnp.where(jax.lax.broadcasted_iota(jnp.int32, block, 1) < n, a, 0.0)


def _load(ref, mask):
    return plt.load(ref, mask=mask, other=0.0)


def forward(form: Form, x: Rows, params, interpret: bool) -> Rows:
    rows, n = x.shape
    block = height, width = _gpu_block(rows, n)

    def kernel(x_ref, *refs):
        *param_refs, y_ref = refs
        mask = _inside(x.shape, block, pl.program_id(0) * height)
        in_row = _inside((1, n), (1, width), 0)
        values = [_load(p, in_row) for p in param_refs]
        y = _formulas.forward(form, n, _load(x_ref, mask), values, _only(n, block))
        plt.store(y_ref, y.astype(y_ref.dtype), mask=mask)

    many, one = pl.BlockSpec(block, lambda i: (i, 0)), pl.BlockSpec((1, width), lambda i: (0, 0))
    return pl.pallas_call(
        kernel,
        like(x),
        grid=(pl.cdiv(rows, height),),
        in_specs=[many, *[one] * len(params)],
        out_specs=many,
        compiler_params=_gpu_params(block),
        interpret=interpret,
        name="eqx_norms_forward",
    )(x, *params)


def backward(form: Form, g: Rows, x: Rows, weight, interpret: bool) -> Sequence[Array]:
    rows, n = x.shape
    block = height, width = _gpu_block(rows, n)
    steps = max(pl.cdiv(rows, _GPU_PROGRAMS * height), pl.cdiv(_GPU_ROWS, height))
    sums = form.weight + form.bias

    def kernel(g_ref, x_ref, *refs):
        weight_refs, (dx_ref, *sum_refs) = refs[: len(weight)], refs[len(weight) :]
        in_row = _inside((1, n), (1, width), 0)
        values = [_load(w, in_row) for w in weight_refs]
        first = pl.program_id(0) * (steps * height)

        def step(i, totals):
            at = (pl.ds(i * height, height), slice(None))
            mask = _inside(x.shape, block, first + i * height)
            read = _load(g_ref.at[at], mask), _load(x_ref.at[at], mask), values
            dx, terms = _formulas.backward(form, n, *read, _only(n, block))
            plt.store(dx_ref.at[at], dx.astype(dx_ref.dtype), mask=mask)
            # Rows that are not there are all alike, and without an eps not a number.
            terms = (jnp.where(mask, term, 0.0) for term in terms)
            return tuple(total + term for total, term in zip(totals, terms, strict=True))

        zero = jnp.zeros(block, jnp.float32)
        totals = jax.lax.fori_loop(0, steps, step, (zero,) * sums)
        for ref, total in zip(sum_refs, totals, strict=True):
            plt.store(ref, jnp.sum(total, axis=0, keepdims=True), mask=in_row)

    many = pl.BlockSpec((steps * height, width), lambda i: (i, 0))
    programs = pl.cdiv(rows, steps * height)
    partial = result(x, (programs, n))
    return pl.pallas_call(
        kernel,
        [like(x), *[partial] * sums],
        grid=(programs,),
        in_specs=[many, many, *[pl.BlockSpec((1, width), lambda i: (0, 0))] * len(weight)],
        out_specs=[many, *[pl.BlockSpec((1, width), lambda i: (i, 0))] * sums],
        compiler_params=_gpu_params(block),
        interpret=interpret,
        name="eqx_norms_backward",
    )(g, x, *weight)
