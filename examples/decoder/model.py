"""A decoder, written for ONE sequence. Who needs a batch maps it outside, once.

Three norms, of which one belongs in a decoder. The others average over tokens, so that every
output reads the letters that it should predict. In its place, what is none, from instead.py.
"""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

import eqx_norms
from eqx_norms import is_norm

from .instead import INSTEAD, LayerScale
from .settings import Settings

LAYERS = {"ours": eqx_norms.LayerNorm, "eqx": eqx.nn.LayerNorm}


class PerToken(eqx.Module):
    """Every token on its own."""

    layer: Callable

    def __init__(self, layer: Callable, tokens: int, features: int):
        self.layer = layer(features)

    def __call__(self, x: Float[Array, "tokens features"]) -> Float[Array, "tokens features"]:
        return jax.vmap(self.layer)(x)


class OverTokensAndFeatures(eqx.Module):
    """One mean and one variance for the whole name: the `jax.vmap` is missing."""

    layer: Callable

    def __init__(self, layer: Callable, tokens: int, features: int):
        self.layer = layer((tokens, features))

    def __call__(self, x: Float[Array, "tokens features"]) -> Float[Array, "tokens features"]:
        return self.layer(x)


class OverTokens(eqx.Module):
    """A mean and a variance for every feature, over the name: the wrong axis is mapped."""

    layer: Callable

    def __init__(self, layer: Callable, tokens: int, features: int):
        self.layer = layer(tokens)

    def __call__(self, x: Float[Array, "tokens features"]) -> Float[Array, "tokens features"]:
        return jax.vmap(self.layer, in_axes=1, out_axes=1)(x)


NORMS = {
    "per-token": PerToken,
    "over-tokens-and-features": OverTokensAndFeatures,
    "over-tokens": OverTokens,
}
LEAKING = ("over-tokens-and-features", "over-tokens")


def make_norm(settings: Settings) -> Callable:
    """A new one; norms draw no random numbers."""
    size = settings.context, settings.width
    if settings.norm in INSTEAD:
        return PerToken(INSTEAD[settings.norm], *size)
    return NORMS[settings.norm](LAYERS[settings.norms], *size)


def make_after(settings: Settings) -> Callable:
    """What the output of attention or MLP goes through before it is added."""
    if settings.norm == "layer-scale":
        return PerToken(LayerScale, settings.context, settings.width)
    return make_norm(settings) if settings.placement in ("sandwich", "peri") else eqx.nn.Identity()


class Block(eqx.Module):
    """Attention and MLP, each added to the residual stream, with norms as `placement` says.

    "pre", "sandwich" and "peri" differ in what `after1` and `after2` are.
    """

    norm1: Callable
    attention: eqx.nn.MultiheadAttention
    after1: Callable
    norm2: Callable
    mlp: eqx.nn.MLP
    after2: Callable
    placement: str = eqx.field(static=True)

    def __init__(self, settings: Settings, *, key: PRNGKeyArray):
        key1, key2 = jr.split(key)
        width, self.placement = settings.width, settings.placement
        self.norm1 = make_norm(settings)
        self.attention = eqx.nn.MultiheadAttention(settings.heads, width, key=key1)
        self.after1 = make_after(settings)
        self.norm2 = eqx.nn.Identity() if self.placement == "parallel" else make_norm(settings)
        self.mlp = eqx.nn.MLP(width, width, 4 * width, depth=1, activation=jax.nn.gelu, key=key2)
        self.after2 = make_after(settings)

    def __call__(self, x: Float[Array, "tokens features"]) -> Float[Array, "tokens features"]:
        mask = jnp.tri(len(x), dtype=bool)
        return self.around(x, lambda h: (self.attention(h, h, h, mask=mask), None))[0]

    def around(
        self, x: Float[Array, "tokens features"], attend: Callable
    ) -> tuple[Float[Array, "tokens features"], PyTree]:
        """The block around any `attend`, and what that returns beside its output: a cache."""
        feed = lambda h: self.after2(jax.vmap(self.mlp)(h))
        h = x if self.placement == "post" else self.norm1(x)
        mixed, kept = attend(h)
        x = x + self.after1(mixed)
        if self.placement == "post":
            x = self.norm1(x)
            return self.norm2(x + feed(x)), kept
        return x + feed(h if self.placement == "parallel" else self.norm2(x)), kept


class Decoder(eqx.Module):
    """Reads the letters before, one token each, and scores what comes next."""

    embedding: eqx.nn.Embedding
    position: Float[Array, "context features"]
    norm_in: Callable  # of the embeddings, in "peri" alone
    blocks: list[Block]
    norm: Callable
    readout: eqx.nn.Linear
    bf16: bool = eqx.field(static=True)
    remat: bool = eqx.field(static=True)

    def __init__(self, settings: Settings, symbols: int, *, key: PRNGKeyArray):
        key1, key2, key3, *keys = jr.split(key, 3 + settings.layers)
        width, context = settings.width, settings.context
        norm_if = lambda there: make_norm(settings) if there else eqx.nn.Identity()
        self.embedding = eqx.nn.Embedding(symbols, width, key=key1)
        self.position = jr.normal(key2, (context, width))
        self.norm_in = norm_if(settings.placement == "peri")
        self.blocks = [Block(settings, key=key) for key in keys]
        self.norm = norm_if(settings.placement != "post")  # there the last block ends with one
        self.readout = eqx.nn.Linear(width, symbols, key=key3)
        self.bf16, self.remat = settings.bf16, settings.remat

    def __call__(self, letters: Int[Array, " tokens"]) -> Float[Array, "tokens symbols"]:
        model = in_bfloat16(self) if self.bf16 else self
        x = model.norm_in(jax.vmap(model.embedding)(letters) + model.position[: len(letters)])
        for block in model.blocks:
            x = eqx.filter_checkpoint(block)(x) if self.remat else block(x)
        return jax.vmap(model.readout)(model.norm(x)).astype(jnp.float32)


def in_bfloat16(model: Decoder) -> Decoder:
    """Casts parameters for use; norms keep theirs, for they compute in float32 anyway."""
    cast = lambda leaf: leaf.astype(jnp.bfloat16) if eqx.is_inexact_array(leaf) else leaf
    return jax.tree.map(lambda leaf: leaf if is_norm(leaf) else cast(leaf), model, is_leaf=is_norm)
