"""capture_grads against PyTorch's forward and backward hooks, with the same weights.

The two libraries order their float32 sums differently. Activations are of order one and may
differ by 1e-5. Gradients may differ by 1e-6 of the largest entry at the same place.
"""

import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from draws import normal

from eqx_norms.diagnostics import capture_grads

pytestmark = pytest.mark.skipif(
    sys.version_info >= (3, 12),
    reason="torch is pinned to its small CPU build, which exists for Python 3.11",
)

LETTERS, CONTEXT, EMBEDDING, WIDTH, BATCH = 27, 3, 10, 30, 32
CAPTURED = (eqx.nn.Linear, eqx.nn.LayerNorm, eqx.nn.Lambda)


class MLP(eqx.Module):
    embedding: jax.Array
    layers: list

    def __init__(self, key):
        keys = jr.split(key, 4)
        sizes = [CONTEXT * EMBEDDING, WIDTH, WIDTH]
        self.embedding = normal(keys[0], (LETTERS, EMBEDDING))
        self.layers = []
        for key, size in zip(keys[1:3], sizes[:2], strict=True):
            linear = eqx.nn.Linear(size, WIDTH, key=key)
            self.layers += [linear, eqx.nn.LayerNorm(WIDTH), eqx.nn.Lambda(jnp.tanh)]
        self.layers += [eqx.nn.Linear(WIDTH, LETTERS, key=keys[3]), eqx.nn.LayerNorm(LETTERS)]

    def __call__(self, tokens):
        x = self.embedding[tokens].ravel()
        for layer in self.layers:
            x = layer(x)
        return x


class Block(eqx.Module):
    norm1: eqx.nn.LayerNorm
    norm2: eqx.nn.LayerNorm
    qkv: eqx.nn.Linear
    out: eqx.nn.Linear
    up: eqx.nn.Linear
    down: eqx.nn.Linear

    def __init__(self, key):
        keys = jr.split(key, 4)
        self.norm1, self.norm2 = eqx.nn.LayerNorm(16), eqx.nn.LayerNorm(16)
        self.qkv = eqx.nn.Linear(16, 48, key=keys[0])
        self.out = eqx.nn.Linear(16, 16, key=keys[1])
        self.up = eqx.nn.Linear(16, 64, key=keys[2])
        self.down = eqx.nn.Linear(64, 16, key=keys[3])

    def __call__(self, x):
        q, k, v = jnp.split(jax.vmap(self.qkv)(jax.vmap(self.norm1)(x)), 3, axis=-1)
        heads = lambda a: a.reshape(len(x), 4, 4)
        y = jax.nn.dot_product_attention(heads(q), heads(k), heads(v), is_causal=True)
        x = x + jax.vmap(self.out)(y.reshape(len(x), 16))
        mlp = lambda x: self.down(jax.nn.gelu(self.up(self.norm2(x)), approximate=False))
        return x + jax.vmap(mlp)(x)


class Transformer(eqx.Module):
    embedding: jax.Array
    blocks: list
    norm: eqx.nn.LayerNorm
    head: eqx.nn.Linear

    def __init__(self, key):
        keys = jr.split(key, 4)
        self.embedding = normal(keys[0], (LETTERS, 16))
        self.blocks = [Block(keys[1]), Block(keys[2])]
        self.norm = eqx.nn.LayerNorm(16)
        self.head = eqx.nn.Linear(16, LETTERS, key=keys[3])

    def __call__(self, tokens):
        x = self.embedding[tokens]
        for block in self.blocks:
            x = block(x)
        return jax.vmap(self.head)(jax.vmap(self.norm)(x))


def loss_of(model, tokens, targets):
    logits = jax.vmap(model)(tokens)
    log_p = jax.nn.log_softmax(logits)
    return -jnp.mean(jnp.take_along_axis(log_p, targets[..., None], axis=-1))


def to_torch(layer):
    """The same layer in torch, with the same weights; a function for an activation."""
    import torch

    if isinstance(layer, eqx.nn.Lambda):
        return torch.nn.Tanh()
    if isinstance(layer, eqx.nn.Linear):
        new = torch.nn.Linear(layer.in_features, layer.out_features)
    else:
        new = torch.nn.LayerNorm(layer.shape, eps=layer.eps)
    new.weight = torch.nn.Parameter(torch.tensor(np.asarray(layer.weight)))
    new.bias = torch.nn.Parameter(torch.tensor(np.asarray(layer.bias)))
    return new


class Hooks:
    """Records what each torch module returns, and the gradient that comes back to it."""

    def __init__(self):
        self.layers, self.values, self.grads = {}, {}, {}

    def add(self, path, layer):
        layer = to_torch(layer)
        layer.register_forward_hook(lambda _, __, out: self.values.update({path: out}))
        layer.register_full_backward_hook(lambda _, __, g: self.grads.update({path: g[0]}))
        self.layers[path] = layer
        return layer


def run_mlp_in_torch(model, hooks, embedding, tokens):
    x = embedding[tokens].flatten(1)
    for i, layer in enumerate(model.layers):
        x = hooks.add(f"layers[{i}]", layer)(x)
    return x


def run_transformer_in_torch(model, hooks, embedding, tokens):
    import torch.nn.functional as F

    x = embedding[tokens]
    batch, length, _ = x.shape
    for i, block in enumerate(model.blocks):
        part = lambda name: hooks.add(f"blocks[{i}].{name}", getattr(block, name))  # noqa: B023
        q, k, v = part("qkv")(part("norm1")(x)).chunk(3, dim=-1)
        heads = lambda a: a.view(batch, length, 4, 4).transpose(1, 2)
        y = F.scaled_dot_product_attention(heads(q), heads(k), heads(v), is_causal=True)
        x = x + part("out")(y.transpose(1, 2).reshape(batch, length, 16))
        x = x + part("down")(F.gelu(part("up")(part("norm2")(x))))
    return hooks.add("head", model.head)(hooks.add("norm", model.norm)(x))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "run_in_torch", "length", "target_shape"),
    [
        (MLP, run_mlp_in_torch, CONTEXT, (BATCH,)),
        (Transformer, run_transformer_in_torch, 9, (BATCH, 9)),
    ],
    ids=["mlp", "transformer"],
)
def test_the_same_as_torch_hooks(make, run_in_torch, length, target_shape, getkey):
    import torch

    model = make(getkey())
    tokens = jr.randint(getkey(), (BATCH, length), 0, LETTERS)
    targets = jr.randint(getkey(), target_shape, 0, LETTERS)
    loss, values, grads, model_grads = eqx.filter_jit(
        lambda model: capture_grads(loss_of, model, tokens, targets, where=CAPTURED)
    )(model)

    hooks = Hooks()
    as_long = lambda x: torch.tensor(np.asarray(x)).long()
    embedding = torch.tensor(np.asarray(model.embedding), requires_grad=True)
    logits = run_in_torch(model, hooks, embedding, as_long(tokens))
    expected_loss = torch.nn.functional.cross_entropy(
        logits.reshape(-1, LETTERS), as_long(targets).reshape(-1)
    )
    expected_loss.backward()

    np.testing.assert_allclose(loss, expected_loss.item(), rtol=1e-6)
    assert set(values) == set(grads) == set(hooks.values) == set(hooks.grads)
    assert len(values) == {MLP: 8, Transformer: 14}[make]
    for path, value in values.items():
        np.testing.assert_allclose(value, hooks.values[path].detach(), rtol=0, atol=1e-5)
        assert_relative(grads[path], hooks.grads[path])
    assert_relative(model_grads.embedding, embedding.grad)


def assert_relative(ours, theirs):
    theirs = theirs.numpy()
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6 * np.abs(theirs).max())
