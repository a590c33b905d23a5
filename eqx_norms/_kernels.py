"""Two Pallas kernels, forward and backward, each for GPUs (Triton) and for TPUs (Mosaic).

Each reads x once, and g, and writes y, or dx, once. All statistics of a row stay in registers: the
backward takes them again from the x it has read, so the forward keeps nothing. The mathematics is
that of `_normalize.py`, and stands once, for both platforms, at the top.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu, triton as plt
from jaxtyping import Array, Float

from ._batched import Batch, Form, Param
from ._normalize import divided

Rows = Float[Array, "rows width"]
Row = Float[Array, "1 width"]
Each = Float[Array, "rows 1"]  # one number for each row
Only = Callable[[Rows], Rows]  # zero beyond the last column

LARGEST = 2**15  # example: compiled for all of H100, v5e and v6e


def _mean(n: int, a: Rows) -> Each:
    return divided(jnp.sum(a, axis=1, keepdims=True), n)


def _scale(form: Form, x: Rows) -> Each:
    """A power of two for each row, after which no square of x - mean overflows, or vanishes.

    The largest entry is then between 2**-24 and 2**54, or comes from the smallest that there are.
    So a sum of 2**15 squares is below 2**124; and entries that differ do so by 2**-54 at least, of
    which the mean square, over as many, is above 2**-124. Small ones matter if eps does not swamp
    them.
    """
    largest = jnp.max(jnp.abs(x), axis=1, keepdims=True)
    scale = jnp.where(largest > 2.0**50, 2.0**-74, 1.0)
    if form.eps < 2.0**-100:
        scale = jnp.where(largest < 2.0**-20, 2.0**72, scale)
    return scale


def _normalised(form: Form, n: int, x: Rows, only: Only) -> tuple[Rows, Each, Each]:
    """`(xhat, rstd, scale)`, of which 1 / sqrt(variance + eps) is the product of the last two.

    Of the largest numbers the product is too small to be had. x is zero where `only` makes it so.
    """
    x = x.astype(jnp.float32)
    scale = _scale(form, x)
    xc = x * scale
    if form.centre:  # the mean in two parts, as in `_normalize._forward`
        xc = only(xc - _mean(n, xc))
        xc = only(xc - _mean(n, xc))
    var = _mean(n, jnp.square(xc))
    # Where all entries are alike, eps alone is left, which the scale may have made zero.
    alike = var == 0
    rstd = jax.lax.rsqrt(jnp.where(alike, form.eps, var + form.eps * scale * scale))
    return xc * rstd, rstd, jnp.where(alike, 1.0, scale)


def _forward(form: Form, n: int, x: Rows, params: list[Row], only: Only) -> Rows:
    weight, bias = form.named(params)
    y, *_ = _normalised(form, n, x, only)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def _backward(form: Form, n: int, g: Rows, x: Rows, weight: list[Row], only: Only):
    """`(dx, terms)`: what is to be summed over rows for dweight and dbias, as far as there are."""
    xhat, rstd, scale = _normalised(form, n, x, only)
    g = g.astype(jnp.float32)
    gw = g * weight[0] if weight else g
    dx = gw - xhat * _mean(n, gw * xhat)
    if form.centre:
        dx = dx - _mean(n, gw)
    return rstd * dx * scale, [g * xhat] * form.weight + [g] * form.bias


def exists_for(x, form: Form, platform: str) -> bool:
    """Whether there is a kernel for an x of this type."""
    dtypes = ("float32", "bfloat16", *(("float16",) if platform == "cuda" else ()))
    if x.dtype.name not in dtypes or not all(isinstance(size, int) for size in x.shape):
        return False  # Sizes that an export leaves open are no ints.
    rows, n = form.rows(x)
    return rows > 0 and 0 < n <= LARGEST and (platform == "tpu" or _is_gpu_known())


def _is_gpu_known() -> bool:
    """From 0.12 on JAX compiles Triton only for a GPU that is there, or named by the mesh."""
    get_gpu_info = getattr(plt, "get_gpu_info", None)
    try:
        return get_gpu_info is None or bool(get_gpu_info())
    except ValueError:
        return False


def forward(x: Batch, *params: Param, form: Form, platform: str, interpret: bool = False) -> Batch:
    rows, n = form.rows(x)
    run = {"cuda": _forward_on_gpu, "tpu": _forward_on_tpu}[platform]
    params = tuple(p.reshape(1, n) for p in params)
    return run(form, x.reshape(rows, n), params, interpret).reshape(x.shape)


def backward(
    g: Batch, x: Batch, *params: Param, form: Form, platform: str, interpret: bool = False
) -> list[Array]:
    rows, n = form.rows(x)
    run = {"cuda": _backward_on_gpu, "tpu": _backward_on_tpu}[platform]
    weight = [p.reshape(1, n) for p in params[: form.weight]]
    dx, *sums = run(form, g.reshape(rows, n), x.reshape(rows, n), weight, interpret)
    dparams = [jnp.sum(s, axis=0).reshape(p.shape) for s, p in zip(sums, params, strict=True)]
    return [dx.reshape(x.shape), *dparams]


def _like(x: Array) -> jax.ShapeDtypeStruct:
    return _result(x, x.shape, x.dtype)


def _result(x: Array, shape: tuple[int, ...], dtype=jnp.float32) -> jax.ShapeDtypeStruct:
    """One that varies over the axes of `jax.shard_map` as x does."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(x).manual_axis_type)


# On a TPU a program has whole rows in its vector memory, and programs run one after the other.

# Of the 16 MiB that a kernel is given: x, g and dx, twice each, and some five in float32.
_TPU_ENTRIES = 2**17


def _tpu_blocks(rows: int, n: int) -> tuple[int, pl.BlockSpec, pl.BlockSpec]:
    # Tiles have 8 rows in float32 and 16 in bfloat16.
    block = min(rows, max(8, _TPU_ENTRIES // n // 16 * 16))
    return block, pl.BlockSpec((block, n), lambda i: (i, 0)), pl.BlockSpec((1, n), lambda i: (0, 0))


def _forward_on_tpu(form: Form, x: Rows, params, interpret: bool) -> Rows:
    def kernel(x_ref, *refs):
        *param_refs, y_ref = refs
        y = _forward(form, x.shape[1], x_ref[...], [p[...] for p in param_refs], lambda a: a)
        y_ref[...] = y.astype(y_ref.dtype)

    block, many, one = _tpu_blocks(*x.shape)
    return pl.pallas_call(
        kernel,
        _like(x),
        grid=(pl.cdiv(len(x), block),),
        in_specs=[many, *[one] * len(params)],
        out_specs=many,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        interpret=interpret,
        name="eqx_norms_forward",
    )(x, *params)


def _backward_on_tpu(form: Form, g: Rows, x: Rows, weight, interpret: bool) -> Sequence[Array]:
    rows, n = x.shape
    block, many, one = _tpu_blocks(rows, n)

    def kernel(g_ref, x_ref, *refs):
        weight_refs, (dx_ref, *sum_refs) = refs[: len(weight)], refs[len(weight) :]
        read = g_ref[...], x_ref[...], [w[...] for w in weight_refs]
        dx, terms = _backward(form, n, *read, lambda a: a)
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

    total = _result(x, (1, n))
    sums = form.weight + form.bias
    return pl.pallas_call(
        kernel,
        [_like(x), *[total] * sums],
        grid=(pl.cdiv(rows, block),),
        in_specs=[many, many, *[one] * len(weight)],
        out_specs=[many, *[one] * sums],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        interpret=interpret,
        name="eqx_norms_backward",
    )(g, x, *weight)


# On a GPU tensors are powers of two in size; a program has some rows in registers, masked. In a
# backward it goes over several of these blocks, and adds up: so there are few sums to add after.

_GPU_ENTRIES = 2**12  # of a block, if rows are shorter than that: 16 for a thread
_GPU_PROGRAMS = 4 * 132  # of an H100, four for each of its processors
_GPU_ROWS = 16  # for a program of the backward, at least: its sums are a sixteenth of x


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


def _forward_on_gpu(form: Form, x: Rows, params, interpret: bool) -> Rows:
    rows, n = x.shape
    block = height, width = _gpu_block(rows, n)

    def kernel(x_ref, *refs):
        *param_refs, y_ref = refs
        mask = _inside(x.shape, block, pl.program_id(0) * height)
        in_row = _inside((1, n), (1, width), 0)
        values = [_load(p, in_row) for p in param_refs]
        y = _forward(form, n, _load(x_ref, mask), values, _only(n, block))
        plt.store(y_ref, y.astype(y_ref.dtype), mask=mask)

    many, one = pl.BlockSpec(block, lambda i: (i, 0)), pl.BlockSpec((1, width), lambda i: (0, 0))
    return pl.pallas_call(
        kernel,
        _like(x),
        grid=(pl.cdiv(rows, height),),
        in_specs=[many, *[one] * len(params)],
        out_specs=many,
        compiler_params=_gpu_params(block),
        interpret=interpret,
        name="eqx_norms_forward",
    )(x, *params)


def _backward_on_gpu(form: Form, g: Rows, x: Rows, weight, interpret: bool) -> Sequence[Array]:
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
            dx, terms = _backward(form, n, *read, _only(n, block))
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
    partial = _result(x, (programs, n))
    return pl.pallas_call(
        kernel,
        [_like(x), *[partial] * sums],
        grid=(programs,),
        in_specs=[many, many, *[pl.BlockSpec((1, width), lambda i: (0, 0))] * len(weight)],
        out_specs=[many, *[pl.BlockSpec((1, width), lambda i: (i, 0))] * sums],
        compiler_params=_gpu_params(block),
        interpret=interpret,
        name="eqx_norms_backward",
    )(g, x, *weight)
