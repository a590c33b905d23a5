"""LayerNorm: its parameters, its checks, its call of the op."""

import warnings
from collections.abc import Hashable, Sequence
from typing import overload

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from ._checks import (
    check_axis_name,
    check_broadcast,
    check_eps,
    check_example,
    check_floating,
    check_implementation,
    check_mask,
    check_param_dtype,
    check_shape,
    check_stacked,
    no_state,
    own_params,
)
from ._op import normalize_by
from ._real import Integer, Number


def layer_norm(
    x: Float[Array, "*shape"],
    weight: Float[Array, "..."] | None = None,
    bias: Float[Array, "..."] | None = None,
    *,
    eps: Number = 1e-5,
    where: Bool[Array, "*shape"] | None = None,
    axis_name: Hashable | Sequence[Hashable] | None = None,
    implementation: str = "xla",
) -> Float[Array, "*shape"]:
    r"""Normalises one example over all its entries, and scales and shifts the result.

    $$y = \frac{x - \mathbb{E}[x]}{\sqrt{\text{Var}[x] + \varepsilon}} * \text{weight}
    + \text{bias}$$

    with the biased variance (divided by the number of entries), and `eps` inside the root. The
    derivative is hand-written; see [`eqx_norms.LayerNorm`][].

    **Arguments:**

    - `x`: one example, of any shape and of dtype float16, bfloat16, float32 or float64. For a
        batch, `jax.vmap` this function.
    - `weight`, `bias`: floating-point arrays that broadcast to the shape of `x`, or `None`.
    - `eps`: added to the variance; a finite number, 0 or above.
    - `where`, `axis_name`, `implementation`: as for [`eqx_norms.LayerNorm`][].

    **Returns:**

    An array of the shape and dtype of `x`. Statistics, weight and bias are taken in float32
    (float64 for float64), and the result rounded once.

    **Raises:** `TypeError` if `x` is not of one of these dtypes, or if `weight` or `bias` is not a
    real floating-point array. `ValueError` if `weight` or `bias` does not broadcast to the shape of
    `x`, or for a bad `eps`, mask or `implementation`.
    """
    check_floating("layer_norm", x)
    check_broadcast("layer_norm", x, weight=weight, bias=bias)
    check_mask("layer_norm", x, where)
    eps = check_eps("layer_norm", eps)
    check_implementation("layer_norm", implementation)
    axis_name = check_axis_name(axis_name)
    return normalize_by(implementation, x, weight, bias, where, eps=eps, axis_name=axis_name)


class LayerNorm(eqx.Module):
    r"""Normalises one example over all its entries, then scales and shifts each entry.

    $$y = \frac{x - \mathbb{E}[x]}{\sqrt{\text{Var}[x] + \varepsilon}} * \text{weight}
    + \text{bias}$$

    The variance is the biased one, and `eps` stands inside the root. Fields and leaves are those
    of `equinox.nn.LayerNorm`, so its checkpoints load.

    The backward is hand-written. It keeps `x` in its own dtype and 12 bytes for each example.
    Forward mode, Hessians, `jax.checkpoint`, scans and sharding work as with any JAX function.
    `jax.experimental.jet` and `sparsify` do not work: see [`eqx_norms.normalize_reference`][].

    !!! tip "Batches"

        The layer takes one example. For an array of shape `(batch, tokens, features)`:
        ```python
        layer_norm = LayerNorm(features)
        y = jax.vmap(jax.vmap(layer_norm))(x)
        ```

    ??? cite
        [Layer Normalization](https://arxiv.org/abs/1607.06450)

        ```bibtex
        @article{ba2016layer,
            author={Jimmy Lei Ba and Jamie Ryan Kiros and Geoffrey E. Hinton},
            title={Layer Normalization},
            year={2016},
            journal={arXiv:1607.06450},
        }
        ```
    """

    shape: tuple[int, ...] = eqx.field(static=True)
    eps: float = eqx.field(static=True)
    use_weight: bool = eqx.field(static=True)
    use_bias: bool = eqx.field(static=True)
    weight: Float[Array, "*shape"] | None
    bias: Float[Array, "*shape"] | None
    # With defaults, for subclasses whose `__init__` sets the fields of `equinox.nn` alone.
    unit_offset: bool = eqx.field(static=True, default=False)
    axis_name: Hashable | None = eqx.field(static=True, default=None)
    implementation: str = eqx.field(static=True, default="xla")
    round_before_weight: bool = eqx.field(static=True, default=False)

    def __init__(
        self,
        shape: Integer | Sequence[Integer],
        eps: Number = 1e-5,
        use_weight: bool = True,
        use_bias: bool = True,
        dtype=None,
        *,
        unit_offset: bool = False,
        axis_name: Hashable | Sequence[Hashable] | None = None,
        implementation: str = "xla",
        round_before_weight: bool = False,
        elementwise_affine: bool | None = None,
    ):
        """**Arguments:**

        - `shape`: the shape of one example, without batch axes: an int or a sequence of ints.
        - `eps`: added to the variance; a finite number, 0 or above.
        - `use_weight`: whether to scale by a learned `weight` of shape `shape`, from ones.
        - `use_bias`: whether to shift by a learned `bias` of shape `shape`, from zeros.
        - `dtype`: the dtype of `weight` and `bias`. Defaults to float32, or float64 in 64-bit mode.
        - `unit_offset`: scale by `1 + weight` instead, as Gemma does. `weight` then starts at zero.
            The sum is taken in float32, so a bfloat16 weight keeps its digits.
        - `axis_name`: the name of a mapped axis (of `jax.shard_map`, or of `jax.vmap`) along
            which one example is split evenly. `shape` is then that of one part, and mean and
            variance are taken over all parts. Along a `jax.vmap` JAX differentiates the
            forward by itself, and keeps more for it.
        - `implementation`: `"xla"`, or `"kernel"` for kernels, which read and write less: on CPUs
            with numba (`pip install "eqx-norms[cpu]"`), on GPUs and TPUs, where they have never
            been timed. [Kernels](../kernels.md) says when they run. (`"pallas"` is the same.)
        - `round_before_weight`: round to the dtype of `x` before the weight and again behind each
            operation, as DeBERTa and Chameleon do, and return the dtype that `x`, weight and bias
            promote to. With `unit_offset`, `1 + weight` is rounded to the dtype of the weight. No
            kernel does this. See [Published norms](../published_norms.md).
        - `elementwise_affine`: deprecated, as in `equinox.nn`. It sets `use_weight` and `use_bias`.

        **Raises:** `ValueError` for a negative size, a bad `eps` or `implementation`; `TypeError`
        for a `dtype` that is none of float16, bfloat16, float32 and float64.
        """
        if elementwise_affine is not None:
            use_weight = use_bias = elementwise_affine
            warnings.warn(
                "`LayerNorm(elementwise_affine=...)` is deprecated, as in `equinox.nn`; type "
                "`LayerNorm(use_weight=..., use_bias=...)`.",
                stacklevel=2,
            )
        self.shape = check_shape("LayerNorm", shape)
        self.eps = check_eps("LayerNorm", eps)
        self.use_weight = use_weight
        self.use_bias = use_bias
        dtype = check_param_dtype("LayerNorm", dtype)
        ones = jnp.zeros if unit_offset else jnp.ones
        self.weight = ones(self.shape, dtype) if use_weight else None
        self.bias = jnp.zeros(self.shape, dtype) if use_bias else None
        self.unit_offset = unit_offset
        self.axis_name = check_axis_name(axis_name)
        self.implementation = check_implementation("LayerNorm", implementation)
        self.round_before_weight = round_before_weight

    @overload
    def __call__(self, x: Array, *, key=None, where: Array | None = None) -> Array: ...

    @overload
    def __call__(
        self, x: Array, state: eqx.nn.State, *, key=None, where: Array | None = None
    ) -> tuple[Array, eqx.nn.State]: ...

    @jax.named_scope("eqx_norms.LayerNorm")
    def __call__(
        self,
        x: Float[Array, "*shape"],
        state=no_state,
        *,
        key: PRNGKeyArray | None = None,
        where: Bool[Array, "*shape"] | None = None,
    ):
        """**Arguments:**

        - `x`: one example, of shape `shape` and dtype float16, bfloat16, float32 or float64.
        - `state`: passed through, so that the layer can stand in for `equinox.nn.BatchNorm`.
        - `key`: ignored; `equinox.nn.Sequential` passes it.
        - `where`: a boolean mask of shape `shape`. Entries where it is `False`, NaN or not, take
            no part in mean and variance, come out as zero and receive a zero gradient.

        **Returns:**

        An array of the shape of `x` and, without `round_before_weight`, of its dtype; with
        `state`, a tuple of it and the state.

        **Raises:** `ValueError` if `x` is not of shape `shape`, with the `jax.vmap` that is
        missing, for a bad mask, or if a parameter that `use_weight` or `use_bias` promises is
        missing or does not broadcast to `shape`; `TypeError` if `x` is not of such a dtype.
        """
        check_floating("LayerNorm", x)
        check_example("LayerNorm", "layer_norm", self.shape, x)
        check_mask("LayerNorm", x, where)
        weight, bias = own_params(self, weight=self.use_weight, bias=self.use_bias)
        check_stacked("LayerNorm", self.shape, (p.shape for p in (weight, bias) if p is not None))
        y = normalize_by(
            self.implementation,
            x,
            weight,
            bias,
            where,
            eps=self.eps,
            unit_offset=self.unit_offset,
            axis_name=self.axis_name,
            round_before_weight=self.round_before_weight,
        )
        return y if state is no_state else (y, state)
