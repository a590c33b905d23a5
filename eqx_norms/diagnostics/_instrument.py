"""Give the submodules that `where` matches, in a copy of the model, a call that tags its output."""

import functools as ft
from collections.abc import Callable, Iterator
from typing import Any

import equinox as eqx
import jax.tree_util as jtu
from jaxtyping import PyTree

from ._tag import tag

Where = type | tuple[type, ...] | Callable[[str, eqx.Module], bool]


def instrument(model: PyTree, where: Where) -> PyTree:
    """A copy of `model` whose matched submodules tag what they return."""
    matches = _as_predicate(where)
    modules = list(_callable_modules((), model))
    if any(isinstance(module, _Tagged) for _, module in modules):
        raise NotImplementedError(
            "`capture` must be given a model of its own, but this one is being captured already: "
            "type one `capture` with a `where` that matches both."
        )
    paths = {path for path, module in modules if matches(path, module)}
    if not paths:
        raise ValueError(_nothing_matches(modules))
    return _map_modules(lambda path, m: _tagged(m, path) if path in paths else m, (), model)


def restore(tree: PyTree) -> PyTree:
    """`tree`, with every module in it of its own class again."""
    return _map_modules(lambda path, m: _untagged(m) if isinstance(m, _Tagged) else m, (), tree)


def _as_predicate(where: Where) -> Callable[[str, eqx.Module], bool]:
    classes = where if isinstance(where, tuple) else (where,)
    if all(isinstance(cls, type) for cls in classes):
        return lambda path, module: isinstance(module, classes)  # pyright: ignore
    if not isinstance(where, tuple) and callable(where):
        return where
    raise TypeError(
        "`where` must be a submodule type, a tuple of types, or a function of (path, module), "
        f"but it is {where!r}. Type for instance `where=eqx.nn.Linear`."
    )


def _nothing_matches(modules: list[tuple[str, eqx.Module]]) -> str:
    here = [f"{path!r}: {type(module).__name__}" for path, module in modules]
    listed = ", ".join(here[:20]) + (", ..." if len(here) > 20 else "")
    return (
        "`where` must match at least one submodule that can be called, but it matches none. "
        f"The model has {{{listed}}}: type one of these types, or a function of (path, module)."
    )


def _children(node: Any) -> tuple[list[tuple[tuple, Any]], Any]:
    return jtu.tree_flatten_with_path(node, is_leaf=lambda x: x is not node)


def _path(keys: tuple) -> str:
    return jtu.keystr(keys).removeprefix(".")


def _callable_modules(keys: tuple, node: Any) -> Iterator[tuple[str, eqx.Module]]:
    if isinstance(node, eqx.Module) and callable(node):
        yield _path(keys), node
    for key, child in _children(node)[0]:
        if child is not node:
            yield from _callable_modules((*keys, *key), child)


def _map_modules(fn: Callable[[str, eqx.Module], eqx.Module], keys: tuple, node: Any) -> Any:
    children, structure = _children(node)
    if not jtu.treedef_is_leaf(structure):
        new = [_map_modules(fn, (*keys, *key), child) for key, child in children]
        node = structure.unflatten(new)
    return fn(_path(keys), node) if isinstance(node, eqx.Module) else node


class _Tagged:
    """Mixed in ahead of a module's own class: tags what its `__call__` returns."""

    def __init_subclass__(cls) -> None:
        # Not passed on, for a class that keeps a registry of its subclasses must not see ours.
        pass

    def __call__(self, *args, **kwargs):
        out = super().__call__(*args, **kwargs)  # pyright: ignore
        # The path is missing where the model itself made a new instance of this class.
        path = self._eqx_norms_path  # pyright: ignore
        return out if path is None else tag(out, path)


def _tagged(module: eqx.Module, path: str) -> eqx.Module:
    return _with_class(_tagged_class(type(module)), {**vars(module), "_eqx_norms_path": path})


def _untagged(module: eqx.Module) -> eqx.Module:
    _, _, cls, *_ = type(module).__mro__
    return _with_class(cls, {k: v for k, v in vars(module).items() if k != "_eqx_norms_path"})


def _with_class(cls: type, attributes: dict[str, Any]) -> Any:
    # Past `__init__`, whose checks and conversions the module has been through.
    module = object.__new__(cls)
    for name, value in attributes.items():
        object.__setattr__(module, name, value)
    return module


@ft.cache
def _tagged_class(cls: type[eqx.Module]) -> type[eqx.Module]:
    # A subclass, so that `isinstance` stays true. The path is a static field, not one class for
    # each path: it is part of the tree's structure, so a function that is jitted inside the model
    # and called with two submodules is traced for each of them.
    namespace = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "__annotations__": {"_eqx_norms_path": str | None},
        "_eqx_norms_path": eqx.field(static=True, init=False, default=None),
    }
    return type(cls)(cls.__name__, (_Tagged, cls), namespace)  # pyright: ignore
