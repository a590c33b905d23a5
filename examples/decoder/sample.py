"""New names, letter by letter, and what to compare them with."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from .data import END_ID, counted, shifted


@eqx.filter_jit
def sample(
    model: Callable, key: PRNGKeyArray, *, count: int, context: int
) -> Int[Array, "count context"]:
    """Names as the model writes them.

    At every letter the model gets the whole row, with end marks where nothing is written yet: a
    norm over tokens knows no shorter one.
    """

    def write(place, names):
        scores = jax.vmap(model)(shifted(names))[:, place]
        letters = jr.categorical(jr.fold_in(key, place), scores).astype(names.dtype)
        goes_on = counted(names)[:, place]
        return names.at[:, place].set(jnp.where(goes_on, letters, END_ID))

    nothing = jnp.full((count, context), END_ID, jnp.int32)
    return jax.lax.fori_loop(0, context, write, nothing)


class FutureHidden(eqx.Module):
    """A model that gets, for every letter, only those before it, as in `sample`."""

    model: Callable

    def __call__(self, letters: Int[Array, " tokens"]) -> Float[Array, "tokens symbols"]:
        before = jnp.tri(len(letters), dtype=bool)
        scores = jax.vmap(self.model)(jnp.where(before, letters[None], END_ID))
        return jnp.diagonal(scores).T


class Bigram(eqx.Module):
    """How often letters follow one another: what a model of names should do better than."""

    scores: Float[Array, "symbols symbols"]

    def __init__(self, names: Int[np.ndarray, "names context"], symbols: int):
        seen = np.asarray(counted(names))
        pairs = np.asarray(shifted(names))[seen], names[seen]
        counts = np.ones((symbols, symbols))  # add-one smoothing
        np.add.at(counts, pairs, 1)
        self.scores = jnp.log(jnp.asarray(counts / counts.sum(1, keepdims=True), jnp.float32))

    def __call__(self, letters: Int[Array, " tokens"]) -> Float[Array, "tokens symbols"]:
        return self.scores[letters]
