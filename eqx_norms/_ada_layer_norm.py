"""AdaLayerNorm: a LayerNorm whose weight and bias are computed from a second input."""

import math
from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from ._checks import (
    check_eps,
    check_example,
    check_floating,
    check_implementation,
    check_param_dtype,
    check_shape,
    check_size,
    check_stacked,
    check_there,
)
from ._op import normalize_by
from ._real import Integer, Number


class AdaLayerNorm(eqx.Module):
    r"""Normalises one example, and scales and shifts it as a second input (the condition) says.

    $$y = \frac{x - \mathbb{E}[x]}{\sqrt{\text{Var}[x] + \varepsilon}} * (1 + \text{scale})
    + \text{shift}, \qquad (\text{scale}, \text{shift}) = \text{linear}(\text{cond})$$

    `linear` starts at zero, so the layer starts as a LayerNorm without weight and bias, for any
    condition. This is the adaLN-Zero of DiT without its gate. The gate multiplies the residual
    branch by a third output of the same kind:
    ```python
    x = x + gate(cond) * attention(ada_layer_norm(x, cond))
    ```
    where `gate` is an `eqx.nn.Linear(cond_size, features, key=key)` with weight and bias zero.

    !!! tip "Batches"

        The layer takes one example and its condition. For `x` of shape
        `(batch, tokens, features)` and one condition a sequence, `(batch, cond_size)`:
        ```python
        over_tokens = jax.vmap(ada_layer_norm, in_axes=(0, None))
        y = jax.vmap(over_tokens)(x, cond)
        ```

    ??? cite
        [Scalable Diffusion Models with Transformers](https://arxiv.org/abs/2212.09748)

        ```bibtex
        @inproceedings{peebles2023scalable,
            author={William Peebles and Saining Xie},
            title={Scalable Diffusion Models with Transformers},
            booktitle={International Conference on Computer Vision},
            year={2023},
        }
        ```
    """

    shape: tuple[int, ...] = eqx.field(static=True)
    cond_size: int = eqx.field(static=True)
    eps: float = eqx.field(static=True)
    linear: eqx.nn.Linear
    implementation: str = eqx.field(static=True, default="xla")

    def __init__(
        self,
        shape: Integer | Sequence[Integer],
        cond_size: int,
        eps: Number = 1e-5,
        dtype=None,
        *,
        key: PRNGKeyArray,
        implementation: str = "xla",
    ):
        """**Arguments:**

        - `shape`: the shape of one example, without batch axes.
        - `cond_size`: the size of the condition, an array of one axis.
        - `eps`: added to the variance; a finite number, 0 or above.
        - `dtype`: the dtype of the parameters of `linear`. Defaults to float32, or to float64 in
            64-bit mode.
        - `key`: a `jax.random` key, which `eqx.nn.Linear` asks for; its draw is set to zero.
        - `implementation`: as for [`eqx_norms.GroupNorm`][].

        **Raises:** `ValueError` for a negative size, a `cond_size` below 1, or a bad `eps` or
        `implementation`; `TypeError` for a `dtype` that is none of float16, bfloat16, float32 and
        float64.
        """
        self.shape = check_shape("AdaLayerNorm", shape)
        self.cond_size = check_size("AdaLayerNorm(cond_size=...)", cond_size)
        self.eps = check_eps("AdaLayerNorm", eps)
        dtype = check_param_dtype("AdaLayerNorm", dtype)
        linear = eqx.nn.Linear(self.cond_size, 2 * math.prod(self.shape), dtype=dtype, key=key)
        self.linear = jax.tree.map(jnp.zeros_like, linear)
        self.implementation = check_implementation("AdaLayerNorm", implementation)

    @jax.named_scope("eqx_norms.AdaLayerNorm")
    def __call__(
        self,
        x: Float[Array, "*shape"],
        cond: Float[Array, "cond_size"],
        *,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "*shape"]:
        """**Arguments:**

        - `x`: one example, of shape `shape` and dtype float16, bfloat16, float32 or float64.
        - `cond`: its condition, of shape `(cond_size,)`, floating point.
        - `key`: ignored; for the interface of Equinox layers.

        **Returns:**

        An array of the shape and dtype of `x`.

        **Raises:** `ValueError` if `x` is not of shape `shape` or `cond` not of shape
        `(cond_size,)`, for several layers, stacked, or if a parameter is missing; `TypeError` if
        `x` or `cond` is of another dtype.
        """
        check_floating("AdaLayerNorm", x)
        check_floating("AdaLayerNorm(cond=...)", cond)
        if cond.shape != (self.cond_size,):
            raise ValueError(
                f"`AdaLayerNorm(x, cond)` takes one condition, of shape ({self.cond_size},); got "
                f"an array of shape {cond.shape}. Map the layer over x and cond together: "
                "jax.vmap(ada_layer_norm)(x, cond)"
            )
        check_example("AdaLayerNorm", "ada_layer_norm", self.shape, x)
        for param in ("weight", "bias"):
            check_there("AdaLayerNorm", f"linear.{param}", getattr(self.linear, param))
        both = self.linear(cond)
        check_stacked("AdaLayerNorm", (2 * math.prod(self.shape),), [both.shape])
        scale, shift = both.reshape(2, *self.shape)
        return normalize_by(self.implementation, x, scale, shift, eps=self.eps, unit_offset=True)
