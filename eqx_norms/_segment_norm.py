"""SegmentNorm: its parameters, its checks, its call of the op."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from ._checks import check_eps, check_size
from ._op import normalize
from ._real import Integer, Number
from ._steps import (
    check_channel_params,
    check_step_mask,
    check_steps,
    in_groups,
    of_channels,
    own_channel_params,
    set_fields,
)


def segment_norm(
    x: Float[Array | np.ndarray, "tokens channels *spatial"],
    segments: Int[Array | np.ndarray, "tokens"],
    weight: Float[Array | np.ndarray, "..."] | None = None,
    bias: Float[Array | np.ndarray, "..."] | None = None,
    *,
    num_segments: Integer | None = None,
    groups: Integer = 1,
    eps: Number = 1e-5,
    where: Bool[Array | np.ndarray, "..."] | None = None,
) -> Float[Array, "tokens channels *spatial"]:
    """Normalises each segment of one example, such as a document or a graph, over its tokens.

    **Arguments:**

    - `x`: one example, tokens first, of dtype float16, bfloat16, float32 or float64. For a batch,
        `jax.vmap` this function.
    - `segments`, `num_segments`, `where`: as for the call of [`eqx_norms.SegmentNorm`][].
    - `weight`, `bias`: floating-point arrays of shape `(channels,)`, or that broadcast to
        `(channels, *spatial)` from the left; or `None`.
    - `groups`, `eps`: as for [`eqx_norms.SegmentNorm`][].

    **Returns:**

    An array of the shape and dtype of `x`.

    **Raises:** `TypeError` if `x`, `weight` or `bias` is not a real floating-point array, or if
    `segments` is not an array of integers. `ValueError` if `x` has fewer than two axes, if `groups`
    does not divide the channels, if `weight`, `bias` or `segments` has another shape, if
    `segments` is traced and `num_segments` is missing, or for a bad `eps` or mask.
    """
    groups = check_size("segment_norm(groups=...)", groups)
    eps = check_eps("segment_norm", eps)
    check_steps("segment_norm", x, None, groups)
    check_channel_params("segment_norm", x, weight=weight, bias=bias)
    check_step_mask("segment_norm", x, where)
    count = _check_segments("segment_norm", x, segments, num_segments)
    return _by_group(x, segments, weight, bias, where, count, groups, eps)


def _check_segments(name: str, x: Any, segments: Any, num_segments: Integer | None) -> int:
    """How many there are."""
    dtype = getattr(segments, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.integer):
        got = type(segments).__name__ if dtype is None else dtype
        raise TypeError(f"`{name}(x, segments)` takes an array of integers; got {got}.")
    if segments.shape != x.shape[:1]:
        raise ValueError(
            f"`{name}(x, segments)` takes the segment of each token: expected shape "
            f"{x.shape[:1]}, got {segments.shape} for x of shape {x.shape}."
        )
    if num_segments is not None:
        return check_size(f"{name}(num_segments=...)", num_segments)
    if isinstance(segments, Tracer):
        raise ValueError(
            f"`{name}(x, segments)` is traced, as by `jax.jit` or `jax.vmap`, and cannot look at "
            f"the segments to count them. Say how many there may be: "
            f"{name}(x, segments, num_segments=8)"
        )
    return max(int(np.max(segments, initial=0)) + 1, 1)


def _as_int32(segments: Any, count: int) -> Array:
    """What does not fit in there is a number of no segment, and stays one."""
    if segments.dtype.itemsize > 4:
        of = np if isinstance(segments, np.ndarray) else jnp
        outside = (segments < 0) | (segments >= count)
        segments = of.where(outside, of.asarray(count, segments.dtype), segments)
    return jnp.asarray(segments.astype(np.int32))


def _by_group(x, segments, weight, bias, where, count: int, groups: int, eps: float) -> Array:
    weight, bias = (of_channels(param, x, groups) for param in (weight, bias))
    grouped, mask = (in_groups(a, x, groups) for a in (x, where))
    parts = {"eps": eps, "segments": _as_int32(segments, count), "num_segments": count}
    return normalize(grouped, weight, bias, mask, **parts).reshape(x.shape)


class SegmentNorm(eqx.Module):
    r"""Normalises each segment of one example by the mean and variance of its own tokens.

    $$y_i = \frac{x_i - \mathbb{E}[x_{s(i)}]}{\sqrt{\text{Var}[x_{s(i)}] + \varepsilon}}
    * \text{weight} + \text{bias}$$

    where $x_{s(i)}$ are all tokens of the segment of token $i$. The example has shape
    `(tokens, channels, *spatial)`. Its tokens may be documents packed into a row, the nodes of
    graphs batched into one, or sequences of any lengths one after the other. `weight` and `bias`
    have one entry for each channel. With `groups=1` the statistics run over all channels, as in
    torch_geometric's `LayerNorm(mode="graph")`. With `groups=channels` each channel has its own
    statistics, as in its `InstanceNorm`.

    It is exact at any offset, and for a million tokens in one segment. The backward is
    hand-written. It keeps `x` in its own dtype, three numbers for each token and group, the
    segments, and the mask.

    !!! tip "Which tokens of a segment are read"

        All tokens of the segment are read, including later ones. For text that is read from left to
        right this is a leak within each document. [`eqx_norms.LayerNorm`][], mapped over tokens,
        has none.
    """

    channels: int = eqx.field(static=True)
    groups: int = eqx.field(static=True)
    eps: float = eqx.field(static=True)
    channelwise_affine: bool = eqx.field(static=True)
    weight: Float[Array, "channels"] | None
    bias: Float[Array, "channels"] | None

    def __init__(
        self,
        channels: Integer,
        groups: Integer = 1,
        eps: Number = 1e-5,
        channelwise_affine: bool = True,
        dtype=None,
    ):
        """**Arguments:**

        - `channels`: the size of the second axis of the input, behind the tokens.
        - `groups`: how many groups the channels are split into, each with statistics of its own;
            must divide their number.
        - `eps`: added to the variance; a finite number, 0 or above.
        - `channelwise_affine`: whether to scale and shift each channel by a learned `weight`, from
            ones, and `bias`, from zeros.
        - `dtype`: the dtype of `weight` and `bias`. Defaults to float32, or float64 in 64-bit mode.

        **Raises:** `ValueError` if `groups` does not divide `channels`, if either is below 1, or
        for a bad `eps`; `TypeError` for a `dtype` that is none of float16, bfloat16, float32 and
        float64.
        """
        set_fields(self, channels, groups, eps, channelwise_affine, dtype)

    @jax.named_scope("eqx_norms.SegmentNorm")
    def __call__(
        self,
        x: Float[Array, "tokens channels *spatial"],
        segments: Int[Array | np.ndarray, "tokens"],
        *,
        num_segments: Integer | None = None,
        where: Bool[Array | np.ndarray, "..."] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "tokens channels *spatial"]:
        """**Arguments:**

        - `x`: one example, of shape `(tokens, channels, *spatial)` and dtype float16, bfloat16,
            float32 or float64.
        - `segments`: the segment of each token, integers of shape `(tokens,)` in any order. Not all
            numbers need occur. A token whose number is negative, or `num_segments` or more, is in
            no segment, as if masked. -1 is a common choice for padding.
        - `num_segments`: how many segments there may be. The default is `max(segments) + 1`, if
            `segments` is not traced.
        - `where`: a boolean mask of shape `(tokens,)`, or with as many axes as `x`, each of its
            size or of size 1. Entries where it is `False`, NaN or not, take no part in any mean
            and variance, come out as zero and receive a zero gradient.
        - `key`: ignored.

        **Returns:**

        An array of the shape and dtype of `x`.

        **Raises:** `ValueError` if the second axis of `x` is not `channels`, if `segments` has
        another shape, if `num_segments` is missing under `jax.jit` or `jax.vmap` of `segments`,
        for a bad mask, or if weight or bias, with `channelwise_affine`, is missing or does not
        fit; `TypeError` if `x` is not of such a dtype, or `segments` not an array of integers.
        """
        check_steps("SegmentNorm", x, self.channels, self.groups)
        check_step_mask("SegmentNorm", x, where)
        count = _check_segments("SegmentNorm", x, segments, num_segments)
        weight, bias = own_channel_params(self, x.shape[1:])
        return _by_group(x, segments, weight, bias, where, count, self.groups, self.eps)
