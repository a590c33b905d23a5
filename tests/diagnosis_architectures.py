"""Architectures as people write them in Equinox, for `diagnose`: they join the zoo.

Each has what an author's code has: tied weights, norms with a state, adapters on frozen weights,
losses of reinforcement learning, branches that start at zero.
"""

import math

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


def images(key):
    return floats(key, BATCH, 1, 8, 8)


class ResBlock(eqx.Module):
    norm1: eqx.nn.GroupNorm
    conv1: eqx.nn.Conv2d
    time: eqx.nn.Linear
    norm2: eqx.nn.GroupNorm
    conv2: eqx.nn.Conv2d
    skip: eqx.nn.Conv2d | None

    def __init__(self, i, o, key):
        a, b, c, d = jr.split(key, 4)
        self.norm1 = eqx.nn.GroupNorm(min(4, i), i)
        self.norm2 = eqx.nn.GroupNorm(4, o)
        self.conv1 = eqx.nn.Conv2d(i, o, 3, padding=1, key=a)
        conv2 = eqx.nn.Conv2d(o, o, 3, padding=1, key=b)
        self.conv2 = eqx.tree_at(lambda c: (c.weight, c.bias), conv2, replace_fn=jnp.zeros_like)
        self.time = eqx.nn.Linear(16, o, key=c)
        self.skip = None if i == o else eqx.nn.Conv2d(i, o, 1, key=d)

    def __call__(self, x, t):
        h = self.conv1(jax.nn.silu(self.norm1(x)))
        h = h + self.time(jax.nn.silu(t))[:, None, None]
        h = self.conv2(jax.nn.silu(self.norm2(h)))
        return h + (x if self.skip is None else self.skip(x))


class UNet(eqx.Module):
    time_mlp: eqx.nn.MLP
    stem: eqx.nn.Conv2d
    down: list
    pool: eqx.nn.Conv2d
    mid: ResBlock
    up: eqx.nn.ConvTranspose2d
    ups: list
    norm: eqx.nn.GroupNorm
    out: eqx.nn.Conv2d

    def __init__(self, key):
        k = jr.split(key, 9)
        self.time_mlp = eqx.nn.MLP(16, 16, 32, 1, jax.nn.silu, key=k[0])
        self.stem = eqx.nn.Conv2d(1, 8, 3, padding=1, key=k[1])
        self.down = [ResBlock(8, 8, k[2]), ResBlock(8, 16, k[3])]
        self.pool = eqx.nn.Conv2d(16, 16, 3, 2, 1, key=k[4])
        self.mid = ResBlock(16, 16, k[5])
        self.up = eqx.nn.ConvTranspose2d(16, 16, 4, 2, padding=1, key=k[6])
        self.ups = [ResBlock(32, 8, k[7])]
        self.norm = eqx.nn.GroupNorm(4, 8)
        out = eqx.nn.Conv2d(8, 1, 3, padding=1, key=k[8])
        self.out = eqx.tree_at(lambda c: (c.weight, c.bias), out, replace_fn=jnp.zeros_like)

    def __call__(self, t, x):
        freq = jnp.exp(-math.log(1e4) * jnp.arange(8) / 7).astype(x.dtype)
        emb = jnp.concatenate([jnp.sin(1000 * t * freq), jnp.cos(1000 * t * freq)])
        emb = self.time_mlp(emb)
        h = self.stem(x)
        for d in self.down:
            h = d(h, emb)
        s = h
        h = self.up(self.mid(self.pool(h), emb))
        h = jnp.concatenate([h, s])
        for u in self.ups:
            h = u(h, emb)
        return self.out(jax.nn.silu(self.norm(h)))


@healthy
def unet_denoiser(key):
    def single(model, x, t, key):
        mean = x * jnp.exp(-0.5 * t)
        var = jnp.maximum(1 - jnp.exp(-t), 1e-5)
        noise = jr.normal(key, x.shape, x.dtype)
        pred = model(t, mean + jnp.sqrt(var) * noise)
        return (1 - jnp.exp(-t)) * jnp.mean((pred + noise / jnp.sqrt(var)) ** 2)

    def loss_fn(model, x, key):
        tk, lk = jr.split(key)
        t = jr.uniform(tk, (len(x),), x.dtype, minval=0.01, maxval=10 / len(x)) + (
            10 / len(x)
        ) * jnp.arange(len(x), dtype=x.dtype)
        return jnp.mean(jax.vmap(single, (None, 0, 0, 0))(model, x, t, jr.split(lk, len(x))))

    return Case(loss_fn, UNet(key), (images(key), key))


class Seq2Seq(eqx.Module):
    source: eqx.nn.Embedding
    target: eqx.nn.Embedding
    encoder: eqx.nn.GRUCell
    decoder: eqx.nn.GRUCell
    bridge: eqx.nn.Linear
    out: eqx.nn.Linear

    def __init__(self, key):
        a, b, c, d, e, f = jr.split(key, 6)
        self.source = eqx.nn.Embedding(IDS, WIDTH, key=a)
        self.target = eqx.nn.Embedding(IDS, WIDTH, key=b)
        self.encoder = eqx.nn.GRUCell(WIDTH, WIDTH, key=c)
        self.decoder = eqx.nn.GRUCell(2 * WIDTH, WIDTH, key=d)
        self.bridge = eqx.nn.Linear(WIDTH, WIDTH, key=e)
        self.out = eqx.nn.Linear(2 * WIDTH, IDS, key=f)

    def __call__(self, src, mask, tgt):
        def enc(h, xm):
            x, m = xm
            new = self.encoder(self.source(x), h)
            h = jnp.where(m, new, h)
            return h, h

        h0 = jnp.zeros(WIDTH, self.out.weight.dtype)
        h, hs = jax.lax.scan(enc, h0, (src, mask))

        def dec(h, x):
            s = jnp.where(mask, hs @ h, -1e9)
            ctx = jax.nn.softmax(s) @ hs
            h = self.decoder(jnp.concatenate([self.target(x), ctx]), h)
            return h, self.out(jnp.concatenate([h, ctx]))

        return jax.lax.scan(dec, jnp.tanh(self.bridge(h)), tgt)[1]


@healthy
def seq2seq_with_attention(key):
    """Reverses sequences of different lengths; every target begins with BOS."""
    ids = jr.randint(key, (BATCH, TOKENS), 2, IDS)
    length = jr.randint(jr.fold_in(key, 1), (BATCH, 1), 2, TOKENS + 1)
    mask = jnp.arange(TOKENS) < length
    src = jnp.where(mask, ids, 0)
    rev = jnp.take_along_axis(src, jnp.clip(length - 1 - jnp.arange(TOKENS), 0), 1)
    tgt_in = jnp.concatenate([jnp.ones((BATCH, 1), int), rev[:, :-1]], 1)

    def loss_fn(model, src, mask, tgt_in, tgt):
        logits = jax.vmap(model)(src, mask, tgt_in).astype(jnp.float32)
        each = optax.softmax_cross_entropy_with_integer_labels(logits, tgt)
        return jnp.sum(each * mask) / jnp.sum(mask)

    return Case(loss_fn, Seq2Seq(key), (src, mask, tgt_in, rev))


class MoE(eqx.Module):
    router: eqx.nn.Linear
    experts: eqx.nn.MLP

    def __init__(self, key, n=6):
        a, b = jr.split(key)
        self.router = eqx.nn.Linear(WIDTH, n, use_bias=False, key=a)
        self.experts = eqx.filter_vmap(
            lambda k: eqx.nn.MLP(WIDTH, WIDTH, 2 * WIDTH, 1, jax.nn.silu, key=k)
        )(jr.split(b, n))

    def __call__(self, x):
        p = jax.nn.softmax(self.router(x).astype(jnp.float32))
        w, i = jax.lax.top_k(p, 2)
        arrays, static = eqx.partition(self.experts, eqx.is_array)

        def one(i):
            return eqx.combine(jax.tree.map(lambda a: a[i], arrays), static)(x)

        y = jax.vmap(one)(i)
        return x + (w / w.sum()).astype(x.dtype) @ y, p


class MoEModel(eqx.Module):
    first: eqx.nn.Linear
    moes: list
    norms: list
    head: eqx.nn.Linear

    def __init__(self, key):
        a, b, *ks = jr.split(key, 4)
        self.first = eqx.nn.Linear(WIDTH, WIDTH, key=a)
        self.moes = [MoE(k) for k in ks]
        self.norms = [eqx.nn.RMSNorm(WIDTH) for _ in ks]
        self.head = eqx.nn.Linear(WIDTH, CLASSES, key=b)

    def __call__(self, x):
        x = self.first(x)
        aux = 0.0
        for norm, moe in zip(self.norms, self.moes, strict=True):
            x, p = moe(norm(x))
            aux += jnp.sum(p**2)
        return self.head(x), aux


@healthy
def moe_top_2(key):
    x = floats(key)

    def loss_fn(model, x, y):
        logits, aux = jax.vmap(model)(x)
        return cross_entropy(logits, y) + 0.01 * jnp.mean(aux)

    return Case(loss_fn, MoEModel(key), (x, zoo.labels(x)), {"classes": CLASSES})


class Mamba(eqx.Module):
    norm: eqx.nn.RMSNorm
    in_proj: eqx.nn.Linear
    conv: eqx.nn.Conv1d
    x_proj: eqx.nn.Linear
    dt_proj: eqx.nn.Linear
    A_log: jax.Array
    D: jax.Array
    out_proj: eqx.nn.Linear

    def __init__(self, key, n=4, d=32, r=2):
        a, b, c, e, f = jr.split(key, 5)
        self.norm = eqx.nn.RMSNorm(WIDTH, use_bias=False)
        self.in_proj = eqx.nn.Linear(WIDTH, 2 * d, use_bias=False, key=a)
        self.conv = eqx.nn.Conv1d(d, d, 4, padding=[(3, 0)], groups=d, key=b)
        self.x_proj = eqx.nn.Linear(d, r + 2 * n, use_bias=False, key=c)
        dt = eqx.nn.Linear(r, d, key=e)
        init = jnp.exp(jr.uniform(f, (d,), minval=math.log(1e-3), maxval=math.log(0.1)))
        self.dt_proj = eqx.tree_at(
            lambda linear: linear.bias, dt, init + jnp.log(-jnp.expm1(-init))
        )
        self.A_log = jnp.log(jnp.broadcast_to(jnp.arange(1, n + 1.0), (d, n)))
        self.D = jnp.ones(d)
        self.out_proj = eqx.nn.Linear(d, WIDTH, use_bias=False, key=jr.fold_in(f, 1))

    def __call__(self, xs):
        x, z = jnp.split(jax.vmap(self.in_proj)(jax.vmap(self.norm)(xs)), 2, -1)
        x = jax.nn.silu(self.conv(x.T).T)
        n = self.A_log.shape[1]
        dt, B, C = jnp.split(jax.vmap(self.x_proj)(x), [2, 2 + n], -1)
        dt = jax.nn.softplus(jax.vmap(self.dt_proj)(dt))
        A = -jnp.exp(self.A_log)
        dA = jnp.exp(dt[:, :, None] * A)
        dBx = (dt * x)[:, :, None] * B[:, None]
        op = lambda a, b: (a[0] * b[0], b[0] * a[1] + b[1])
        h = jax.lax.associative_scan(op, (dA, dBx))[1]
        y = jnp.einsum("ldn,ln->ld", h, C) + x * self.D
        return xs + jax.vmap(self.out_proj)(y * jax.nn.silu(z))


class TiedLM(eqx.Module):
    shared: eqx.nn.Shared
    blocks: list
    norm: eqx.nn.RMSNorm

    def __init__(self, key, block, depth=3):
        a, *ks = jr.split(key, depth + 1)
        emb = eqx.nn.Embedding(weight=0.05 * jr.normal(a, (IDS, WIDTH)))
        lin = eqx.nn.Linear(WIDTH, IDS, use_bias=False, key=a)
        self.shared = eqx.nn.Shared((emb, lin), lambda p: p[1].weight, lambda p: p[0].weight)
        self.blocks = [block(k) for k in ks]
        self.norm = eqx.nn.RMSNorm(WIDTH)

    def __call__(self, ids):
        emb, lin = self.shared()
        x = jax.vmap(emb)(ids)
        for b in self.blocks:
            x = b(x)
        return jax.vmap(lin)(jax.vmap(self.norm)(x))


@healthy
def mamba_tied(key):
    return Case(zoo.next_token, TiedLM(key, Mamba), (zoo.tokens(key),), {"classes": IDS})


class Llama(eqx.Module):
    n1: eqx.nn.RMSNorm
    n2: eqx.nn.RMSNorm
    q: eqx.nn.Linear
    k: eqx.nn.Linear
    v: eqx.nn.Linear
    o: eqx.nn.Linear
    gate: eqx.nn.Linear
    up: eqx.nn.Linear
    down: eqx.nn.Linear

    def __init__(self, key):
        ks = jr.split(key, 7)
        lin = lambda i, o, k: eqx.nn.Linear(i, o, use_bias=False, key=k)
        self.n1 = eqx.nn.RMSNorm(WIDTH, use_bias=False)
        self.n2 = eqx.nn.RMSNorm(WIDTH, use_bias=False)
        self.q, self.o = lin(WIDTH, WIDTH, ks[0]), lin(WIDTH, WIDTH, ks[3])
        self.k, self.v = lin(WIDTH, 8, ks[1]), lin(WIDTH, 8, ks[2])
        self.gate, self.up, self.down = (
            lin(WIDTH, 40, ks[4]),
            lin(WIDTH, 40, ks[5]),
            lin(40, WIDTH, ks[6]),
        )

    def __call__(self, x):
        h = jax.vmap(self.n1)(x)
        T = len(x)
        q = jax.vmap(self.q)(h).reshape(T, 4, 4)
        k = jax.vmap(self.k)(h).reshape(T, 2, 4)
        v = jax.vmap(self.v)(h).reshape(T, 2, 4)
        rope = jax.vmap(eqx.nn.RotaryPositionalEmbedding(4), 1, 1)
        a = jax.nn.dot_product_attention(rope(q)[None], rope(k)[None], v[None], is_causal=True)[0]
        x = x + jax.vmap(self.o)(a.reshape(T, -1))
        h = jax.vmap(self.n2)(x)
        f = lambda h: self.down(jax.nn.silu(self.gate(h)) * self.up(h))
        return x + jax.vmap(f)(h)


@healthy
def llama(key):
    return Case(zoo.next_token, TiedLM(key, Llama, 4), (zoo.tokens(key),), {"classes": IDS})


class Discriminator(eqx.Module):
    layers: list

    def __init__(self, key):
        a, b, c = jr.split(key, 3)
        self.layers = [
            eqx.nn.Conv2d(1, 16, 4, 2, 1, key=a),
            jax.tree_util.Partial(jax.nn.leaky_relu, negative_slope=0.2),
            eqx.nn.Conv2d(16, 32, 4, 2, 1, key=b),
            eqx.nn.GroupNorm(4, 32),
            jax.tree_util.Partial(jax.nn.leaky_relu, negative_slope=0.2),
            jnp.ravel,
            eqx.nn.Linear(32 * 4, "scalar", key=c),
        ]

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


@healthy
def discriminator_hinge(key):
    real, fake = jnp.tanh(images(key)), 0.3 * images(jr.fold_in(key, 1))

    def loss_fn(model, real, fake):
        of_real, of_fake = jax.vmap(model)(real), jax.vmap(model)(fake)
        return jnp.mean(jax.nn.relu(1 - of_real)) + jnp.mean(jax.nn.relu(1 + of_fake))

    return Case(loss_fn, Discriminator(key), (real, fake))


class Dueling(eqx.Module):
    torso: eqx.nn.MLP
    value: eqx.nn.Linear
    advantage: eqx.nn.Linear

    def __init__(self, key):
        a, b, c = jr.split(key, 3)
        self.torso = eqx.nn.MLP(8, 64, 64, 1, final_activation=jax.nn.relu, key=a)
        self.value = eqx.nn.Linear(64, "scalar", key=b)
        self.advantage = eqx.nn.Linear(64, 6, key=c)

    def __call__(self, x):
        h = self.torso(x)
        a = self.advantage(h)
        return self.value(h) + a - a.mean()


@healthy
def dueling_double_dqn(key):
    model, target = Dueling(key), Dueling(key)
    obs, nxt = floats(key, BATCH, 8), floats(jr.fold_in(key, 1), BATCH, 8)
    act = jr.randint(key, (BATCH,), 0, 6)
    rew = (jr.uniform(key, (BATCH,)) > 0.9) * 1.0
    done = jr.bernoulli(key, 0.1, (BATCH,))

    def loss_fn(model, target, obs, act, rew, nxt, done):
        q = jnp.take_along_axis(jax.vmap(model)(obs), act[:, None], 1)[:, 0]
        best = jnp.argmax(jax.vmap(model)(nxt), -1)
        qn = jnp.take_along_axis(jax.vmap(target)(nxt), best[:, None], 1)[:, 0]
        y = jax.lax.stop_gradient(rew + 0.99 * (1 - done) * qn)
        return jnp.mean(optax.huber_loss(q, y.astype(q.dtype)))

    return Case(loss_fn, model, (target, obs, act, rew, nxt, done))


class ActorCritic(eqx.Module):
    trunk: list
    actor: eqx.nn.Linear
    critic: eqx.nn.Linear
    log_std: jax.Array

    def __init__(self, key):
        ks = jr.split(key, 4)

        def lin(i, o, k, s):
            weight = jax.nn.initializers.orthogonal(s)(k, (o, i))
            parts = lambda linear: (linear.weight, linear.bias)
            return eqx.tree_at(parts, eqx.nn.Linear(i, o, key=k), (weight, jnp.zeros(o)))

        self.trunk = [lin(8, 64, ks[0], 2**0.5), lin(64, 64, ks[1], 2**0.5)]
        self.actor = lin(64, 3, ks[2], 0.01)
        self.critic = lin(64, 1, ks[3], 1.0)
        self.log_std = jnp.zeros(3)

    def __call__(self, x):
        for linear in self.trunk:
            x = jnp.tanh(linear(x))
        return self.actor(x), self.log_std, self.critic(x)[0]


@healthy
def ppo_continuous(key):
    model = ActorCritic(key)
    obs = floats(key, BATCH, 8)
    act = floats(jr.fold_in(key, 1), BATCH, 3)
    adv = floats(jr.fold_in(key, 2), BATCH)
    ret = floats(jr.fold_in(key, 3), BATCH)

    def logp(mu, ls, a):
        return jnp.sum(-0.5 * ((a - mu) / jnp.exp(ls)) ** 2 - ls - 0.9189, -1)

    mu, ls, _ = jax.vmap(model)(obs)
    old = logp(mu, ls, act)

    def loss_fn(model, obs, act, old, adv, ret):
        mu, ls, v = jax.vmap(model)(obs)
        lp = logp(mu, ls, act)
        r = jnp.exp(lp - old)
        pg = -jnp.mean(jnp.minimum(r * adv, jnp.clip(r, 0.8, 1.2) * adv))
        return pg + 0.5 * jnp.mean((v - ret) ** 2) - 0.01 * jnp.mean(jnp.sum(ls, -1))

    return Case(loss_fn, model, (obs, act, old, adv, ret))


class BNBlock(eqx.Module):
    conv1: eqx.nn.Conv2d
    bn1: eqx.nn.BatchNorm
    conv2: eqx.nn.Conv2d
    bn2: eqx.nn.BatchNorm

    def __init__(self, key):
        a, b = jr.split(key)
        self.conv1 = eqx.nn.Conv2d(8, 8, 3, padding=1, use_bias=False, key=a)
        self.conv2 = eqx.nn.Conv2d(8, 8, 3, padding=1, use_bias=False, key=b)
        self.bn1 = eqx.nn.BatchNorm(8, "batch", mode="batch")
        bn2 = eqx.nn.BatchNorm(8, "batch", mode="batch")
        self.bn2 = eqx.tree_at(lambda b: b.weight, bn2, jnp.zeros(8))  # zero-init residual gamma

    def __call__(self, x, state):
        h, state = self.bn1(self.conv1(x), state)
        h, state = self.bn2(self.conv2(jax.nn.relu(h)), state)
        return jax.nn.relu(x + h), state


class ResNet(eqx.Module):
    stem: eqx.nn.Conv2d
    bn: eqx.nn.BatchNorm
    blocks: list
    head: eqx.nn.Linear

    def __init__(self, key):
        a, b, *ks = jr.split(key, 5)
        self.stem = eqx.nn.Conv2d(1, 8, 3, padding=1, use_bias=False, key=a)
        self.bn = eqx.nn.BatchNorm(8, "batch", mode="batch")
        self.blocks = [BNBlock(k) for k in ks]
        self.head = eqx.nn.Linear(8, CLASSES, key=b)

    def __call__(self, x, state):
        x, state = self.bn(self.stem(x), state)
        x = jax.nn.relu(x)
        for b in self.blocks:
            x, state = b(x, state)
        return self.head(x.mean((1, 2))), state


@healthy
def resnet_batch_norm(key):
    model, state = eqx.nn.make_with_state(ResNet)(key)
    x = images(key)

    def loss_fn(model, state, x, y):
        logits, state = jax.vmap(model, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(
            x, state
        )
        return cross_entropy(logits, y)

    return Case(loss_fn, model, (state, x, zoo.labels(x)), {"classes": CLASSES})


class GAT(eqx.Module):
    w: list
    a: list
    out: eqx.nn.Linear

    def __init__(self, key):
        a, b, c, d, e = jr.split(key, 5)
        self.w = [eqx.nn.Linear(WIDTH, WIDTH, use_bias=False, key=k) for k in (a, b)]
        self.a = [eqx.nn.Linear(2 * WIDTH, "scalar", use_bias=False, key=k) for k in (c, d)]
        self.out = eqx.nn.Linear(WIDTH, CLASSES, key=e)

    def __call__(self, x, s, r):
        n = len(x)
        for w, a in zip(self.w, self.a, strict=True):
            h = jax.vmap(w)(x)
            e = jax.nn.leaky_relu(jax.vmap(a)(jnp.concatenate([h[s], h[r]], -1)), 0.2)
            e = e - jax.ops.segment_max(e, r, n)[r]
            p = jnp.exp(e)
            p = p / jax.ops.segment_sum(p, r, n)[r]
            x = jax.nn.elu(jax.ops.segment_sum(p[:, None] * h[s], r, n))
        return jax.vmap(self.out)(x)


@healthy
def graph_attention_with_padding(key):
    """Self loops; labels of a part of the nodes; last node takes the padding edges."""
    n = BATCH + 1
    x = floats(key, n, WIDTH)
    s, r = jr.randint(key, (2, 4 * n), 0, n - 1)
    s = jnp.concatenate([s, jnp.arange(n), jnp.full(20, n - 1)])
    r = jnp.concatenate([r, jnp.arange(n), jnp.full(20, n - 1)])
    mask = jnp.arange(n) < n // 2 + 1
    y = zoo.labels(x)

    def loss_fn(m, x, s, r, y, mask):
        each = optax.softmax_cross_entropy_with_integer_labels(m(x, s, r).astype(jnp.float32), y)
        return jnp.sum(each * mask) / mask.sum()

    return Case(loss_fn, GAT(key), (x, s, r, y, mask))


class LoRALinear(eqx.Module):
    linear: eqx.nn.Linear
    A: jax.Array
    B: jax.Array

    def __call__(self, x, *, key=None):
        return self.linear(x) + 2.0 * (self.B @ (self.A @ x))


@healthy
def lora_of_a_transformer(key):
    m = TiedLM(key, Llama, 2)

    def adapted(linear):
        ins, outs = linear.in_features, linear.out_features
        return LoRALinear(linear, jr.normal(key, (2, ins)) / 4, jnp.zeros((outs, 2)))

    some = lambda m: [linear for block in m.blocks for linear in (block.q, block.v)]
    m = eqx.tree_at(some, m, [adapted(linear) for linear in some(m)])
    spec = jax.tree.map(lambda _: False, m)
    ab = lambda m: [factor for each in some(m) for factor in (each.A, each.B)]
    spec = eqx.tree_at(ab, spec, replace_fn=lambda _: True)
    train, frozen = eqx.partition(m, spec)
    return Case(
        lambda t, f, ids: zoo.next_token(eqx.combine(t, f), ids), train, (frozen, zoo.tokens(key))
    )


class ConvNeXtBlock(eqx.Module):
    dw: eqx.nn.Conv2d
    norm: eqx.nn.LayerNorm
    up: eqx.nn.Linear
    down: eqx.nn.Linear
    gamma: jax.Array

    def __init__(self, key):
        a, b, c = jr.split(key, 3)
        self.dw = eqx.nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH, key=a)
        self.norm = eqx.nn.LayerNorm(WIDTH, eps=1e-6)
        self.up, self.down = (
            eqx.nn.Linear(WIDTH, 4 * WIDTH, key=b),
            eqx.nn.Linear(4 * WIDTH, WIDTH, key=c),
        )
        self.gamma = jnp.full(WIDTH, 1e-6)

    def __call__(self, x):
        h = jnp.moveaxis(self.dw(x), 0, -1)
        f = lambda p: self.gamma * self.down(jax.nn.gelu(self.up(self.norm(p))))
        return x + jnp.moveaxis(jax.vmap(jax.vmap(f))(h), -1, 0)


class ConvNeXt(eqx.Module):
    stem: eqx.nn.Conv2d
    blocks: list
    norm: eqx.nn.LayerNorm
    head: eqx.nn.Linear

    def __init__(self, key, depth=4):
        a, b, *ks = jr.split(key, depth + 2)
        self.stem = eqx.nn.Conv2d(1, WIDTH, 2, 2, key=a)
        self.blocks = [ConvNeXtBlock(k) for k in ks]
        self.norm, self.head = eqx.nn.LayerNorm(WIDTH), eqx.nn.Linear(WIDTH, CLASSES, key=b)

    def __call__(self, x):
        x = self.stem(x)
        for b in self.blocks:
            x = b(x)
        return self.head(self.norm(x.mean((1, 2))))


@healthy
def convnext_layer_scale(key):
    x = images(key)
    return Case(zoo.classify, ConvNeXt(key), (x, zoo.labels(x)), {"classes": CLASSES})


class VQVAE(eqx.Module):
    enc: eqx.nn.MLP
    codebook: jax.Array
    dec: eqx.nn.MLP

    def __call__(self, x):
        z = self.enc(x)
        i = jnp.argmin(jnp.sum((z - self.codebook) ** 2, -1))
        q = self.codebook[i]
        sg = jax.lax.stop_gradient
        return self.dec(z + sg(q - z)), jnp.sum((sg(z) - q) ** 2) + 0.25 * jnp.sum((z - sg(q)) ** 2)


@healthy
def vq_vae(key):
    a, b, c = jr.split(key, 3)
    m = VQVAE(
        eqx.nn.MLP(WIDTH, 4, 64, 1, key=a),
        jr.normal(c, (32, 4)),
        eqx.nn.MLP(4, WIDTH, 64, 1, key=b),
    )

    def loss_fn(m, x):
        y, more = jax.vmap(m)(x)
        return jnp.mean((y - x) ** 2) + jnp.mean(more)

    return Case(loss_fn, m, (floats(key),))


class NeRF(eqx.Module):
    trunk: eqx.nn.MLP
    density: eqx.nn.Linear
    colour: eqx.nn.MLP

    def __call__(self, p):
        enc = lambda p: jnp.concatenate(
            [f(2.0**i * p) for i in range(5) for f in (jnp.sin, jnp.cos)]
        )
        h = self.trunk(enc(p))
        return jax.nn.softplus(self.density(h) - 1), self.colour(h)


@healthy
def nerf(key):
    a, b, c = jr.split(key, 3)
    m = NeRF(
        eqx.nn.MLP(30, 64, 64, 3, final_activation=jax.nn.relu, key=a),
        eqx.nn.Linear(64, "scalar", key=b),
        eqx.nn.MLP(64, 3, 32, 1, final_activation=jax.nn.sigmoid, key=c),
    )
    o = floats(key, BATCH, 3)
    d = floats(a, BATCH, 3)
    d /= jnp.linalg.norm(d, axis=-1, keepdims=True)

    def loss_fn(m, o, d, rgb):
        t = jnp.linspace(0.1, 2, 12, dtype=o.dtype)

        def ray(o, d):
            sig, col = jax.vmap(m)(o + t[:, None] * d)
            al = 1 - jnp.exp(-sig * 0.16)
            w = al * jnp.concatenate([jnp.ones(1, o.dtype), jnp.cumprod(1 - al + 1e-10)[:-1]])
            return w @ col

        return jnp.mean((jax.vmap(ray)(o, d) - rgb) ** 2)

    return Case(loss_fn, m, (o, d, jax.nn.sigmoid(2 * o)))


class SpectralConv(eqx.Module):
    real: jax.Array
    imag: jax.Array

    def __call__(self, v):
        n = v.shape[-1]
        f = jnp.fft.rfft(v.astype(jnp.float32))
        w = self.real + 1j * self.imag
        k = w.shape[-1]
        out = (
            jnp.zeros((w.shape[0], f.shape[-1]), f.dtype)
            .at[:, :k]
            .set(jnp.einsum("ik,iok->ok", f[:, :k], w))
        )
        return jnp.fft.irfft(out, n).astype(v.dtype)


class FNO(eqx.Module):
    lift: eqx.nn.Conv1d
    spec: list
    by: list
    proj: eqx.nn.Conv1d

    def __init__(self, key, depth=4):
        ks = jr.split(key, 2 * depth + 2)
        self.lift, self.proj = eqx.nn.Conv1d(2, 8, 1, key=ks[0]), eqx.nn.Conv1d(8, 1, 1, key=ks[1])
        s = 1 / 64
        self.spec = [SpectralConv(*(s * jr.uniform(k, (2, 8, 8, 6)))) for k in ks[2 : 2 + depth]]
        self.by = [eqx.nn.Conv1d(8, 8, 1, key=k) for k in ks[2 + depth :]]

    def __call__(self, x):
        h = self.lift(x)
        for s, b in zip(self.spec, self.by, strict=True):
            h = jax.nn.gelu(s(h) + b(h))
        return self.proj(h)


@healthy
def fourier_neural_operator(key):
    grid = jnp.linspace(0, 1, 32)
    c = floats(key, BATCH, 3)
    u = jnp.sum(c[:, :, None] * jnp.sin(2 * jnp.pi * jnp.arange(1, 4)[:, None] * grid), 1)
    y = jnp.sum(
        c[:, :, None]
        * jnp.exp(-0.05 * jnp.arange(1, 4)[:, None] ** 2)
        * jnp.sin(2 * jnp.pi * jnp.arange(1, 4)[:, None] * grid),
        1,
    )
    x = jnp.stack([u, jnp.broadcast_to(grid, u.shape)], 1)
    return Case(zoo.regress, FNO(key), (x, y[:, None]))


class Recommender(eqx.Module):
    user: eqx.nn.Embedding
    item: eqx.nn.Embedding
    bu: eqx.nn.Embedding

    def __init__(self, key):
        a, b = jr.split(key)
        self.user = eqx.nn.Embedding(weight=0.01 * jr.normal(a, (100, 8)))
        self.item = eqx.nn.Embedding(weight=0.01 * jr.normal(b, (200, 8)))
        self.bu = eqx.nn.Embedding(weight=jnp.zeros((100, 1)))

    def __call__(self, u, i):
        return self.user(u) @ self.item(i) + self.bu(u)[0]


@healthy
def matrix_factorisation(key):
    u, i = jr.randint(key, (BATCH,), 0, 100), jr.randint(jr.fold_in(key, 1), (BATCH,), 0, 200)
    r = floats(key, BATCH)
    return Case(
        lambda m, u, i, r: jnp.mean((jax.vmap(m)(u, i) - r) ** 2), Recommender(key), (u, i, r)
    )


# ---- Sick.


@sick
def a_cell_of_equal_weights(key):
    """Its gates differ, but the units of each gate are one unit: the head is as equal."""
    case = zoo.gru(key)
    alike = lambda x: jnp.full_like(x, 0.1) if eqx.is_inexact_array(x) else x
    case = case._replace(model=jax.tree.map(alike, case.model))
    return zoo.ill(case, *[("identical units", f"cell.weight_{part}") for part in ("ih", "hh")])


@sick
def one_picture_for_a_batch_norm(key):
    """Behind the norm over the batch there is rounding alone, in which the examples differ."""
    case = resnet_batch_norm(key)
    state, x, y = case.args
    args = state, jnp.tile(x[:1], (BATCH, 1, 1, 1)), y
    return zoo.ill(case._replace(args=args), ("identical examples", "args"))


@sick
def no_activation_between_convolutions(key):
    one, two, three = jr.split(key, 3)
    layers = [
        eqx.nn.Conv2d(1, 8, 3, padding=1, key=one),
        eqx.nn.Conv2d(8, 8, 3, padding=1, key=two),
        eqx.nn.Lambda(jax.nn.relu),
        eqx.nn.Lambda(jnp.ravel),
        eqx.nn.Linear(8 * 64, CLASSES, key=three),
    ]
    case = zoo.classifier(eqx.nn.Sequential(layers), images(key))
    return zoo.ill(case, ("no activation", "layers[0]"))


@sick
def a_learning_rate_of_zero(key):
    """In every step, also of an optimiser that accumulates gradients over four."""
    case = dueling_double_dqn(key)
    optim = optax.MultiSteps(optax.sgd(0.0), 4)
    options = {"optimiser": (optim, optim.init(zoo.weights(case.model)))}
    return zoo.ill(case._replace(options=options), ("update ratio", "optimiser"))


@sick
def scores_100_times_too_large(key):
    """Twice: of the queries and of the keys."""
    case = llama(key)
    of = lambda m: [linear.weight for block in m.blocks for linear in (block.q, block.k)]
    model = eqx.tree_at(of, case.model, replace_fn=lambda w: 100 * w)
    places = [("saturated", f"blocks[{i}]") for i in range(len(model.blocks))]
    return zoo.ill(case._replace(model=model), *places)


class Pooled(eqx.Module):
    conv: eqx.nn.Conv2d
    norm: eqx.nn.GroupNorm
    head: eqx.nn.Linear

    def __init__(self, key):
        one, two = jr.split(key)
        self.conv = eqx.nn.Conv2d(1, 8, 3, padding=1, key=one)
        weight = 1 + 0.1 * jnp.arange(8.0)
        self.norm = eqx.tree_at(lambda n: n.weight, eqx.nn.GroupNorm(8, 8), weight)
        self.head = eqx.nn.Linear(8, CLASSES, key=two)

    def __call__(self, x):
        return self.head(jnp.mean(self.norm(self.conv(x)), axis=(1, 2)))


@sick
def a_pooling_behind_an_instance_norm(key):
    """The mean of each channel is its bias."""
    return zoo.ill(zoo.classifier(Pooled(key), images(key)), ("cancelled gradient", "norm"))


@sick
def pixels_that_are_sure_and_wrong(key):
    one, two = jr.split(key)
    layers = [
        eqx.nn.Conv2d(1, 8, 3, padding=1, key=one),
        eqx.nn.Lambda(jax.nn.relu),
        eqx.nn.Conv2d(8, 1, 3, padding=1, key=two),
    ]
    model = eqx.tree_at(
        lambda m: m.layers[2].weight, eqx.nn.Sequential(layers), replace_fn=lambda w: 300 * w
    )
    x = images(key)

    def loss_fn(model, x, y):
        return jnp.mean(optax.sigmoid_binary_cross_entropy(jax.vmap(model)(x), y))

    return Case(
        loss_fn, model, (x, (x > 0).astype(x.dtype)), illness=(("initial loss", "loss_fn"),)
    )


@sick
def a_tiny_rate_for_an_actor_and_its_critic(key):
    """Its loss holds the advantages still, so that it need not fall with a longer step."""
    model, obs = ActorCritic(key), floats(key, BATCH, 8)
    actions, returns = (floats(jr.fold_in(key, i), BATCH, n) for i, n in ((1, 3), (2, 1)))

    def loss_fn(model, obs, actions, returns):
        mean, log_std, value = jax.vmap(model)(obs)
        log_p = jnp.sum(-0.5 * ((actions - mean) / jnp.exp(log_std)) ** 2 - log_std, axis=-1)
        advantage = returns[:, 0] - value
        return jnp.mean(0.5 * advantage**2 - jax.lax.stop_gradient(advantage) * log_p)

    optim = optax.sgd(1e-8)
    options = {"optimiser": (optim, optim.init(zoo.weights(model)))}
    places = [f"trunk[{i}].weight" for i in range(2)] + ["actor.weight", "critic.weight"]
    illness = tuple(("update ratio", place) for place in places)
    return Case(loss_fn, model, (obs, actions, returns), options, illness)


class Log(eqx.Module):
    linear: eqx.nn.Linear

    def __call__(self, x):
        return jnp.log(self.linear(x))


@sick
def a_log_of_less_than_zero_in_a_shard_map(key):
    """Into which is not looked: it is said where it may be."""
    model = Log(eqx.nn.Linear(WIDTH, WIDTH, key=key))
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def loss_fn(model, x):
        mean = lambda x: jax.lax.pmean(jnp.mean(jax.vmap(model)(x)), "data")
        return jax.shard_map(mean, mesh=mesh, in_specs=jax.P("data"), out_specs=jax.P())(x)

    return Case(loss_fn, model, (floats(key),), illness=(("non-finite", "loss_fn"),))
