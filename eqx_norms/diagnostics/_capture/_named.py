"""Parameters of `flax.linen` and of Haiku: `fn` closes over modules, which are called by name.

Which modules there are is known once the function is traced. All are tagged, and the arrays that
each holds say to which parameters of the model its name belongs.
"""

import contextlib
import functools as ft
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from ._instrument import Arrays, Observer, Origin, innermost
from ._model import FlaxModel, as_attributes
from ._tag import Place

_PARAMS = jtu.GetAttrKey("params")


class NamedModel(FlaxModel):
    """The `params`, or all variables, of modules that the function closes over."""

    known = False
    to_share = "call the one module at both places"
    nothing_there = (
        "the second argument, the model, has none: it is a tree of arrays. Type an "
        "`equinox.Module` or a `flax.nnx.Module` with a `__call__`; or, for `flax.linen` and Haiku "
        "the parameters that `fn` gives to `apply`. Of functions without modules, name values by "
        "`jax.ad_checkpoint.checkpoint_name`, and type `where=(), names=('hidden',)`."
    )

    def __init__(self, model: PyTree):
        super().__init__(model)
        self.arrays = dict(zip(self.keys(model), _arrays(model), strict=True))

    def keys(self, tree: PyTree) -> list[tuple]:
        """`params` has no part in them, be the tree that of the parameters or of all variables."""
        long = [as_attributes(keys) for keys in super().keys(tree)]
        short = [tuple(key for key in keys if key != _PARAMS) for keys in long]
        return short if len(set(short)) == len(short) else long

    def holds_more_of_it(self, arg: Any) -> bool:
        return isinstance(arg, Mapping)

    def trained(self, tree: PyTree) -> PyTree:
        return super().trained(tree["params"] if _are_variables(tree) else tree)

    def with_trained(self, tree: PyTree, trained: PyTree) -> PyTree:
        if not _are_variables(tree):
            return super().with_trained(tree, trained)
        return type(tree)({**tree, "params": eqx.combine(trained, tree["params"])})

    def modules(self, model: PyTree) -> Iterator[tuple[tuple, Any]]:
        return iter(())

    def owns(self, module: Any) -> bool:
        return any(isinstance(module, library.kind) for library in libraries())


def _arrays(tree: PyTree) -> list[Array]:
    return jtu.tree_leaves(eqx.filter(tree, eqx.is_array))


def _are_variables(tree: PyTree) -> bool:
    """Whether it is a dictionary of Flax's collections."""
    return isinstance(tree, Mapping) and isinstance(tree.get("params"), Mapping)


class NamedObserver(Observer):
    """Tags every call of a module; `where` is asked about each when its path is known."""

    @contextlib.contextmanager
    def _hearing(self) -> Iterator[None]:
        def heard(next_fn, args, kwargs, context):
            run = ft.partial(next_fn, *args, **kwargs)
            ours = context.method_name == "__call__" and innermost(NamedObserver) is self
            return self.told(context.module, run) if ours else run()

        with contextlib.ExitStack() as stack:
            for library in libraries():
                stack.enter_context(library.intercepted(heard))
            yield

    def _may_match(self, module: Any, place: Place) -> bool:
        return True

    def _place(self, module: Any) -> tuple[Place | None, Sequence[Array]]:
        for library in libraries():
            if isinstance(module, library.kind):
                keys, names, held = library.opened(module)
                if held:
                    return Place(keys, type(module), names, module=module), held
                # It is where the module is that calls it.
                for _, place, held in reversed(self._calls):
                    if place is not None:
                        return place._replace(keys=keys, module=module), held
        return None, ()

    def holders(self, place: Place, held: list[Origin], arrays: Arrays) -> list[tuple]:
        """What stands ahead of the names of the arrays in the model. It has all that is held, or
        else the most.
        """
        scores = {}
        for name, (bits, _) in zip(place.names, held, strict=True):
            for keys, bit in arrays.own.items() if bits else ():
                if bits & bit and keys[len(keys) - len(name) :] == name:
                    ahead = keys[: len(keys) - len(name)]
                    exact, both = scores.get(ahead, (0, 0))
                    scores[ahead] = exact + (bits == bit), both + 1
        best = max(scores.values(), default=None)
        if best is None:  # They are made of the model's, under other names.
            return [()] if any(bits for bits, _ in held) else []
        return [ahead for ahead, score in scores.items() if score == best]

    def looks_for(self, found: list[tuple], place: Place) -> bool:
        for keys in found:
            if keys not in self.modules:
                self.modules[keys] = place.module
                if self._asks(keys, place.module):
                    self.matched.add(keys)
        return super().looks_for(found, place)


class _Library(NamedTuple):
    """How one library's modules are heard.

    - `kind`: the class of modules.
    - `intercepted`: a context manager, which takes the function that hears the calls.
    - `opened`: of a module its keys, and the names and values of its parameters, from the root.
    """

    kind: type
    intercepted: Callable[[Callable], Any]
    opened: Callable[[Any], tuple[tuple, tuple, list[Array]]]


def libraries() -> list[_Library]:
    """Those that are imported."""
    found = []
    if "flax.linen" in sys.modules:
        linen = sys.modules["flax.linen"]
        found.append(_Library(linen.Module, linen.intercept_methods, _of_linen))
    if "haiku" in sys.modules:
        haiku = sys.modules["haiku"]
        found.append(_Library(haiku.Module, haiku.intercept_methods, _of_haiku))
    return found


def _of_linen(module: Any) -> tuple[tuple, tuple, list[Array]]:
    keys = as_attributes(module.path)
    return keys, *_flat(module.variables.get("params", {}), keys)


def _of_haiku(module: Any) -> tuple[tuple, tuple, list[Array]]:
    keys = as_attributes((module.module_name,))
    return keys, *_flat(module.params_dict(), ())


def _flat(params: Mapping, ahead: tuple) -> tuple[tuple, list[Array]]:
    leaves, _ = jtu.tree_flatten_with_path(eqx.filter(params, eqx.is_array))
    return tuple((*ahead, *as_attributes(keys)) for keys, _ in leaves), [x for _, x in leaves]
