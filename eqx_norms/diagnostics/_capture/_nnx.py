"""Models of `flax.nnx`: modules are objects in a graph, which `fn` may update."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax.tree_util as jtu
from flax import nnx
from jaxtyping import Array, PyTree

from ._model import FlaxModel, as_attributes, path


def holds_modules(model: PyTree) -> bool:
    is_module = lambda x: isinstance(x, nnx.Module)
    leaves = jtu.tree_leaves(model, is_leaf=is_module)
    return isinstance(model, Split) or any(map(is_module, leaves))


def refuse_states(model: PyTree) -> None:
    """Raises `TypeError` for what `nnx.split` returns, which says nothing of modules."""
    if any(isinstance(x, nnx.State) for x in jtu.tree_leaves(model, is_leaf=_is_state)):
        raise TypeError(
            "The model must be an `nnx.Module`, but it is an `nnx.State`, of which nobody knows "
            "the modules. Type `capture(fn, nnx.merge(graphdef, state), x, where=where)`. `fn` may "
            "split its model, and merge it again."
        )


def _is_state(x: Any) -> bool:
    return isinstance(x, nnx.State)


class Split(NamedTuple):
    """A model as it goes into `jax.jit`, which would make two arrays of what is shared in it."""

    graphdef: Any
    states: tuple


class NnxModel(FlaxModel):
    """An `nnx.Module`, or a pytree of several.

    `tree` is a pair of its `nnx.Param`s and of all else. `fn` gets a copy of the model each time
    that it is traced, so that what it updates in there is no part of the model itself.
    """

    to_share = "give both places the one `nnx.Param`, or the one module"

    def __init__(self, model: PyTree):
        if isinstance(model, Split):
            model = nnx.merge(model.graphdef, *model.states)
        self.given = model
        self.graphdef, *self.states = nnx.split(model, nnx.Param, ...)
        self.tree = tuple(map(nnx.as_pure, self.states))
        leaves, _ = jtu.tree_flatten_with_path(tuple(self.states))
        self._keys = [_of_state(keys[1:]) for keys, x in leaves if eqx.is_array(x)]
        arrays = [x for x in jtu.tree_leaves(self.tree) if eqx.is_array(x)]
        self.arrays = dict(zip(self._keys, arrays, strict=True))

    def build(self, tree: PyTree) -> PyTree:
        states = jtu.tree_unflatten(jtu.tree_structure(tuple(self.states)), jtu.tree_leaves(tree))
        return nnx.merge(self.graphdef, *states)

    def apart(self) -> PyTree:
        return Split(self.graphdef, tuple(self.states))

    def keys(self, tree: PyTree) -> list[tuple]:
        return self._keys

    def paths(self) -> list[str]:
        arrays = [x for x in jtu.tree_leaves(self.tree[0]) if eqx.is_array(x)]
        pairs = zip(self._keys[: len(arrays)], arrays, strict=True)
        return [path(keys) for keys, x in pairs if eqx.is_inexact_array(x)]

    def holds_more_of_it(self, arg: Any) -> bool:
        return False

    def trained(self, tree: PyTree) -> PyTree:
        return eqx.filter(tree[0], eqx.is_inexact_array)

    def with_trained(self, tree: PyTree, trained: PyTree) -> PyTree:
        return eqx.combine(trained, tree[0]), tree[1]

    def gradients(self, grads: PyTree) -> PyTree:
        leaves = jtu.tree_leaves(grads, is_leaf=lambda x: x is None)
        return jtu.tree_unflatten(jtu.tree_structure(self.states[0]), leaves)

    def optimiser_state(self, state: PyTree) -> PyTree:
        return nnx.as_pure(state)

    def modules(self, model: PyTree) -> Iterator[tuple[tuple, Any]]:
        for names, module in [*nnx.iter_modules(model)][::-1]:
            if callable(module):
                yield as_attributes(names), module

    def owns(self, module: Any) -> bool:
        return isinstance(module, nnx.Module)

    def is_whole(self, x: Any) -> bool:
        return isinstance(x, nnx.Pytree | nnx.Variable | nnx.State)

    def held(self, module: Any) -> tuple[Sequence[tuple], Sequence[Array]]:
        leaves, _ = jtu.tree_flatten_with_path(nnx.state(module))
        arrays = [(_of_state(keys), x) for keys, x in leaves if eqx.is_array(x)]
        return [keys for keys, _ in arrays], [x for _, x in arrays]

    def content(self, module: Any) -> tuple:
        return (nnx.graphdef(module),)

    def equal(self, module: Any, other: Any) -> bool:
        bare = type(module) is type(other) and not self.held(other)[1]
        return bare and nnx.graphdef(module) == nnx.graphdef(other)


def _of_state(keys: tuple) -> tuple:
    """Without the attribute of the `nnx.Variable` that holds the array."""
    at = next((i for i, key in enumerate(keys) if isinstance(key, jtu.GetAttrKey)), len(keys))
    return (*as_attributes(keys[:at]), *keys[at + 1 :])
