"""The instruments of models of flax.nnx, flax.linen and Haiku.

Values and derivatives are compared with those of a second function, that calls the layers one by
one and adds a shift to each output. The two run the same operations in programs that XLA may fuse
differently, so in float64 a millionfold of its rounding is allowed. `flax.nnx` and linen compute in
the dtype of their parameters and inputs, which are float64 here.
"""

import functools as ft
import itertools

import flax
import haiku as hk
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optax
import pytest
from draws import normal
from flax import linen as nn, nnx
from refused import refused
from slow import slow

from eqx_norms.diagnostics import Watch, capture, capture_grads, diagnose

WIDE = {"param_dtype": jnp.float64}
everything = lambda path, module: True


@pytest.fixture(autouse=True)
def as_flax_expects(x64):
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


def assert_close(a, b):
    assert jtu.tree_structure(a) == jtu.tree_structure(b)
    for x, y in zip(jtu.tree_leaves(a), jtu.tree_leaves(b), strict=True):
        assert x.shape == y.shape and x.dtype == y.dtype
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-9 * max(1, np.abs(y).max(initial=0)))


# ---- flax.nnx


def attend(query, key, value, **_):
    """As that of nnx, which takes the softmax in float32, whatever the dtype."""
    scores = jnp.einsum("...qhd,...khd->...hqk", query, key) / query.shape[-1] ** 0.5
    return jnp.einsum("...hqk,...khd->...qhd", jax.nn.softmax(scores), value)


class Block(nnx.Module):
    """A shared linear layer is called twice, ahead of attention and behind it."""

    def __init__(self, size, rngs):
        self.shared = nnx.Linear(size, size, rngs=rngs, **WIDE)
        how = {"decode": False, "attention_fn": attend, "dtype": jnp.float64}
        self.attention = nnx.MultiHeadAttention(2, size, rngs=rngs, **how, **WIDE)
        self.norm = nnx.BatchNorm(size, rngs=rngs, **WIDE)
        # In float32 otherwise, whatever the dtype of the parameters.
        self.norm.mean = nnx.BatchStat(jnp.zeros(size))
        self.norm.var = nnx.BatchStat(jnp.ones(size))
        self.tied = self.shared

    def __call__(self, x):
        x = self.attention(self.shared(x))
        return jnp.tanh(self.tied(self.norm(x)))


class Net(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 4, (3,), rngs=rngs, **WIDE)
        self.blocks = nnx.List([Block(4, rngs) for _ in range(2)])
        self.heads = nnx.Dict(a=nnx.Linear(4, 2, rngs=rngs, **WIDE))

    def __call__(self, x):
        x = self.conv(x)
        for block in self.blocks:
            x = block(x)
        return self.heads["a"](x)


KEYS = [
    "conv",
    *(f"blocks[{i}].{name}" for i in (0, 1) for name in ("shared", "norm", "shared#1")),
    "heads.a",
]
LAYERS = (nnx.Linear, nnx.Conv, nnx.BatchNorm)


def by_hand(net, shifts, x):
    """What the layers return, each with a shift, and what the model does."""
    values = {}

    def call(key, layer, x):
        values[key] = layer(x) + shifts[key]
        return values[key]

    x = call("conv", net.conv, x)
    for i, block in enumerate(net.blocks):
        x = call(f"blocks[{i}].shared", block.shared, x)
        x = call(f"blocks[{i}].norm", block.norm, block.attention(x))
        x = jnp.tanh(call(f"blocks[{i}].shared#1", block.shared, x))
    return call("heads.a", net.heads["a"], x), values


@pytest.fixture(scope="module")
def expected():
    """The model, its input, and by hand the loss, values, derivatives there and of the model."""
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        net, x = Net(nnx.Rngs(0)), normal(jax.random.key(1), (2, 5, 3), jnp.float64)
        graphdef, params, rest = nnx.split(net, nnx.Param, ...)
        zeros = {key: jnp.zeros((2, 5, 2 if key == "heads.a" else 4)) for key in KEYS}

        @ft.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
        def loss(params, shifts):
            out, values = by_hand(
                nnx.merge(graphdef, params, jtu.tree_map(jnp.copy, rest)), shifts, x
            )
            return loss_of(out), values

        (value, values), (of_params, grads) = jax.jit(loss)(params, zeros)
        return net, x, value, values, grads, of_params


def loss_of(out):
    return jnp.mean(out * jnp.sin(jnp.arange(out.size).reshape(out.shape)))


def loss_fn(net, x):
    return loss_of(net(x))


def call(net, x):
    return net(x)


def merged(net, x):
    graphdef, state = nnx.split(net)
    return loss_fn(nnx.merge(graphdef, state), x)


@pytest.mark.parametrize(
    "fn",
    [
        slow(loss_fn),
        slow(merged),
        slow(lambda net, x: loss_of(nnx.jit(nnx.remat(call))(net, x))),
        slow(lambda net, x: nnx.value_and_grad(loss_fn)(net, x)[0]),
    ],
)
def test_nnx_by_hand(fn, expected):
    net, x, value, values, grads, of_params = expected
    found = nnx.jit(lambda net, x: capture_grads(fn, net, x, where=LAYERS))(net, x)
    assert {*found[1]} == {*KEYS}
    assert_close(found[:3], (value, values, grads))
    assert_close(nnx.as_pure(found[3]), nnx.as_pure(of_params))
    assert isinstance(found[3], nnx.State)
    # What `fn` updates is a copy.
    assert not any(np.any(block.norm.mean[...]) for block in net.blocks)


@pytest.mark.slow
def test_nnx_under_transformations(expected):
    net, x, _, values, _, _ = expected
    run = lambda net, x: capture(lambda net, x: net(x), net, x, where=LAYERS, inputs=True)[1]
    found = nnx.jit(run)(net, x)
    assert_close({key: found[key] for key in KEYS}, values)
    assert_close(found["conv:in"], x)
    assert_close(found["blocks[0].shared:in"], values["conv"])
    graphdef, state = nnx.split(net)
    plain = jax.jit(lambda state, x: run(nnx.merge(graphdef, state), x))(state, x)
    assert_close(plain, found)


class Stack(nnx.Module):
    """Blocks that `nnx.vmap` makes, and `nnx.scan` runs, with what holds no array in them."""

    def __init__(self, rngs):
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=0, out_axes=0)
        def make(rngs):
            return nnx.Sequential(nnx.Linear(4, 4, rngs=rngs, **WIDE), Tanh())

        self.blocks = make(rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def run(x, block):
            return nnx.remat(lambda block, x: block(x))(block, x)

        return run(x, self.blocks)


class Tanh(nnx.Module):
    def __call__(self, x):
        return jnp.tanh(x)


def test_nnx_scan_over_layers():
    net, x = Stack(nnx.Rngs(0)), normal(jax.random.key(1), (5, 4), jnp.float64)
    run = nnx.jit(lambda net, x: capture_grads(loss_fn, net, x, where=everything))
    loss, values, grads, of_net = run(net, x)
    weights = np.asarray(net.blocks.layers[0].kernel[...])
    hidden, before = np.asarray(x), []
    for i, weight in enumerate(weights):
        before.append(hidden @ weight)
        hidden = np.tanh(before[-1])
        np.testing.assert_allclose(values["blocks.layers[1]"][i], hidden, atol=1e-12)
        np.testing.assert_allclose(values["blocks"][i], hidden, atol=1e-12)
    np.testing.assert_allclose(values["blocks.layers[0]"], before, atol=1e-12)
    np.testing.assert_allclose(loss, loss_of(hidden), atol=1e-12)
    at_end = np.sin(np.arange(hidden.size)).reshape(hidden.shape) / hidden.size
    np.testing.assert_allclose(grads["blocks"][2], at_end, atol=1e-12)
    at_last = at_end * (1 - hidden**2)
    np.testing.assert_allclose(grads["blocks.layers[0]"][2], at_last, atol=1e-12)
    of_weight = np.tanh(before[1]).T @ at_last
    np.testing.assert_allclose(of_net["blocks"]["layers"][0]["kernel"][2], of_weight, atol=1e-12)


@pytest.mark.slow
def test_nnx_ensemble():
    """Members by nnx.vmap, of which each has its own parameters."""

    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=0, out_axes=0)
    def make(rngs):
        return nnx.Linear(4, 2, rngs=rngs, **WIDE)

    nets = make(nnx.Rngs(0))
    x = normal(jax.random.key(1), (5, 4), jnp.float64)
    run = lambda nets, x: nnx.vmap(lambda net, x: net(x), in_axes=(0, None))(nets, x)
    _, values = capture(run, nets, x, where=nnx.Linear)
    np.testing.assert_allclose(values[""], x @ nets.kernel[...], atol=1e-12)


def test_nnx_several_models():
    """A generator and a discriminator, say; and a replacement between them."""
    one, two = (nnx.Linear(4, 4, rngs=nnx.Rngs(i), **WIDE) for i in range(2))
    x = normal(jax.random.key(1), (5, 4), jnp.float64)
    run = lambda nets, x: nets["two"](nets["one"](x))
    out, values = capture(run, {"one": one, "two": two}, x, where=nnx.Linear)
    assert_close(values, {"one": one(x), "two": out})
    silent = {"one": jnp.zeros_like}
    out, values = capture(run, {"one": one, "two": two}, x, where=(), replace=silent)
    assert_close((out, values), (two(0 * x), {"one": 0 * x}))


@pytest.mark.slow
def test_nnx_dropout_and_streams():
    """Random streams go on in the copy that `fn` has, and stay as they are in the model."""
    net = nnx.Sequential(nnx.Linear(4, 4, rngs=nnx.Rngs(0)), nnx.Dropout(0.5, rngs=nnx.Rngs(1)))
    x = normal(jax.random.key(1), (5, 4))
    twice = lambda net, x: (net(x), net(x))
    (one, two), values = capture(twice, net, x, where=nnx.Dropout, inputs=True)
    assert_close(values["layers[1]"], one)
    assert_close(values["layers[1]#1"], two)
    assert np.any(one != two)
    assert_close(capture(twice, net, x, where=nnx.Dropout)[0], (one, two))
    assert_close((net(x), net(x)), (one, two))


# ---- flax.linen


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        x = nn.MultiHeadDotProductAttention(2, **WIDE)(x)
        x = nn.BatchNorm(use_running_average=False, **WIDE)(x)
        shared = nn.Dense(4, name="shared", **WIDE)
        return jnp.tanh(shared(nn.relu(shared(x)))), None


class LinenNet(nn.Module):
    """One block alone, one that is computed anew, and three in a scan."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3,), name="conv", **WIDE)(x)
        x, _ = nn.jit(LinenBlock)(name="one")(x)
        x, _ = nn.remat(LinenBlock)(name="anew")(x)
        axes = {"params": 0, "batch_stats": 0}
        stack = nn.scan(LinenBlock, variable_axes=axes, split_rngs={"params": True}, length=3)
        x, _ = stack(name="stack")(x, None)
        return nn.Dense(2, **WIDE)(x)


LINEN = (nn.Dense, nn.Conv, nn.BatchNorm)


@pytest.fixture(scope="module")
def linen():
    """The parameters of the model, its loss, its input, and by hand values and derivatives."""
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        x = normal(jax.random.key(1), (2, 5, 3), jnp.float64)
        variables = jax.jit(LinenNet().init)(jax.random.key(0), x)

        def loss(params, x):
            both = {"params": params, "batch_stats": variables["batch_stats"]}
            return loss_of(LinenNet().apply(both, x, mutable=["batch_stats"])[0])

        return variables, loss, x


def linen_by_hand(params, shifts, x):
    values = {}

    def call(key, layer, params, x):
        out = layer.apply({"params": params}, x, mutable=["batch_stats"])[0]
        values[key] = out + shifts[key]
        return values[key]

    def block(path, params, x, at=""):
        attention = nn.MultiHeadDotProductAttention(2, **WIDE)
        x = attention.apply({"params": params["MultiHeadDotProductAttention_0"]}, x)
        norm = nn.BatchNorm(use_running_average=False, **WIDE)
        x = call(f"{path}.BatchNorm_0{at}", _with_statistics(norm), params["BatchNorm_0"], x)
        x = call(f"{path}.shared{at}", nn.Dense(4, **WIDE), params["shared"], x)
        x = call(f"{path}.shared#1{at}", nn.Dense(4, **WIDE), params["shared"], nn.relu(x))
        return jnp.tanh(x)

    x = call("conv", nn.Conv(4, (3,), **WIDE), params["conv"], x)
    x = block("one", params["one"], x)
    x = block("anew", params["anew"], x)
    for i in range(3):
        x = block("stack", jtu.tree_map(lambda w: w[i], params["stack"]), x, f"@{i}")  # noqa: B023
    return call("Dense_0", nn.Dense(2, **WIDE), params["Dense_0"], x), values


def _with_statistics(norm):
    """One that makes its running statistics as it is applied."""

    class Applied:
        def apply(self, variables, x, mutable):
            stats = {"mean": jnp.zeros(x.shape[-1]), "var": jnp.ones(x.shape[-1])}
            return norm.apply(variables | {"batch_stats": stats}, x, mutable=mutable)

    return Applied()


def unstacked(values):
    """Those in the scan, step by step."""
    found = {}
    for key, x in values.items():
        if key.startswith("stack"):
            found |= {f"{key}@{i}": x[i] for i in range(3)}
        else:
            found[key] = x
    return found


@pytest.mark.slow
def test_linen_by_hand(linen):
    variables, loss, x = linen
    params = variables["params"]
    found = jax.jit(lambda params, x: capture_grads(loss, params, x, where=LINEN))(params, x)
    of_blocks = [f"{p}.{name}" for p in ("one", "anew", "stack") for name in BLOCK]
    assert {*found[1]} == {"conv", *of_blocks, "Dense_0"}
    shifts = jtu.tree_map(jnp.zeros_like, unstacked(found[1]))

    @ft.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    def by_hand(params, shifts):
        out, values = linen_by_hand(params, shifts, x)
        return loss_of(out), values

    (value, values), (of_params, grads) = jax.jit(by_hand)(params, shifts)
    assert_close((found[0], unstacked(found[1]), unstacked(found[2])), (value, values, grads))
    assert_close(found[3], of_params)


BLOCK = ("BatchNorm_0", "shared", "shared#1")


@pytest.mark.slow
def test_linen_variables(linen):
    """All variables may be the model; what is trained is `params`."""
    variables, loss, x = linen
    run = lambda variables, x: LinenNet().apply(variables, x, mutable=["batch_stats"])[0]
    in_all = lambda v, x: capture_grads(lambda v, x: loss_of(run(v, x)), v, x, where=LINEN)
    in_params = lambda p, x: capture_grads(loss, p, x, where=LINEN)
    assert_close(jax.jit(in_all)(variables, x), jax.jit(in_params)(variables["params"], x))


class Dense(nn.Module):
    """With a random mask in front, which has no parameters."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(4, **WIDE)(nn.Dropout(0.5, deterministic=True)(x))


def test_linen_several_models():
    """Two roots, which a jitted function makes one program of, have the paths of their arrays."""
    x = normal(jax.random.key(1), (5, 4), jnp.float64)
    init = jax.jit(Dense().init)
    params = {name: init(jax.random.key(i), x)["params"] for i, name in enumerate("ab")}
    apply = jax.jit(lambda params, x: Dense().apply({"params": params}, x))
    run = lambda params, x: apply(params["b"], apply(params["a"], x))
    out, values = capture(run, params, x, where=everything, inputs=True)
    middle = apply(params["a"], x)
    assert_close(values["b"], out)
    assert_close(values["a.Dense_0"], middle)
    assert_close(values["b.Dropout_0:in"], middle)
    assert [*capture(run, params, x, where=nn.Dropout)[1]] == ["a.Dropout_0", "b.Dropout_0"]
    out, values = capture(run, params, x, where=(), replace={"a.Dense_0": jnp.zeros_like})
    assert_close((out, values), (apply(params["b"], 0 * x), {"a.Dense_0": 0 * x}))
    stacked = jtu.tree_map(lambda *w: jnp.stack(w), params["a"], params["b"])
    scan = lambda params, x: jax.lax.scan(lambda x, p: (apply(p, x), None), x, params["blocks"])[0]
    out, values = capture(scan, {"blocks": stacked}, x, where=nn.Dense)
    assert_close(values, {"blocks.Dense_0": jnp.stack([middle, apply(params["b"], middle)])})
    stacks = lambda params, x: scan({"blocks": jtu.tree_map(lambda *w: jnp.stack(w), *params)}, x)
    both = params["a"], params["b"]
    with refused(NotImplementedError, "Which of '.0..Dense_0', '.1..Dense_0' is called cannot be"):
        capture(stacks, both, x, where=nn.Dense)


@pytest.mark.slow
def test_haiku():
    def mlp(x):
        hidden = hk.Linear(4)(x)
        return hk.nets.MLP([4, 2], activation=jnp.tanh)(hidden)

    transformed = hk.without_apply_rng(hk.transform(mlp))
    x = normal(jax.random.key(1), (5, 3), jnp.float64)
    params = jax.jit(transformed.init)(jax.random.key(0), x)
    loss = lambda params, x: loss_of(jax.jit(transformed.apply)(params, x))
    grads_of = lambda params, x: capture_grads(loss, params, x, where=hk.Linear)[1:]
    values, grads, of_params = jax.jit(grads_of)(params, x)
    assert [*values] == ["linear", "mlp.~.linear_0", "mlp.~.linear_1"]
    w = {key: params[key.replace(".", "/")]["w"] for key in values}
    hidden = x @ w["linear"] @ w["mlp.~.linear_0"]
    np.testing.assert_allclose(values["mlp.~.linear_0"], hidden, atol=1e-6)
    out = np.tanh(hidden) @ w["mlp.~.linear_1"]
    np.testing.assert_allclose(values["mlp.~.linear_1"], out, atol=1e-6)
    at_out = np.sin(np.arange(out.size)).reshape(out.shape) / out.size
    np.testing.assert_allclose(grads["mlp.~.linear_1"], at_out, atol=1e-6)
    assert_close(of_params, jax.grad(loss)(params, x))


# ---- What is wrong, and what is not


class MLP(nnx.Module):
    def __init__(self, depth=3, act=jax.nn.relu, **options):
        rngs = nnx.Rngs(0)
        sizes = [4, *[16] * depth]
        pairs = itertools.pairwise(sizes)
        self.layers = nnx.List([nnx.Linear(*pair, rngs=rngs, **options) for pair in pairs])
        self.head = nnx.Linear(16, 3, rngs=rngs)
        self.act = act

    def __call__(self, x):
        for layer in self.layers:
            x = self.act(layer(x))
        return self.head(x)


class Root(nnx.Module):
    def __call__(self, x):
        return jnp.sqrt(x - 1)


def with_root():
    net = MLP()
    net.layers[1] = Root()
    return net


def dead():
    net = MLP()
    net.layers[1].bias[...] = jnp.full(16, -20.0)
    return net


def copied():
    net = MLP()
    net.layers[2].kernel[...] = net.layers[1].kernel[...]
    return net


def square(net, x, y):
    return jnp.mean((net(x) - y) ** 2)


def data():
    return normal(jax.random.key(0), (32, 4), jnp.float32), jnp.ones((32, 3), jnp.float32)


# For each model what is found first, and where.
ZOO = {
    "healthy": (MLP, 1e-3, None),
    "dead": (dead, 1e-3, ("dead", "layers[1]")),
    "equal": (
        lambda: MLP(kernel_init=nnx.initializers.constant(0.1)),
        None,
        ("identical units", "layers[0].kernel"),
    ),
    "NaN": (with_root, 1e-3, ("non-finite", "layers[1]")),
    "rate of 0": (MLP, 0.0, ("update ratio", "optimiser")),
    "linear": (lambda: MLP(act=lambda x: x), None, ("no activation", "layers[0]")),
    "copied": (copied, None, ("update ratio", "layers[2].kernel")),
}


@pytest.mark.parametrize("name", [name if name == "dead" else slow(name) for name in ZOO])
def test_nnx_zoo(name):
    make, rate, expected = ZOO[name]
    net, optimiser = make(), None
    if rate is not None:
        of_net = nnx.Optimizer(net, optax.adam(rate), wrt=nnx.Param)
        optimiser = of_net.tx, of_net.opt_state
    found = diagnose(square, net, *data(), optimiser=optimiser)
    findings = [(finding.kind, finding.where) for finding in found.findings]
    assert findings[:1] == ([expected] if expected else [])
    assert {p.path for p in found.parameters} >= {"layers[0].kernel", "head.bias"}


@pytest.mark.slow
def test_identical_examples():
    x, y = data()
    [finding] = diagnose(square, MLP(), jnp.tile(x[:1], (32, 1)), y).findings
    assert finding[:2] == ("identical examples", "args")


class LinenMLP(nn.Module):
    kernel_init: object = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x):
        for i in range(3):
            bias_init = nn.initializers.constant(-20.0 if i == 1 else 0.0)
            x = nn.relu(nn.Dense(16, kernel_init=self.kernel_init, bias_init=bias_init)(x))
        return nn.Dense(3)(x)


@pytest.mark.slow
def test_linen_zoo():
    x, y = data()
    params = LinenMLP().init(jax.random.key(0), x)["params"]
    loss = lambda params, x, y: jnp.mean((LinenMLP().apply({"params": params}, x) - y) ** 2)
    optim = optax.adam(1e-3)
    found = diagnose(loss, params, x, y, optimiser=(optim, optim.init(params)))
    assert found.findings[0][:2] == ("dead", "Dense_1")
    healthy = dict(params, Dense_1=params["Dense_2"])
    healthy["Dense_2"] = params["Dense_1"] | {"bias": jnp.zeros(16)}
    found = diagnose(loss, healthy, x, y, optimiser=(optim, optim.init(healthy)))
    assert not found.findings
    assert "Dense_1:relu" in [row.name for row in found.calls]
    equal = jtu.tree_map(lambda w: jnp.full_like(w, 0.1), healthy)
    assert diagnose(loss, equal, x, y).findings[0][:2] == ("identical units", "Dense_0.kernel")
    rows = diagnose(lambda p, x: jnp.mean(jnp.tanh(x @ p["w"])), {"w": jnp.ones((4, 3))}, x)
    assert [row.name for row in rows.calls] == [":tanh"]  # of a plain function


class NamedRoot(nn.Module):
    @nn.compact
    def __call__(self, x):
        return jnp.sqrt(x)


class Rooted(nn.Module):
    """The root of a negative number in three steps of the sixth example, and one of the second."""

    @nn.compact
    def __call__(self, x):
        where = jnp.zeros(x.shape[:2]).at[5, 2:5].set(-99).at[1, 3].set(-99)
        return nn.Dense(3)(NamedRoot()(nn.softplus(nn.Dense(8)(x)) + where[..., None]))


@pytest.mark.slow
def test_a_batch_of_flax_is_counted():
    x, net = normal(jax.random.key(0), (8, 6, 4)), Rooted()
    params = net.init(jax.random.key(1), x)["params"]
    [born] = diagnose(lambda p, x: jnp.mean(net.apply({"params": p}, x) ** 2), params, x).findings
    assert (born.where, born.example, born.share) == ("NamedRoot_0", (1,), 0.25)
    assert born.advice.endswith("First in example 1; 2 of 8 examples.")


@pytest.mark.slow
def test_norms_have_no_activation():
    """The variance of Flax's norms is a difference, of which the maximum with 0 is taken."""
    net = nnx.Sequential(nnx.LayerNorm(4, rngs=nnx.Rngs(0)), nnx.relu)
    x = normal(jax.random.key(0), (16, 4), jnp.float32)
    rows = diagnose(lambda net, x: jnp.mean(net(x) ** 2), net, x).calls
    assert [row.name for row in rows] == ["", "layers[0]", "layers[0]:relu"]


@pytest.mark.slow
def test_watch(expected):
    """What is shared stays one parameter, also where the look compiles itself."""
    net, x, value, values, _, of_params = expected
    optimiser = nnx.Optimizer(net, optax.sgd(0.1), wrt=nnx.Param)
    watch = Watch(loss_fn, where=LAYERS, optimiser=optimiser.tx)
    look = watch.measure(net, x, opt_state=optimiser.opt_state)
    assert_close(look.loss, value)
    assert [*look.values] == KEYS
    assert "blocks[0].shared.kernel" in look.params
    assert not any("tied" in name for name in look.params)
    rms = lambda x: jnp.sqrt(jnp.mean(x**2))
    grad = of_params["blocks"][0]["shared"]["kernel"][...]
    found = look.params["blocks[0].shared.kernel"]
    assert_close(found["grad_rms"], rms(grad))
    of_weight = rms(net.blocks[0].shared.kernel[...])
    assert_close(found["update_ratio"], 0.1 * rms(grad) / of_weight)
    np.testing.assert_allclose(look.values["conv"]["rms"], rms(values["conv"]), rtol=1e-6)
    inside = nnx.jit(lambda net, o, x: watch.measure(net, x, opt_state=o.opt_state))
    assert_close({**inside(net, optimiser, x).params}, {**look.params})


# ---- Errors


def test_what_is_no_model():
    x = normal(jax.random.key(0), (5, 4))
    net, call = nnx.Linear(4, 2, rngs=nnx.Rngs(0)), lambda net, x: net(x)
    with refused(ValueError, "The model has {'': flax.nnx.Linear}: type one of these types"):
        capture(call, net, x, where=nnx.Conv)
    with refused(TypeError, "it is an `nnx.State`, .* nnx.merge"):
        capture(call, nnx.split(net)[1], x, where=nnx.Linear)
    with refused(TypeError, "it is the module itself, a Dense. Type `capture.lambda params"):
        capture(call, nn.Dense(2), x, where=nn.Dense)
    with refused(ValueError, "the model, has none: it is a tree of arrays"):
        capture(lambda w, x: x @ w, jnp.ones((4, 2)), x, where=nn.Dense)
    params = nn.Dense(2).init(jax.random.key(0), x)
    with refused(ValueError, "The model has {'': flax.linen.Dense}: type one of these types"):
        capture(nn.Dense(2).apply, params, x, where=nn.Conv)
    with refused(ValueError, "at 'Dense_0' there is none. The model has {'': flax.linen"):
        capture(nn.Dense(2).apply, params, x, where=(), replace={"Dense_0": jnp.zeros_like})
    with refused(ValueError, "must call at least one submodule"):
        capture(lambda _, x: net(x), nnx.clone(net), x, where=nnx.Linear)
    norm = nnx.BatchNorm(4, rngs=nnx.Rngs(0))
    with pytest.raises(flax.errors.TraceContextError) as info:
        capture(lambda _, x: norm(x.astype("float32")), nnx.clone(norm), x, where=nnx.BatchNorm)
    assert "updates a module of `flax.nnx` that it closes over" in info.value.__notes__[0]
