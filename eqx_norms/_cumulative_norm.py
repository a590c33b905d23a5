"""CumulativeNorm: its parameters, its checks, its call of the op, at once or step by step."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from ._checks import as_float, check_eps, check_param_dtype, check_size, no_state
from ._op import CumulativeState, Reach, no_steps, normalize_chunk, normalize_so_far
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


def cumulative_norm(
    x: Float[Array | np.ndarray, "time channels *spatial"],
    weight: Float[Array | np.ndarray, "..."] | None = None,
    bias: Float[Array | np.ndarray, "..."] | None = None,
    *,
    groups: Integer = 1,
    eps: Number = 1e-5,
    where: Bool[Array | np.ndarray, "..."] | None = None,
    decay: Number | None = None,
    window: Integer | None = None,
) -> Float[Array, "time channels *spatial"]:
    """Normalises each step of one example by the mean and variance of all steps up to it.

    **Arguments:**

    - `x`: one example, time first, of dtype float16, bfloat16, float32 or float64. For a batch,
        `jax.vmap` this function.
    - `weight`, `bias`: floating-point arrays of shape `(channels,)`, or that broadcast to
        `(channels, *spatial)` from the left; or `None`.
    - `groups`, `eps`, `decay`, `window`: as for [`eqx_norms.CumulativeNorm`][].
    - `where`: as for the call of that layer.

    **Returns:**

    An array of the shape and dtype of `x`.

    **Raises:** `TypeError` if `x`, `weight` or `bias` is not a real floating-point array.
    `ValueError` if `x` has fewer than two axes, if `groups` does not divide the channels, if
    `weight` or `bias` has another shape, or for a bad `eps`, `decay`, `window` or mask.
    """
    groups = check_size("cumulative_norm(groups=...)", groups)
    eps = check_eps("cumulative_norm", eps)
    reach = _check_reach("cumulative_norm", decay, window)
    check_steps("cumulative_norm", x, None, groups)
    check_channel_params("cumulative_norm", x, weight=weight, bias=bias)
    check_step_mask("cumulative_norm", x, where)
    return _by_group(x, weight, bias, where, groups, eps, reach)


def _check_reach(name: str, decay: Any, window: Any) -> Reach:
    if window is not None:
        if decay is not None:
            raise ValueError(
                f"`{name}` forgets by `decay=` or by `window=`, not by both; got {decay!r} and "
                f"{window!r}. Leave one of them out."
            )
        return Reach(window=check_size(f"{name}(window=...)", window))
    if decay is None:
        return Reach()
    number = as_float(decay)
    if not np.finfo(np.float32).tiny <= number < 1:
        raise ValueError(
            f"`{name}(decay=...)` is the share that each step keeps of the weight of all before: a "
            f"number above 0 and below 1, or None to forget nothing; got {decay!r}."
        )
    return Reach(number)


def _by_group(x, weight, bias, where, groups: int, eps: float, reach: Reach) -> Array:
    weight, bias = (of_channels(param, x, groups) for param in (weight, bias))
    grouped, mask = (in_groups(a, x, groups) for a in (x, where))
    y = normalize_so_far(grouped, weight, bias, mask, eps=eps, reach=reach)
    return y.reshape(x.shape)


class CumulativeNorm(eqx.Module):
    r"""Normalises each step by the mean and variance of all steps up to it, so it is causal.

    $$y_t = \frac{x_t - \mathbb{E}[x_{0..t}]}{\sqrt{\text{Var}[x_{0..t}] + \varepsilon}}
    * \text{weight} + \text{bias}$$

    The example has shape `(time, channels, *spatial)`. `weight` and `bias` have one entry for each
    channel. With `groups=1` this is the cumulative layer normalisation (cLN) of Conv-TasNet, over
    all features of all steps so far. With `groups=channels` each channel has its own statistics,
    as in a cumulative InstanceNorm. Other numbers of groups give a cumulative GroupNorm.

    It is exact at any offset and for any number of steps, because no two large sums are
    subtracted. The backward is hand-written. It takes time and memory in proportion to the number
    of steps, and keeps `x` in its own dtype and three numbers for each step and group
    ([how](../backward.md#over-what-has-come-so-far)).

    !!! tip "Streaming"

        The same layer runs one step at a time, with a state of five numbers for each group, of six
        with `decay`, and of four for each step but one of a `window`:
        ```python
        state = norm.init_state()
        y_t, state = norm.step(x_t, state)  # x_t of shape (channels, *spatial)
        y, state = norm.chunk(x, state)  # several steps, x of shape (time, channels, *spatial)
        ```
        Chunks of any lengths return what `norm` does to the whole, except for the order of the
        sums.

    ??? cite
        [Conv-TasNet: Surpassing Ideal Time-Frequency Magnitude Masking for Speech
        Separation](https://arxiv.org/abs/1809.07454)

        ```bibtex
        @article{luo2019conv,
            author={Yi Luo and Nima Mesgarani},
            title={Conv-TasNet: Surpassing Ideal Time-Frequency Magnitude Masking for Speech
                Separation},
            year={2019},
            journal={IEEE/ACM Transactions on Audio, Speech, and Language Processing},
        }
        ```
    """

    channels: int = eqx.field(static=True)
    groups: int = eqx.field(static=True)
    eps: float = eqx.field(static=True)
    channelwise_affine: bool = eqx.field(static=True)
    decay: float | None = eqx.field(static=True)
    window: int | None = eqx.field(static=True)
    weight: Float[Array, "channels"] | None
    bias: Float[Array, "channels"] | None

    def __init__(
        self,
        channels: Integer,
        groups: Integer = 1,
        eps: Number = 1e-5,
        channelwise_affine: bool = True,
        dtype=None,
        decay: Number | None = None,
        window: Integer | None = None,
    ):
        """**Arguments:**

        - `channels`: the size of the second axis of the input, behind time.
        - `groups`: how many groups the channels are split into, each with statistics of its own;
            must divide their number.
        - `eps`: added to the variance; a finite number, 0 or above.
        - `channelwise_affine`: whether to scale and shift each channel by a learned `weight`, from
            ones, and `bias`, from zeros.
        - `dtype`: the dtype of `weight` and `bias`. Defaults to float32, or float64 in 64-bit mode.
        - `decay`: for exponential forgetting, a number between 0 and 1: an entry of step `s` has
            the weight `decay**(t - s)` in the mean and variance of step `t`. Steps that `where`
            leaves out of a group age nothing there. `None` forgets nothing.
        - `window`: how many steps the mean and variance of a step are over, itself the last, and
            those among them that `where` leaves out. The first steps have fewer.

        **Raises:** `ValueError` if `groups` does not divide `channels`, if either is below 1, or
        for a bad `eps`, `decay` or `window`, or for both of these two; `TypeError` for a `dtype`
        that is none of float16, bfloat16, float32 and float64.
        """
        set_fields(self, channels, groups, eps, channelwise_affine, dtype)
        self.decay, self.window = _check_reach("CumulativeNorm", decay, window)

    @jax.named_scope("eqx_norms.CumulativeNorm")
    def __call__(
        self,
        x: Float[Array, "time channels *spatial"],
        state=no_state,
        *,
        key: PRNGKeyArray | None = None,
        where: Bool[Array | np.ndarray, "..."] | None = None,
    ):
        """**Arguments:**

        - `x`: one example, of shape `(time, channels, *spatial)` and dtype float16, bfloat16,
            float32 or float64.
        - `state`: passed through, as by all norms; not that of `step`.
        - `key`: ignored; `equinox.nn.Sequential` passes it.
        - `where`: a boolean mask of shape `(time,)`, or with as many axes as `x`, each of its size
            or of size 1. Entries where it is `False`, NaN or not, take no part in any mean and
            variance, come out as zero and receive a zero gradient.

        **Returns:**

        An array of the shape and dtype of `x`; with `state`, a tuple of it and the state.

        **Raises:** `ValueError` if the second axis of `x` is not `channels`, for a bad mask, or if
        weight or bias, with `channelwise_affine`, is missing or does not fit; `TypeError` if `x`
        is not of such a dtype.
        """
        check_steps("CumulativeNorm", x, self.channels, self.groups)
        check_step_mask("CumulativeNorm", x, where)
        weight, bias = own_channel_params(self, x.shape[1:])
        y = _by_group(x, weight, bias, where, self.groups, self.eps, self._reach())
        return y if state is no_state else (y, state)

    def init_state(self, dtype=jnp.float32) -> CumulativeState:
        """The state before the first step.

        **Arguments:**

        - `dtype`: of the steps to come. Statistics are float64 for float64, else float32.

        **Returns:**

        A tuple of five arrays of shape `(groups,)`: the number of entries, as int32, their mean
        and the sum of squares about it, each in two parts. From 2^31 - 1 entries in a group on,
        the oldest are forgotten as fast as new ones come. With `decay` there are six arrays: in
        place of the number of entries stands their weight, also in two parts. With `window` there
        are four, of shape `(window - 1, groups)`, of the last steps each by itself.
        """
        check_param_dtype("CumulativeNorm.init_state", dtype)
        wide = jnp.float64 if jnp.dtype(dtype) == jnp.float64 else jnp.float32
        return no_steps(self.groups, wide, self._reach())

    @jax.named_scope("eqx_norms.CumulativeNorm.step")
    def step(
        self,
        x: Float[Array, "channels *spatial"],
        state: CumulativeState,
        *,
        where: Bool[Array | np.ndarray, "..."] | None = None,
    ) -> tuple[Float[Array, "channels *spatial"], CumulativeState]:
        """Normalises one step of a stream as the layer would.

        Time and memory are constant: with a `window` in proportion to that, else to nothing.

        **Arguments:**

        - `x`: the next step, of shape `(channels, *spatial)`.
        - `state`: from `init_state()`, or from the step before.
        - `where`: a boolean mask of shape `()`, or with as many axes as `x`, each of its size or of
            size 1.

        **Returns:**

        A tuple of the normalised step, of the shape and dtype of `x`, and the new state.

        **Raises:** the errors of the layer's call, and `ValueError` for a state of another dtype or
        number of groups.
        """
        check_steps("CumulativeNorm.step", x, self.channels, self.groups, steps=0)
        if where is not None:
            where = jnp.asarray(where)[None]
        check_step_mask("CumulativeNorm.step", x[None], where)
        self._check_state("CumulativeNorm.step", x, state)
        y, state = self._chunk(x[None], state, where)
        return y[0], state

    @jax.named_scope("eqx_norms.CumulativeNorm.chunk")
    def chunk(
        self,
        x: Float[Array | np.ndarray, "time channels *spatial"],
        state: CumulativeState,
        *,
        where: Bool[Array | np.ndarray, "..."] | None = None,
    ) -> tuple[Float[Array, "time channels *spatial"], CumulativeState]:
        """Several steps of a stream, one after the other: what `step` returns for each.

        **Arguments:**

        - `x`: the next steps, of shape `(time, channels, *spatial)`; chunks may differ in length.
        - `state`: from `init_state()`, or from the step or chunk before.
        - `where`: as for the call of the layer.

        **Returns:**

        A tuple of the normalised steps, of the shape and dtype of `x`, and the new state.

        **Raises:** as `step` does.
        """
        check_steps("CumulativeNorm.chunk", x, self.channels, self.groups)
        check_step_mask("CumulativeNorm.chunk", x, where)
        self._check_state("CumulativeNorm.chunk", x, state)
        return self._chunk(x, state, where)

    def _chunk(self, x, state: CumulativeState, where) -> tuple[Array, CumulativeState]:
        weight, bias = own_channel_params(self, x.shape[1:])
        weight, bias = (of_channels(p, x, self.groups) for p in (weight, bias))
        grouped, mask = (in_groups(a, x, self.groups) for a in (x, where))
        how = {"eps": self.eps, "reach": self._reach()}
        y, state = normalize_chunk(grouped, state, weight, bias, mask, **how)
        return y.reshape(x.shape), state

    def _reach(self) -> Reach:
        return Reach(self.decay, self.window)

    def _check_state(self, name: str, x, state) -> None:
        wide = jnp.dtype(jnp.float64 if x.dtype == jnp.float64 else jnp.float32)
        mean = getattr(state, "mean", None)
        got = getattr(mean, "shape", None), getattr(mean, "dtype", None)
        decays = getattr(state, "entries_rest", None) is not None
        if decays != (self.decay is not None):
            with_, without = ("with", "without") if decays else ("without", "with")
            raise ValueError(
                f"`{name}(x, state)` got the state of a layer {with_} decay, and is {without}: "
                "begin with norm.init_state(x.dtype)"
            )
        shape = (self.groups,) if self.window is None else (self.window - 1, self.groups)
        if got != (shape, wide):
            raise ValueError(
                f"`{name}(x, state)` takes the state of the step before, or "
                f"`norm.init_state(x.dtype)`: expected statistics of shape {shape} and "
                f"{wide}, got {got[0]} and {got[1]}."
            )
