"""Rules: who may read whom, as boolean arrays.

`allowed[t, j]` says whether output `t` may read input `j`. Rules are NumPy arrays and combine as
such. `causal(T) & segments(ids)` is what both allow, `a | b` is what at least one of them allows,
and `~a` is what `a` forbids. `a & mask` also hides the inputs where a row `mask` of bools is False.
Any other boolean array will do as well. If positions lie along several axes, they are numbered in
C order.

A rule is also the mask of a model that follows it, if True means "may attend" there: pass
`jnp.asarray(rule)`, or `additive(rule)` if the mask is added to the scores.
"""

import operator
from collections.abc import Sequence
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from .._real import Integer, Real

Align = Literal["start", "end"]


def causal(
    length: Integer,
    in_length: Integer | None = None,
    *,
    strict: bool = False,
    align: Align | None = None,
) -> Bool[np.ndarray, "T_out T_in"]:
    """Every output reads its own input and those before it, or with `strict` only those before it.

    `causal(3, 5, align="end")` has 3 outputs and 5 inputs. With `"start"` the first output stands
    at the first input, as in torch. With `"end"` the last output stands at the last input, as
    behind a cache. If the lengths differ, `align` must say which is meant.
    """
    ahead = _ahead(length, in_length, align)
    return ahead < 0 if strict else ahead <= 0


def independent(length: Integer) -> Bool[np.ndarray, "T T"]:
    """Every output reads its own input alone, as the examples of a batch do."""
    return np.eye(_size("length", length), dtype=bool)


def segments(
    ids: Int[np.ndarray | Array, " T_in"] | Sequence[Integer],
    out_ids: Int[np.ndarray | Array, " T_out"] | Sequence[Integer] | None = None,
) -> Bool[np.ndarray, "T_out T_in"]:
    """Every output reads the inputs of its own segment, such as a packed document or a group.

    `ids[j]` is the number of the segment of input `j`, and `out_ids[t]` that of output `t`, by
    default the same. Padding with an id of its own is one more segment.
    """
    ids = _row("ids", ids)
    out_ids = ids if out_ids is None else _row("out_ids", out_ids)
    return out_ids[:, None] == ids


def window(
    length: Integer,
    size: Integer | Sequence[Integer | None] | Int[np.ndarray | Array, "2"],
    *,
    in_length: Integer | None = None,
    align: Align | None = None,
) -> Bool[np.ndarray, "T_out T_in"]:
    """Every output reads the inputs near its own.

    - A `size` counts its own input: `causal(T) & window(T, 4)` is 4 inputs, itself and the 3
        before. `window(T, 4)` alone looks as far to the other side.
    - A pair `(left, right)` does not count it: `window(T, (4, 0))` is 5 inputs, itself and the 4
        before. `None` is no bound on that side.

    Libraries count in either way. `in_length` and `align` are as in `causal`, for more or fewer
    inputs than outputs.
    """
    ahead = _ahead(length, in_length, align)
    left, right = _sides(size)
    return (ahead >= -left) & (ahead <= right)


def prefix(length: Integer, size: Integer) -> Bool[np.ndarray, "T T"]:
    """The first `size` see one another, the rest is causal: a prefix language model."""
    length, size = _size("length", length), _size("size", size)
    return causal(length) | (np.arange(length) < size)


def blocks(
    shape: Integer | Sequence[Integer], size: Integer | Sequence[Integer], *, strict: bool = False
) -> Bool[np.ndarray, "T T"]:
    """Every output reads its own block and those before it, or with `strict` only those before it.

    `blocks(12, 4)` is block-autoregressive, with 3 blocks of 4 positions. With `shape` and `size`
    of several axes, as in `blocks((8, 8), (4, 4))`, the blocks are patches, row by row. The
    positions are then those of `axis=(0, 1)`.
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
    if not 0 <= _index("start", start) < length:
        raise ValueError(f"start must be from 0 to {length - 1}, the last input, got {start}")
    return causal(length)[start::stride]


def dilated(length: Integer, step: Integer) -> Bool[np.ndarray, "T T"]:
    """Every output reads every `step`-th input on either side, its own among them.

    `causal(T) & dilated(T, 2) & window(T, 5)` is a causal convolution of 3 taps, 2 apart.
    """
    length, step = _size("length", length), _size("step", step)
    return _ahead(length) % step == 0


def ordered(
    order: Int[np.ndarray | Array, " T"] | Sequence[Integer], *, strict: bool = False
) -> Bool[np.ndarray, "T T"]:
    """Causal in another order than that of the positions, as in MADE and PixelCNN.

    `order` lists the positions from first to last. With `(2, 0, 1)`, output 0 reads inputs 2 and 0.
    With `strict` an output does not read its own input, as in MADE.
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
    """No output reads padding, where `mask` is False. Outputs at padding may read anything.

    What stands at padding is thrown away, and usually reads itself. `out_mask` says which outputs
    count. The default is `mask`, and `np.ones(T_out, bool)` counts all of them.

    Together with another rule, outputs at padding are held to that rule: `causal(T) &
    unpadded(mask)` still holds them to `causal(T)`. Use [`eqx_norms.causality.rules.let_off`][]
    instead, as the last step.
    """
    mask = _mask("mask", mask)
    out_mask = mask if out_mask is None else _mask("out_mask", out_mask)
    return mask | ~out_mask[:, None]


def let_off(
    rule: Bool[np.ndarray | Array, "*heads T_out T_in"],
    mask: Bool[np.ndarray | Array, " T_out"]
    | Bool[np.ndarray | Array, "*heads T_out"]
    | Sequence[bool],
) -> Bool[np.ndarray, "*heads T_out T_in"]:
    """`rule`, except that the outputs where `mask` is False may read anything.

    `let_off(causal(T) & mask, mask)` is the rule of a padded text. No output reads padding. What
    stands at padding is thrown away, and is an average of everything in many models. With masks
    `(B, T)` of a batch, `let_off(causal(T) & masks[:, None], masks)` is a stack for `each`.
    """
    rule, mask = _rule(rule), _bools("mask", mask)
    if mask.shape not in (rule.shape[:-1], rule.shape[-2:-1]):
        raise ValueError(
            f"mask must have an entry for each of the {rule.shape[-2]} outputs of rule, which is "
            f"{rule.shape}, got {mask.shape}"
        )
    return np.logical_or(rule, ~mask[..., None])


def each(
    batch: Integer | Bool[np.ndarray | Array, "B T_out T_in"],
    rule: Bool[np.ndarray | Array, "T_out T_in"]
    | Bool[np.ndarray | Array, "B T_out T_in"]
    | None = None,
) -> Bool[np.ndarray, "rows columns"]:
    """`rule` within every example of a batch, and nothing across examples, for `axis=(0, 1)`.

    `each(stack)` takes a rule for each example, `(B, T_out, T_in)`, in that order.
    """
    if rule is None:
        stack = _rule(batch, "batch, where rule is left out,", ndim=3)
    else:
        number, rule = _size("batch", batch), _rule(rule)
        if rule.shape[:-2] not in ((), (number,)):
            raise ValueError(
                f"rule must be (T_out, T_in), or a stack of one for each of the {number} examples, "
                f"got {rule.shape}"
            )
        stack = np.broadcast_to(rule, (number, *rule.shape[-2:]))
    examples, outputs, inputs = stack.shape
    whole = np.zeros((examples, outputs, examples, inputs), bool)
    at = np.arange(examples)
    whole[at, :, at] = stack
    return whole.reshape(examples * outputs, examples * inputs)


def additive(
    rule: Bool[np.ndarray | Array, "*heads T_out T_in"], dtype: DTypeLike = np.float32
) -> Float[np.ndarray, "*heads T_out T_in"]:
    """What to add to scores that should follow `rule`: 0 where it allows, minus infinity elsewhere.

    Use it for functions that add their mask, such as torch with a float mask, or `jax.nn` with
    `bias=`. A softmax over a row that may read nothing (see `unread_rows`) is then NaN.
    """
    dtype = jnp.dtype(dtype)
    if not jnp.issubdtype(dtype, jnp.floating) or not np.isneginf(np.asarray(-np.inf, dtype)):
        raise TypeError(f"dtype must be of floats, and have an infinity, got {dtype}")
    return np.where(_rule(rule), np.zeros((), dtype), np.asarray(-np.inf, dtype))


def unread_rows(
    rule: Bool[np.ndarray | Array, "*heads T_out T_in"],
) -> Bool[np.ndarray, "*heads T_out"]:
    """Which outputs may read nothing. These are dead rows.

    One library returns an average of everything for them, another zeros, a third NaN.
    `let_off(rule, ~unread_rows(rule))` says that nobody looks at these outputs. As a mask,
    `rule | independent(T)` has no dead rows, because each output reads itself.
    """
    return np.logical_not(_rule(rule).any(-1))


def _ahead(
    length: Integer, in_length: Integer | None = None, align: Align | None = None
) -> Int[np.ndarray, "T_out T_in"]:
    """How far the input lies ahead of the output."""
    length = _size("length", length)
    if isinstance(in_length, bool | np.bool_):
        raise TypeError(
            f"in_length must be a number of inputs, got {in_length}; or write strict=True"
        )
    in_length = length if in_length is None else _size("in_length", in_length)
    if align not in (None, "start", "end"):
        raise ValueError(f'align must be "start" or "end", got {align!r}')
    if align is None and in_length != length:
        raise ValueError(
            f"with {length} outputs and {in_length} inputs align must say which of them stand at "
            'one place: align="start", the first of both, or align="end", the last, as behind a '
            "cache"
        )
    last = in_length - length if align == "end" else 0
    return np.arange(in_length) - np.arange(length)[:, None] - last


def _sides(
    size: Integer | Sequence[Integer | None] | Int[np.ndarray | Array, "2"],
) -> tuple[Real, Real]:
    """How far a window reaches to the left and to the right, its own input not counted."""
    if not isinstance(size, Sequence | np.ndarray | Array):
        reach = _size("size", size) - 1
        return reach, reach
    if len(size) != 2:
        raise ValueError(f"size must be one number or a pair (left, right), got {size}")
    left, right = (np.inf if side is None else _index("a side of size", side) for side in size)
    if min(left, right) < 0:
        raise ValueError(f"left and right must be at least 0, or None for no bound, got {size}")
    return left, right


def _size(name: str, value: Any) -> int:
    size = _index(name, value)
    if size < 1:
        raise ValueError(f"{name} must be at least 1, got {size}")
    return size


def _index(name: str, value: Any) -> int:
    """Of an integer, and of no bool: `True` where a number stands was meant for another option."""
    try:
        if isinstance(value, bool | np.bool_):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None


def _sizes(name: str, value: Integer | Sequence[Integer]) -> tuple[int, ...]:
    values = value if isinstance(value, Sequence) else (value,)
    if not values:
        raise ValueError(f"{name} must have at least one axis, got ()")
    return tuple(_size(name, part) for part in values)


def _rule(values, name: str = "rule", ndim: int | None = None) -> Bool[np.ndarray, "..."]:
    rule = np.asarray(values)
    if rule.dtype != np.bool_ or rule.ndim < 2 or rule.ndim != (ndim or rule.ndim):
        shape = "(B, T_out, T_in)" if ndim else "(T_out, T_in)"
        raise ValueError(f"{name} must be a boolean array {shape}, got {rule.dtype} {rule.shape}")
    return rule


def _row(name: str, values) -> Int[np.ndarray, " T"]:
    values = np.asarray(values)
    if values.ndim != 1 or not len(values) or values.dtype.kind not in "iu":
        raise ValueError(
            f"{name} must be a row of integers, one for each position, got {values.dtype} of shape "
            f"{values.shape}"
        )
    return values


def _mask(name: str, values) -> Bool[np.ndarray, " T"]:
    mask = _bools(name, values)
    if mask.ndim != 1:
        raise ValueError(
            f"{name} must be one row, got shape {mask.shape}; for the examples of a batch write "
            "each(let_off(rule & masks[:, None], masks))"
        )
    return mask


def _bools(name: str, values) -> Bool[np.ndarray, "..."]:
    values = np.asarray(values)
    if not values.ndim or not values.size or values.dtype != np.bool_:
        raise ValueError(
            f"{name} must be a row of bools, True where there is no padding, got {values.dtype} of "
            f"shape {values.shape}"
        )
    return values
