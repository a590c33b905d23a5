"""The numbers that a function holds, and that its trace does not tell from those in its text.

A parameter that is a JAX array, or a NumPy array with axes, is a constant of the trace by itself.
NumPy's scalars and arrays without axes are written into it as a `0.5` in the program is, and so is
an entry that Python takes out of a NumPy array. So they are looked for where the function has them:
in closures, attributes, defaults, pytrees and globals.
"""

import collections
import dataclasses
import functools
import sys
import sysconfig
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_LIBRARIES = tuple({sysconfig.get_paths()[name] for name in ("stdlib", "purelib", "platlib")})


@dataclasses.dataclass(frozen=True)
class Held:
    """The floats that a function holds: `numbers`, and NumPy `arrays` with axes."""

    numbers: frozenset[Any] = frozenset()
    arrays: tuple[np.ndarray, ...] = ()
    told: dict[tuple[str, bytes], bool] = dataclasses.field(default_factory=dict, compare=False)

    def have(self, value: Any) -> bool:
        """Whether one of them, in the dtype of a number of the trace, is that number."""
        value = np.asarray(value)
        key = str(value.dtype), value.tobytes()
        if key not in self.told:
            self.told[key] = any(_has(a, value) for a in (*self.numbers, *self.arrays))
        return self.told[key]

    @property
    def were_met(self) -> bool:
        """Whether `have` was ever true."""
        return any(self.told.values())


def _has(held: Any, value: np.ndarray) -> bool:
    held = np.asarray(held)
    held = held if np.iscomplexobj(value) else held.real
    with np.errstate(all="ignore"):
        return bool((held.astype(value.dtype) == value).any())


def held_numbers(fn: Callable) -> Held:
    """All such floats that `fn` can reach."""
    found: set[Any] = set()
    arrays: list[np.ndarray] = []
    seen: dict[int, Any] = {}
    rest: list[Any] = [fn]
    while rest:
        node = rest.pop()
        if id(node) in seen:
            continue
        seen[id(node)] = node  # kept, so that no other object gets its id
        if is_scalar(node):
            found.add(np.asarray(node).item())
        elif _is_array(node):
            arrays.append(node)
        else:
            rest += _parts(node)
    return Held(frozenset(found), tuple(arrays))


def is_scalar(node: Any) -> bool:
    """Whether this is a NumPy float or complex number, as a scalar or as an array."""
    return isinstance(node, np.generic | np.ndarray) and (
        node.ndim == 0 and jnp.issubdtype(node.dtype, jnp.inexact)
    )


def _is_array(node: Any) -> bool:
    return isinstance(node, np.ndarray) and jnp.issubdtype(node.dtype, jnp.inexact)


def _parts(node: Any) -> Iterator[Any]:
    if isinstance(node, np.ndarray):
        yield from node.reshape(-1).tolist() if node.dtype == object else ()
        return
    if isinstance(node, jax.Array | str | bytes | type | types.ModuleType):
        return
    if isinstance(node, Mapping):
        yield from node.values()
    elif isinstance(node, list | tuple | set | frozenset | collections.deque):
        yield from node
    elif isinstance(node, types.MethodType):
        yield from (node.__self__, node.__func__)
    elif isinstance(node, types.FunctionType):
        yield from _of_function(node)
    elif isinstance(node, functools.partial):
        yield from (node.func, *node.args, *node.keywords.values())
    yield getattr(node, "__wrapped__", None)
    if type(node).__module__.startswith(("jax", "numpy", "weakref")):
        return
    yield from getattr(node, "__dict__", {}).values()
    for kind in type(node).__mro__:
        slots = vars(kind).get("__slots__", ())
        names = [slots] if isinstance(slots, str) else slots
        yield from (getattr(node, name, None) for name in names)
        if not isinstance(node, types.FunctionType) and not _is_of_a_library(kind):
            yield from map(_plain, vars(kind).values())


def _is_of_a_library(kind: type) -> bool:
    if kind.__module__.split(".")[0] in sys.stdlib_module_names:
        return True
    file = getattr(sys.modules.get(kind.__module__), "__file__", None) or ""
    return file.startswith(_LIBRARIES)


def _plain(attribute: Any) -> Any:
    """The function of a method, whatever kind of method it is; else what is given."""
    if isinstance(attribute, staticmethod | classmethod):
        return attribute.__func__
    if isinstance(attribute, property):
        return attribute.fget
    return attribute.func if isinstance(attribute, functools.cached_property) else attribute


def _of_function(fn: types.FunctionType) -> Iterator[Any]:
    yield from fn.__defaults__ or ()
    yield from (fn.__kwdefaults__ or {}).values()
    for cell in fn.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not set yet
            pass
    if fn.__code__.co_filename.startswith(_LIBRARIES):
        return
    for name in _names(fn.__code__):
        value = fn.__globals__.get(name)
        yield value
        if isinstance(value, types.ModuleType):
            there = vars(value)
            yield from (there[at] for at in _names(fn.__code__) if is_scalar(there.get(at)))


def _names(code: types.CodeType) -> set[str]:
    inner = (const for const in code.co_consts if isinstance(const, types.CodeType))
    return set(code.co_names).union(*map(_names, inner))


def with_arrays(fn: Any, all_of_them: bool = False) -> Any:
    """A copy of `fn` whose closures and pytrees hold JAX arrays in the place of such scalars.

    Or in the place of `all_of_them`, NumPy arrays with axes as well.
    """
    changed = functools.partial(with_arrays, all_of_them=all_of_them)
    if is_scalar(fn) or (all_of_them and _is_array(fn)):
        return jnp.asarray(fn)
    if isinstance(fn, types.MethodType):
        return types.MethodType(changed(fn.__func__), changed(fn.__self__))
    if isinstance(fn, types.FunctionType) and fn.__closure__:
        return _with_cells(fn, changed)
    leaf = lambda node: node is not fn
    children, tree = jax.tree.flatten(fn, is_leaf=leaf)
    if children and children[0] is not fn:
        return jax.tree.unflatten(tree, map(changed, children))
    return fn


def _with_cells(fn: types.FunctionType, changed: Callable) -> types.FunctionType:
    cells = [types.CellType(changed(cell.cell_contents)) for cell in fn.__closure__ or ()]
    copy = types.FunctionType(
        fn.__code__, fn.__globals__, fn.__name__, fn.__defaults__, tuple(cells)
    )
    copy.__kwdefaults__ = fn.__kwdefaults__
    copy.__dict__.update(fn.__dict__)
    return copy
