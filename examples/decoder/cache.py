"""Writing with a cache: keys and values of the letters so far, so that each is computed once.

    python -m examples.decoder.cache                 # letters a second, with it and without
    python -m examples.decoder.cache --context 128

A norm over tokens cannot have one: with each new letter it changes all that was kept. One over the
tokens so far can: of each `eqx_norms.CumulativeNorm` in the model the state is kept as well.
"""

import argparse
import itertools
import math
import sys
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from eqx_norms import CumulativeNorm
from eqx_norms.causality import DifferenceError, SameReport, assert_same

from .data import END_ID, Data, shifted
from .model import Block, Decoder, OverTokens, OverTokensAndFeatures, in_bfloat16
from .sample import sample
from .settings import Settings


class Cache(NamedTuple):
    """Keys and values of one block, 0 for letters that are still to come."""

    keys: Float[Array, "context heads size"]
    values: Float[Array, "context heads size"]


class Kept(NamedTuple):
    """A cache for each block, a state for each norm over the letters so far."""

    blocks: list[Cache]
    norms: list[PyTree]


def empty(model: Decoder, context: int) -> Kept:
    """Before the first letter. Raises `ValueError` for a model whose norms average over tokens."""
    is_over = lambda node: isinstance(node, OverTokens | OverTokensAndFeatures)
    if any(map(is_over, jax.tree.leaves(model, is_leaf=is_over))):
        raise ValueError(
            "a norm over tokens cannot have one: each new letter changes its mean and its "
            "variance, and with them the keys and values of all letters before"
        )
    dtype = jnp.bfloat16 if model.bf16 else jnp.float32
    shape = lambda attention: (context, attention.num_heads, attention.qk_size)
    zeros = [jnp.zeros(shape(block.attention), dtype) for block in model.blocks]
    leaves = jax.tree.leaves(model, is_leaf=_is_so_far)
    states = [norm.init_state(dtype) for norm in leaves if _is_so_far(norm)]
    return Kept([Cache(both, both) for both in zeros], states)


def _is_so_far(node: PyTree) -> bool:
    return isinstance(node, CumulativeNorm)


def streaming(model: Decoder, states: Sequence[PyTree]) -> tuple[Decoder, list[PyTree]]:
    """The model, whose norms over the letters so far go on from their states; and the states,
    which are those behind the letters once the model has been called with them."""
    states, number = list(states), itertools.count()

    def go_on(node: PyTree) -> PyTree:
        if not _is_so_far(node):
            return node
        i = next(number)

        def norm(x: Float[Array, "tokens features"]) -> Float[Array, "tokens features"]:
            y, states[i] = node.chunk(x, states[i])
            return y

        return norm

    return jax.tree.map(go_on, model, is_leaf=_is_so_far), states


def attend(
    block: Block, cache: Cache, place: Int[Array, ""], h: Float[Array, "1 features"]
) -> tuple[Float[Array, "1 features"], Cache]:
    """What `block.attention` makes of the token at `place`, and the cache with that in it."""
    attention = block.attention
    split = lambda project: project(h[0]).reshape(attention.num_heads, -1)
    keys = cache.keys.at[place].set(split(attention.key_proj))
    values = cache.values.at[place].set(split(attention.value_proj))
    query = split(attention.query_proj) / math.sqrt(attention.qk_size)
    scores = jnp.einsum("hf,thf->ht", query, keys).astype(jnp.float32)
    weights = jax.nn.softmax(scores, where=jnp.arange(len(keys)) <= place).astype(h.dtype)
    mixed = jnp.einsum("ht,thf->hf", weights, values).reshape(-1)
    return attention.output_proj(mixed)[None], Cache(keys, values)


def next_scores(
    model: Decoder, before: Kept, place: Int[Array, ""], letter: Int[Array, ""]
) -> tuple[Float[Array, " symbols"], Kept]:
    """Reads the letter at `place` and scores what comes next."""
    model, states = streaming(in_bfloat16(model) if model.bf16 else model, before.norms)
    x = model.norm_in((model.embedding(letter) + model.position[place])[None])
    caches = []
    for block, cache in zip(model.blocks, before.blocks, strict=True):
        x, cache = block.around(x, lambda h, b=block, c=cache: attend(b, c, place, h))
        caches.append(cache)
    return model.readout(model.norm(x)[0]).astype(jnp.float32), Kept(caches, states)


class LetterByLetter(eqx.Module):
    """The decoder, with a cache: the same function of a row of letters."""

    model: Decoder

    def __call__(self, letters: Int[Array, " tokens"]) -> Float[Array, "tokens symbols"]:
        def read(kept, at):
            scores, kept = next_scores(self.model, kept, *at)
            return kept, scores

        places = jnp.arange(len(letters))
        return jax.lax.scan(read, empty(self.model, len(letters)), (places, letters))[1]


def check_cache(model: Decoder, letters: Int[Array, " tokens"], symbols: int) -> SameReport:
    """Raises `eqx_norms.causality.DifferenceError` if the cache changes what the model says."""
    ids = (0, symbols - 1)
    message = "The cache is not used:"
    return assert_same(model, LetterByLetter(model), letters, token_values=ids, err_msg=message)


def writer(model: Decoder, data: Data) -> tuple[Callable, str]:
    """What writes names as `sample` does, with the cache if that changes nothing, and a word."""
    try:
        report = check_cache(model, shifted(data.train[0]), len(data.vocabulary))
    except (ValueError, DifferenceError) as error:
        return sample, f"writes without a cache: {error}"
    return sample_cached, f"writes with a cache, checked on {report.inputs} names: {report.status}"


@eqx.filter_jit
def sample_cached(
    model: Decoder, key: PRNGKeyArray, *, count: int, context: int
) -> Int[Array, "count context"]:
    """Names as `sample` writes them, from the same random numbers."""

    def write(carry, place):
        kept, last = carry
        step = lambda kept, letter: next_scores(model, kept, place, letter)
        scores, kept = jax.vmap(step)(kept, last)
        letters = jr.categorical(jr.fold_in(key, place), scores).astype(last.dtype)
        goes_on = (place == 0) | (last != END_ID)
        letters = jnp.where(goes_on, letters, END_ID)
        return (kept, letters), letters

    kept = jax.tree.map(lambda leaf: jnp.stack([leaf] * count), empty(model, context))
    start = kept, jnp.full(count, END_ID, jnp.int32)
    return jax.lax.scan(write, start, jnp.arange(context))[1].T


# ---- Letters a second.


def rates(settings: Settings, count: int, symbols: int = 27) -> dict[str, float]:
    """Of a model with random parameters, which takes as long as a trained one."""
    model = Decoder(settings, symbols, key=jr.key(settings.seed))
    key = jr.key(1)
    letters = jr.randint(key, (settings.context,), 0, symbols)
    print(check_cache(model, letters, symbols))
    how = {"count": count, "context": settings.context}
    return {
        name: count * settings.context / seconds(lambda write=write: write(model, key, **how))
        for name, write in (("full", sample), ("cached", sample_cached))
    }


def seconds(call: Callable, repeats: int = 5) -> float:
    """The fastest of some calls after the first, which compiles."""
    taken = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        jax.block_until_ready(call())
        taken.append(time.perf_counter() - began)
    return min(taken[1:])


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m examples.decoder.cache", description=(__doc__ or "").split("\n", 1)[0]
    )
    add = parser.add_argument
    for field, text in (("context", "letters"), ("width", "features"), ("layers", "blocks")):
        default = getattr(Settings, field)
        add(f"--{field}", type=int, default=default, help=f"{text}; by default {default}")
    add("--names", type=int, default=100, help="written side by side; by default %(default)s")
    add("--bf16", action="store_true", help="bfloat16 activations")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = vars(parser().parse_args(argv))
    names = args.pop("names")
    for name, rate in rates(Settings(**args), names).items():
        print(f"{name:7} {rate:12,.0f} letters a second")
    return 0


if __name__ == "__main__":
    sys.exit(main())
