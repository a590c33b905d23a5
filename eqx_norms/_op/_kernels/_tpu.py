"""For TPUs (Mosaic): a program has whole rows in its memory; programs run one after the other."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from .._form import Form
from . import _formulas
from ._formulas import Rows, like, result

DTYPES = ("float32", "bfloat16")


def is_known() -> bool:
    return True


# Of the 16 MiB that a kernel is given: x, g and dx, twice each, and some five in float32.
_TPU_ENTRIES = 2**17


def _tpu_blocks(rows: int, n: int) -> tuple[int, pl.BlockSpec, pl.BlockSpec]:
    # Tiles have 8 rows in float32 and 16 in bfloat16.
    block = min(rows, max(8, _TPU_ENTRIES // n // 16 * 16))
    return block, pl.BlockSpec((block, n), lambda i: (i, 0)), pl.BlockSpec((1, n), lambda i: (0, 0))


def forward(form: Form, x: Rows, params, interpret: bool) -> Rows:
    def kernel(x_ref, *refs):
        *param_refs, y_ref = refs
        y = _formulas.forward(
            form, x.shape[1], x_ref[...], [p[...] for p in param_refs], lambda a: a
        )
        y_ref[...] = y.astype(y_ref.dtype)

    block, many, one = _tpu_blocks(*x.shape)
    return pl.pallas_call(
        kernel,
        like(x),
        grid=(pl.cdiv(len(x), block),),
        in_specs=[many, *[one] * len(params)],
        out_specs=many,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        interpret=interpret,
        name="eqx_norms_forward",
    )(x, *params)


def backward(form: Form, g: Rows, x: Rows, weight, interpret: bool) -> Sequence[Array]:
    rows, n = x.shape
    block, many, one = _tpu_blocks(rows, n)

    def kernel(g_ref, x_ref, *refs):
        weight_refs, (dx_ref, *sum_refs) = refs[: len(weight)], refs[len(weight) :]
        read = g_ref[...], x_ref[...], [w[...] for w in weight_refs]
        dx, terms = _formulas.backward(form, n, *read, lambda a: a)
        dx_ref[...] = dx.astype(dx_ref.dtype)
        # The last block may be longer than what is left: nobody knows what is read there.
        first = pl.program_id(0) * block
        exists = first + jax.lax.broadcasted_iota(jnp.int32, (block, 1), 0) < rows

        @pl.when(first == 0)
        def _():
            for ref in sum_refs:
                ref[...] = jnp.zeros_like(ref)

        for ref, term in zip(sum_refs, terms, strict=True):
            ref[...] += jnp.sum(jnp.where(exists, term, 0.0), axis=0, keepdims=True)

    total = result(x, (1, n))
    sums = form.weight + form.bias
    return pl.pallas_call(
        kernel,
        [like(x), *[total] * sums],
        grid=(pl.cdiv(rows, block),),
        in_specs=[many, many, *[one] * len(weight)],
        out_specs=[many, *[one] * sums],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        interpret=interpret,
        name="eqx_norms_backward",
    )(g, x, *weight)
