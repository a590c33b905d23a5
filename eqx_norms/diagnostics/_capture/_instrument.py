"""While a function of a model is traced, tag what the submodules that `where` matches return.

The model stays as it is, the structure of its tree with it. For as long as the function runs, the
`__call__` of its modules' classes is exchanged.
"""

import contextlib
import functools as ft
import inspect
import operator
import re
import sys
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

from ._model import Model, path
from ._names import batches_in_front
from ._tag import Place, tag, tag_inputs

Where = type | tuple[type, ...] | Callable[[str, Any], bool] | Callable[[Any], bool]


# From which arrays of the model an array comes, as a set of bits, and its shape.
Origin = tuple[int, tuple[int, ...]]


class Arrays(NamedTuple):
    """The arrays of a model, by where they stand: from which of them each comes, and its shape.

    `shared` are those that an `equinox.nn.Shared` puts there.
    """

    own: dict[tuple, int]
    shared: dict[tuple, int]
    shapes: dict[tuple, tuple[int, ...]]

    def origin(self, keys: tuple) -> int:
        return self.own.get(keys, self.shared.get(keys, 0))


class Observer:
    """Which modules of `model` to look at, and, while a function is traced, which are called."""

    def __init__(
        self,
        model: Model,
        where: Where,
        also: Collection[str] = (),
        names: Collection[str] = (),
        inputs: bool = False,
        lenient: bool = False,
        functions: Collection[str] = (),
    ):
        """`also` are the paths of modules to look at whether `where` matches them or not, `names`
        those of values to look at; `named` will be all that are there. With `inputs` what modules
        are given is marked too. With `functions`, which are to be found in between, all modules are
        marked, both ways. If it is `lenient`, it is no error that it cannot be told which of
        several modules is called: they are `unclear`.
        """
        self.model = model
        self._where, self._also, self._matches = where, frozenset(also), _as_predicate(where)
        self._by_where, self._lenient, self.unclear = False, lenient, set()
        self.modules = dict(model.modules(model.given))
        self.matched = {keys for keys, module in self.modules.items() if self._asks(keys, module)}
        self.names, self.named, self.inputs = frozenset(names), {}, inputs
        self.functions = frozenset(functions)
        if model.known:
            self.check_matched()
        self.outer = _watch.get()
        self.level = 0 if self.outer is None else self.outer.level + 1
        self._places = {}
        self._calls = []
        self._contents = {
            keys: _content(model, module)
            for keys, module in self.modules.items()
            if not model.held(module)[1]
        }

    def _asks(self, keys: tuple, module: Any) -> bool:
        by_where = bool(self._matches(path(keys), module))
        self._by_where |= by_where
        return by_where or path(keys) in self._also

    def check_matched(self) -> None:
        """Raises `ValueError` unless what was asked for is among the modules."""
        paths = set(map(path, self.modules))
        for each in self._also:
            if each not in paths:
                raise ValueError(_not_there(each, self.modules))
        if not self._by_where and (
            self._where != () or not (self._also or self.names or self.functions)
        ):
            trained = jtu.tree_leaves(self.model.trained(self.model.tree))
            if self._where is not everything or not trained:
                raise ValueError(_nothing_matches(self.model, self.modules))
        both = self.names.intersection(map(path, self.matched))
        if both:
            raise ValueError(
                f"`names` must differ from the paths of the submodules that are captured, but "
                f"{min(both)!r} is both. Type a `where` that leaves it out, or another name."
            )

    def trace(self, fn: Callable, args: tuple) -> tuple[Any, PyTree, PyTree]:
        """As `equinox.filter_make_jaxpr(fn)(model, *args)`, with tags in it."""

        def watched(tree, *args):
            # The copy that `fn` gets is alive until it returns, so ids stay distinct.
            model = self.model.build(tree)
            self._places = {id(m): keys for keys, m in self.model.modules(model)}
            names = batches_in_front() if self.names else contextlib.nullcontext()
            with _set(_watch, self), _traces(self._key()), self._hearing(), names:
                try:
                    return fn(model, *args)
                except Exception as error:
                    if type(error).__name__ == "TraceContextError":
                        error.add_note(_UPDATED)
                    raise

        return eqx.filter_make_jaxpr(watched)(self.model.tree, *args)

    def _hearing(self) -> contextlib.AbstractContextManager:
        """Within it this observer is told of every call of a module."""
        return _exchanged({type(module) for module in self.modules.values()})

    def told(self, module: Any, run: ft.partial) -> Any:
        """What `run()` returns, which calls `module`, with a tag if it is looked for."""
        place, held = self._place(module) if self.model.owns(module) else (None, ())
        looked_for = place if place is not None and self._may_match(module, place) else None
        if looked_for is not None and (self.inputs or self.functions):
            given = (run.args, run.keywords)
            args, kwargs = tag_inputs(given, looked_for, held, self.level, self.model.is_whole)
            run = ft.partial(run.func, *args, **kwargs)
        if self.outer is not None:
            run = ft.partial(self.outer.told, module, run)
        self._calls.append((module, place, held))
        try:
            out = run()
        finally:
            self._calls.pop()
        return out if looked_for is None else tag(out, looked_for, held, self.level)

    def _may_match(self, module: Any, place: Place) -> bool:
        if self.functions:
            return True
        if place.holder is None:
            return place.keys in self.matched
        return any(type(self.modules[keys]) is type(module) for keys in self.matched)

    def _place(self, module: Any) -> tuple[Place | None, Sequence[Array]]:
        if id(module) in self._places:
            keys = self._places[id(module)]
            return Place(keys, equals=self._equals(keys)), ()
        # `fn` has built it anew, as `jax.jit` and `equinox.combine` do.
        names, held = self.model.held(module)
        if held:
            return Place((), type(module), tuple(names)), held
        for caller, place, held in reversed(self._calls):
            for keys, child in self.model.modules(caller):
                if child is module:
                    return place and place._replace(keys=(*place.keys, *keys)), held
        return self._place_of_equal(module), ()

    def _equals(self, keys: tuple) -> tuple[tuple, ...]:
        """Where the others stand that are equal to the module at `keys`, which holds no array."""
        same = self._contents.get(keys)
        others = self._contents.items()
        return tuple(other for other, each in others if each == same and other != keys)

    def _place_of_equal(self, module: Any) -> Place | None:
        equal = [keys for keys, other in self.modules.items() if self.model.equal(module, other)]
        if len(equal) > 1 and self._lenient:
            same = [keys for keys in self.matched if type(self.modules[keys]) is type(module)]
            self.unclear.update(map(path, same))
        elif len(equal) > 1 and self.matched.intersection(equal):
            paths = ", ".join(repr(path(keys)) for keys in equal)
            raise NotImplementedError(
                f"`fn` calls a {type(module).__name__} in a tree that it has built anew, and which "
                f"of {paths} this is cannot be told, because it holds no array. Call the module "
                "that holds it, or type a `where` that leaves them out."
            )
        return Place(equal[0]) if len(equal) == 1 else None

    def holders(self, place: Place, held: list[Origin], arrays: "Arrays") -> list[tuple]:
        """The modules that hold the most of the arrays that the called one holds."""
        if place.holder is None:
            return [()]
        scores = {}
        for keys, module in self.modules.items():
            if type(module) is place.holder:
                here = [(*keys, *name) for name in place.names]
                both = [
                    a == b
                    for a, (b, _) in zip(map(arrays.origin, here), held, strict=True)
                    if a & b
                ]
                shapes = zip(map(arrays.shapes.get, here), held, strict=True)
                fit = sum(_ends_as(shape, other) for shape, (_, other) in shapes)
                # An array that comes from there alone says more than one that others are in too,
                # and one that stands there more than one that is shared with it.
                shared = sum(each not in arrays.own for each in here)
                scores[keys] = (sum(both), len(both), fit, -shared)
        best = max(scores.values(), default=(0, 0, 0, 0))
        return [keys for keys, score in scores.items() if score == best and score[1] > 0]

    def looks_for(self, found: list[tuple], place: Place) -> bool:
        """Whether one of the modules there is looked for, of which a call was tagged."""
        return bool(self.matched.intersection(found))

    def _key(self) -> "_Key":
        """What tags depend on besides the arguments of a function and its own code."""
        matched = frozenset((keys, type(self.modules[keys])) for keys in self.matched)
        contents = frozenset(self._contents.items())
        outer = self.outer and self.outer._key()
        kind = type(self), self.inputs, self._lenient
        key = _Key((kind, matched, contents, self.names, bool(self.functions), outer))
        return _keys.setdefault(key, key)


# The innermost capture whose function is being traced, in this thread.
_watch: ContextVar[Observer | None] = ContextVar("watch", default=None)
# JAX keeps traces of the functions that are jitted inside `fn`. This is part of what it finds them
# by, so that none with our tags in it is used where nothing is captured, where other things are, or
# in another model, nor the other way round.
_traces = jax.make_user_context()


_UPDATED = (
    "`fn` updates a module of `flax.nnx` that it closes over, as a BatchNorm in training. Give the "
    "module to `capture` as the model, or as one of `args`: `fn` gets copies of these."
)


def innermost(kind: type) -> Observer | None:
    """The innermost capture of this kind whose function is being traced."""
    watch = _watch.get()
    while watch is not None and not isinstance(watch, kind):
        watch = watch.outer
    return watch


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


def _content(model: Model, module: Any) -> Any:
    content = model.content(module)
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
        return run() if watch is None or type(self) is not cls else watch.told(self, run)

    setattr(cls, "__call__", watched_call)  # noqa: B010


def _restore(cls: type) -> None:
    del _users[cls]
    if cls in _own_calls:
        setattr(cls, "__call__", _own_calls.pop(cls))  # noqa: B010
    else:
        delattr(cls, "__call__")


def everything(path: str, module: Any) -> bool:
    """A `where` that matches all modules there are, if there are any."""
    return True


def _as_predicate(where: Where) -> Callable[[str, Any], bool]:
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


def _nothing_matches(model: Model, modules: dict[tuple, Any]) -> str:
    must = "`where` must match at least one submodule that can be called, but "
    if not modules:
        return must + model.nothing_there
    return (
        f"{must}it matches none. The "
        f"model has {_listed(modules)}: type one of these types, or a function of (path, module)."
    )


def _not_there(path: str, modules: dict[tuple, Any]) -> str:
    return (
        "`replace` must name submodules that can be called, but at "
        f"{path!r} there is none. The model has {_listed(modules)}: type one of these paths. "
        "What `jax.ad_checkpoint.checkpoint_name` names must be in `names` as well."
    )


def _listed(modules: dict[tuple, Any]) -> str:
    here = [f"{path(keys)!r}: {_full_name(type(module))}" for keys, module in modules.items()]
    return f"{{{', '.join(here[:20])}{', ...' if len(here) > 20 else ''}}}"


def _ends_as(shape: tuple[int, ...] | None, other: tuple[int, ...]) -> bool:
    """Whether they are the same but for axes in front, of `jax.vmap` or of a scan."""
    return shape is not None and all(map(operator.eq, shape[::-1], other[::-1]))


def _full_name(cls: type) -> str:
    """With the module that it is imported from, because many libraries have a LayerNorm."""
    parts = re.sub(r"\._.*", "", cls.__module__).split(".")
    names = [".".join(parts[: i + 1]) for i in range(len(parts))]
    exports = lambda name: getattr(sys.modules.get(name), cls.__qualname__, None) is cls
    return f"{next(filter(exports, names), names[-1])}.{cls.__qualname__}"
