"""What is tried in the place of a norm, and is none: modules for one token, as a norm is.

docs/recipes.md has the same classes, to paste.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from eqx_norms import rms_norm


class DyT(eqx.Module):
    alpha: Float[Array, ""]
    weight: Float[Array, " features"]
    bias: Float[Array, " features"]

    def __init__(self, features: int):
        self.alpha = 0.5 * jnp.ones(())
        self.weight, self.bias = jnp.ones(features), jnp.zeros(features)

    def __call__(self, x: Float[Array, " features"]) -> Float[Array, " features"]:
        return self.weight * jnp.tanh(self.alpha * x) + self.bias


class Derf(eqx.Module):
    alpha: Float[Array, ""]
    shift: Float[Array, ""]
    weight: Float[Array, " features"]
    bias: Float[Array, " features"]

    def __init__(self, features: int):
        self.alpha, self.shift = 0.5 * jnp.ones(()), jnp.zeros(())
        self.weight, self.bias = jnp.ones(features), jnp.zeros(features)

    def __call__(self, x: Float[Array, " features"]) -> Float[Array, " features"]:
        return self.weight * jax.lax.erf(self.alpha * x + self.shift) + self.bias


class ScaleNorm(eqx.Module):
    weight: Float[Array, ""]

    def __init__(self, features: int):
        self.weight = jnp.ones(())

    def __call__(self, x: Float[Array, " features"]) -> Float[Array, " features"]:
        return rms_norm(x, self.weight)


class LayerScale(eqx.Module):
    weight: Float[Array, " features"]

    def __init__(self, features: int):
        self.weight = 0.1 * jnp.ones(features)

    def __call__(self, x: Float[Array, " features"]) -> Float[Array, " features"]:
        return self.weight * x


INSTEAD = {
    "scale-norm": ScaleNorm,
    "dyt": DyT,
    "derf": Derf,
    "layer-scale": eqx.nn.Identity,  # LayerScale is for the output of a branch
    "none": eqx.nn.Identity,
}
