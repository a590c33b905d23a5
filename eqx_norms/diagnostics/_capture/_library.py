"""Which library a model is of."""

import sys
from typing import Any

import equinox as eqx
import jax.tree_util as jtu
from jaxtyping import PyTree

from ._instrument import Observer
from ._model import Model
from ._named import NamedModel, NamedObserver, libraries


def as_model(model: PyTree) -> Model:
    """`model` as the instruments see it. No library is imported that was not."""
    if any(_is_equinox(node) for node in jtu.tree_leaves(model, is_leaf=_is_equinox)):
        return Model(model)
    if "flax.nnx" in sys.modules:
        from ._nnx import NnxModel, holds_modules, refuse_states

        if holds_modules(model):
            return NnxModel(model)
        refuse_states(model)
    _refuse_linen(model)
    has_arrays = any(map(eqx.is_array, jtu.tree_leaves(model)))
    return NamedModel(model) if libraries() and has_arrays else Model(model)


def observe(model: Model, *args: Any, **options: Any) -> Observer:
    """An `Observer` of such a model."""
    kind = Observer if model.known else NamedObserver
    return kind(model, *args, **options)


def _is_equinox(node: Any) -> bool:
    return isinstance(node, eqx.Module)


def _refuse_linen(model: PyTree) -> None:
    for leaf in jtu.tree_leaves(model):
        if any(isinstance(leaf, library.kind) for library in libraries()):
            raise TypeError(
                "The model must be the parameters that a module of `flax.linen` or of Haiku is "
                f"applied to, but it is the module itself, a {type(leaf).__name__}. Type "
                "`capture(lambda params, x: module.apply({'params': params}, x), params, x, "
                "where=where)`."
            )
