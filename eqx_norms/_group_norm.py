"""GroupNorm: its parameters, its checks, its call of the op, once a group."""

import functools as ft
from typing import Any, overload

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from ._checks import (
    check_broadcast_mask,
    check_eps,
    check_floating,
    check_groups,
    check_implementation,
    check_param_dtype,
    check_size,
    check_stacked,
    fits,
    no_state,
    own_params,
)
from ._op import as_jax_has_it, grouped, normalize_by, together
from ._real import Integer, Number


def group_norm(
    x: Float[Array | np.ndarray, "channels *spatial"],
    groups: Integer,
    weight: Float[Array | np.ndarray, "..."] | None = None,
    bias: Float[Array | np.ndarray, "..."] | None = None,
    *,
    eps: Number = 1e-5,
    implementation: str = "xla",
    where: Bool[Array | np.ndarray, "..."] | None = None,
) -> Float[Array, "channels *spatial"]:
    r"""Normalises one example, each group of neighbouring channels over all its entries.

    $$y_g = \frac{x_g - \mathbb{E}[x_g]}{\sqrt{\text{Var}[x_g] + \varepsilon}} * \text{weight}
    + \text{bias}$$

    with the biased variance (divided by the number of entries), and `eps` inside the root. The
    derivative is hand-written; see [`eqx_norms.GroupNorm`][].

    **Arguments:**

    - `x`: one example, channels first, of dtype float16, bfloat16, float32 or float64. For a
        batch, `jax.vmap` this function.
    - `groups`: how many groups the channels are split into; must divide their number.
    - `weight`, `bias`: floating-point arrays of shape `(channels,)`, or of a shape that broadcasts
        to that of `x` with channels first, such as `(channels, 1)`; or `None`.
    - `eps`: added to the variance; a finite number, 0 or above.
    - `implementation`, `where`: as for [`eqx_norms.GroupNorm`][].

    **Returns:**

    An array of the shape and dtype of `x`. Statistics, weight and bias are taken in float32
    (float64 for float64), and the result rounded once.

    **Raises:** `TypeError` if `x` is not of one of these dtypes, or if `weight` or `bias` is not a
    real floating-point array. `ValueError` if `groups` does not divide the channels, if `weight`
    or `bias` has another shape, or for a bad `eps`, `implementation` or mask.
    """
    _check_example("group_norm", x, groups)
    check_implementation("group_norm", implementation)
    for name, param in (("weight", weight), ("bias", bias)):
        if param is None:
            continue
        call = f"group_norm(x, groups, {name}=...)"
        check_floating(call, param, narrow=True)
        if not fits(_left_aligned(param.shape, x), x.shape):
            raise ValueError(
                f"`{call}` takes one entry a channel: expected shape ({x.shape[0]},), "
                f"got {param.shape}."
            )
    check_broadcast_mask("group_norm", x, where)
    eps = check_eps("group_norm", eps)
    return _by_group(implementation, x, groups, weight, bias, where, eps)


def _check_example(name: str, x: Any, groups: Integer) -> None:
    check_floating(name, x)
    if x.ndim == 0:
        raise ValueError(f"`{name}` takes an array of shape (channels, *spatial); got a scalar.")
    check_groups(name, groups, x.shape[0])


def _left_aligned(shape: tuple[int, ...], x: Any) -> tuple[int, ...]:
    """With the rank of x, of which channels are the first axis."""
    return shape + (1,) * (x.ndim - len(shape))


def _by_group(
    implementation: str, x: Any, groups: Integer, weight: Any, bias: Any, where: Any, eps: float
):
    channels = x.shape[0]

    def by_channel(param: Any) -> Array | None:
        if param is None:
            return None
        param = jnp.asarray(param).reshape(_left_aligned(param.shape, x))
        return jnp.broadcast_to(param, (channels, *param.shape[1:]))

    where = None if where is None else jnp.asarray(where)
    # One vmap for all: where the channels are split over devices, they must be so in each.
    placed = together(as_jax_has_it(x), by_channel(weight), by_channel(bias), where)
    split = lambda a: a.reshape(groups, channels // groups, *a.shape[1:])
    # A mask that all channels share is not repeated.
    shared = where is not None and where.shape[0] != channels
    *params, mask = placed
    parts: list[Any] = jax.tree.map(split, params)
    parts.append(mask if shared else jax.tree.map(split, mask))
    norm = ft.partial(normalize_by, implementation, eps=eps)
    return grouped(jax.vmap(norm, (0, 0, 0, None if shared else 0))(*parts)).reshape(x.shape)


class GroupNorm(eqx.Module):
    r"""Splits the channels of one example into groups and normalises each over all its entries.

    $$y_g = \frac{x_g - \mathbb{E}[x_g]}{\sqrt{\text{Var}[x_g] + \varepsilon}} * \text{weight}
    + \text{bias}$$

    The example has shape `(channels, *spatial)`. `weight` and `bias` have one entry for each
    channel. With `groups=channels` this is InstanceNorm. With `groups=1` it is LayerNorm over the
    whole example. Fields and leaves are those of `equinox.nn.GroupNorm`, so its checkpoints load.

    The backward is hand-written. It keeps `x` in its own dtype and 12 bytes for each group.
    Forward mode, Hessians, `jax.checkpoint`, scans and sharding work as with any JAX function.
    `jax.experimental.jet` and `sparsify` do not work: see [`eqx_norms.normalize_reference`][].

    !!! warning "Over (channels, time) it mixes time"

        Mean and variance are taken over all spatial axes, and time is one of them. So each output
        reads the whole sequence, including the future. `eqx_norms.assert_causal` shows it. In a
        causal model map the layer over time instead:
        `jax.vmap(group_norm, in_axes=1, out_axes=1)(x)`.

    ??? cite
        [Group Normalization](https://arxiv.org/abs/1803.08494)

        ```bibtex
        @article{wu2018group,
            author={Yuxin Wu and Kaiming He},
            title={Group Normalization},
            year={2018},
            journal={arXiv:1803.08494},
        }
        ```
    """

    groups: int = eqx.field(static=True)
    channels: int | None = eqx.field(static=True)
    eps: float = eqx.field(static=True)
    channelwise_affine: bool = eqx.field(static=True)
    weight: Float[Array, "channels"] | None
    bias: Float[Array, "channels"] | None
    # With a default, for subclasses whose `__init__` sets the fields of `equinox.nn` alone.
    implementation: str = eqx.field(static=True, default="xla")

    def __init__(
        self,
        groups: Integer,
        channels: Integer | None = None,
        eps: Number = 1e-5,
        channelwise_affine: bool = True,
        dtype=None,
        *,
        implementation: str = "xla",
    ):
        """**Arguments:**

        - `groups`: how many groups the channels are split into; must divide their number.
        - `channels`: the size of the first axis of the input. May be `None`, for any multiple of
            `groups`, if `channelwise_affine=False`.
        - `eps`: added to the variance; a finite number, 0 or above.
        - `channelwise_affine`: whether to scale and shift each channel by a learned `weight`, from
            ones, and `bias`, from zeros.
        - `dtype`: the dtype of `weight` and `bias`. Defaults to float32, or float64 in 64-bit mode.
        - `implementation`: `"xla"`, or `"kernel"` for kernels on CPUs, with numba
            (`pip install "eqx-norms[cpu]"`); see [Kernels](../kernels.md) for when they run.

        **Raises:** `ValueError` if `groups` does not divide `channels` or is below 1, if
        `channels` is negative or missing, or for a bad `eps` or `implementation`; `TypeError` for
        a `dtype` that is none of float16, bfloat16, float32 and float64.
        """
        self.channels = (
            None if channels is None else check_size("GroupNorm(channels=...)", channels, least=0)
        )
        self.groups = check_groups("GroupNorm", groups, self.channels)
        self.eps = check_eps("GroupNorm", eps)
        self.channelwise_affine = channelwise_affine
        if channelwise_affine and channels is None:
            raise ValueError(
                "`GroupNorm(groups, channels)` needs the number of channels for its weight and "
                "bias. Give it, or type `GroupNorm(groups, channelwise_affine=False)`."
            )
        dtype = check_param_dtype("GroupNorm", dtype)
        self.weight = jnp.ones(channels, dtype) if channelwise_affine else None
        self.bias = jnp.zeros(channels, dtype) if channelwise_affine else None
        self.implementation = check_implementation("GroupNorm", implementation)

    @overload
    def __call__(self, x: Array, *, key=None, where: Array | None = None) -> Array: ...

    @overload
    def __call__(
        self, x: Array, state: eqx.nn.State, *, key=None, where: Array | None = None
    ) -> tuple[Array, eqx.nn.State]: ...

    @jax.named_scope("eqx_norms.GroupNorm")
    def __call__(
        self,
        x: Float[Array, "channels *spatial"],
        state=no_state,
        *,
        key: PRNGKeyArray | None = None,
        where: Bool[Array | np.ndarray, "..."] | None = None,
    ):
        """**Arguments:**

        - `x`: one example, of shape `(channels, *spatial)` and dtype float16, bfloat16, float32
            or float64.
        - `state`: passed through, so that the layer can stand in for `equinox.nn.BatchNorm`.
        - `key`: ignored; `equinox.nn.Sequential` passes it.
        - `where`: a boolean mask with as many axes as `x`, each of its size or of size 1, as
            `(1, time)` for padding that all channels share. Entries where it is `False`, NaN or
            not, take no part in mean and variance, come out as zero and receive a zero gradient.
            It is kept unchanged for the backward, with a byte for each entry.

        **Returns:**

        An array of the shape and dtype of `x`; with `state`, a tuple of it and the state.

        **Raises:** `ValueError` if the first axis of `x` is not `channels`, with the call that
        works, or not a multiple of `groups`, or if weight or bias, with `channelwise_affine`, is
        missing or does not broadcast to `x`, or for a bad mask; `TypeError` if `x` is not of such
        a dtype.
        """
        check_floating("GroupNorm", x)
        if self.channels is not None and x.shape[:1] != (self.channels,):
            raise ValueError(
                f"`GroupNorm` takes one example of shape (channels, *spatial): expected "
                f"{self.channels} channels, got an array of shape {x.shape}."
                + _cure(self.channels, x.shape)
            )
        _check_example("GroupNorm", x, self.groups)
        affine = self.channelwise_affine
        weight, bias = own_params(self, weight=affine, bias=affine)
        shapes = [_left_aligned(p.shape, x) for p in (weight, bias) if p is not None]
        check_stacked("GroupNorm", x.shape, shapes)
        check_broadcast_mask("GroupNorm", x, where)
        y = _by_group(self.implementation, x, self.groups, weight, bias, where, self.eps)
        return y if state is no_state else (y, state)


def _cure(channels: int, got: tuple[int, ...]) -> str:
    """How to bring an array of shape `got`, whose channels stand elsewhere, to `group_norm`."""
    if channels not in got:
        return ""
    axis = got.index(channels)
    if axis == 1 or axis < len(got) - 1:
        call = ft.reduce(lambda call, _: f"jax.vmap({call})", range(axis), "group_norm")
        return f" Map it over the axes before: {call}(x)"
    # Channels last, after spatial axes and, from four axes on, a batch.
    if len(got) == 3:
        return " Bring the channels to the front: group_norm(jnp.moveaxis(x, -1, 0))"
    return " Bring the channels to the front: jax.vmap(group_norm)(jnp.moveaxis(x, -1, 1))"
