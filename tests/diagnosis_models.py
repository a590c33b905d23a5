"""More healthy models for `diagnose`, of kinds that people train: they join those of the zoo.

Each has something that looks like an illness: losses with margins, gates, cells that come again in
every step, branches that start at zero, outputs that are sure of themselves.
"""

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


def batched(model, x):
    return jax.vmap(model)(x)


# ---- Over time.


class Language(eqx.Module):
    """A recurrent language model: in the first step, the same token for all."""

    embedding: eqx.nn.Embedding
    cell: eqx.Module
    head: eqx.nn.Linear

    def __init__(self, key, cell):
        one, two, three = jr.split(key, 3)
        self.embedding = eqx.nn.Embedding(IDS, WIDTH, key=one)
        self.cell = cell(WIDTH, WIDTH, key=two)
        self.head = eqx.nn.Linear(WIDTH, IDS, key=three)

    def __call__(self, tokens):
        zeros = jnp.zeros(WIDTH, self.head.weight.dtype)
        state = (zeros, zeros) if isinstance(self.cell, eqx.nn.LSTMCell) else zeros

        def step(state, token):
            state = self.cell(self.embedding(token), state)
            h = state[0] if isinstance(state, tuple) else state
            return state, self.head(h)

        return jax.lax.scan(step, state, tokens)[1]


def language_model(model, key):
    ids = zoo.tokens(key).at[:, 0].set(0)
    return Case(zoo.next_token, model, (ids,), {"classes": IDS})


@healthy
def lstm_language_model(key):
    return language_model(Language(key, eqx.nn.LSTMCell), key)


@healthy
def gru_language_model(key):
    return language_model(Language(key, eqx.nn.GRUCell), key)


class Elman(eqx.Module):
    """A linear layer in a recurrent scan, as wide as the scan is long."""

    cell: eqx.nn.Linear
    head: eqx.nn.Linear

    def __init__(self, key):
        one, two = jr.split(key)
        self.cell = eqx.nn.Linear(2 * WIDTH, WIDTH, key=one)
        self.head = eqx.nn.Linear(WIDTH, CLASSES, key=two)

    def __call__(self, xs):
        def step(cell_arrays):
            def run(h, x):
                cell = eqx.combine(cell_arrays, static)
                return jnp.tanh(cell(jnp.concatenate([h, x]))), None

            return run

        arrays, static = eqx.partition(self.cell, eqx.is_array)
        h = jax.lax.scan(step(arrays), jnp.zeros(WIDTH, xs.dtype), xs)[0]
        return self.head(h)


@healthy
def elman(key):
    return zoo.classifier(Elman(key), floats(key, BATCH, WIDTH, WIDTH))


class StateSpace(eqx.Module):
    """A selective state space as in Mamba: its decay starts the same in every layer."""

    norm: eqx.nn.RMSNorm
    into: eqx.nn.Linear
    parts: eqx.nn.Linear
    out: eqx.nn.Linear
    log_decay: jax.Array
    skip: jax.Array

    def __init__(self, key, states=4):
        one, two, three = jr.split(key, 3)
        self.norm = eqx.nn.RMSNorm(WIDTH)
        self.into = eqx.nn.Linear(WIDTH, 2 * WIDTH, key=one)
        self.parts = eqx.nn.Linear(WIDTH, 2 * states + WIDTH, key=two)
        self.out = eqx.nn.Linear(WIDTH, WIDTH, key=three)
        self.log_decay = jnp.tile(jnp.log(jnp.arange(1.0, states + 1)), (WIDTH, 1))
        self.skip = jnp.ones(WIDTH)

    def __call__(self, xs):
        x, gate = jnp.split(jax.vmap(self.into)(jax.vmap(self.norm)(xs)), 2, axis=-1)
        x = jax.nn.silu(x)
        states = self.log_decay.shape[1]
        b, c, rate = jnp.split(jax.vmap(self.parts)(x), [states, 2 * states], axis=-1)
        rate = jax.nn.softplus(rate)

        def step(h, now):
            x, b, c, rate = now
            decay = jnp.exp(-rate[:, None] * jnp.exp(self.log_decay))
            h = decay * h + (rate * x)[:, None] * b
            return h, h @ c + self.skip * x

        ys = jax.lax.scan(step, jnp.zeros_like(self.log_decay), (x, b, c, rate))[1]
        return xs + jax.vmap(self.out)(ys * jax.nn.silu(gate))


class Tower(eqx.Module):
    """Blocks over embedded tokens, unrolled or scanned."""

    embedding: eqx.nn.Embedding
    blocks: list | eqx.Module
    head: eqx.nn.Linear

    def __init__(self, key, block, depth=4, scanned=False):
        one, two, *keys = jr.split(key, depth + 2)
        self.embedding = eqx.nn.Embedding(IDS, WIDTH, key=one)
        self.blocks = (
            eqx.filter_vmap(block)(jnp.stack(keys)) if scanned else [block(k) for k in keys]
        )
        self.head = eqx.nn.Linear(WIDTH, IDS, key=two)

    def __call__(self, tokens):
        x = jax.vmap(self.embedding)(tokens)
        if isinstance(self.blocks, list):
            for block in self.blocks:
                x = block(x)
        else:
            arrays, static = eqx.partition(self.blocks, eqx.is_array)
            step = lambda x, block: (eqx.combine(block, static)(x), None)
            x = jax.lax.scan(step, x, arrays)[0]
        return jax.vmap(self.head)(x)


@healthy
def state_space_model(key):
    return Case(zoo.next_token, Tower(key, StateSpace, 3), (zoo.tokens(key),), {"classes": IDS})


@healthy
def transformer_in_a_scan(key):
    model = Tower(key, lambda k: zoo.Block(WIDTH, k, causal=True), scanned=True)
    return Case(zoo.next_token, model, (zoo.tokens(key),), {"classes": IDS})


@healthy
def neural_ode(key):
    """One field, called in every step of a solver."""
    field = eqx.nn.MLP(WIDTH, WIDTH, 2 * WIDTH, 1, jnp.tanh, key=key)

    def loss_fn(field, x, y):
        step = lambda x, _: (x + field(x) / 8, None)
        end = jax.vmap(lambda x: jax.lax.scan(step, x, length=8)[0])(x)
        return jnp.mean((end - y).astype(jnp.float32) ** 2)

    x = floats(key)
    return Case(loss_fn, field, (x, jnp.roll(x, 1, axis=1)))


# ---- Losses with a margin, a penalty, a term that may be silent.


@healthy
def hinge(key):
    model = eqx.nn.MLP(WIDTH, CLASSES, 2 * WIDTH, 2, key=key)
    x = floats(key)

    def loss_fn(model, x, y):
        scores = batched(model, x)
        right = jnp.take_along_axis(scores, y[:, None], axis=1)
        margins = jax.nn.relu(1 + scores - right)
        return jnp.mean(jnp.sum(margins, axis=1) - 1) + jnp.mean(jax.nn.relu(jnp.abs(scores) - 5))

    return Case(loss_fn, model, (x, zoo.labels(x)))


@healthy
def triplet(key):
    model = eqx.nn.MLP(WIDTH, 8, 2 * WIDTH, 1, key=key)
    x, noise = floats(key), floats(jr.fold_in(key, 1))

    def loss_fn(model, x, positive):
        a, p = batched(model, x), batched(model, positive)
        gap = jnp.sum((a - p) ** 2, -1) - jnp.sum((a - jnp.roll(a, 1, axis=0)) ** 2, -1)
        return jnp.mean(jnp.maximum(gap + 1, 0))

    return Case(loss_fn, model, (x, x + 0.1 * noise))


@healthy
def contrastive(key):
    model = eqx.nn.MLP(WIDTH, 8, 2 * WIDTH, 1, key=key)
    x, noise = floats(key), floats(jr.fold_in(key, 1))

    def loss_fn(model, x, other):
        a, b = (z / jnp.linalg.norm(z, axis=-1, keepdims=True) for z in
                (batched(model, x), batched(model, other)))  # fmt: skip
        return cross_entropy(10 * a @ b.T, jnp.arange(len(x)))

    return Case(loss_fn, model, (x, x + 0.3 * noise))


class Variational(eqx.Module):
    encoder: eqx.nn.MLP
    decoder: eqx.nn.MLP

    def __call__(self, x, key):
        mean, log_scale = jnp.split(self.encoder(x), 2)
        z = mean + jnp.exp(log_scale) * jr.normal(key, mean.shape, mean.dtype)
        kl = 0.5 * (mean**2 + jnp.exp(2 * log_scale) - 1) - log_scale
        return self.decoder(z), jnp.sum(jax.nn.relu(kl - 0.5))  # free bits


@healthy
def variational_autoencoder(key):
    one, two = jr.split(key)
    model = Variational(
        eqx.nn.MLP(WIDTH, 8, 2 * WIDTH, 1, key=one), eqx.nn.MLP(4, WIDTH, 2 * WIDTH, 1, key=two)
    )

    def loss_fn(model, x, key):
        y, kl = jax.vmap(model)(x, jr.split(key, len(x)))
        return jnp.mean((y - x).astype(jnp.float32) ** 2) + 0.01 * jnp.mean(kl)

    return Case(loss_fn, model, (floats(one, BATCH, 4) @ floats(two, 4, WIDTH), key))


@healthy
def critic(key):
    """Of a Wasserstein GAN: a shift of all its outputs changes nothing."""
    model = eqx.nn.MLP(WIDTH, "scalar", 2 * WIDTH, 2, jax.nn.leaky_relu, key=key)

    def loss_fn(model, real, fake):
        penalty = jax.vmap(jax.grad(model))((real + fake) / 2)
        sizes = jnp.sqrt(jnp.sum(penalty.astype(jnp.float32) ** 2, -1))
        gap = jnp.mean(batched(model, fake)) - jnp.mean(batched(model, real))
        return gap.astype(jnp.float32) + jnp.mean((sizes - 1) ** 2)

    return Case(loss_fn, model, (floats(key), 0.5 * floats(jr.fold_in(key, 1)) + 1))


@healthy
def deep_q_network(key):
    """18 actions, of which an example says something of one."""
    one, two = jr.split(key)
    model = eqx.nn.MLP(WIDTH, 18, 2 * WIDTH, 2, key=one)
    target = eqx.nn.MLP(WIDTH, 18, 2 * WIDTH, 2, key=one)

    def loss_fn(model, target, x, actions, rewards, after):
        values = jnp.take_along_axis(batched(model, x), actions[:, None], axis=1)[:, 0]
        wanted = rewards + 0.9 * jnp.max(batched(target, after), axis=1)
        return jnp.mean(optax.huber_loss(values, jax.lax.stop_gradient(wanted)))

    x, actions = floats(key), jr.randint(two, (BATCH,), 0, 18)
    return Case(loss_fn, model, (target, x, actions, x[:, 0], jnp.roll(x, 1, axis=0)))


class Experts(eqx.Module):
    """Each example goes to the one expert that its router chooses."""

    router: eqx.nn.Linear
    experts: list
    head: eqx.nn.Linear

    def __init__(self, key):
        one, two, *keys = jr.split(key, 6)
        self.router = eqx.nn.Linear(WIDTH, 4, key=one)
        self.experts = [eqx.nn.MLP(WIDTH, WIDTH, 2 * WIDTH, 1, key=k) for k in keys]
        self.head = eqx.nn.Linear(WIDTH, CLASSES, key=two)

    def __call__(self, x):
        chances = jax.nn.softmax(self.router(x))
        i = jnp.argmax(chances)
        experts = [lambda x, expert=expert: expert(x) for expert in self.experts]
        return self.head(x + chances[i] * jax.lax.switch(i, experts, x))


@healthy
def mixture_of_experts(key):
    return zoo.classifier(Experts(key), floats(key))


# ---- Gates, zeros, ensembles.


class LowRank(eqx.Module):
    """A frozen layer and two factors, the second of which starts at zero."""

    frozen: jax.Array
    down: eqx.nn.Linear
    up: eqx.nn.Linear
    head: eqx.nn.Linear

    def __init__(self, key):
        one, two, three = jr.split(key, 3)
        self.frozen = jr.normal(one, (WIDTH, WIDTH)) / WIDTH**0.5
        self.down = zoo.linear(WIDTH, 2, two, 1.0)
        self.up = zoo.linear(2, WIDTH, three, 0.0)
        self.head = eqx.nn.Linear(WIDTH, CLASSES, key=three)

    def __call__(self, x):
        h = jax.lax.stop_gradient(self.frozen) @ x + self.up(self.down(x))
        return self.head(jax.nn.relu(h))


def frozen_apart(case):
    """The model without its frozen array, which the loss function holds."""
    frozen = case.model.frozen
    at = lambda m: m.frozen

    def loss_fn(model, *args):
        return case.loss_fn(eqx.tree_at(at, model, frozen, is_leaf=lambda x: x is None), *args)

    return case._replace(loss_fn=loss_fn, model=eqx.tree_at(at, case.model, None))


@healthy
def low_rank_adaptation(key):
    return frozen_apart(zoo.classifier(LowRank(key), floats(key)))


@healthy
def ensemble(key):
    make = lambda k: eqx.nn.MLP(WIDTH, CLASSES, 2 * WIDTH, 2, key=k)
    models = eqx.filter_vmap(make)(jr.split(key, 4))
    x = floats(key)

    def loss_fn(models, x, y):
        logits = eqx.filter_vmap(batched, in_axes=(eqx.if_array(0), None))(models, x)
        return jnp.mean(jax.vmap(cross_entropy, (0, None))(logits, y))

    return Case(loss_fn, models, (x, zoo.labels(x)), {"classes": CLASSES})


class ZeroStart(eqx.Module):
    """Equinox's own norms behind layers that start at zero."""

    first: eqx.nn.Linear
    layers: list
    norms: list
    head: eqx.nn.Linear

    def __init__(self, key):
        one, two = jr.split(key)
        self.first = eqx.nn.Linear(WIDTH, WIDTH, key=one)
        self.layers = [zoo.linear(WIDTH, WIDTH, key, 0.0) for _ in range(3)]
        self.norms = [eqx.nn.LayerNorm(WIDTH), eqx.nn.GroupNorm(4, WIDTH), eqx.nn.RMSNorm(WIDTH)]
        self.head = eqx.nn.Linear(WIDTH, CLASSES, key=two)

    def __call__(self, x):
        x = self.first(x)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = x + norm(layer(jax.nn.gelu(x)))
        return self.head(x)


@healthy
def norms_behind_zeros(key):
    return zoo.classifier(ZeroStart(key), floats(key))


# ---- Images, graphs, coordinates.


class Segmenter(eqx.Module):
    """A small U-Net with depthwise convolutions and relu6."""

    down: eqx.nn.Conv2d
    depthwise: eqx.nn.Conv2d
    pointwise: eqx.nn.Conv2d
    up: eqx.nn.ConvTranspose2d
    out: eqx.nn.Conv2d

    def __init__(self, key):
        a, b, c, d, e = jr.split(key, 5)
        self.down = eqx.nn.Conv2d(1, 8, 3, stride=2, padding=1, key=a)
        self.depthwise = eqx.nn.Conv2d(8, 8, 3, padding=1, groups=8, key=b)
        self.pointwise = eqx.nn.Conv2d(8, 8, 1, key=c)
        self.up = eqx.nn.ConvTranspose2d(8, 8, 2, stride=2, key=d)
        self.out = eqx.nn.Conv2d(9, 1, 3, padding=1, key=e)

    def __call__(self, x):
        h = jax.nn.relu6(self.down(x))
        h = h + jax.nn.relu6(self.pointwise(self.depthwise(h)))
        return jax.nn.sigmoid(self.out(jnp.concatenate([x, self.up(h)])))


@healthy
def segmentation(key):
    x = floats(key, BATCH, 1, 8, 8)

    def loss_fn(model, x, y):
        p = batched(model, x).astype(jnp.float32)
        return 1 - jnp.mean((2 * jnp.sum(p * y, (1, 2, 3)) + 1) / (jnp.sum(p + y, (1, 2, 3)) + 1))

    return Case(loss_fn, Segmenter(key), (x, (x > 0).astype(jnp.float32)))


class DeltaFilters(eqx.Module):
    """Each filter looks at one pixel beside, of images that are dark but for one spot."""

    conv: eqx.nn.Conv2d
    head: eqx.nn.Linear

    def __init__(self, key):
        self.conv = eqx.nn.Conv2d(1, 9, 3, padding=1, use_bias=False, key=key)
        deltas = jnp.eye(9).reshape(9, 1, 3, 3)
        self.conv = eqx.tree_at(lambda c: c.weight, self.conv, deltas)
        self.head = eqx.nn.Linear(9 * 64, CLASSES, key=key)

    def __call__(self, x):
        return self.head(jax.nn.relu(self.conv(x)).ravel())


@healthy
def shifted_deltas(key):
    at = jr.randint(key, (BATCH,), 0, 64)
    return zoo.classifier(DeltaFilters(key), jax.nn.one_hot(at, 64).reshape(BATCH, 1, 8, 8))


class GraphNetwork(eqx.Module):
    messages: list
    head: eqx.nn.Linear

    def __init__(self, key):
        one, two, three = jr.split(key, 3)
        self.messages = [eqx.nn.MLP(2 * WIDTH, WIDTH, WIDTH, 1, key=k) for k in (one, two)]
        self.head = eqx.nn.Linear(WIDTH, CLASSES, key=three)

    def __call__(self, nodes, senders, receivers):
        for message in self.messages:
            pairs = jnp.concatenate([nodes[senders], nodes[receivers]], axis=-1)
            sums = jax.ops.segment_sum(jax.vmap(message)(pairs), receivers, len(nodes))
            nodes = nodes + sums
        return jax.vmap(self.head)(nodes)


@healthy
def graph_network(key):
    one, two = jr.split(key)
    nodes, edges = floats(key), jr.randint(one, (2, 3 * BATCH), 0, BATCH)
    loss_fn = lambda model, x, edges, y: cross_entropy(model(x, *edges), y)
    return Case(loss_fn, GraphNetwork(two), (nodes, edges, zoo.labels(nodes)))


@healthy
def physics_informed(key):
    """u'' = -u, by the derivatives of the network itself, at points of one line."""
    model = eqx.nn.MLP("scalar", "scalar", WIDTH, 2, jnp.tanh, key=key)

    def loss_fn(model, t):
        second = jax.vmap(jax.grad(jax.grad(model)))(t)
        start = (model(jnp.zeros((), t.dtype)) - 1) ** 2
        return jnp.mean((second + batched(model, t)) ** 2) + start

    return Case(loss_fn, model, (jnp.linspace(0, 3, BATCH),))


@healthy
def sine_network(key):
    one, two = jr.split(key)
    model = eqx.nn.MLP(2, 1, 2 * WIDTH, 2, lambda x: jnp.sin(10 * x), key=one)
    xy = jr.uniform(two, (4 * BATCH, 2), minval=-1)
    target = jnp.sin(9 * xy[:, :1]) * xy[:, 1:]
    return Case(lambda model, x, y: zoo.regress(model, x, y), model, (xy, target))


class Denoiser(eqx.Module):
    into: eqx.nn.Linear
    time: eqx.nn.MLP
    blocks: list
    out: eqx.nn.Linear

    def __init__(self, key):
        a, b, c, *keys = jr.split(key, 5)
        self.into = eqx.nn.Linear(WIDTH, WIDTH, key=a)
        self.time = eqx.nn.MLP(8, WIDTH, WIDTH, 1, jax.nn.silu, key=b)
        self.blocks = [eqx.nn.MLP(WIDTH, WIDTH, 2 * WIDTH, 1, jax.nn.silu, key=k) for k in keys]
        self.out = zoo.linear(WIDTH, WIDTH, c, 0.0)

    def __call__(self, x, t):
        angles = t * 2.0 ** jnp.arange(4, dtype=x.dtype)
        h = self.into(x)
        for block in self.blocks:
            h = h + block(h + self.time(jnp.concatenate([jnp.sin(angles), jnp.cos(angles)])))
        return self.out(h)


@healthy
def diffusion(key):
    def loss_fn(model, x, key):
        one, two = jr.split(key)
        t = jr.uniform(one, (len(x),), x.dtype)
        noise = jr.normal(two, x.shape, x.dtype)
        noisy = jnp.cos(t)[:, None] * x + jnp.sin(t)[:, None] * noise
        return jnp.mean((jax.vmap(model)(noisy, t) - noise).astype(jnp.float32) ** 2)

    return Case(loss_fn, Denoiser(key), (floats(key), key))


class Coupling(eqx.Module):
    layers: list

    def __init__(self, key):
        make = lambda k: eqx.nn.MLP(WIDTH // 2, WIDTH, WIDTH, 1, jnp.tanh, key=k)
        self.layers = [make(k) for k in jr.split(key, 4)]

    def __call__(self, x):
        log_volume = 0
        for layer in self.layers:
            a, b = jnp.split(x, 2)
            scale, shift = jnp.split(layer(a), 2)
            x = jnp.concatenate([b * jnp.exp(jnp.tanh(scale)) + shift, a])
            log_volume += jnp.sum(jnp.tanh(scale))
        return x, log_volume


@healthy
def normalising_flow(key):
    def loss_fn(model, x):
        z, log_volume = batched(model, x)
        each = 0.5 * jnp.sum(z.astype(jnp.float32) ** 2, -1) - log_volume.astype(jnp.float32)
        return jnp.mean(each)

    return Case(loss_fn, Coupling(key), (2 * floats(key) + 1,))


class Pooled(eqx.Module):
    """Attention from one learned query, which is the same for all examples."""

    query: jax.Array
    first: eqx.nn.Linear
    attention: eqx.nn.MultiheadAttention
    norm: eqx.nn.LayerNorm
    head: eqx.nn.Linear

    def __init__(self, key):
        a, b, c, d = jr.split(key, 4)
        self.query = jr.normal(a, (1, WIDTH))
        self.first = eqx.nn.Linear(WIDTH, WIDTH, key=b)
        self.attention = eqx.nn.MultiheadAttention(2, WIDTH, key=c)
        self.norm = eqx.nn.LayerNorm(WIDTH)
        self.head = eqx.nn.Linear(WIDTH, CLASSES, key=d)

    def __call__(self, x):
        x = jax.nn.gelu(jax.vmap(self.first)(x))
        query = self.query + 0 * x[:1]
        return self.head(self.norm(self.attention(query, x, x)[0]))


@healthy
def attention_pooling(key):
    return zoo.classifier(Pooled(key), floats(key, BATCH, TOKENS, WIDTH))


# ---- Sick.


def ill(case, *illness):
    return zoo.ill(case._replace(options={}), *illness)


def reconstruct(model, x):
    return zoo.regress(model, x, x)


@sick
def a_dead_member_of_an_ensemble(key):
    case = ensemble(key)
    bias = case.model.layers[1].bias.at[2].set(-8.0)
    model = eqx.tree_at(lambda m: m.layers[1].bias, case.model, bias)
    return ill(case._replace(model=model), ("dead", "layers[1]"))


@sick
def both_factors_zero(key):
    case = zoo.classifier(LowRank(key), floats(key))
    model = eqx.tree_at(lambda m: m.down.weight, case.model, jnp.zeros((2, WIDTH)))
    places = [("no gradient", part) for part in ("up.weight", "down", "down.weight")]
    return ill(frozen_apart(case._replace(model=model)), *places)


@sick
def all_gradients_zero(key):
    """Of a low-rank adaptation alone, by two factors that are both zero."""
    frozen = jr.normal(key, (CLASSES, WIDTH))
    zeros = {"down": jnp.zeros((2, WIDTH)), "up": jnp.zeros((CLASSES, 2))}
    x = floats(key)

    class Adapted(eqx.Module):
        down: jax.Array
        up: jax.Array

        def __call__(self, x):
            return (frozen + self.up @ self.down) @ x

    return ill(zoo.classifier(Adapted(**zeros), x), ("no gradient", ""))


@sick
def symmetric_start(key):
    model = eqx.nn.MLP(WIDTH, CLASSES, 2 * WIDTH, 2, jnp.tanh, key=key)
    model = jax.tree.map(lambda x: jnp.full_like(x, 0.1) if eqx.is_array(x) else x, model)
    places = [("identical units", f"layers[{i}].weight") for i in range(2)]
    return ill(zoo.classifier(model, floats(key)), *places)


class LinearRecurrence(eqx.Module):
    matrix: jax.Array

    def __call__(self, xs):
        step = lambda h, x: (self.matrix @ h + x, None)
        return jax.lax.scan(step, jnp.zeros(WIDTH), xs)[0]


@sick
def linear_recurrence_that_explodes(key):
    model = LinearRecurrence(1.5 * jr.orthogonal(key, WIDTH))
    x = floats(key, BATCH, 60, WIDTH)
    loss_fn = lambda model, x: jnp.mean((batched(model, x) - x[:, -1]) ** 2)
    return ill(Case(loss_fn, model, (x,)), ("growing activations", ""))


@sick
def one_example_32_times(key):
    x = jnp.tile(floats(key, 1, WIDTH), (BATCH, 1))
    model = eqx.nn.MLP(WIDTH, WIDTH, 2 * WIDTH, 2, key=key)
    return ill(Case(reconstruct, model, (x,)), ("identical examples", "args"))


@sick
def a_forgotten_activation(key):
    one, two, three = jr.split(key, 3)
    layers = [
        eqx.nn.Linear(WIDTH, 2 * WIDTH, key=one),
        eqx.nn.Lambda(jax.nn.relu),
        eqx.nn.Linear(2 * WIDTH, 2 * WIDTH, key=two),
        eqx.nn.Linear(2 * WIDTH, CLASSES, key=three),
    ]
    case = zoo.classifier(eqx.nn.Sequential(layers), floats(key))
    return ill(case, ("no activation", "layers[2]"))


@sick
def huge_logits(key):
    case = zoo.plain_mlp(key)
    model = eqx.tree_at(lambda m: m.layers[2].weight, case.model, replace_fn=lambda w: 300 * w)
    return ill(case._replace(model=model), ("initial loss", "loss_fn"))


class Summed(eqx.Module):
    first: eqx.nn.Linear
    norm: eqx.nn.LayerNorm

    def __call__(self, x):
        return jnp.sum(self.norm(self.first(x)))


@sick
def the_sum_of_a_norm(key):
    model = Summed(eqx.nn.Linear(WIDTH, WIDTH, key=key), eqx.nn.LayerNorm(WIDTH))
    loss_fn = lambda model, x: jnp.mean(batched(model, x))
    return ill(Case(loss_fn, model, (floats(key),)), ("cancelled gradient", "norm"))


# ---- Not finite.


def with_state(optim, change, key):
    case = zoo.plain_mlp(key)
    state = jax.tree.map(change, optim.init(zoo.weights(case.model)))
    return zoo.ill(
        case._replace(options={"optimiser": (optim, state)}), ("non-finite", "optimiser")
    )


@sick
def a_moment_that_is_nan(key):
    change = lambda x: x.at[..., :1].set(jnp.nan) if x.ndim else x
    return with_state(optax.adam(1e-3), change, key)


@sick
def a_moment_that_is_infinite(key):
    case = with_state(optax.adam(1e-3), lambda x: x, key)
    optim, state = case.options["optimiser"]
    nu = jax.tree.map(lambda x: jnp.full_like(x, jnp.inf), state[0].nu)
    state = (state[0]._replace(nu=nu), *state[1:])
    return case._replace(options={"optimiser": (optim, state)})


@sick
def a_learning_rate_that_is_nan(key):
    return with_state(optax.sgd(jnp.nan), lambda x: x, key)


@sick
def an_input_that_is_all_nan(key):
    model = eqx.nn.MLP(WIDTH, CLASSES, 2 * WIDTH, 2, key=key)
    x = floats(key) * jnp.nan
    return ill(Case(zoo.classify, model, (x, zoo.labels(floats(key)))), ("non-finite", "args"))


@sick
def held_data_that_is_nan(key):
    x = floats(key).at[2, 3].set(jnp.nan)
    model = eqx.nn.MLP(WIDTH, WIDTH, 2 * WIDTH, 1, key=key)
    return ill(Case(lambda model: reconstruct(model, x), model, ()), ("non-finite", "loss_fn"))


class Mask(eqx.Module):
    def __call__(self, x):
        return jnp.where(jnp.arange(TOKENS) < x[0], 0, -jnp.inf)


class Additive(eqx.Module):
    """A mask of -inf, in which one example has nothing left."""

    mask: Mask
    attention: zoo.Attention
    softmax: eqx.nn.Lambda
    head: eqx.nn.Linear

    def __init__(self, key):
        self.mask, self.attention = Mask(), zoo.Attention(WIDTH, key)
        self.softmax = eqx.nn.Lambda(jax.nn.softmax)
        self.head = eqx.nn.Linear(WIDTH, CLASSES, key=key)

    def __call__(self, x, length):
        q, k, v = (jax.vmap(f)(x) for f in
                   (self.attention.query, self.attention.key, self.attention.value))  # fmt: skip
        return self.head(jnp.mean(self.softmax(q @ k.T / 4 + self.mask(length)) @ v, axis=0))


@sick
def a_mask_of_nothing(key):
    """The mask itself is as it should be."""
    x = floats(key, BATCH, TOKENS, WIDTH)
    lengths = jnp.full((BATCH, 1), 5.0).at[3].set(0)
    loss_fn = lambda model, x, lengths, y: cross_entropy(jax.vmap(model)(x, lengths), y)
    return ill(Case(loss_fn, Additive(key), (x, lengths, zoo.labels(x))), ("non-finite", "softmax"))


@sick
def a_root_of_zero_between_twins(key):
    """One pair is the same picture twice."""
    x = floats(key)
    model = eqx.nn.MLP(WIDTH, 8, 2 * WIDTH, 1, key=key)

    def loss_fn(model, a, b):
        return jnp.mean(jnp.sqrt(jnp.sum((batched(model, a) - batched(model, b)) ** 2, -1)))

    other = jnp.roll(x, 1, axis=0).at[5].set(x[5])
    return ill(Case(loss_fn, model, (x, other)), ("non-finite", "loss_fn"))


@sick
def a_root_of_zero_in_a_recurrence(key):
    """Of how far the state moves: not at all where the input is zero."""
    cell = eqx.nn.Linear(WIDTH, WIDTH, use_bias=False, key=key)

    def loss_fn(cell, xs):
        def step(h, x):
            after = jnp.tanh(cell(h + x))
            return after, jnp.sqrt(jnp.sum((after - h) ** 2))

        return jnp.mean(jax.vmap(lambda xs: jax.lax.scan(step, jnp.zeros(WIDTH), xs)[1])(xs))

    xs = floats(key, BATCH, TOKENS, WIDTH).at[3, 0].set(0)
    return ill(Case(loss_fn, cell, (xs,)), ("non-finite", "loss_fn"))
