"""While a function of a model is traced, tag what the submodules that `where` matches return.

The model stays as it is, the structure of its tree with it. For as long as the function runs, the
`__call__` of its modules' classes is exchanged.
"""

import contextlib
import functools as ft
import inspect
import re
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from ._names import batches_in_front
from ._tag import Place, tag, tag_inputs

Where = type | tuple[type, ...] | Callable[[str, eqx.Module], bool] | Callable[[eqx.Module], bool]


class Observer:
    """Which modules of `model` to look at, and, while a function is traced, which are called."""

    def __init__(
        self,
        model: PyTree,
        where: Where,
        also: Collection[str] = (),
        names: Collection[str] = (),
        inputs: bool = False,
    ):
        """`also` are the paths of modules to look at whether `where` matches them or not, `names`
        those of values to look at; `named` will be all that are there. With `inputs` what modules
        are given is marked too.
        """
        matches = _as_predicate(where)
        self.modules = dict(callable_modules((), model))
        paths = {path(keys): keys for keys in self.modules}
        for each in also:
            if each not in paths:
                raise ValueError(_not_there(each, self.modules))
        self.matched = {keys for each, keys in paths.items() if matches(each, self.modules[keys])}
        if not self.matched and (where != () or not (also or names)):
            raise ValueError(_nothing_matches(self.modules))
        self.matched.update(paths[each] for each in also)
        self.names, self.named, self.inputs = frozenset(names), {}, inputs
        both = self.names.intersection(map(path, self.matched))
        if both:
            raise ValueError(
                f"`names` must differ from the paths of the submodules that are captured, but "
                f"{min(both)!r} is both. Type a `where` that leaves it out, or another name."
            )
        self.outer = _watch.get()
        self.level = 0 if self.outer is None else self.outer.level + 1
        self._places = {}
        self._calls = []
        self._contents = _contents(self.modules)

    def trace(self, fn: Callable, model: PyTree, args: tuple) -> tuple[Any, PyTree, PyTree]:
        """As `equinox.filter_make_jaxpr(fn)(model, *args)`, with tags in it."""

        def watched(model, *args):
            # The copy that `fn` gets is alive until it returns, so ids stay distinct.
            self._places = {id(m): keys for keys, m in callable_modules((), model)}
            names = batches_in_front() if self.names else contextlib.nullcontext()
            with _set(_watch, self), _traces(self._key()), _exchanged(self._classes), names:
                return fn(model, *args)

        return eqx.filter_make_jaxpr(watched)(model, *args)

    def call(self, module: eqx.Module, run: ft.partial) -> Any:
        """What `run()` returns, which calls `module`, with a tag if it is looked for."""
        place, held = self._place(module)
        looked_for = place if place is not None and self._may_match(module, place) else None
        if looked_for is not None and self.inputs:
            args, kwargs = tag_inputs((run.args, run.keywords), looked_for, held, self.level)
            run = ft.partial(run.func, *args, **kwargs)
        if self.outer is not None:
            run = ft.partial(self.outer.call, module, run)
        self._calls.append((module, place, held))
        try:
            out = run()
        finally:
            self._calls.pop()
        return out if looked_for is None else tag(out, looked_for, held, self.level)

    def _may_match(self, module: eqx.Module, place: Place) -> bool:
        if place.holder is None:
            return place.keys in self.matched
        return any(type(self.modules[keys]) is type(module) for keys in self.matched)

    def _place(self, module: eqx.Module) -> tuple[Place | None, Sequence[Array]]:
        if id(module) in self._places:
            keys = self._places[id(module)]
            return Place(keys, equals=self._equals(keys)), ()
        # `fn` has built it anew, as `jax.jit` and `equinox.combine` do.
        opened = jtu.tree_map(_opened, eqx.filter(module, eqx.is_array))
        leaves, _ = jtu.tree_flatten_with_path(opened)
        if leaves:
            names, held = zip(*leaves, strict=True)
            return Place((), type(module), names), held
        for caller, place, held in reversed(self._calls):
            for keys, child in callable_modules((), caller):
                if child is module:
                    return place and place._replace(keys=(*place.keys, *keys)), held
        return self._place_of_equal(module), ()

    def _equals(self, keys: tuple) -> tuple[tuple, ...]:
        """Where the others stand that are equal to the module at `keys`, which holds no array."""
        same = self._contents.get(keys)
        others = self._contents.items()
        return tuple(other for other, each in others if each == same and other != keys)

    def _place_of_equal(self, module: eqx.Module) -> Place | None:
        equal = [keys for keys, other in self.modules.items() if _equal(module, other)]
        if len(equal) > 1 and self.matched.intersection(equal):
            paths = ", ".join(repr(path(keys)) for keys in equal)
            raise NotImplementedError(
                f"`fn` calls a {type(module).__name__} in a tree that it has built anew, and which "
                f"of {paths} this is cannot be told, because it holds no array. Call the module "
                "that holds it, or type a `where` that leaves them out."
            )
        return Place(equal[0]) if len(equal) == 1 else None

    @property
    def _classes(self) -> set[type[eqx.Module]]:
        return {type(module) for module in self.modules.values()}

    def _key(self) -> "_Key":
        """What tags depend on besides the arguments of a function and its own code."""
        matched = frozenset((keys, type(self.modules[keys])) for keys in self.matched)
        contents = frozenset(self._contents.items())
        outer = self.outer and self.outer._key()
        key = _Key((type(self), matched, contents, self.names, self.inputs, outer))
        return _keys.setdefault(key, key)


def _opened(leaf: Any) -> Any:
    """The arrays that a parameter consists of, if it is a pytree that Quax traces as one array.

    Some, as a LoRA matrix, refuse to be made one, which a tag would ask of them.
    """
    value = getattr(leaf, "value", None)  # of a tracer of Quax's; other arrays have one array there
    parts = isinstance(value, eqx.Module) and len(jtu.tree_leaves(value)) > 1
    return value if parts else leaf


# The innermost capture whose function is being traced, in this thread.
_watch: ContextVar[Observer | None] = ContextVar("watch", default=None)
# JAX keeps traces of the functions that are jitted inside `fn`. This is part of what it finds them
# by, so that none with our tags in it is used where nothing is captured, where other things are, or
# in another model, nor the other way round.
_traces = jax.make_user_context()


class _Key:
    """A value whose hash is computed once, because JAX asks for it at each look-up."""

    def __init__(self, value: Any):
        self.value = value
        self.hash = hash(value)

    def __hash__(self):
        return self.hash

    def __eq__(self, other):
        return self is other or (isinstance(other, _Key) and self.value == other.value)


# Those in use, so that equal ones are the same, which is quickly seen.
_keys = weakref.WeakValueDictionary()


class _Content(NamedTuple):
    """What a module without arrays consists of; two that are equal cannot be told apart."""

    structure: Any
    leaves: tuple


def _contents(modules: dict[tuple, eqx.Module]) -> dict[tuple, Any]:
    return {keys: _content(module) for keys, module in modules.items() if _is_bare(module)}


def _is_bare(module: eqx.Module) -> bool:
    return not any(map(eqx.is_array, jtu.tree_leaves(module)))


def _content(module: eqx.Module) -> _Content | object:
    leaves, structure = jtu.tree_flatten(module)
    content = _Content(structure, tuple(leaves))
    try:
        hash(content)
    except TypeError:
        return object()  # equal to nothing else
    return content


@contextlib.contextmanager
def _set(variable: ContextVar, value: Any) -> Iterator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


_lock = threading.Lock()
_users = Counter()


@contextlib.contextmanager
def _exchanged(classes: set[type]) -> Iterator[None]:
    """Within it, calls of modules of these classes are told to the thread's `_watch`."""
    # Several threads can be in here at a time: the last to leave a class restores it.
    with _lock:
        for cls in classes:
            if not _users[cls]:
                _exchange(cls)
            _users[cls] += 1
    try:
        yield
    finally:
        with _lock:
            for cls in classes:
                _users[cls] -= 1
                if not _users[cls]:
                    _restore(cls)


_own_calls = {}


def _exchange(cls: type) -> None:
    if "__call__" in vars(cls):
        _own_calls[cls] = vars(cls)["__call__"]
    original = next(vars(c)["__call__"] for c in cls.__mro__ if "__call__" in vars(c))

    @ft.wraps(original, updated=())
    def watched_call(self, *args, **kwargs):
        run = ft.partial(original.__get__(self, type(self)), *args, **kwargs)
        watch = _watch.get()
        # A subclass that asks its superclass is one call, not two.
        return run() if watch is None or type(self) is not cls else watch.call(self, run)

    setattr(cls, "__call__", watched_call)  # noqa: B010


def _restore(cls: type) -> None:
    del _users[cls]
    if cls in _own_calls:
        setattr(cls, "__call__", _own_calls.pop(cls))  # noqa: B010
    else:
        delattr(cls, "__call__")


def path(keys: tuple) -> str:
    return jtu.keystr(keys).removeprefix(".")


def _as_predicate(where: Where) -> Callable[[str, eqx.Module], bool]:
    classes = where if isinstance(where, tuple) else (where,)
    if all(isinstance(cls, type) for cls in classes):
        return lambda path, module: isinstance(module, classes)  # pyright: ignore
    if not isinstance(where, tuple) and callable(where):
        return where if _takes_a_path(where) else lambda _, module: where(module)  # pyright: ignore
    raise TypeError(
        "`where` must be a submodule type, a tuple of types, or a function of (path, module), "
        f"but it is {where!r}. Type for instance `where=eqx.nn.Linear`."
    )


def _takes_a_path(where: Callable) -> bool:
    """Whether it is a function of (path, module), and not of the module alone, as `is_norm` is."""
    try:
        inspect.signature(where).bind("", None)
    except TypeError:
        return False
    except ValueError:  # It has no signature.
        return True
    return True


def _nothing_matches(modules: dict[tuple, eqx.Module]) -> str:
    must = "`where` must match at least one submodule that can be called, but "
    if not modules:
        return (
            f"{must}the second argument, the model, has none: only an `equinox.Module` with a "
            "`__call__` is one. The first is a function of the model: type for instance "
            "`capture(lambda model, x: model(x), model, x, where=where)`."
        )
    return (
        f"{must}it matches none. The "
        f"model has {_listed(modules)}: type one of these types, or a function of (path, module)."
    )


def _not_there(path: str, modules: dict[tuple, eqx.Module]) -> str:
    return (
        "`replace` must name submodules that can be called, but at "
        f"{path!r} there is none. The model has {_listed(modules)}: type one of these paths. "
        "What `jax.ad_checkpoint.checkpoint_name` names must be in `names` as well."
    )


def _listed(modules: dict[tuple, eqx.Module]) -> str:
    here = [f"{path(keys)!r}: {_full_name(type(module))}" for keys, module in modules.items()]
    return f"{{{', '.join(here[:20])}{', ...' if len(here) > 20 else ''}}}"


def _full_name(cls: type) -> str:
    """With the module that it is imported from, because many libraries have a LayerNorm."""
    public = re.sub(r"\._.*", "", cls.__module__)
    return f"{public}.{cls.__qualname__}"


def callable_modules(keys: tuple, node: Any) -> Iterator[tuple[tuple, eqx.Module]]:
    if isinstance(node, eqx.Module) and callable(node):
        yield keys, node
    children, _ = jtu.tree_flatten_with_path(node, is_leaf=lambda x: x is not node)
    for key, child in children:
        if child is not node:
            yield from callable_modules((*keys, *key), child)


def _equal(module: eqx.Module, other: eqx.Module) -> bool:
    return type(module) is type(other) and bool(eqx.tree_equal(module, other))
