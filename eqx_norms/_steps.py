"""What the norms along an axis of steps share: x of shape (steps, channels, *spatial)."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from ._checks import (
    Param,
    check_eps,
    check_floating,
    check_groups,
    check_param_dtype,
    check_size,
    check_stacked,
    fits,
    own_params,
)
from ._real import Integer, Number


def set_fields(
    layer: Any, channels: Integer, groups: Integer, eps: Number, channelwise_affine: bool, dtype
) -> None:
    """Of a new layer, those that all of them have."""
    name = type(layer).__name__
    layer.channels = check_size(f"{name}(channels=...)", channels)
    layer.groups = check_groups(name, groups, layer.channels)
    layer.eps = check_eps(name, eps)
    layer.channelwise_affine = channelwise_affine
    dtype = check_param_dtype(name, dtype)
    layer.weight = jnp.ones(layer.channels, dtype) if channelwise_affine else None
    layer.bias = jnp.zeros(layer.channels, dtype) if channelwise_affine else None


def check_steps(name: str, x: Any, channels: int | None, groups: int, steps: int = 1) -> None:
    """That x has `steps` axes, 0 or 1, in front of `channels`."""
    check_floating(name, x)
    axes = "(steps, channels, *spatial)" if steps else "(channels, *spatial)"
    if x.ndim <= steps or channels not in (None, x.shape[steps]):
        wanted = "any" if channels is None else channels
        raise ValueError(
            f"`{name}` takes one example of shape {axes}: expected {wanted} channels, got an array "
            f"of shape {x.shape}." + _cure(channels, x.shape) * steps
        )
    check_groups(name, groups, x.shape[steps])


def _cure(channels: int | None, got: tuple[int, ...]) -> str:
    if channels not in got:
        return ""
    axis = got.index(channels)
    if axis == 0:
        return " Bring the steps to the front: norm(jnp.moveaxis(x, -1, 0))"
    return f" Map it over the axes before: {'jax.vmap(' * (axis - 1)}norm{')' * (axis - 1)}(x)"


def check_channel_params(name: str, x: Any, **params: Any) -> None:
    for param, value in params.items():
        if value is None:
            continue
        check_floating(f"{name}(x, {param}=...)", value, narrow=True)
        if not fits(_left_aligned(value, x.ndim - 1), x.shape[1:]):
            raise ValueError(
                f"`{name}(x, {param}=...)` takes one entry a channel: expected shape "
                f"({x.shape[1]},), got {value.shape}."
            )


def own_channel_params(layer: Any, shape: tuple[int, ...]) -> tuple[Param, Param]:
    """The weight and bias of such a layer, which fit a step of this shape."""
    affine = layer.channelwise_affine
    weight, bias = own_params(layer, weight=affine, bias=affine)
    found = [_left_aligned(p, len(shape)) for p in (weight, bias) if p is not None]
    check_stacked(type(layer).__name__, shape, found)
    return weight, bias


def check_step_mask(name: str, x: Any, where: Any) -> None:
    if where is None:
        return
    got = getattr(where, "shape", ()), getattr(where, "dtype", type(where).__name__)
    per_step = len(got[0]) == 1 and got[0] == x.shape[:1]
    if got[1] != jnp.bool_ or not (per_step or (len(got[0]) == x.ndim and fits(got[0], x.shape))):
        raise ValueError(
            f"`{name}(x, where=...)` takes a boolean mask, True for entries that count: of shape "
            f"{x.shape[:1]}, one entry a step, or with as many axes as x, each of its size or of "
            f"size 1; got {got[0]} and {got[1]} for x of shape {x.shape}."
        )


def _left_aligned(a: Any, rank: int) -> tuple[int, ...]:
    return a.shape + (1,) * (rank - a.ndim)


def in_groups(a: Any, x: Any, groups: Integer, axis: int = 1) -> Any:
    """With the rank of x and one axis more: the channels, at `axis`, as (groups, channels each)."""
    if a is None:
        return None
    a = jnp.asarray(a).reshape(_left_aligned(a, x.ndim))
    channels = a.shape[axis]
    split = (1, 1) if channels == 1 != x.shape[axis] else (groups, channels // groups)
    return a.reshape(*a.shape[:axis], *split, *a.shape[axis + 1 :])


def of_channels(param: Any, x: Any, groups: Integer, axis: int = 1) -> Array | None:
    """A parameter of the channels, likewise, with an entry for each group."""
    if param is None:
        return None
    param = jnp.asarray(param).reshape(_left_aligned(param, x.ndim - axis))
    param = jnp.broadcast_to(param, (x.shape[axis], *param.shape[1:]))
    return in_groups(param if axis == 0 else param[None], x, groups, axis)
