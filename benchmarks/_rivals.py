"""The same three layers, of each library, as pure functions of a whole batch.

Parameters are float32 throughout, as they are kept in mixed-precision training, and x has the
dtype of the row. Each library does with them what its own mixed-precision recipe does:

- eqx_norms, eqx.nn: nothing to set; statistics in float32, the result in the dtype of x.
- flax (linen): `dtype=` of the layer is that of x, `param_dtype` float32.
- haiku: the parameters are cast to the dtype of x at the entry, as a jmp policy does.
- keras (on JAX): the policies `mixed_bfloat16` and `mixed_float16`.
- plain jnp: x cast to float32, the textbook formula, the result cast back.
- torch: its kernels take float32 parameters with half-precision x. That of RMSNorm does not; its
  weight is cast to the dtype of x, which is faster.

GroupNorm reads x as (batch, channels, spatial), or (batch, spatial, channels) where that is what
the library is made for.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ._cases import CHANNELS, EPS, GROUPS


class Norm(NamedTuple):
    """`apply(params, x)` is y; `pair(params)` is `(weight, bias)`, or `(weight,)` for RMSNorm."""

    params: Any
    apply: Callable
    pair: Callable
    channels_last: bool = False


def example_shape(layer: str, rows: int, n: int, channels_last: bool = False) -> tuple[int, ...]:
    """Of an array that has `rows` means, over `n` entries each."""
    if layer != "GroupNorm":
        return rows, n
    in_a_group = CHANNELS // GROUPS
    if rows % GROUPS or n % in_a_group:
        raise ValueError(
            f"GroupNorm takes rows x n as (rows / {GROUPS}, {CHANNELS} channels, n / {in_a_group}):"
            f" rows must be a multiple of {GROUPS} and n of {in_a_group}, got {rows}x{n}."
        )
    batch, spatial = rows // GROUPS, n // in_a_group
    return (batch, spatial, CHANNELS) if channels_last else (batch, CHANNELS, spatial)


def make(rival: str, layer: str, rows: int, n: int, dtype) -> Norm:
    """The layer of a JAX library, as it is initialised: weight 1, bias 0."""
    channels_last = rival in ("flax", "haiku", "keras")
    norm = norm_of(rival, layer, example_shape(layer, rows, n, channels_last), dtype)
    return norm._replace(channels_last=channels_last and layer == "GroupNorm")


def norm_of(rival: str, layer: str, shape: tuple[int, ...], dtype) -> Norm:
    """The layer for a batch of this shape; GroupNorm's channels are where the library has them."""
    return _MAKERS[rival](layer, shape, jnp.dtype(dtype))


def _equinox(layers, layer, shape, **options):
    import equinox as eqx

    if layer == "GroupNorm":
        norm = layers.GroupNorm(GROUPS, shape[1], EPS, **options)
    else:
        norm = getattr(layers, layer)(shape[-1], EPS, use_bias=layer != "RMSNorm", **options)
    params, static = eqx.partition(norm, eqx.is_array)
    apply = lambda params, x: jax.vmap(eqx.combine(params, static))(x)
    return Norm(params, apply, lambda p: (p.weight,) if p.bias is None else (p.weight, p.bias))


def _ours(layer, shape, dtype):
    import eqx_norms

    return _equinox(eqx_norms, layer, shape)


def _kernel(layer, shape, dtype):
    import eqx_norms

    return _equinox(eqx_norms, layer, shape, implementation="kernel")


def _eqx(layer, shape, dtype):
    import equinox as eqx

    return _equinox(eqx.nn, layer, shape)


def _flax(layer, shape, dtype, **options):
    import flax.linen as linen

    if layer == "GroupNorm":
        options["num_groups"] = GROUPS
    norm = getattr(linen, layer)(epsilon=EPS, dtype=dtype, param_dtype=jnp.float32, **options)
    params = norm.init(jax.random.key(0), jnp.zeros(shape, dtype))
    return Norm(params, norm.apply, lambda p: _named(p["params"], "scale", "bias"))


def _flax_two_pass(layer, shape, dtype):
    return _flax(layer, shape, dtype, use_fast_variance=False)


def _haiku(layer, shape, dtype):
    import haiku as hk

    norms = {
        "LayerNorm": lambda: hk.LayerNorm(-1, True, True, EPS),
        "RMSNorm": lambda: hk.RMSNorm(-1, EPS),
        "GroupNorm": lambda: hk.GroupNorm(GROUPS, eps=EPS),
    }
    norm = hk.without_apply_rng(hk.transform(lambda x: norms[layer]()(x)))
    params = norm.init(None, jnp.zeros(shape, jnp.float32))
    apply = lambda params, x: norm.apply(jax.tree.map(lambda p: p.astype(x.dtype), params), x)
    return Norm(params, apply, lambda p: _named(*p.values(), "scale", "offset"))


def _keras(layer, shape, dtype):
    import keras

    policy = "float32" if dtype == jnp.float32 else f"mixed_{dtype.name}"
    options = {"groups": GROUPS} if layer == "GroupNorm" else {}
    kind = {
        "LayerNorm": keras.layers.LayerNormalization,
        "RMSNorm": keras.layers.RMSNormalization,
        "GroupNorm": keras.layers.GroupNormalization,
    }[layer]
    norm = kind(epsilon=EPS, dtype=policy, **options)
    norm.build(shape)
    params = [variable.value for variable in norm.trainable_variables]
    return Norm(params, lambda params, x: norm.stateless_call(params, [], x)[0], tuple)


def _jnp(layer, shape, dtype):
    channels = shape[1] if layer == "GroupNorm" else shape[-1]
    params = [jnp.ones(channels), jnp.zeros(channels)][: 1 if layer == "RMSNorm" else 2]

    def textbook(x, centred):
        mean = x.mean(-1, keepdims=True) if centred else 0
        variance = jnp.square(x - mean).mean(-1, keepdims=True)
        return (x - mean) / jnp.sqrt(variance + EPS)

    def apply(params, x):
        wide = x.astype(jnp.float32)
        if layer == "GroupNorm":
            rows = wide.reshape(x.shape[0], GROUPS, -1)
            y = textbook(rows, True).reshape(x.shape)
            params = [p[:, None] for p in params]
        else:
            y = textbook(wide, layer == "LayerNorm")
        y = y * params[0] if layer == "RMSNorm" else y * params[0] + params[1]
        return y.astype(x.dtype)

    return Norm(params, apply, tuple)


def _tokamax(layer, shape, dtype):
    import tokamax

    params = [jnp.ones(shape[-1]), jnp.zeros(shape[-1])][: 1 if layer == "RMSNorm" else 2]

    def apply(params, x):
        options = {"epsilon": EPS, "subtract_mean": layer == "LayerNorm"}
        return tokamax.layer_norm(x, params[0], params[1] if params[1:] else None, **options)

    return Norm(params, apply, tuple)


def _named(params, *names):
    return tuple(params[name] for name in names if name in params)


_MAKERS = {
    "ours": _ours,
    "kernel": _kernel,
    "pallas": _kernel,
    "eqx": _eqx,
    "flax": _flax,
    "flax, two-pass": _flax_two_pass,
    "haiku": _haiku,
    "keras": _keras,
    "jnp": _jnp,
    "tokamax": _tokamax,
}
