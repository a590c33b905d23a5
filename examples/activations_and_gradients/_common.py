"""The data, the model and its training, for every study here."""

import functools as ft
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

import eqx_norms
from eqx_norms.diagnostics import capture, capture_grads, singular_value_ratio, update_ratio

from ..names_data import END, Vocabulary

try:
    import optax
except ImportError:
    raise ImportError('training needs optax: pip install "eqx-norms[examples]"') from None

CONTEXT, EMBEDDING, BATCH = 3, 10, 32
WIDTH = CONTEXT * EMBEDDING
RELU_GAIN = math.sqrt(2)


# ---- Data: which letter comes after these three?


class Pairs(NamedTuple):
    contexts: Int[np.ndarray, "pairs context"]
    letters: Int[np.ndarray, " pairs"]
    vocabulary: Vocabulary


def letter_pairs(names: Sequence[str]) -> Pairs:
    """A pair for each letter of each name and for its end mark; end marks stand before a name."""
    vocabulary = Vocabulary.of(names)
    contexts, letters = [], []
    for name in names:
        context = END * CONTEXT
        for letter in name + END:
            contexts.append(context)
            letters.append(letter)
            context = context[1:] + letter
    encode = lambda texts: vocabulary.encode("".join(texts))
    return Pairs(encode(contexts).reshape(-1, CONTEXT), encode(letters), vocabulary)


# ---- Model, written for one example. The batch is mapped in `loss`.


class Block(eqx.Module):
    """Linear, norm, activation."""

    linear: eqx.nn.Linear
    norm: Any
    activation: eqx.nn.Lambda

    def __call__(self, x: Float[Array, " features"], state: eqx.nn.State):
        x, state = normalized(self.norm, self.linear(x), state)
        return self.activation(x), state


class PreActivationBlock(eqx.Module):
    """Norm, activation, linear; then, with a skip, the block's input is added."""

    norm: Any
    activation: eqx.nn.Lambda
    linear: eqx.nn.Linear
    skip: bool = eqx.field(static=True)

    def __call__(self, x: Float[Array, " features"], state: eqx.nn.State):
        h, state = normalized(self.norm, x, state)
        h = self.linear(self.activation(h))
        return (x + h if self.skip else h), state


class Network(eqx.Module):
    """The embedded letters, side by side, through the blocks, to one logit a symbol."""

    embedding: eqx.nn.Embedding
    first: eqx.nn.Linear | None
    blocks: list
    head: eqx.nn.Linear
    head_norm: Any

    def __call__(self, letters: Int[Array, " context"], state: eqx.nn.State):
        x = jax.vmap(self.embedding)(letters).ravel()
        x = x if self.first is None else self.first(x)
        for block in self.blocks:
            x, state = block(x, state)
        return normalized(self.head_norm, self.head(x), state)


def normalized(norm, x: Array, state: eqx.nn.State):
    return (x, state) if norm is None else norm(x, state)


NORMS: dict[str, Callable[[int], Any]] = {
    "none": lambda size: None,
    "LN": eqx_norms.LayerNorm,
    "BN": ft.partial(eqx.nn.BatchNorm, axis_name="batch", mode="batch"),
}


class Architecture(NamedTuple):
    """What needs a compilation of its own; gain and learning rate do not.

    As in the notebook, `num_linear` leaves out the first linear, whose input is the embedding.
    """

    num_linear: int
    norm: str = "none"
    activation: Callable = jax.nn.relu
    skip: bool | None = None  # None: blocks are [linear, norm, activation]


def xavier_linear(ins: int, outs: int, key: PRNGKeyArray) -> eqx.nn.Linear:
    """Uniform weights of variance 2 / (ins + outs), zero biases."""
    linear = eqx.nn.Linear(ins, outs, key=key)
    weight = jax.nn.initializers.xavier_uniform()(key, (outs, ins))
    return eqx.tree_at(lambda lin: (lin.weight, lin.bias), linear, (weight, jnp.zeros(outs)))


def make_network(architecture: Architecture, symbols: int, key: PRNGKeyArray) -> Network:
    num_linear, norm, activation, skip = architecture
    # A key for every layer. The notebook reseeds its generator before each, so that all its
    # square layers start as the same matrix; that is not copied.
    embedding_key, head_key, *keys = jr.split(key, num_linear + 3)
    linears = [xavier_linear(WIDTH, WIDTH, key) for key in keys]
    norms = [NORMS[norm](WIDTH) for _ in keys]
    act = eqx.nn.Lambda(activation)
    if skip is None:
        first = None
        blocks = [Block(linear, norm, act) for linear, norm in zip(linears, norms, strict=True)]
    else:
        first, *linears = linears
        blocks = [
            PreActivationBlock(norm, act, linear, skip)
            for linear, norm in zip(linears, norms[1:], strict=True)
        ]
    embedding = eqx.nn.Embedding(symbols, EMBEDDING, key=embedding_key)
    head = xavier_linear(WIDTH, symbols, head_key)
    return Network(embedding, first, blocks, head, NORMS[norm](symbols))


def with_gain(network: Network, gain: Float[Array, ""]) -> Network:
    """Multiplies the weight of every linear."""
    is_linear = lambda node: isinstance(node, eqx.nn.Linear)
    scaled = lambda lin: eqx.tree_at(lambda lin: lin.weight, lin, gain * lin.weight)
    return jax.tree.map(lambda n: scaled(n) if is_linear(n) else n, network, is_leaf=is_linear)


class Batch(NamedTuple):
    contexts: Int[Array, "batch context"]
    letters: Int[Array, " batch"]


def loss(network: Network, state: eqx.nn.State, batch: Batch):
    """The mean cross-entropy, and the state that batch norm keeps."""
    batched = jax.vmap(network, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
    logits, state = batched(batch.contexts, state)
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch.letters).mean(), state


PARTS = ("linear outputs", "activations", "activation gradients", "weight gradients")

# ---- What to look at while it trains: functions of (network, state, batch, optimiser).


def activations_and_gradients(network: Network, state, batch: Batch, optimiser) -> dict[str, Array]:
    """Of every block, the first axis: raw values, to be reduced after training."""
    where = (eqx.nn.Linear, eqx.nn.Lambda)
    loss_fn = lambda network: loss(network, state, batch)[0]
    _, values, grads, network_grads = capture_grads(loss_fn, network, where=where)
    each = lambda seen, part: jnp.stack(
        [seen[f"blocks[{i}].{part}"] for i in range(len(network.blocks))]
    )
    return {
        "linear outputs": each(values, "linear"),
        "activations": each(values, "activation"),
        "activation gradients": each(grads, "activation"),
        "weight gradients": jnp.stack([block.linear.weight for block in network_grads.blocks]),
    }


def weight_update_ratios(network: Network, state, batch: Batch, optimiser) -> Float[Array, " lins"]:
    """log10 of how far a step moves the weight of every linear, the head's last."""
    params, static = eqx.partition(network, eqx.is_array)
    loss_fn = lambda params: loss(eqx.combine(params, static), state, batch)[0]
    updates, _ = optimiser.update(jax.grad(loss_fn)(params), optimiser.init(params))
    linears = lambda network: [*(block.linear for block in network.blocks), network.head]
    weights = lambda network: [linear.weight for linear in linears(network)]
    return jnp.log10(jnp.stack(update_ratio(weights(updates), weights(params))))


def direction_ratios(network: Network, state, batch: Batch, optimiser) -> Float[Array, " lins"]:
    """The largest singular value over the sum of all, of the output of every linear."""
    _, values = capture(lambda n: loss(n, state, batch), network, where=eqx.nn.Linear)
    return jnp.stack([singular_value_ratio(x) for x in values.values()])


# ---- Training: plain SGD.


class Runs(NamedTuple):
    """Axes: configurations, seeds, and then steps or looks."""

    losses: Float[np.ndarray, "configs seeds steps"]
    looks: PyTree  # the first one before training, then every `every` steps
    every: int

    @property
    def final(self) -> Float[np.ndarray, "configs seeds"]:
        """The mean loss over the last 100 steps."""
        return self.losses[..., -100:].mean(-1)


def train(
    architecture: Architecture,
    pairs: Pairs,
    configs: Sequence[tuple[float, float]],
    *,
    steps: int,
    seeds: int,
    every: int,
    look: Callable[..., PyTree] = lambda *_: None,
) -> Runs:
    """Trains all `configs`, pairs of gain and learning rate, from all seeds, in one compilation.

    A seed stands for the same unscaled initial weights and the same batches in every
    configuration and architecture of a depth: losses can be compared seed by seed. Every
    `every` steps, `look` sees the network, its state, the next batch and the optimiser.
    """
    data = Batch(jnp.asarray(pairs.contexts), jnp.asarray(pairs.letters))
    # Not in the jit below: compiling random number generators takes longer than all the rest.
    make = eqx.nn.make_with_state(make_network)
    keys = jr.split(jr.key(0), seeds)
    made = [make(architecture, len(pairs.vocabulary), key) for key in keys]
    arrays, (static, *_) = zip(*(eqx.partition(one, eqx.is_array) for one in made), strict=True)
    starts = jax.tree.map(lambda *leaves: jnp.stack(leaves), *arrays)
    size = (seeds, steps // every, every, BATCH)
    chosen = np.random.default_rng(0).integers(len(pairs.letters), size=size, dtype=np.int32)

    def run(config, start, chosen, data):
        gain, rate = config
        network, state = eqx.combine(start, static)
        params, fixed = eqx.partition(with_gain(network, gain), eqx.is_array)
        optimiser = optax.sgd(rate)
        fetch = lambda indices: Batch(data.contexts[indices], data.letters[indices])

        def step(carry, indices):
            params, state, optimiser_state = carry
            loss_fn = lambda params: loss(eqx.combine(params, fixed), state, fetch(indices))
            (value, state), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
            updates, optimiser_state = optimiser.update(grads, optimiser_state)
            return (optax.apply_updates(params, updates), state, optimiser_state), value

        def look_and_train(carry, indices):
            params, state, _ = carry
            seen = look(eqx.combine(params, fixed), state, fetch(indices[0]), optimiser)
            carry, losses = jax.lax.scan(step, carry, indices)
            return carry, (losses, seen)

        carry = params, state, optimiser.init(params)
        _, (losses, seen) = jax.lax.scan(look_and_train, carry, chosen)
        return losses.ravel(), seen

    each_seed = jax.vmap(run, in_axes=(None, 0, 0, None))
    each_config = jax.jit(jax.vmap(each_seed, in_axes=(0, None, None, None)))
    columns = [jnp.asarray(column, jnp.float32) for column in zip(*configs, strict=True)]
    seen = each_config(tuple(columns), starts, chosen, data)
    losses, looks = jax.tree.map(np.asarray, seen)
    return Runs(losses, looks, every)
