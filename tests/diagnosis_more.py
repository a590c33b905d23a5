"""Still more healthy models for `diagnose`, and sick ones: they join the zoo.

Of self-supervision, attention of other kinds, sets, graphs, control, equations and flows.
"""

import functools as ft
import math

import diagnosis_models
import diagnosis_zoo as zoo
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from diagnosis_zoo import (
    BATCH,
    CLASSES,
    IDS,
    TOKENS,
    WIDTH,
    Case,
    cross_entropy,
    floats,
    healthy,
    sick,
)


def mlp(ins, outs, key, width=32, depth=1, activation=jax.nn.relu):
    return eqx.nn.MLP(ins, outs, width, depth, activation, key=key)


def linear(ins, outs, key, std=None, bias=True):
    """As Equinox draws it, or normal weights of this standard deviation and no biases."""
    made = eqx.nn.Linear(ins, outs, use_bias=bias, key=key)
    if std is None:
        return made
    made = eqx.tree_at(lambda m: m.weight, made, std * jr.normal(key, made.weight.shape))
    return eqx.tree_at(lambda m: m.bias, made, jnp.zeros(outs)) if bias else made


def of_length_one(x):
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


# ---- Pairs, and attention of other kinds.


class Clip(eqx.Module):
    images: eqx.nn.MLP
    texts: eqx.nn.MLP
    log_scale: jax.Array


@healthy
def clip_with_its_temperature(key):
    """The scale of the logits is learnt, and starts at its largest."""
    a, b = jr.split(key)
    model = Clip(mlp(WIDTH, 8, a), mlp(WIDTH, 8, b), jnp.log(jnp.asarray(100.0)))

    def loss_fn(model, x, y):
        a, b = (of_length_one(jax.vmap(f)(z)) for f, z in ((model.images, x), (model.texts, y)))
        logits, labels = jnp.exp(model.log_scale) * a @ b.T, jnp.arange(len(x))
        return (cross_entropy(logits, labels) + cross_entropy(logits.T, labels)) / 2

    x = floats(a)
    return Case(loss_fn, model, (x, 0.3 * x @ floats(b, WIDTH, WIDTH)))


class CosineAttention(eqx.Module):
    """As of the second Swin: cosines, times a scale that is learnt, less a distance."""

    query: eqx.nn.Linear
    key: eqx.nn.Linear
    value: eqx.nn.Linear
    out: eqx.nn.Linear
    log_scale: jax.Array

    def __init__(self, key):
        keys = jr.split(key, 4)
        self.query, self.key, self.value = (linear(WIDTH, WIDTH, k) for k in keys[:3])
        self.out = linear(WIDTH, CLASSES, keys[3])
        self.log_scale = jnp.log(jnp.asarray(20.0))

    def __call__(self, x):
        q, k, v = (jax.vmap(f)(x) for f in (self.query, self.key, self.value))
        scale = jnp.minimum(jnp.exp(self.log_scale), 100)
        at = jnp.arange(len(x), dtype=x.dtype)
        scores = scale * of_length_one(q) @ of_length_one(k).T - jnp.abs(at[:, None] - at)
        return self.out(jnp.mean(x + jax.nn.softmax(scores, axis=-1) @ v, axis=0))


@healthy
def cosine_attention(key):
    return zoo.classifier(CosineAttention(key), floats(key, BATCH, TOKENS, WIDTH))


class Hopfield(eqx.Module):
    """Looks three times for what is nearest in a memory, with sharp weights."""

    into: eqx.nn.MLP
    memory: jax.Array
    head: eqx.nn.Linear

    def __call__(self, x):
        z = self.into(x)
        for _ in range(3):
            z = jax.nn.softmax(2 * self.memory @ z) @ self.memory
        return self.head(z)


@healthy
def hopfield_memory(key):
    a, b, c = jr.split(key, 3)
    model = Hopfield(mlp(WIDTH, WIDTH, a), floats(b, 24, WIDTH), linear(WIDTH, CLASSES, c))
    return zoo.classifier(model, floats(key))


class Gated(eqx.Module):
    """A block of a gMLP: tokens are mixed by a matrix that starts near zero, with biases of one."""

    norm1: eqx.nn.LayerNorm
    up: eqx.nn.Linear
    norm2: eqx.nn.LayerNorm
    mix: eqx.nn.Linear
    down: eqx.nn.Linear

    def __init__(self, key):
        a, b, c = jr.split(key, 3)
        self.norm1, self.norm2 = eqx.nn.LayerNorm(WIDTH), eqx.nn.LayerNorm(WIDTH)
        self.up, self.down = linear(WIDTH, 2 * WIDTH, a), linear(WIDTH, WIDTH, c)
        mix = linear(TOKENS, TOKENS, b, 1e-3)
        self.mix = eqx.tree_at(lambda m: m.bias, mix, jnp.ones(TOKENS))

    def __call__(self, x):
        h = jax.nn.gelu(jax.vmap(self.up)(jax.vmap(self.norm1)(x)))
        u, v = jnp.split(h, 2, axis=-1)
        v = jax.vmap(self.mix, 1, 1)(jax.vmap(self.norm2)(v))
        return x + jax.vmap(self.down)(u * v)


class Blocks(eqx.Module):
    blocks: list
    head: eqx.nn.Linear

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(jnp.mean(x, axis=0))


@healthy
def gated_mlp(key):
    *keys, head = jr.split(key, 5)
    model = Blocks([Gated(k) for k in keys], linear(WIDTH, CLASSES, head))
    return zoo.classifier(model, floats(key, BATCH, TOKENS, WIDTH))


class LinearAttention(eqx.Module):
    """Of features that are positive, so that it is a sum over the past."""

    norm: eqx.nn.LayerNorm
    query: eqx.nn.Linear
    key: eqx.nn.Linear
    value: eqx.nn.Linear
    out: eqx.nn.Linear

    def __init__(self, key):
        self.norm = eqx.nn.LayerNorm(WIDTH)
        make = (linear(WIDTH, WIDTH, k) for k in jr.split(key, 4))
        self.query, self.key, self.value, self.out = make

    def __call__(self, x):
        h = jax.vmap(self.norm)(x)
        q, k = (jax.nn.elu(jax.vmap(f)(h)) + 1 for f in (self.query, self.key))
        products = k[:, :, None] * jax.vmap(self.value)(h)[:, None]
        sums, total = jnp.cumsum(products, axis=0), jnp.cumsum(k, axis=0)
        y = jnp.einsum("td,tde->te", q, sums) / jnp.sum(q * total, axis=-1, keepdims=True)
        return x + jax.vmap(self.out)(y)


@healthy
def linear_attention(key):
    model = diagnosis_models.Tower(key, LinearAttention, 4)
    return Case(zoo.next_token, model, (zoo.tokens(key),), {"classes": IDS})


# ---- Sets, networks that write networks, losses of other kinds.


class Set(eqx.Module):
    each: eqx.nn.MLP
    whole: eqx.nn.MLP

    def __call__(self, x):
        return self.whole(jnp.sum(jax.vmap(self.each)(x), axis=0))


@healthy
def deep_sets(key):
    """The largest of seven numbers; what is read first of all is a sum."""
    a, b = jr.split(key)
    x = floats(key, BATCH, 7, 4)
    model = Set(mlp(4, 32, a), mlp(32, 1, b))
    return Case(zoo.regress, model, (x, jnp.max(x, axis=1)[:, :1]))


class Writer(eqx.Module):
    """Writes the weights of a small network for each example."""

    mlp: eqx.nn.MLP

    def __call__(self, x, task):
        numbers = self.mlp(task)
        w, b, v = numbers[:64].reshape(16, 4), numbers[64:80], numbers[80:]
        return jnp.tanh(w @ x + b) @ v


@healthy
def hypernetwork(key):
    a, b = jr.split(key)
    x, task = floats(a, BATCH, 4), floats(b, BATCH, 3)
    loss_fn = lambda m, x, task, y: jnp.mean((jax.vmap(m)(x, task) - y) ** 2)
    y = jnp.sin(x[:, 0] * task[:, 0])
    return Case(loss_fn, Writer(mlp(3, 96, key, width=64)), (x, task, y))


@healthy
def quantile_regression(key):
    x = floats(key)
    y = x[:, :1] + floats(jr.fold_in(key, 1), BATCH, 1)

    def loss_fn(model, x, y):
        q, gap = jnp.asarray([0.1, 0.5, 0.9], x.dtype), y - jax.vmap(model)(x)
        return jnp.mean(jnp.maximum(q * gap, (q - 1) * gap).astype(jnp.float32))

    return Case(loss_fn, mlp(WIDTH, 3, key, depth=2), (x, y))


class SparseCode(eqx.Module):
    encoder: eqx.nn.Linear
    decoder: eqx.nn.Linear

    def __call__(self, x):
        code = jax.nn.relu(self.encoder(x))
        return self.decoder(code), jnp.sum(code)


@healthy
def sparse_autoencoder(key):
    a, b = jr.split(key)

    def loss_fn(model, x):
        y, size = jax.vmap(model)(x)
        return jnp.mean((y - x).astype(jnp.float32) ** 2) + 1e-3 * jnp.mean(size)

    return Case(loss_fn, SparseCode(linear(WIDTH, 64, a), linear(64, WIDTH, b)), (floats(key),))


class Tagger(eqx.Module):
    """A chain of tags: its scores are summed over all chains, in a scan."""

    emissions: eqx.nn.MLP
    transitions: jax.Array

    def __call__(self, x, tags):
        scores = jax.vmap(self.emissions)(x)
        chain = jnp.sum(jnp.take_along_axis(scores, tags[:, None], axis=1))
        chain += jnp.sum(self.transitions[tags[:-1], tags[1:]])
        step = lambda a, s: (jax.nn.logsumexp(a[:, None] + self.transitions, axis=0) + s, None)
        return jax.nn.logsumexp(jax.lax.scan(step, scores[0], scores[1:])[0]) - chain


@healthy
def conditional_random_field(key):
    x = floats(key, BATCH, 6, WIDTH)
    tags = (x[..., 0] > 0).astype(int) + 2 * (x[..., 1] > 0)
    model = Tagger(mlp(WIDTH, 4, key), jnp.zeros((4, 4)))
    return Case(lambda m, x, tags: jnp.mean(jax.vmap(m)(x, tags)), model, (x, tags))


# ---- Masked, diffused, by reinforcement, by equations.


class MaskedAutoencoder(eqx.Module):
    """Of images: three of four patches are left out, and told from the others."""

    embed: eqx.nn.Linear
    encoder: list
    mask_token: jax.Array
    position: jax.Array
    decoder: list
    out: eqx.nn.Linear

    def __init__(self, key):
        a, b, c, d, *keys = jr.split(key, 7)
        self.embed = eqx.nn.Linear(4, WIDTH, key=a)
        self.encoder = [zoo.Block(WIDTH, k) for k in keys[:2]]
        self.mask_token = 0.02 * jr.normal(b, (WIDTH,))
        self.position = 0.1 * jr.normal(c, (16, WIDTH))
        self.decoder = [zoo.Block(WIDTH, keys[2])]
        self.out = eqx.nn.Linear(WIDTH, 4, key=d)

    def __call__(self, patches, order):
        seen, hidden = order[:4], order[4:]
        x = jax.vmap(self.embed)(patches[seen]) + self.position[seen]
        for block in self.encoder:
            x = block(x)
        rest = jnp.broadcast_to(self.mask_token, (12, WIDTH)) + self.position[hidden]
        x = jnp.concatenate([x, rest])
        for block in self.decoder:
            x = block(x)
        return jax.vmap(self.out)(x[4:]), patches[hidden]


@healthy
def masked_autoencoder(key):
    def loss_fn(model, patches, orders):
        y, wanted = jax.vmap(model)(patches, orders)
        return jnp.mean((y - wanted).astype(jnp.float32) ** 2)

    orders = jax.vmap(lambda k: jr.permutation(k, 16))(jr.split(key, BATCH))
    x = floats(key, BATCH, 1, 4) * jnp.linspace(0.5, 1.5, 16)[:, None]
    return Case(loss_fn, MaskedAutoencoder(key), (x, orders))


class DiTBlock(eqx.Module):
    """Its norms are shifted and scaled by the condition, by a layer that starts at zero."""

    norm1: eqx.nn.LayerNorm
    norm2: eqx.nn.LayerNorm
    attention: eqx.nn.MultiheadAttention
    mlp: eqx.nn.MLP
    modulation: eqx.nn.Linear

    def __init__(self, key):
        a, b, c = jr.split(key, 3)
        bare = ft.partial(eqx.nn.LayerNorm, WIDTH, use_weight=False, use_bias=False)
        self.norm1, self.norm2 = bare(), bare()
        self.attention = eqx.nn.MultiheadAttention(2, WIDTH, key=a)
        self.mlp = eqx.nn.MLP(WIDTH, WIDTH, 2 * WIDTH, 1, jax.nn.gelu, key=b)
        self.modulation = linear(WIDTH, 6 * WIDTH, c, 0.0)

    def __call__(self, x, c):
        s1, b1, g1, s2, b2, g2 = jnp.split(self.modulation(jax.nn.silu(c)), 6)
        h = jax.vmap(self.norm1)(x) * (1 + s1) + b1
        x = x + g1 * self.attention(h, h, h)
        return x + g2 * jax.vmap(self.mlp)(jax.vmap(self.norm2)(x) * (1 + s2) + b2)


class DiT(eqx.Module):
    into: eqx.nn.Linear
    time: eqx.nn.MLP
    blocks: DiTBlock
    out: eqx.nn.Linear

    def __init__(self, key, depth=4):
        a, b, c = jr.split(key, 3)
        self.into = eqx.nn.Linear(4, WIDTH, key=a)
        self.time = eqx.nn.MLP(8, WIDTH, WIDTH, 1, jax.nn.silu, key=b)
        self.blocks = eqx.filter_vmap(DiTBlock)(jr.split(c, depth))
        self.out = linear(WIDTH, 4, c, 0.0)

    def __call__(self, x, t):
        waves = t * jnp.exp(jnp.linspace(0, 3, 4)).astype(t.dtype)
        c = self.time(jnp.concatenate([jnp.sin(waves), jnp.cos(waves)]))
        x = jax.vmap(self.into)(x)
        arrays, static = eqx.partition(self.blocks, eqx.is_array)
        x = jax.lax.scan(lambda x, a: (eqx.combine(a, static)(x, c), None), x, arrays)[0]
        return jax.vmap(self.out)(x)


@healthy
def flow_matching_transformer(key):
    """In a scan; all of its blocks start as the identity, and its output at zero."""

    def loss_fn(model, x, noise, t):
        at = t[:, None, None] * x + (1 - t[:, None, None]) * noise
        return jnp.mean((jax.vmap(model)(at, t) - (x - noise)).astype(jnp.float32) ** 2)

    a, b, c = jr.split(key, 3)
    x = jnp.cumsum(floats(a, BATCH, TOKENS, 4), axis=1) / 3
    return Case(loss_fn, DiT(key), (x, floats(b, BATCH, TOKENS, 4), jr.uniform(c, (BATCH,))))


class SquashedPolicy(eqx.Module):
    torso: eqx.nn.MLP

    def __call__(self, obs, noise):
        mean, log_std = jnp.split(self.torso(obs), 2)
        log_std = jnp.clip(log_std, -5, 2)
        raw = mean + jnp.exp(log_std) * noise
        log_p = jnp.sum(-0.5 * noise**2 - log_std - 0.919)
        log_p -= jnp.sum(2 * (math.log(2) - raw - jax.nn.softplus(-2 * raw)))
        return jnp.tanh(raw), log_p


class SoftActorCritic(eqx.Module):
    policy: SquashedPolicy
    critics: eqx.nn.MLP
    log_alpha: jax.Array


@healthy
def soft_actor_critic(key):
    """The three losses in one; two critics are an ensemble."""
    a, b, c = jr.split(key, 3)
    critic = lambda k: eqx.nn.MLP(10, "scalar", 32, 2, key=k)
    critics = eqx.filter_vmap(critic)(jr.split(b, 2))
    model = SoftActorCritic(SquashedPolicy(eqx.nn.MLP(8, 4, 32, 2, key=a)), critics, jnp.zeros(()))
    stop = jax.lax.stop_gradient

    def values(critics, obs, actions):
        x = jnp.concatenate([obs, actions], axis=-1)
        each = eqx.filter_vmap(lambda m, x: jax.vmap(m)(x), in_axes=(eqx.if_array(0), None))
        return each(critics, x)

    def loss_fn(model, target, obs, actions, rewards, after, noise):
        alpha = jnp.exp(model.log_alpha)
        new, log_p = jax.vmap(model.policy)(after, noise)
        best = jnp.min(values(target, after, new), axis=0) - alpha * log_p
        wanted = stop(rewards + 0.99 * best)
        of_critics = jnp.mean((values(model.critics, obs, actions) - wanted) ** 2)
        new, log_p = jax.vmap(model.policy)(obs, noise)
        frozen = jax.tree.map(lambda x: stop(x) if eqx.is_array(x) else x, model.critics)
        of_policy = jnp.mean(stop(alpha) * log_p - jnp.min(values(frozen, obs, new), axis=0))
        of_alpha = -jnp.mean(model.log_alpha * stop(log_p - 2))
        return (of_critics + of_policy + of_alpha).astype(jnp.float32)

    obs, after = floats(a, BATCH, 8), floats(b, BATCH, 8)
    actions, noise = jnp.tanh(floats(c, BATCH, 2)), floats(key, BATCH, 2)
    return Case(loss_fn, model, (critics, obs, actions, obs[:, 0], after, noise))


class Sine(eqx.Module):
    layers: list
    frequency: float = eqx.field(static=True)

    def __init__(self, key, frequency=10.0):
        keys = jr.split(key, 4)
        sizes, self.frequency = (2, 24, 24, 24, 1), frequency
        self.layers = []
        for i, (k, ins, outs) in enumerate(zip(keys, sizes, sizes[1:], strict=False)):
            limit = 1 / ins if i == 0 else (6 / ins) ** 0.5 / frequency
            weight = jr.uniform(k, (outs, ins), minval=-limit, maxval=limit)
            made = eqx.nn.Linear(ins, outs, key=k)
            self.layers.append(eqx.tree_at(lambda m: m.weight, made, weight))

    def __call__(self, x):
        for layer in self.layers[:-1]:
            x = jnp.sin(self.frequency * layer(x))
        return self.layers[-1](x)[0]


@healthy
def poisson_by_hessians(key):
    """A field of sines, and the trace of its Hessian in the loss."""

    def loss_fn(model, x, edge):
        laplace = jax.vmap(lambda x: jnp.trace(jax.hessian(model)(x)))(x)
        source = -2 * jnp.pi**2 * jnp.prod(jnp.sin(jnp.pi * x), axis=-1)
        inside = jnp.mean(((laplace - source) / 20).astype(jnp.float32) ** 2)
        return inside + jnp.mean(jax.vmap(model)(edge).astype(jnp.float32) ** 2)

    x = jr.uniform(key, (BATCH, 2))
    return Case(loss_fn, Sine(key), (x, x.at[:, 0].set(jnp.round(x[:, 0]))))


class MaskedLinear(eqx.Module):
    linear: eqx.nn.Linear
    mask: tuple = eqx.field(static=True)

    def __call__(self, x):
        mask = jnp.asarray(self.mask, x.dtype)
        return (self.linear.weight * mask) @ x + self.linear.bias


class Autoregressive(eqx.Module):
    """Of a flow: entry i reads those before it, so that the masks leave whole rows at zero."""

    layers: list

    def __init__(self, key, size=6, hidden=32):
        ranks = [range(size), [i % (size - 1) for i in range(hidden)], [*range(size)] * 2]
        keys = jr.split(key, 2)
        self.layers = []
        for i, k in enumerate(keys):
            after = (lambda out, into: out > into) if i else (lambda out, into: out >= into)
            mask = tuple(tuple(after(o, r) for r in ranks[i]) for o in ranks[i + 1])
            made = eqx.nn.Linear(len(ranks[i]), len(ranks[i + 1]), key=k)
            self.layers.append(MaskedLinear(made, mask))

    def __call__(self, x):
        shift, log_scale = jnp.split(self.layers[1](jnp.tanh(self.layers[0](x))), 2)
        return (x - shift) * jnp.exp(-log_scale), -jnp.sum(log_scale)


@healthy
def masked_autoregressive_flow(key):
    model = [Autoregressive(k) for k in jr.split(key, 3)]

    def log_density(model, x):
        total = 0.0
        for each in model:
            x, log_slope = each(x)
            x, total = x[::-1], total + log_slope
        return total - 0.5 * jnp.sum(x**2) - 3 * math.log(2 * math.pi)

    x = floats(key, BATCH, 6)
    x = x.at[:, 1].set(x[:, 0] ** 2 + 0.3 * x[:, 1])
    loss_fn = lambda model, x: -jnp.mean(jax.vmap(log_density, (None, 0))(model, x))
    return Case(loss_fn, model, (x,))


class Temporal(eqx.Module):
    """Dilated convolutions whose weights are normed."""

    convs: list
    out: eqx.nn.Linear

    def __init__(self, key, depth=4):
        *keys, last = jr.split(key, depth + 1)
        conv = lambda i, k: eqx.nn.Conv1d(4 if i == 0 else 8, 8, 3, dilation=2**i, key=k)
        self.convs = [eqx.nn.WeightNorm(conv(i, k)) for i, k in enumerate(keys)]
        self.out = eqx.nn.Linear(8, CLASSES, key=last)

    def __call__(self, x):
        for i, conv in enumerate(self.convs):
            h = jax.nn.relu(conv(jnp.pad(x, ((0, 0), (2 * 2**i, 0)))))
            x = h if i == 0 else x + h
        return self.out(x[:, -1])


@healthy
def temporal_convolutions_with_weight_norm(key):
    x = floats(key, BATCH, 4, 20)
    return Case(zoo.classify, Temporal(key), (x, zoo.labels(x)), {"classes": CLASSES})


class DeepONet(eqx.Module):
    branch: eqx.nn.MLP
    trunk: eqx.nn.MLP
    bias: jax.Array

    def __call__(self, u, at):
        return self.branch(u) @ self.trunk(at) + self.bias


@healthy
def deep_operator_network(key):
    """The integral of a function that is given at 12 points, asked at 7."""
    a, b, c = jr.split(key, 3)
    branch = eqx.nn.MLP(12, 16, 32, 2, jax.nn.gelu, key=a)
    trunk = eqx.nn.MLP(1, 16, 32, 2, jnp.tanh, final_activation=jnp.tanh, key=b)
    waves = floats(c, BATCH, 3)
    grid, at = jnp.linspace(0, 1, 12), jr.uniform(c, (7, 1))
    n = jnp.pi * jnp.arange(1, 4)
    u = waves @ jnp.cos(n[:, None] * grid)
    y = waves @ (jnp.sin(n[:, None] * at[:, 0]) / n[:, None])

    def loss_fn(model, u, at, y):
        each = jax.vmap(jax.vmap(model, (None, 0)), (0, None))(u, at)
        return jnp.mean((each - y).astype(jnp.float32) ** 2)

    return Case(loss_fn, DeepONet(branch, trunk, jnp.zeros(())), (u, at, y))


def matrices_of(tree, std, key):
    """The tree, in which all matrices are drawn with this standard deviation."""
    arrays, static = eqx.partition(tree, eqx.is_array)
    leaves, structure = jax.tree.flatten(arrays)
    keys = jr.split(key, len(leaves))
    draw = lambda x, k: std * jr.normal(k, x.shape) if x.ndim > 1 else x
    drawn = map(draw, leaves, keys)
    return eqx.combine(jax.tree.unflatten(structure, drawn), static)


class SmallStart(eqx.Module):
    """GPT-2's: weights of .02, what ends a branch smaller by the root of their number."""

    embedding: eqx.nn.Embedding
    blocks: list
    norm: eqx.nn.LayerNorm

    def __init__(self, key, depth=4):
        a, b, *keys = jr.split(key, depth + 2)
        self.embedding = eqx.nn.Embedding(weight=0.02 * jr.normal(a, (IDS, WIDTH)))
        blocks = matrices_of([zoo.Block(WIDTH, k, causal=True) for k in keys], 0.02, b)
        ends = lambda blocks: [w for b in blocks for w in (b.attention.output_proj, b.down)]
        weights = lambda blocks: [end.weight for end in ends(blocks)]
        self.blocks = eqx.tree_at(weights, blocks, replace_fn=lambda w: w / (2 * depth) ** 0.5)
        self.norm = eqx.nn.LayerNorm(WIDTH)

    def __call__(self, ids):
        x = jax.vmap(self.embedding)(ids)
        for block in self.blocks:
            x = block(x)
        return jax.vmap(self.norm)(x) @ self.embedding.weight.T


@healthy
def weights_of_a_fiftieth(key):
    return Case(zoo.next_token, SmallStart(key), (zoo.tokens(key),), {"classes": IDS})


class LinearRecurrent(eqx.Module):
    """Of complex numbers on the diagonal, inside of the unit circle."""

    log_rate: jax.Array
    log_angle: jax.Array
    into: jax.Array
    out: jax.Array
    gate: eqx.nn.Linear
    norm: eqx.nn.LayerNorm

    def __init__(self, key, states=12):
        a, b, c, d, e = jr.split(key, 5)
        radius = jnp.sqrt(jr.uniform(a, (states,), minval=0.8, maxval=0.98))
        self.log_rate = jnp.log(-jnp.log(radius))
        self.log_angle = jnp.log(jr.uniform(b, (states,), minval=0.01, maxval=3.0))
        self.into = jr.normal(c, (2, states, WIDTH)) / (2 * WIDTH) ** 0.5
        self.out = jr.normal(d, (2, WIDTH, states)) / states**0.5
        self.gate = eqx.nn.Linear(WIDTH, 2 * WIDTH, key=e)
        self.norm = eqx.nn.LayerNorm(WIDTH)

    def __call__(self, xs):
        wide = lambda x: x.astype(jnp.float32)
        rate, angle = jnp.exp(wide(self.log_rate)), jnp.exp(wide(self.log_angle))
        decay = jnp.exp(-rate + 1j * angle)
        u = wide(jax.vmap(self.norm)(xs)) @ (wide(self.into[0]) + 1j * wide(self.into[1])).T
        u = jnp.sqrt(1 - jnp.abs(decay) ** 2) * u
        join = lambda a, b: (a[0] * b[0], b[0] * a[1] + b[1])
        decays = jnp.broadcast_to(decay, u.shape)
        h = jax.lax.associative_scan(join, (decays, u))[1]
        y = (h @ (wide(self.out[0]) + 1j * wide(self.out[1])).T).real.astype(xs.dtype)
        value, gate = jnp.split(jax.vmap(self.gate)(jax.nn.gelu(y)), 2, axis=-1)
        return xs + value * jax.nn.sigmoid(gate)


class Sequence(eqx.Module):
    embedding: eqx.nn.Embedding
    blocks: list
    head: eqx.nn.Linear

    def __init__(self, key, block, depth=3):
        a, b, *keys = jr.split(key, depth + 2)
        self.embedding = eqx.nn.Embedding(IDS, WIDTH, key=a)
        self.blocks = [block(k) for k in keys]
        self.head = eqx.nn.Linear(WIDTH, IDS, key=b)

    def __call__(self, ids):
        x = jax.vmap(self.embedding)(ids)
        for block in self.blocks:
            x = block(x)
        return jax.vmap(self.head)(x)


@healthy
def linear_recurrent_unit(key):
    model = Sequence(key, LinearRecurrent)
    return Case(zoo.next_token, model, (zoo.tokens(key),), {"classes": IDS})


class Slots(eqx.Module):
    """Slot attention: slots compete for the inputs, and are changed by a cell, three times."""

    into: eqx.nn.MLP
    start: jax.Array
    query: eqx.nn.Linear
    key: eqx.nn.Linear
    value: eqx.nn.Linear
    cell: eqx.nn.GRUCell
    out: eqx.nn.MLP

    def __init__(self, key):
        a, b, c, d, e, f, g = jr.split(key, 7)
        self.into = eqx.nn.MLP(3, WIDTH, WIDTH, 1, key=a)
        self.start = jr.normal(b, (4, WIDTH))
        bare = ft.partial(eqx.nn.Linear, WIDTH, WIDTH, use_bias=False)
        self.query, self.key, self.value = bare(key=c), bare(key=d), bare(key=e)
        self.cell = eqx.nn.GRUCell(WIDTH, WIDTH, key=f)
        self.out = eqx.nn.MLP(WIDTH, 3, WIDTH, 1, key=g)

    def __call__(self, x):
        h = jax.vmap(self.into)(x)
        k, v, slots = jax.vmap(self.key)(h), jax.vmap(self.value)(h), self.start
        for _ in range(3):
            q = jax.vmap(self.query)(slots)
            weights = jax.nn.softmax(k @ q.T / WIDTH**0.5, axis=-1) + 1e-6
            weights /= jnp.sum(weights, axis=0)
            slots = jax.vmap(self.cell)(weights.T @ v, slots)
        return jax.vmap(self.out)(slots)


@healthy
def slot_attention(key):
    """Finds the four centres of points; each is matched with the nearest slot."""
    a, b = jr.split(key)
    centres = 3 * floats(a, BATCH, 4, 3)
    x = (centres[:, :, None] + 0.2 * floats(b, BATCH, 4, 5, 3)).reshape(BATCH, 20, 3)

    def loss_fn(model, x, centres):
        gaps = jax.vmap(model)(x)[:, :, None] - centres[:, None]
        far = jnp.sum(gaps.astype(jnp.float32) ** 2, axis=-1)
        return jnp.mean(jnp.min(far, axis=1)) + jnp.mean(jnp.min(far, axis=2))

    return Case(loss_fn, Slots(key), (x, centres))


@healthy
def distributional_deep_q_network(key):
    """Over 21 values for each of six actions; that after is shifted and shared out."""
    model = eqx.nn.MLP(8, 6 * 21, 32, 2, key=key)
    values = jnp.linspace(-2, 2, 21)

    def loss_fn(model, target, obs, actions, rewards, after):
        logits = jax.vmap(model)(obs).reshape(-1, 6, 21)
        p = jax.nn.softmax(jax.vmap(target)(after).reshape(-1, 6, 21), axis=-1)
        best = jnp.take_along_axis(p, jnp.argmax(p @ values, -1)[:, None, None], 1)[:, 0]
        at = (jnp.clip(rewards[:, None] + 0.9 * values, -2, 2) + 2) / 0.2
        share = jnp.maximum(1 - jnp.abs(at[:, :, None] - jnp.arange(21)), 0)
        wanted = jax.lax.stop_gradient(jnp.einsum("bi,bij->bj", best, share))
        chosen = jnp.take_along_axis(logits, actions[:, None, None], 1)[:, 0]
        return jnp.mean(optax.softmax_cross_entropy(chosen.astype(jnp.float32), wanted))

    obs, after = floats(key, BATCH, 8), floats(jr.fold_in(key, 1), BATCH, 8)
    actions = jr.randint(key, (BATCH,), 0, 6)
    return Case(loss_fn, model, (model, obs, actions, obs[:, 0], after))


@healthy
def preferences_of_a_language_model(key):
    """DPO: it starts as its reference, which is given beside it."""
    model = zoo.Transformer(key, 2)

    def log_p(model, ids):
        logits = jax.nn.log_softmax(jax.vmap(model)(ids[:, :-1]).astype(jnp.float32))
        return jnp.sum(jnp.take_along_axis(logits, ids[:, 1:, None], axis=-1), axis=(1, 2))

    def loss_fn(model, reference, good, bad):
        gain = lambda ids: log_p(model, ids) - log_p(reference, ids)
        return -jnp.mean(jax.nn.log_sigmoid(0.5 * (gain(good) - gain(bad))))

    return Case(loss_fn, model, (model, zoo.tokens(key), zoo.tokens(jr.fold_in(key, 1))))


@healthy
def actions_that_are_forbidden(key):
    """An actor whose logits are masked by -1e9, with the entropy of what is left."""
    model = eqx.nn.MLP(8, 12, 32, 2, jnp.tanh, key=key)

    def loss_fn(model, obs, allowed, actions, advantages):
        logits = jnp.where(allowed, jax.vmap(model)(obs).astype(jnp.float32), -1e9)
        log_p = jax.nn.log_softmax(logits)
        entropy = -jnp.sum(jnp.where(allowed, jnp.exp(log_p) * log_p, 0), axis=-1)
        chosen = jnp.take_along_axis(log_p, actions[:, None], axis=1)[:, 0]
        return -jnp.mean(advantages * chosen + 0.01 * entropy)

    obs = floats(key, BATCH, 8)
    allowed = jr.bernoulli(key, 0.5, (BATCH, 12)).at[:, 0].set(True)
    actions = jnp.argmax(allowed * jr.uniform(key, allowed.shape), axis=-1)
    return Case(loss_fn, model, (obs, allowed, actions, floats(jr.fold_in(key, 1), BATCH)))


@healthy
def pairs_by_sigmoids(key):
    """SigLIP: a bias of -10 says of each pair that it is none."""

    class Pairs(eqx.Module):
        images: eqx.nn.MLP
        texts: eqx.nn.MLP
        log_scale: jax.Array
        bias: jax.Array

        def __call__(self, x, y):
            a, b = self.images(x), self.texts(y)
            return a / jnp.linalg.norm(a), b / jnp.linalg.norm(b)

    a, b = jr.split(key)
    mlp = lambda k: eqx.nn.MLP(WIDTH, 8, 32, 1, key=k)
    model = Pairs(mlp(a), mlp(b), jnp.log(jnp.asarray(10.0)), jnp.asarray(-10.0))

    def loss_fn(model, x, y):
        a, b = jax.vmap(model)(x, y)
        logits = jnp.exp(model.log_scale) * a @ b.T + model.bias
        signs = 2 * jnp.eye(len(x)) - 1
        return -jnp.mean(jnp.sum(jax.nn.log_sigmoid(signs * logits.astype(jnp.float32)), axis=-1))

    x = floats(key)
    return Case(loss_fn, model, (x, x @ floats(a, WIDTH, WIDTH) / 4))


class GraphCell(eqx.Module):
    """Gated: one cell, four rounds of messages in a scan."""

    message: eqx.nn.Linear
    cell: eqx.nn.GRUCell
    out: eqx.nn.Linear

    def __init__(self, key):
        a, b, c = jr.split(key, 3)
        self.message = eqx.nn.Linear(WIDTH, WIDTH, key=a)
        self.cell = eqx.nn.GRUCell(WIDTH, WIDTH, key=b)
        self.out = eqx.nn.Linear(WIDTH, CLASSES, key=c)

    def __call__(self, edges, x):
        def step(h, _):
            return jax.vmap(self.cell)(edges @ jax.vmap(self.message)(h), h), None

        return self.out(jnp.mean(jax.lax.scan(step, x, length=4)[0], axis=0))


@healthy
def gated_graph_network(key):
    edges = jr.bernoulli(key, 0.3, (BATCH, 6, 6)).astype(jnp.float32)
    x = floats(key, BATCH, 6, WIDTH)
    loss_fn = lambda m, edges, x, y: zoo.cross_entropy(jax.vmap(m)(edges, x), y)
    return Case(loss_fn, GraphCell(key), (edges, x, zoo.labels(x)), {"classes": CLASSES})


# ---- Sick.


class Adapted(eqx.Module):
    """A layer beside two factors, both of which start at zero."""

    linear: eqx.nn.Linear
    down: jax.Array
    up: jax.Array

    def __init__(self, linear):
        self.linear = linear
        self.down = jnp.zeros((2, linear.in_features))
        self.up = jnp.zeros((linear.out_features, 2))

    def __call__(self, x, *, key=None):
        return self.linear(x) + self.up @ (self.down @ x)


@sick
def adapters_of_zeros_in_a_scan(key):
    """Of a decoder, of which nothing else is trained."""

    def block(key):
        some = lambda b: (b.up, b.attention.query_proj)
        return eqx.tree_at(some, zoo.Block(WIDTH, key, causal=True), replace_fn=Adapted)

    model = diagnosis_models.Tower(key, block, 3, scanned=True)
    some = lambda m: (m.blocks.up, m.blocks.attention.query_proj)
    factors = lambda m: [factor for each in some(m) for factor in (each.down, each.up)]
    which = eqx.tree_at(factors, jax.tree.map(lambda _: False, model), replace_fn=lambda _: True)
    trained, frozen = eqx.partition(model, which)
    loss_fn = lambda trained, frozen, ids: zoo.next_token(eqx.combine(trained, frozen), ids)
    return zoo.ill(Case(loss_fn, trained, (frozen, zoo.tokens(key))), ("no gradient", ""))


@sick
def projections_of_equal_weights(key):
    """Of an attention, in a scan over the layers."""
    block = lambda k: zoo.Block(WIDTH, k, causal=True)
    model = diagnosis_models.Tower(key, block, 3, scanned=True)
    names = [f"{name}_proj" for name in ("query", "key", "value", "output")]
    of = lambda m: [getattr(m.blocks.attention, name).weight for name in names]
    model = eqx.tree_at(of, model, replace_fn=lambda w: jnp.full_like(w, 0.05))
    places = [("identical units", f"blocks.attention.{name}.weight") for name in names]
    return zoo.ill(Case(zoo.next_token, model, (zoo.tokens(key),)), *places)


class Recurrence(eqx.Module):
    """Its parameters are in the module itself."""

    matrix: jax.Array
    into: jax.Array
    head: eqx.nn.Linear

    def __call__(self, xs):
        step = lambda h, x: (jax.nn.relu(self.matrix @ h + self.into @ x), None)
        return self.head(jax.lax.scan(step, jnp.zeros(WIDTH), xs)[0])


@sick
def a_recurrence_of_relus_that_explodes(key):
    a, b, c = jr.split(key, 3)
    matrix = 2 * jnp.eye(WIDTH) + 0.1 * floats(a, WIDTH, WIDTH)
    model = Recurrence(matrix, floats(b, WIDTH, WIDTH), linear(WIDTH, 1, c))
    x = floats(key, BATCH, 50, WIDTH)
    case = Case(zoo.regress, model, (x, x[:, 0, :1]))
    return zoo.ill(case, ("growing activations", ""), ("growing activations", "head"))


@sick
def a_dropout_for_an_activation(key):
    a, b = jr.split(key)
    layers = [linear(WIDTH, 32, a), eqx.nn.Dropout(0.1), linear(32, CLASSES, b)]
    x = floats(key)

    def loss_fn(model, x, y, key):
        run = lambda x, key: model(x, key=key)
        return cross_entropy(jax.vmap(run)(x, jr.split(key, len(x))), y)

    case = Case(loss_fn, eqx.nn.Sequential(layers), (x, zoo.labels(x), key))
    return zoo.ill(case, ("no activation", "layers[0]"))


@sick
def an_activation_that_returns_its_input(key):
    model = eqx.nn.MLP(WIDTH, CLASSES, 32, 2, eqx.nn.Identity(), key=key)
    places = [("no activation", f"layers[{i}]") for i in range(2)]
    return zoo.ill(zoo.classifier(model, floats(key)), *places)


def of_members(models, x, y):
    run = eqx.filter_vmap(lambda m, x: jax.vmap(m)(x), in_axes=(eqx.if_array(0), None))
    return jnp.mean(jax.vmap(cross_entropy, (0, None))(run(models, x), y))


@sick
def scores_of_one_member_too_large(key):
    """Of three that read the same data, and have their attention in the model itself."""
    models = eqx.filter_vmap(lambda k: zoo.Heads(k))(jr.split(key, 3))
    weight = models.attention.query.weight.at[1].multiply(1e3)
    models = eqx.tree_at(lambda m: m.attention.query.weight, models, weight)
    x = floats(key, BATCH, TOKENS, WIDTH)
    return zoo.ill(Case(of_members, models, (x, zoo.labels(x))), ("saturated", "attention"))


@sick
def a_mean_of_normed_tokens(key):
    """A block, a norm, and the mean of all that it returns."""

    class Mean(eqx.Module):
        into: eqx.nn.Linear
        block: zoo.Block
        norm: eqx.nn.LayerNorm

        def __call__(self, x):
            return jnp.mean(jax.vmap(self.norm)(self.block(jax.vmap(self.into)(x))))

    a, b = jr.split(key)
    model = Mean(linear(4, WIDTH, a), zoo.Block(WIDTH, b), eqx.nn.LayerNorm(WIDTH))
    loss_fn = lambda model, x: jnp.mean((jax.vmap(model)(x) - 1) ** 2)
    return zoo.ill(
        Case(loss_fn, model, (floats(key, BATCH, TOKENS, 4),)), ("cancelled gradient", "norm")
    )
