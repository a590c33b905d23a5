"""A decoder whose mask is a rule, tested by the same rule.

    python examples/rule_as_mask.py

The boolean array that attention takes as its mask is the one that the check holds the model to:
what a library means by True, and which way round it is, is then found and not looked up. With a
cache the mask of position t is row t of the rule, and `assert_same` compares both.
"""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from eqx_norms import LayerNorm
from eqx_norms.causality import assert_reads, assert_same, rules

TOKENS, WIDTH, LAYERS = 8, 16, 2
DOCUMENTS = np.array([0, 0, 0, 1, 1, 1, 1, 1])
TEXT = np.arange(TOKENS) >= 3  # the rest, on the left, is padding


class Layer(eqx.Module):
    norms: tuple[LayerNorm, LayerNorm]
    attention: eqx.nn.MultiheadAttention
    mlp: eqx.nn.MLP

    def __init__(self, key: PRNGKeyArray):
        one, other = jr.split(key)
        self.norms = (LayerNorm(WIDTH), LayerNorm(WIDTH))
        self.attention = eqx.nn.MultiheadAttention(2, WIDTH, key=one)
        self.mlp = eqx.nn.MLP(WIDTH, WIDTH, 4 * WIDTH, 1, key=other)

    def __call__(
        self,
        x: Float[Array, "queries width"],
        seen: Float[Array, "keys width"],
        mask: Bool[Array, "queries keys"],
    ) -> Float[Array, "queries width"]:
        queries, keys = jax.vmap(self.norms[0])(x), jax.vmap(self.norms[0])(seen)
        x = x + self.attention(queries, keys, keys, mask=mask)
        return x + jax.vmap(self.mlp)(jax.vmap(self.norms[1])(x))


def make_decoder(key: PRNGKeyArray) -> list[Layer]:
    return [Layer(one) for one in jr.split(key, LAYERS)]


def forward(
    x: Float[Array, "tokens width"], decoder: list[Layer], mask: Bool[Array, "tokens tokens"]
) -> Float[Array, "tokens width"]:
    """All tokens at once."""
    for layer in decoder:
        x = layer(x, x, mask)
    return x


def cached(
    x: Float[Array, "tokens width"], decoder: list[Layer], mask: Bool[Array, "tokens tokens"]
) -> Float[Array, "tokens width"]:
    """One token at a time: each layer keeps what it was given so far."""

    def step(cache, token):
        t, x = token
        kept = []
        for layer, seen in zip(decoder, cache, strict=True):
            kept.append(seen.at[t].set(x))
            x = layer(x[None], kept[-1], mask[t][None])[0]
        return kept, x

    empty = [jnp.zeros_like(x) for _ in decoder]
    return jax.lax.scan(step, empty, (jnp.arange(len(x)), x))[1]


def main() -> None:
    decoder, x = make_decoder(jr.key(0)), jr.normal(jr.key(1), (TOKENS, WIDTH))
    causal, itself = rules.causal(TOKENS), rules.independent(TOKENS)
    packed, padded = causal & rules.segments(DOCUMENTS), causal & TEXT
    # A token of padding may read nothing: its mask lets it read itself, and nobody looks at it.
    for name, mask, rule, required in [
        ("packed documents", packed, packed, packed),
        ("padded", padded | itself, rules.let_off(padded, TEXT), padded & TEXT[:, None]),
    ]:
        how = {"decoder": decoder, "mask": jnp.asarray(mask)}
        full, step = functools.partial(forward, **how), functools.partial(cached, **how)
        reads = assert_reads(full, x, rule, required=required, prove=True)
        same = assert_same(full, step, x)
        print(f"{name:<18}reads: {reads.status:<8}with a cache: {same.status}", flush=True)


if __name__ == "__main__":
    main()
