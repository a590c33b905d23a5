"""Models with one known illness at a known place each, and healthy ones, for `diagnose`.

Every entry makes its case from a key. `benchmarks/diagnosis.py` asks other tools the same.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax

from eqx_norms import LayerNorm

WIDTH, BATCH, CLASSES, TOKENS, IDS = 16, 32, 10, 8, 20


class Case(NamedTuple):
    """What `diagnose` is given, and of a sick model which findings say what it suffers from.

    - `illness`: pairs of kind and place; any of them will do.
    """

    loss_fn: Callable
    model: Any
    args: tuple
    options: dict = {}  # noqa: RUF012
    illness: tuple = ()


SICK: dict[str, Callable[..., Case]] = {}
HEALTHY: dict[str, Callable[..., Case]] = {}


def sick(make):
    SICK[make.__name__] = make
    return make


def healthy(make):
    HEALTHY[make.__name__] = make
    return make


# ---- Parts.


class Stack(eqx.Module):
    """Linear layers and an activation function between them, with skips or without."""

    layers: list
    norms: list | None
    last: LayerNorm | None
    head: eqx.nn.Linear
    activation: Callable
    skip: bool = eqx.field(static=True)

    def __init__(self, depth, activation, key, *, gain=None, norm=False, skip=False, out=CLASSES):
        *keys, head = jr.split(key, depth + 1)
        self.layers = [linear(WIDTH, WIDTH, k, gain) for k in keys]
        self.norms = [LayerNorm(WIDTH) for _ in keys] if norm else None
        self.last = LayerNorm(WIDTH) if norm and skip else None
        self.head = eqx.nn.Linear(WIDTH, out, key=head)
        self.activation = activation
        self.skip = skip

    def __call__(self, x):
        for i, layer in enumerate(self.layers):
            h = layer(x if self.norms is None else self.norms[i](x))
            h = self.activation(h)
            x = x + h if self.skip else h
        return self.head(x if self.last is None else self.last(x))


def linear(ins, outs, key, gain=None):
    """As Equinox draws it, or normal weights of standard deviation gain / sqrt(ins), no biases."""
    made = eqx.nn.Linear(ins, outs, key=key)
    if gain is None:
        return made
    weight = gain / ins**0.5 * jr.normal(key, (outs, ins))
    return eqx.tree_at(lambda m: (m.weight, m.bias), made, (weight, jnp.zeros(outs)))


def floats(key, *shape):
    return jr.normal(key, shape or (BATCH, WIDTH))


def labels(x):
    """Something to learn: which of ten random directions an example points along most."""
    directions = jr.normal(jr.key(0), (x[0].size, CLASSES)).astype(x.dtype)
    return jnp.argmax(x.reshape(len(x), -1) @ directions, axis=-1)


def cross_entropy(logits, y):
    each = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), y)
    return jnp.mean(each)


def classify(model, x, y):
    return cross_entropy(jax.vmap(model)(x), y)


def regress(model, x, y):
    return jnp.mean((jax.vmap(model)(x) - y).astype(jnp.float32) ** 2)


def classifier(model, x, **options):
    return Case(classify, model, (x, labels(x)), {"classes": CLASSES, **options})


def ill(case, *illness):
    return case._replace(illness=illness)


class Attention(eqx.Module):
    """One head, by hand; `mask` says who may be read."""

    query: eqx.nn.Linear
    key: eqx.nn.Linear
    value: eqx.nn.Linear
    scale: float

    def __init__(self, size, key, scale=None):
        keys = jr.split(key, 3)
        self.query, self.key, self.value = (linear(size, size, k, 1.0) for k in keys)
        self.scale = size**-0.5 if scale is None else scale

    def __call__(self, x, mask=None):
        q, k, v = (jax.vmap(f)(x) for f in (self.query, self.key, self.value))
        scores = (q @ k.T) * jnp.asarray(self.scale, x.dtype)
        if mask is None:
            return jax.nn.softmax(scores, axis=-1) @ v
        weights = jnp.exp(scores) * mask
        return (weights / jnp.sum(weights, axis=-1, keepdims=True)) @ v


class Block(eqx.Module):
    """Of a transformer, with the norms ahead."""

    norm1: LayerNorm
    attention: eqx.nn.MultiheadAttention
    norm2: LayerNorm
    up: eqx.nn.Linear
    down: eqx.nn.Linear
    causal: bool = eqx.field(static=True)

    def __init__(self, size, key, causal=False):
        one, two, three = jr.split(key, 3)
        self.norm1, self.norm2 = LayerNorm(size), LayerNorm(size)
        self.attention = eqx.nn.MultiheadAttention(2, size, key=one)
        self.up, self.down = (
            eqx.nn.Linear(size, 2 * size, key=two),
            eqx.nn.Linear(2 * size, size, key=three),
        )
        self.causal = causal

    def __call__(self, x):
        h = jax.vmap(self.norm1)(x)
        mask = jnp.tril(jnp.ones((len(x), len(x)), bool)) if self.causal else None
        x = x + self.attention(h, h, h, mask=mask)
        h = jax.vmap(self.up)(jax.vmap(self.norm2)(x))
        return x + jax.vmap(self.down)(jax.nn.gelu(h))


class Transformer(eqx.Module):
    """Over tokens, each of which has logits."""

    embedding: eqx.nn.Embedding
    position: jax.Array
    blocks: list
    norm: LayerNorm
    head: eqx.nn.Linear

    def __init__(self, key, depth=4, causal=True):
        a, b, c, *keys = jr.split(key, depth + 3)
        self.embedding = eqx.nn.Embedding(IDS, WIDTH, key=a)
        self.position = 0.1 * jr.normal(b, (TOKENS, WIDTH))
        self.blocks = [Block(WIDTH, k, causal) for k in keys]
        self.norm = LayerNorm(WIDTH)
        self.head = eqx.nn.Linear(WIDTH, IDS, key=c)

    def __call__(self, tokens):
        x = jax.vmap(self.embedding)(tokens) + self.position
        for block in self.blocks:
            x = block(x)
        return jax.vmap(self.head)(jax.vmap(self.norm)(x))


def tokens(key):
    """Each follows from the one before, but for one in ten."""
    first, noise, where = jr.split(key, 3)
    start = jr.randint(first, (BATCH, 1), 0, IDS)
    ids = (start * 1 + 7 * jnp.arange(TOKENS + 1)) % IDS
    other = jr.randint(noise, ids.shape, 0, IDS)
    return jnp.where(jr.bernoulli(where, 0.1, ids.shape), other, ids)


def next_token(model, ids):
    return cross_entropy(jax.vmap(model)(ids[:, :-1]), ids[:, 1:])


def cast(tree, dtype):
    is_float = lambda x: eqx.is_inexact_array(x)
    return jax.tree.map(lambda x: x.astype(dtype) if is_float(x) else x, tree)


def weights(model):
    return eqx.filter(model, eqx.is_inexact_array)


# ---- Sick.


@sick
def dead_relus(key):
    model = Stack(4, jax.nn.relu, key, gain=1.4)
    model = eqx.tree_at(lambda m: m.layers[2].bias, model, jnp.full(WIDTH, -8.0))
    return ill(classifier(model, floats(key)), ("dead", "layers[2]"))


@sick
def dead_channels(key):
    model = Convolutions(key)
    model = eqx.tree_at(lambda m: m.layers[1].bias, model, jnp.full((8, 1, 1), -8.0))
    return ill(classifier(model, floats(key, BATCH, 1, 8, 8)), ("dead", "layers[1]"))


@sick
def sigmoid_tower(key):
    model = Stack(8, jax.nn.sigmoid, key)
    return ill(classifier(model, floats(key)), ("vanishing gradient", "layers[0]"))


@sick
def saturated_tanh(key):
    model = Stack(3, jnp.tanh, key, gain=8.0)
    places = [("saturated", f"layers[{i}]") for i in range(3)]
    return ill(classifier(model, floats(key)), *places)


@sick
def gain_3(key):
    model = Stack(12, jax.nn.relu, key, gain=3.0)
    return ill(classifier(model, floats(key)), ("exploding gradient", "layers[0]"))


@sick
def skips_without_norms(key):
    model = Stack(12, jax.nn.relu, key, gain=2.0, skip=True)
    return ill(classifier(model, floats(key)), ("growing activations", "layers[11]"))


@sick
def gain_point_3(key):
    model = Stack(8, jax.nn.relu, key, gain=0.3)
    return ill(classifier(model, floats(key)), ("vanishing gradient", "layers[0]"))


@sick
def no_residuals_in_24_layers(key):
    model = Stack(24, jax.nn.gelu, key)
    return ill(classifier(model, floats(key)), ("vanishing gradient", "layers[0]"))


class Scanned(eqx.Module):
    """The same layers, stacked and scanned over."""

    layers: eqx.nn.Linear
    head: eqx.nn.Linear
    skip: bool = eqx.field(static=True)

    def __init__(self, depth, key, gain=None, skip=False):
        keys, head = jr.split(key, depth), jr.fold_in(key, 1)
        self.layers = eqx.filter_vmap(lambda k: linear(WIDTH, WIDTH, k, gain))(keys)
        self.head = eqx.nn.Linear(WIDTH, CLASSES, key=head)
        self.skip = skip

    def __call__(self, x):
        arrays, static = eqx.partition(self.layers, eqx.is_array)

        def step(x, layer):
            h = jnp.tanh(eqx.combine(layer, static)(x))
            return (x + h if self.skip else h), None

        return self.head(jax.lax.scan(step, x, arrays)[0])


@sick
def no_residuals_in_a_scan(key):
    model = Scanned(24, key)
    return ill(classifier(model, floats(key)), ("vanishing gradient", "layers"))


class Length(eqx.Module):
    """The length of a vector, of which the derivative at zero is 0 / 0."""

    def __call__(self, x):
        return jnp.sqrt(jnp.sum(x**2))


class Scaled(eqx.Module):
    first: eqx.nn.Linear
    length: Length
    head: eqx.nn.Linear

    def __init__(self, key):
        one, two = jr.split(key)
        self.first = eqx.nn.Linear(WIDTH, WIDTH, use_bias=False, key=one)
        self.length = Length()
        self.head = eqx.nn.Linear(WIDTH, CLASSES, key=two)

    def __call__(self, x):
        h = self.first(x)
        return self.head(h / (1 + self.length(h)))


@sick
def root_of_zero_in_the_backward(key):
    x = floats(key).at[3].set(0)
    return ill(classifier(Scaled(key), x), ("non-finite", "length"))


class Entropy(eqx.Module):
    """`where` hides that the derivative of log(0) is infinite, but 0 times it is NaN."""

    def __call__(self, p):
        return -jnp.sum(jnp.where(p > 0, p * jnp.log(p), 0))


class Confident(eqx.Module):
    first: eqx.nn.Linear
    entropy: Entropy

    def __call__(self, x):
        p = self.first(x) ** 2
        return p * self.entropy(p)


@sick
def log_of_zero_in_the_backward(key):
    first = eqx.nn.Linear(WIDTH, CLASSES, use_bias=False, key=key)
    case = classifier(Confident(first, Entropy()), floats(key).at[3].set(0))
    return ill(case._replace(options={}), ("non-finite", "entropy"))


class Masked(eqx.Module):
    """Of one example a whole row of the mask is empty."""

    attention: Attention
    head: eqx.nn.Linear

    def __init__(self, key):
        self.attention = Attention(WIDTH, key)
        self.head = eqx.nn.Linear(WIDTH, CLASSES, key=key)

    def __call__(self, x):
        mask = (x[:, :1] > -1e9) & (x[:, 0] != 0)
        return self.head(jnp.mean(self.attention(x, mask.astype(x.dtype)), axis=0))


@sick
def zero_over_zero_in_a_masked_softmax(key):
    x = floats(key, BATCH, TOKENS, WIDTH).at[5, :, 0].set(0)
    return ill(classifier(Masked(key), x), ("non-finite", "attention"))


class Heads(eqx.Module):
    first: eqx.nn.Linear
    attention: Attention
    head: eqx.nn.Linear

    def __init__(self, key, size=WIDTH, scale=None):
        self.first = linear(size, size, key, 1.0)
        self.attention = Attention(size, key, scale)
        self.head = eqx.nn.Linear(size, CLASSES, key=key)

    def __call__(self, x):
        h = self.attention(jax.vmap(self.first)(x))
        return self.head(jnp.mean(h, axis=0))


@sick
def float16_overflow_in_attention_scores(key):
    case = classifier(Heads(key, scale=1.0), 200 * floats(key, BATCH, TOKENS, WIDTH))
    model, x = cast((case.model, case.args[0]), jnp.float16)
    case = case._replace(model=model, args=(x, case.args[1]))
    return ill(case, ("non-finite", "attention"))


@sick
def float16_near_its_end(key):
    case = classifier(Stack(2, jnp.tanh, key, norm=True), 6e3 * floats(key))
    model = eqx.tree_at(lambda m: m.layers[0].bias, case.model, jnp.full(WIDTH, 3e4))
    model, x = cast((model, case.args[0]), jnp.float16)
    case = case._replace(model=model, args=(x, case.args[1]))
    return ill(case, ("range", "layers[0]"), ("range", "layers[0].bias"))


@sick
def float16_gradients_that_underflow(key):
    case = classifier(Stack(3, jnp.tanh, key), floats(key))
    loss_fn = lambda model, x, y: 1e-5 * classify(model, x, y)
    model, x = cast((case.model, case.args[0]), jnp.float16)
    places = [("range", f"layers[{i}]") for i in range(3)] + [("range", "head"), ("range", "")]
    return ill(Case(loss_fn, model, (x, case.args[1])), *places)


@sick
def bfloat16_updates_that_vanish(key):
    case = classifier(Stack(3, jax.nn.relu, key, norm=True), floats(key))
    model, x = cast((case.model, case.args[0]), jnp.bfloat16)
    optim = optax.adam(1e-5)
    options = {"optimiser": (optim, optim.init(weights(model)))}
    places = [("update ratio", f"layers[{i}].weight") for i in range(3)]
    return ill(Case(classify, model, (x, case.args[1]), options), *places)


@sick
def an_embedding_row_of_1e4(key):
    model = Transformer(key, depth=1)
    row = 1e4 * jnp.ones(WIDTH)
    weight = model.embedding.weight.at[3].set(row)
    model = eqx.tree_at(lambda m: m.embedding.weight, model, weight)
    return ill(Case(next_token, model, (tokens(key),)), ("range", "embedding.weight"))


class Branches(eqx.Module):
    first: eqx.nn.Linear
    second: eqx.nn.MLP
    head: eqx.nn.Linear
    stop: bool = eqx.field(static=True)

    def __init__(self, key, stop=False):
        one, two, three = jr.split(key, 3)
        self.first = eqx.nn.Linear(WIDTH, WIDTH, key=one)
        self.second = eqx.nn.MLP(WIDTH, WIDTH, WIDTH, 1, key=two)
        self.head = eqx.nn.Linear(WIDTH, CLASSES, key=three)
        self.stop = stop

    def __call__(self, x):
        h = self.first(x)
        if self.stop:
            return self.head(self.second(jax.lax.stop_gradient(h)))
        unused = self.second(h)  # noqa: F841
        return self.head(h)


@sick
def an_unused_branch(key):
    return ill(classifier(Branches(key), floats(key)), ("no gradient", "second"))


@sick
def a_stop_gradient_too_many(key):
    return ill(classifier(Branches(key, stop=True), floats(key)), ("no gradient", "first"))


@sick
def tied_weights_updated_twice(key):
    model = Transformer(key, depth=1)
    model = eqx.tree_at(lambda m: m.head.weight, model, model.embedding.weight)
    return ill(Case(next_token, model, (tokens(key),)), ("update ratio", "head.weight"))


@sick
def one_key_for_all_layers(key):
    model = Stack(3, jax.nn.relu, key, norm=True)
    model = eqx.tree_at(lambda m: m.layers, model, [model.layers[0]] * 3)
    return ill(classifier(model, floats(key)), ("update ratio", "layers[1].weight"))


def _with_rate(optim, key):
    case = classifier(Stack(4, jax.nn.relu, key, gain=1.4, norm=True), floats(key))
    return case._replace(options={"optimiser": (optim, optim.init(weights(case.model)))})


def _all_weights(case, kind):
    params = jax.tree_util.tree_leaves_with_path(weights(case.model))
    paths = [jax.tree_util.keystr(keys).removeprefix(".") for keys, _ in params]
    return ill(case, *[(kind, path) for path in paths if path.endswith("weight")])


@sick
def learning_rate_100_times_too_large(key):
    return _all_weights(_with_rate(optax.adam(0.1), key), "update ratio")


@sick
def learning_rate_100_times_too_small(key):
    return _all_weights(_with_rate(optax.sgd(1e-4), key), "update ratio")


class NormOfOne(eqx.Module):
    first: eqx.nn.Linear
    norm: LayerNorm
    head: eqx.nn.Linear

    def __init__(self, key):
        one, two = jr.split(key)
        self.first = eqx.nn.Linear(WIDTH, WIDTH, key=one)
        self.norm = LayerNorm(1)
        self.head = eqx.nn.Linear(WIDTH, CLASSES, key=two)

    def __call__(self, x):
        h = jax.vmap(self.norm)(self.first(x)[:, None])
        return self.head(jax.nn.relu(1 + h[:, 0]))


@sick
def a_norm_over_one_entry(key):
    places = [("no gradient", "norm.weight"), ("no gradient", "first")]
    return ill(classifier(NormOfOne(key), floats(key)), *places)


class AttentionOnly(eqx.Module):
    layers: list
    head: eqx.nn.Linear
    skip: bool = eqx.field(static=True)

    def __init__(self, depth, key, skip=False):
        self.layers = [Attention(WIDTH, k) for k in jr.split(key, depth)]
        self.head = eqx.nn.Linear(WIDTH, CLASSES, key=key)
        self.skip = skip

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x) + x if self.skip else layer(x)
        return self.head(jnp.mean(x, axis=0))


@sick
def attention_without_skips(key):
    x = floats(key, 1, 32, WIDTH)
    places = [("rank collapse", f"layers[{i}]") for i in range(8)]
    places += [("rank collapse", f"layers[{i}].{part}") for i in range(8) for part in ATTENTION]
    return ill(classifier(AttentionOnly(8, key), x), *places)


ATTENTION = ("query", "key", "value")


@sick
def loss_summed_instead_of_averaged(key):
    case = classifier(Stack(2, jax.nn.relu, key, norm=True), floats(key))
    loss_fn = lambda model, x, y: len(x) * classify(model, x, y)
    return ill(case._replace(loss_fn=loss_fn), ("initial loss", "loss_fn"))


@sick
def opinions_at_the_start(key):
    model = Stack(2, jax.nn.relu, key, gain=1.4)
    model = eqx.tree_at(lambda m: m.head.weight, model, 20 * model.head.weight)
    return ill(classifier(model, floats(key)), ("initial loss", "loss_fn"))


@sick
def a_parameter_that_is_nan(key):
    model = Stack(3, jax.nn.relu, key, norm=True)
    model = eqx.tree_at(lambda m: m.layers[1].bias, model, jnp.full(WIDTH, jnp.nan))
    return ill(classifier(model, floats(key)), ("non-finite", "layers[1].bias"))


@sick
def data_that_is_nan(key):
    x = floats(key)
    case = classifier(Stack(3, jax.nn.relu, key, norm=True), x)
    return ill(case._replace(args=(x.at[2, 3].set(jnp.nan), case.args[1])), ("non-finite", "args"))


# ---- Healthy.


@healthy
def mlp_with_norms(key):
    return classifier(Stack(6, jax.nn.relu, key, norm=True), floats(key))


@healthy
def plain_mlp(key):
    model = eqx.nn.MLP(WIDTH, CLASSES, 2 * WIDTH, 2, key=key)
    return classifier(model, floats(key))


@healthy
def relu_mlp_of_its_gain(key):
    return classifier(Stack(4, jax.nn.relu, key, gain=2**0.5), floats(key))


@healthy
def tanh_mlp_of_its_gain(key):
    return classifier(Stack(6, jnp.tanh, key, gain=5 / 3), floats(key))


@healthy
def residual_mlp(key):
    return classifier(Stack(24, jax.nn.gelu, key, norm=True, skip=True), floats(key))


class Convolutions(eqx.Module):
    layers: list
    pool: eqx.nn.MaxPool2d
    head: eqx.nn.Linear

    def __init__(self, key):
        one, two, three = jr.split(key, 3)
        self.layers = [
            eqx.nn.Conv2d(1, 8, 3, padding=1, key=one),
            eqx.nn.Conv2d(8, 8, 3, padding=1, key=two),
        ]
        self.pool = eqx.nn.MaxPool2d(2, 2)
        self.head = eqx.nn.Linear(8 * 4, CLASSES, key=three)

    def __call__(self, x):
        for conv in self.layers:
            x = self.pool(jax.nn.relu(conv(x)))
        return self.head(x.ravel())


@healthy
def convnet(key):
    return classifier(Convolutions(key), floats(key, BATCH, 1, 8, 8))


class Normed(eqx.Module):
    """A convolution and batch norm, which keeps a state."""

    conv: eqx.nn.Conv2d
    norm: eqx.nn.BatchNorm
    head: eqx.nn.Linear

    def __init__(self, key):
        one, two = jr.split(key)
        self.conv = eqx.nn.Conv2d(1, 8, 3, padding=1, key=one)
        self.norm = eqx.nn.BatchNorm(8, axis_name="batch", mode="batch")
        self.head = eqx.nn.Linear(8 * 64, CLASSES, key=two)

    def __call__(self, x, state):
        x, state = self.norm(self.conv(x), state)
        return self.head(jax.nn.relu(x).ravel()), state


@healthy
def batch_norm(key):
    model, state = eqx.nn.make_with_state(Normed)(key)
    x = floats(key, BATCH, 1, 8, 8)

    def loss_fn(model, x, y, state):
        batched = jax.vmap(model, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
        return cross_entropy(batched(x, state)[0], y)

    return Case(loss_fn, model, (x, labels(x), state), {"classes": CLASSES})


class Recurrent(eqx.Module):
    cell: eqx.nn.GRUCell
    head: eqx.nn.Linear

    def __init__(self, key):
        one, two = jr.split(key)
        self.cell = eqx.nn.GRUCell(WIDTH, WIDTH, key=one)
        self.head = eqx.nn.Linear(WIDTH, CLASSES, key=two)

    def __call__(self, xs):
        step = lambda h, x: (self.cell(x, h), None)
        return self.head(jax.lax.scan(step, jnp.zeros(WIDTH, xs.dtype), xs)[0])


@healthy
def gru(key):
    return classifier(Recurrent(key), floats(key, BATCH, TOKENS, WIDTH))


@healthy
def decoder(key):
    return Case(next_token, Transformer(key), (tokens(key),), {"classes": IDS})


@healthy
def encoder(key):
    """Every fourth token is masked, and is to be told from the others."""

    def loss_fn(model, ids):
        masked = jnp.where(jnp.arange(TOKENS) % 4 == 1, 0, ids)
        each = optax.softmax_cross_entropy_with_integer_labels(
            jax.vmap(model)(masked).astype(jnp.float32), ids
        )
        return jnp.mean(each[:, 1::4])

    return Case(
        loss_fn, Transformer(key, causal=False), (tokens(key)[:, :TOKENS],), {"classes": IDS}
    )


class VisionTransformer(eqx.Module):
    patches: eqx.nn.Conv2d
    position: jax.Array
    token: jax.Array
    blocks: list
    norm: LayerNorm
    head: eqx.nn.Linear

    def __init__(self, key, depth=4):
        a, b, c, d, *keys = jr.split(key, depth + 4)
        self.patches = eqx.nn.Conv2d(1, WIDTH, 4, stride=4, key=a)
        self.position = 0.02 * jr.normal(b, (5, WIDTH))
        self.token = 0.02 * jr.normal(c, (1, WIDTH))
        self.blocks = [Block(WIDTH, k) for k in keys]
        self.norm = LayerNorm(WIDTH)
        self.head = eqx.nn.Linear(WIDTH, CLASSES, key=d)

    def __call__(self, image):
        x = self.patches(image).reshape(WIDTH, -1).T
        x = jnp.concatenate([self.token, x]) + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[0]))


@healthy
def vision_transformer(key):
    return classifier(VisionTransformer(key), floats(key, BATCH, 1, 8, 8))


class MixerBlock(eqx.Module):
    norm1: LayerNorm
    over_tokens: eqx.nn.MLP
    norm2: LayerNorm
    over_channels: eqx.nn.MLP

    def __init__(self, key):
        one, two = jr.split(key)
        self.norm1, self.norm2 = LayerNorm(WIDTH), LayerNorm(WIDTH)
        act = jax.nn.gelu
        self.over_tokens = eqx.nn.MLP(TOKENS, TOKENS, 2 * TOKENS, 1, act, key=one)
        self.over_channels = eqx.nn.MLP(WIDTH, WIDTH, 2 * WIDTH, 1, act, key=two)

    def __call__(self, x):
        x = x + jax.vmap(self.over_tokens)(jax.vmap(self.norm1)(x).T).T
        return x + jax.vmap(self.over_channels)(jax.vmap(self.norm2)(x))


class Mixer(eqx.Module):
    blocks: list
    norm: LayerNorm
    head: eqx.nn.Linear

    def __init__(self, key, depth=4):
        head, *keys = jr.split(key, depth + 1)
        self.blocks = [MixerBlock(k) for k in keys]
        self.norm = LayerNorm(WIDTH)
        self.head = eqx.nn.Linear(WIDTH, CLASSES, key=head)

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(jnp.mean(jax.vmap(self.norm)(x), axis=0))


@healthy
def mixer(key):
    return classifier(Mixer(key), floats(key, BATCH, TOKENS, WIDTH))


@healthy
def autoencoder(key):
    one, two, three = jr.split(key, 3)
    model = eqx.nn.Sequential(
        [
            eqx.nn.MLP(WIDTH, 4, 2 * WIDTH, 1, jax.nn.gelu, key=one),
            eqx.nn.MLP(4, WIDTH, 2 * WIDTH, 1, jax.nn.gelu, key=two),
        ]
    )
    x = floats(three, BATCH, 4) @ floats(two, 4, WIDTH)
    return Case(lambda model, x: regress(model, x, x), model, (x,))


@healthy
def layers_in_a_scan(key):
    return classifier(Scanned(12, key, gain=0.3, skip=True), floats(key))


class ZeroGates(eqx.Module):
    """Each block is switched on by a factor that starts at zero."""

    blocks: list
    gates: jax.Array
    head: eqx.nn.Linear

    def __init__(self, key, depth=4):
        head, *keys = jr.split(key, depth + 1)
        self.blocks = [eqx.nn.MLP(WIDTH, WIDTH, 2 * WIDTH, 1, jax.nn.silu, key=k) for k in keys]
        self.gates = jnp.zeros(depth)
        self.head = eqx.nn.Linear(WIDTH, CLASSES, key=head)

    def __call__(self, x):
        for block, gate in zip(self.blocks, self.gates, strict=True):
            x = x + gate * block(x)
        return self.head(x)


@healthy
def gates_that_start_at_zero(key):
    return classifier(ZeroGates(key), floats(key))


@healthy
def dropout(key):
    one, two = jr.split(key)
    model = eqx.nn.Sequential(
        [
            eqx.nn.Linear(WIDTH, 2 * WIDTH, key=one),
            eqx.nn.Lambda(jax.nn.relu),
            eqx.nn.Dropout(0.3),
            eqx.nn.Linear(2 * WIDTH, CLASSES, key=two),
        ]
    )
    x = floats(key)

    def loss_fn(model, x, y, key):
        logits = jax.vmap(lambda x, key: model(x, key=key))(x, jr.split(key, len(x)))
        return cross_entropy(logits, y)

    return Case(loss_fn, model, (x, labels(x), jr.key(1)), {"classes": CLASSES})


# ---- In other dtypes, and trained.


def in_dtype(case, dtype):
    return case._replace(model=cast(case.model, dtype), args=cast(case.args, dtype))


def trained(case, steps=100, rate=3e-3):
    """After some steps of Adam on its one batch, as float32 parameters."""
    optim = optax.adam(rate)
    dynamic, static = eqx.partition(case.model, eqx.is_inexact_array)

    @jax.jit
    def train(dynamic):
        def step(carry, _):
            dynamic, state = carry
            loss = lambda d: case.loss_fn(eqx.combine(d, static), *case.args)
            updates, state = optim.update(jax.grad(loss)(dynamic), state, dynamic)
            return (optax.apply_updates(dynamic, updates), state), None

        return jax.lax.scan(step, (dynamic, optim.init(dynamic)), length=steps)[0]

    dynamic, state = train(dynamic)
    options = {**case.options, "optimiser": (optim, state)}
    return case._replace(model=eqx.combine(dynamic, static), options=options)


STATES = {
    "at the start": lambda case: case,
    "half way": lambda case: trained(case, steps=50),
    "trained": trained,
    "in bfloat16": lambda case: in_dtype(case, jnp.bfloat16),
}
