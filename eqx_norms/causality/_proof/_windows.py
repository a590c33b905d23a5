"""Convolutions and windows: the operation itself on zeros and ones says what is read."""

from collections.abc import Callable

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np

from . import _reads as r
from ._flow import finite_as, rule
from ._known import Known, everything, full
from ._reads import Reads


@rule("conv_general_dilated")
def _convolution(context, eqn, x, kernel):
    """For each input a run; a kernel of ones, but where it is zero."""
    aval = eqn.outvars[0].aval
    cut = context.zeros_cut and x.finite
    ones = jnp.asarray(~full(kernel, kernel.bounds.zero & cut), jnp.float32)
    settings = dict(preferred_element_type=None, precision=None)
    reads = _each_bit(x, lambda bits: eqn.primitive.bind(bits, ones, **{**eqn.params, **settings}))
    row = r.spread(everything(kernel), len(aval.shape))
    return [finite_as(aval, r.union(reads, row), x, kernel)]


@rule("reduce_window_sum", "reduce_window_max", "reduce_window_min")
def _window(context, eqn, x):
    largest = jex.primitives.reduce_window_max_p
    reads = _each_bit(x, lambda bits: largest.bind(bits, **eqn.params))
    return [finite_as(eqn.outvars[0].aval, reads, x)]


@rule("reduce_window")
def _window_of_ones_own(context, eqn, *operands):
    """Whatever the function of two entries is, it is given those of the window, and the start."""
    arrays, starts = operands[: len(operands) // 2], operands[len(operands) // 2 :]
    kept = "window_dimensions window_strides padding base_dilation window_dilation".split()
    params = {name: eqn.params[name] for name in kept}
    largest = jex.primitives.reduce_window_max_p
    reads = [_each_bit(x, lambda bits: largest.bind(bits, **params)) for x in arrays]
    row = everything(*starts)
    return [
        finite_as(v.aval, r.union(*reads, r.spread(row, len(v.aval.shape))), *operands)
        for v in eqn.outvars
    ]


def _each_bit(x: Known, fn: Callable) -> Reads:
    if x.reads is None:
        return None
    words = r.dense(x.reads, x.shape)
    bits = np.moveaxis(r.unpacked(words).astype(np.float32), -1, 0)
    hit = np.asarray(jax.lax.map(fn, jnp.asarray(bits))) > 0
    return r.of_dense(r.packed(np.ascontiguousarray(np.moveaxis(hit, 0, -1))))
