"""What the instruments ask of a model: its submodules, by path and kind, and its arrays.

`Model` answers for Equinox, and on `FlaxModel` stand `_nnx.py`, for models of `flax.nnx`, and
`_named.py`, for the parameters of `flax.linen` and of Haiku. None of these is imported here.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax.tree_util as jtu
from jaxtyping import Array, PyTree


class LinearShape(NamedTuple):
    """Of a dense layer or of a convolution."""

    ins: int
    outs: int
    kernel: tuple[int, ...] = ()


class Model:
    """An Equinox model: any pytree with `equinox.Module`s in it.

    - `tree`: the pytree of arrays that a program of the model is a function of.
    - `known`: whether its submodules are known before a function calls them.
    - `batches_first`: whether submodules are given batches, and not one example.
    - `nothing_there`: what is wrong with a model without submodules.
    - `to_share`: what people type to have one parameter at two places.
    """

    known = True
    to_share = "type `equinox.nn.Shared`"
    batches_first = False
    nothing_there = (
        "the second argument, the model, has none: only an `equinox.Module` or a `flax.nnx.Module` "
        "with a `__call__` is one. The first is a function of the model: type for instance "
        "`capture(lambda model, x: model(x), model, x, where=where)`."
    )

    def __init__(self, model: PyTree):
        self.given = self.tree = model

    def build(self, tree: PyTree) -> PyTree:
        """The model that `fn` is given, of these arrays."""
        return tree

    def of_tree(self, fn: Callable) -> Callable:
        """`fn(model, *args)` as a function of `tree` and `args`."""
        return lambda tree, *args: fn(self.build(tree), *args)

    def apart(self) -> PyTree:
        """As it can go into `jax.jit`; `as_model` takes it as well."""
        return self.given

    # ---- Its arrays.

    def keys(self, tree: PyTree) -> list[tuple]:
        """Where each array of such a tree stands, in the order of its leaves."""
        leaves, _ = jtu.tree_flatten_with_path(eqx.filter(tree, eqx.is_array))
        return [keys for keys, _ in leaves]

    def holds_more_of_it(self, arg: Any) -> bool:
        """Whether it is what `equinox.partition` has taken out of the model."""
        return type(arg) is type(self.tree)

    def trained(self, tree: PyTree) -> PyTree:
        """What is differentiated and trained, as the optimiser knows it."""
        return eqx.filter(tree, eqx.is_inexact_array)

    def with_trained(self, tree: PyTree, trained: PyTree) -> PyTree:
        """`tree`, with other numbers in what is trained."""
        return eqx.combine(trained, tree)

    def paths(self) -> list[str]:
        """Of what is trained, in the order of its leaves."""
        long = [path(keys) for keys in self.keys(self.trained(self.tree))]
        short = [each.removesuffix("[<flat index 0>]") for each in long]  # of Haliax's arrays
        return short if len(set(short)) == len(short) else long

    def gradients(self, grads: PyTree) -> PyTree:
        """As the library itself returns them."""
        return grads

    def optimiser_state(self, state: PyTree) -> PyTree:
        """As it fits to what `trained` returns."""
        return state

    def has_units_last(self, where: str) -> bool:
        """Whether the units of the parameter there are its last axis, and not its first."""
        return False

    # ---- Its modules.

    def modules(self, model: PyTree) -> Iterator[tuple[tuple, Any]]:
        """All in it that can be called, with where they stand."""
        return callable_modules((), model)

    def owns(self, module: Any) -> bool:
        """Whether it is a module of this library."""
        return isinstance(module, eqx.Module)

    def is_whole(self, x: Any) -> bool:
        """Whether it is no array for a submodule to compute with, though arrays are in it."""
        return isinstance(x, eqx.Module | eqx.nn.State)

    def held(self, module: Any) -> tuple[Sequence[tuple], Sequence[Array]]:
        """Where in it its arrays stand, and the arrays."""
        opened = jtu.tree_map(_opened, eqx.filter(module, eqx.is_array))
        leaves, _ = jtu.tree_flatten_with_path(opened)
        return [keys for keys, _ in leaves], [x for _, x in leaves]

    def content(self, module: Any) -> tuple:
        """What a module without arrays consists of; two that are equal cannot be told apart."""
        leaves, structure = jtu.tree_flatten(module)
        return structure, tuple(leaves)

    def equal(self, module: Any, other: Any) -> bool:
        return type(module) is type(other) and bool(eqx.tree_equal(module, other))

    def linear_shape(self, keys: tuple, module: Any) -> LinearShape | None:
        if isinstance(module, eqx.nn.Linear):
            ins, outs = module.in_features, module.out_features
            return None if ins == "scalar" or outs == "scalar" else LinearShape(ins, outs)
        if isinstance(module, eqx.nn.Conv) and module.groups == 1:
            return LinearShape(module.in_channels, module.out_channels, tuple(module.kernel_size))
        return None


class FlaxModel(Model):
    """What models of `flax.nnx` and of named modules share; `arrays` are the model's, by keys."""

    batches_first = True
    arrays: dict[tuple, Array]

    def has_units_last(self, where: str) -> bool:
        """Of a kernel, or the `w` of Haiku; those of an embedding are not its last axis."""
        return where.rpartition(".")[2] in ("kernel", "w")

    def linear_shape(self, keys: tuple, module: Any) -> LinearShape | None:
        kernel: Any = self.arrays.get((*keys, jtu.GetAttrKey("kernel")))
        kind, ndim = type(module).__name__, getattr(kernel, "ndim", 0)
        if kind in ("Linear", "Dense") and ndim == 2:
            ins, outs = kernel.shape
            return LinearShape(ins, outs)
        if kind == "Conv" and getattr(module, "feature_group_count", 1) == 1 and ndim > 2:
            *width, ins, outs = kernel.shape
            return LinearShape(ins, outs, tuple(width))
        return None


def path(keys: tuple) -> str:
    return jtu.keystr(keys).removeprefix(".")


def callable_modules(keys: tuple, node: Any) -> Iterator[tuple[tuple, eqx.Module]]:
    if isinstance(node, eqx.Module) and callable(node):
        yield keys, node
    children, _ = jtu.tree_flatten_with_path(node, is_leaf=lambda x: x is not node)
    for key, child in children:
        if child is not node:
            yield from callable_modules((*keys, *key), child)


def as_attributes(keys: tuple) -> tuple:
    """Names of a dictionary as those of attributes, and numbers as those of a list."""
    found = []
    for key in keys:
        name = key.key if isinstance(key, jtu.DictKey) else key
        if isinstance(name, str):
            found += [jtu.GetAttrKey(part) for part in name.split("/")]
        else:
            found.append(jtu.SequenceKey(name) if isinstance(name, int) else key)
    return tuple(found)


def _opened(leaf: Any) -> Any:
    """The arrays that a parameter consists of, if it is a pytree that Quax traces as one array.

    Some, as a LoRA matrix, refuse to be made one, which a tag would ask of them.
    """
    value = getattr(leaf, "value", None)  # of a tracer of Quax's; other arrays have one array there
    parts = isinstance(value, eqx.Module) and len(jtu.tree_leaves(value)) > 1
    return value if parts else leaf
