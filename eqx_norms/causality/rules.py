"""Rules: who may read whom, as boolean arrays.

`allowed[t, j]` says whether output `t` may read input `j`. Rules are NumPy arrays and combine as
such: `causal(T) & segments(ids)` is what both allow, `a | b` what one of them does, `~a` what `a`
forbids. Any other boolean array will do as well. Where positions are those of several axes, they
are numbered in C order.
"""

import operator
from collections.abc import Sequence

import numpy as np
from jaxtyping import Array, Bool, Int

from .._real import Integer


def causal(length: Integer, strict: bool = False) -> Bool[np.ndarray, "T T"]:
    """Every output reads its own input and those before it; `strict`: those before it alone."""
    length = _size("length", length)
    return np.tri(length, k=-1 if strict else 0, dtype=bool)


def independent(length: Integer) -> Bool[np.ndarray, "T T"]:
    """Every output reads its own input alone, as the examples of a batch do."""
    return np.eye(_size("length", length), dtype=bool)


def segments(
    ids: Int[np.ndarray | Array, " T_in"] | Sequence[Integer],
    out_ids: Int[np.ndarray | Array, " T_out"] | Sequence[Integer] | None = None,
) -> Bool[np.ndarray, "T_out T_in"]:
    """Every output reads the inputs of its own segment: packed documents, groups.

    `ids[j]` is the number of the segment of input `j`; `out_ids[t]` that of output `t`, by default
    the same. Padding with an id of its own is one more segment.
    """
    ids = _row("ids", ids)
    out_ids = ids if out_ids is None else _row("out_ids", out_ids)
    return out_ids[:, None] == ids


def window(length: Integer, size: Integer) -> Bool[np.ndarray, "T T"]:
    """Every output reads its own input and `size - 1` on either side.

    `causal(T) & window(T, 4)` is itself and the 3 before.
    """
    length, size = _size("length", length), _size("size", size)
    return np.abs(_apart(length)) < size


def prefix(length: Integer, size: Integer) -> Bool[np.ndarray, "T T"]:
    """The first `size` see one another, the rest is causal: a prefix language model."""
    length, size = _size("length", length), _size("size", size)
    return causal(length) | (np.arange(length) < size)


def blocks(
    shape: Integer | Sequence[Integer], size: Integer | Sequence[Integer], strict: bool = False
) -> Bool[np.ndarray, "T T"]:
    """Every output reads its own block and those before it; `strict`: those before it alone.

    `blocks(12, 4)` is block-autoregressive, with 3 blocks of 4 positions. With `shape` and `size`
    of several axes, as in `blocks((8, 8), (4, 4))`, the blocks are patches, row by row, and the
    positions those of `axis=(0, 1)`.
    """
    shape, size = _sizes("shape", shape), _sizes("size", size)
    if len(shape) != len(size):
        raise ValueError(f"size must have as many axes as shape, {shape}, got {size}")
    across = [-(-length // step) for length, step in zip(shape, size, strict=True)]
    places = [at // step for at, step in zip(np.indices(shape), size, strict=True)]
    numbers = np.ravel_multi_index(places, across).reshape(-1)
    return numbers[:, None] > numbers if strict else numbers[:, None] >= numbers


def strided(length: Integer, stride: Integer, start: Integer = 0) -> Bool[np.ndarray, "T_out T"]:
    """Every `stride`-th row of `causal(length)` from `start` on: one output for `stride` inputs.

    Output `i` reads the inputs up to `start + i * stride`. That is a causal convolution with that
    stride, padded on the left; with `start=stride - 1` it is one output for each full patch.
    """
    length, stride = _size("length", length), _size("stride", stride)
    if not 0 <= operator.index(start) < length:
        raise ValueError(f"start must be from 0 to {length - 1}, the last input, got {start}")
    return causal(length)[start::stride]


def dilated(length: Integer, step: Integer) -> Bool[np.ndarray, "T T"]:
    """Every output reads every `step`-th input on either side, its own among them.

    `causal(T) & dilated(T, 2) & window(T, 5)` is a causal convolution of 3 taps, 2 apart.
    """
    length, step = _size("length", length), _size("step", step)
    return _apart(length) % step == 0


def ordered(
    order: Int[np.ndarray | Array, " T"] | Sequence[Integer], strict: bool = False
) -> Bool[np.ndarray, "T T"]:
    """Causal in another order than that of the positions: MADE, PixelCNN.

    `order` lists the positions from first to last: with `(2, 0, 1)`, output 0 reads inputs 2 and 0.
    `strict`: not its own, as in MADE.
    """
    order = _row("order", order)
    if not np.array_equal(np.sort(order), np.arange(len(order))):
        raise ValueError(
            f"order must list every position from 0 to {len(order) - 1} once, got {order.tolist()}"
        )
    rank = np.argsort(order)
    return rank[:, None] > rank if strict else rank[:, None] >= rank


def unpadded(
    mask: Bool[np.ndarray | Array, " T_in"] | Sequence[bool],
    out_mask: Bool[np.ndarray | Array, " T_out"] | Sequence[bool] | None = None,
) -> Bool[np.ndarray, "T_out T_in"]:
    """Nobody reads padding, which is where `mask` is False; outputs there may read anything.

    What stands at padding is thrown away, and usually reads itself. `out_mask` says which outputs
    count, by default as `mask` does: `np.ones(T_out, bool)` is all of them.
    """
    mask = _mask("mask", mask)
    out_mask = mask if out_mask is None else _mask("out_mask", out_mask)
    return mask | ~out_mask[:, None]


def each(
    batch: Integer, rule: Bool[np.ndarray | Array, "T_out T_in"]
) -> Bool[np.ndarray, "batch*T_out batch*T_in"]:
    """`rule` within every example of a batch, and nothing across: for `axis=(0, 1)`."""
    rule = np.asarray(rule)
    if rule.ndim != 2 or rule.dtype != np.bool_:
        raise ValueError(
            f"rule must be a boolean array (T_out, T_in), got {rule.dtype} {rule.shape}"
        )
    return np.kron(independent(_size("batch", batch)), rule)


def _apart(length: Integer) -> Int[np.ndarray, "T T"]:
    """How far the output lies behind the input."""
    return np.subtract.outer(np.arange(length), np.arange(length))


def _size(name: str, value: Integer) -> int:
    try:
        size = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None
    if size < 1:
        raise ValueError(f"{name} must be at least 1, got {size}")
    return size


def _sizes(name: str, value: Integer | Sequence[Integer]) -> tuple[int, ...]:
    values = value if isinstance(value, Sequence) else (value,)
    if not values:
        raise ValueError(f"{name} must have at least one axis, got ()")
    return tuple(_size(name, part) for part in values)


def _row(name: str, values) -> Int[np.ndarray, " T"]:
    values = np.asarray(values)
    if values.ndim != 1 or not len(values) or values.dtype.kind not in "iu":
        raise ValueError(
            f"{name} must be a row of integers, one for each position, got {values.dtype} of shape "
            f"{values.shape}"
        )
    return values


def _mask(name: str, values) -> Bool[np.ndarray, " T"]:
    values = np.asarray(values)
    if values.ndim != 1 or not len(values) or values.dtype != np.bool_:
        raise ValueError(
            f"{name} must be a row of bools, True where there is no padding, got {values.dtype} of "
            f"shape {values.shape}"
        )
    return values
