"""`diagnose` on what optimisers do to norms and biases: the cases of docs/optimisers.md.

Each is held against what training itself shows: moments after many steps, the way that a
parameter goes, the step of a layer alone.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
import pytest
from optax.contrib import muon
from slow import few, slow

from eqx_norms import RMSNorm, is_norm
from eqx_norms.diagnostics import diagnose

FEATURES, DEPTH = 6, 3


@pytest.fixture(autouse=True)
def standard_promotion():
    """As optax needs it."""
    with jax.numpy_dtype_promotion("standard"):
        yield


class Block(eqx.Module):
    norm: RMSNorm
    linear: eqx.nn.Linear

    def __init__(self, key):
        self.norm = RMSNorm(FEATURES)
        self.linear = eqx.nn.Linear(FEATURES, FEATURES, key=key)

    def __call__(self, x):
        return x + jnp.tanh(self.linear(self.norm(x)))


class Tower(eqx.Module):
    """Blocks in a scan, their parameters stacked."""

    blocks: Block

    def __init__(self, key):
        self.blocks = eqx.filter_vmap(Block)(jr.split(key, DEPTH))

    def __call__(self, x):
        arrays, static = eqx.partition(self.blocks, eqx.is_array)
        one = lambda x, block: (eqx.combine(block, static)(x), None)
        return jax.lax.scan(one, x, arrays)[0]


def with_zero_biases(model):
    biases = lambda model: [
        leaf.bias
        for leaf in jax.tree.leaves(model, is_leaf=lambda x: isinstance(x, eqx.nn.Linear))
        if isinstance(leaf, eqx.nn.Linear)
    ]
    return eqx.tree_at(biases, model, replace_fn=jnp.zeros_like)


def mean_square(model, x, y):
    return jnp.mean((jax.vmap(model)(x) - y) ** 2)


def found(model, optim, state=None, seed=0):
    """What is said of updates, by its place."""
    x, y = jr.normal(jr.key(seed), (2, 24, FEATURES)).astype(jax.tree.leaves(model)[0].dtype)
    state = optim.init(eqx.filter(model, eqx.is_inexact_array)) if state is None else state
    found = diagnose(mean_square, model, x, y, optimiser=(optim, state))
    return {each.where: each for each in found.findings if each.kind == "update ratio"}


def in_bfloat16(model):
    return jax.tree.map(lambda a: a.astype(jnp.bfloat16) if eqx.is_inexact_array(a) else a, model)


@pytest.mark.parametrize(
    ("optim", "stands"),
    [
        (optax.adam(0.1), True),
        slow(optax.adam(0.1, mu_dtype=jnp.float32), True),
        slow(optax.adam(0.1, b2=0.95), False),
        slow(optax.chain(optax.sgd(0.1), optax.ema(0.999)), True),
        slow(optax.sgd(0.1, momentum=0.9), False),
    ],
)
def test_a_moment_that_cannot_decay(optim, stands):
    model = in_bfloat16(Block(jr.key(0)))
    where = found(model, optim)
    told = [each for each in where.values() if "cannot decay" in each.advice]
    assert len(told) == stands and all(each.where == "optimiser" for each in told), where
    # What it says is so: after a thousand steps without a gradient.
    state, params = optim.init(ones := jnp.ones(FEATURES, jnp.bfloat16)), ones
    for gradient in [jnp.ones_like(ones)] * 2 + [jnp.zeros_like(ones)] * 300:
        before, state = state, optim.update(gradient, state, params)[1]
    halves = lambda tree: [a for a in jax.tree.leaves(tree) if a.ndim and a.dtype == ones.dtype]
    same = [
        bool((a == b).all() & (a != 0).all())
        for a, b in zip(halves(before), halves(state), strict=True)
    ]
    assert any(same) == stands


@pytest.mark.slow
def test_a_moment_in_float32_decays():
    assert not found(Block(jr.key(0)), optax.adam(1e-3))


SCALED = {
    "adafactor": optax.adafactor(1e-2),
    "lamb": optax.lamb(1e-2),
    "lars": optax.lars(1e-2, trust_coefficient=1.0),  # else the first step alone leads for long
    "fromage": optax.fromage(1e-2),
    "clipped": optax.chain(optax.adaptive_grad_clip(0.01), optax.sgd(0.1)),
}
PLAIN = {
    "adam": optax.adam(1e-2),
    "adamw": optax.adamw(1e-2, weight_decay=0.5),
    "sgd": optax.chain(optax.add_decayed_weights(0.5), optax.sgd(0.01)),
    "lion": optax.lion(1e-3),
    "clip": optax.chain(optax.clip_by_global_norm(0.1), optax.adam(1e-2)),
    "adafactor": optax.adafactor(1e-2, multiply_by_parameter_scale=False),
}


@pytest.mark.parametrize("name", few(SCALED, ["lamb"]))
def test_steps_in_proportion_to_a_parameter_at_zero(name):
    model = with_zero_biases(Block(jr.key(0)))
    (told,) = in_proportion(model, SCALED[name])
    assert told.value > 30 and told.where.endswith("bias") and "1 more" in told.advice
    # Trained, the bias stays behind one that starts from 1: by so much at least.
    assert _way(SCALED[name], 1.0) > 10 * _way(SCALED[name], 0.0)
    # The cure, and weights around one.
    small = lambda params: jax.tree.map(lambda a: "adam" if a.ndim < 2 else "it", params)
    cured = optax.partition({"adam": optax.adam(1e-2), "it": SCALED[name]}, small)
    assert not in_proportion(model, cured)
    biases = lambda model: [model.linear.bias, model.norm.bias]
    assert not in_proportion(eqx.tree_at(biases, model, replace_fn=lambda b: b + 1), SCALED[name])


def in_proportion(model, optim):
    return [each for each in found(model, optim).values() if "in proportion" in each.advice]


def _way(optim, start, steps=50):
    weight = jnp.full(FEATURES, start)
    state = optim.init(weight)
    step = jax.jit(lambda weight, state: optim.update(jnp.full(FEATURES, -0.05), state, weight))
    for _ in range(steps):
        updates, state = step(weight, state)
        weight = weight + updates
    return float(jnp.abs(weight - start).mean())


@pytest.mark.slow
@pytest.mark.parametrize("name", PLAIN)
def test_steps_that_do_not_scale_are_not_told(name):
    model = with_zero_biases(Tower(jr.key(1)))
    optim = PLAIN[name]
    state = optim.init(eqx.filter(model, eqx.is_inexact_array))
    for _ in range(3):  # with moments of other gradients
        grads = jax.tree.map(
            lambda a: 0.1 * jr.normal(jr.key(a.ndim), a.shape),
            eqx.filter(model, eqx.is_inexact_array),
        )
        state = optim.update(grads, state, eqx.filter(model, eqx.is_inexact_array))[1]
    told = [each.advice for each in found(model, optim, state).values()]
    assert not any("in proportion" in advice or "matrix" in advice for advice in told), told


def test_muon_on_stacked_norms():
    model = Tower(jr.key(0))
    where = found(model, muon(1e-2))
    told = [each for each in where.values() if "for a matrix" in each.advice]
    assert [each.where for each in told] and "muon_weight_dimension_numbers" in told[0].advice, (
        where
    )
    # Not of one layer alone, nor with the cure.
    assert not any("matrix" in each.advice for each in found(Block(jr.key(0)), muon(1e-2)).values())
    labels = lambda params: jax.tree.map(
        lambda node: jax.tree.map(
            lambda a: "adam" if is_norm(node) or a.ndim < 3 else "muon", node
        ),
        params,
        is_leaf=is_norm,
    )
    cured = optax.partition({"adam": optax.adam(1e-2), "muon": muon(1e-2)}, labels)
    assert not any("matrix" in each.advice for each in found(model, cured).values())
