"""Functions that JAX cannot trace run beside it: NumPy, torch, and whatever else takes arrays.

Each call is a callback of JAX's, so that all checks work on it as on any other function. What tells
rounding from a leak is the second precision, and a callback has none of its own: so the callback
here is an object that knows how to run in another, which `_widen` asks for.
"""

import contextlib
import dataclasses
import operator
import pickle
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.core
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from .._jaxprs import opened
from .._processes import fetched, jit, readable
from .._real import Integer
from ._tensors import as_array

_SEED = 0
# What a function raised, as it was: JAX makes a text of it.
_raised: list[Exception] = []


def host(
    fn: Callable[[PyTree], PyTree],
    *,
    in_float64: Callable[[PyTree], PyTree] | None = None,
    batch_axis: Integer | None = None,
) -> "Host":
    """A function of NumPy arrays that JAX cannot trace, for all the checks of this module.

    ```python
    import numpy as np
    from eqx_norms.causality import assert_causal, host

    x = np.random.default_rng(0).standard_normal((8, 4))
    assert_causal(host(lambda x: np.cumsum(x, axis=0)), x)
    ```

    It runs unchanged, eagerly, once for each edit (see `batch_axis`), on arrays of the dtypes of
    `x`, including those of 64 bits. So sessions of ONNX Runtime and functions of Keras and
    TensorFlow can be checked, if they take and return NumPy arrays. For torch see
    [`eqx_norms.causality.from_torch`][].

    Rounding is told from a leak as in JAX: what changes runs again in float64 (in float32 if all
    is float64), here by a call with floats of that dtype. There is no second precision if the
    function refuses that, or returns float32 or numbers that float32 could hold. Then what is no
    larger than rounding is `"undecided"`. A rounding to float32 inside, with float64 after it, is
    not noticed, and may be called a leak.

    There is no proof for such a function, and no gradient. `prove=True` names it as an obstacle.

    The global random generators of NumPy, Python and torch start from the same seed in each call,
    and the report says so. Generators that `fn` holds are left alone.

    **Arguments:**

    - `fn`: takes NumPy arrays, one or a pytree of them, and returns the same, or anything that
        `numpy.asarray` takes. The first call is made with `x` itself, and shows which shapes it
        returns. Inside a function of JAX it is made with zeros, because there are no values yet.
    - `in_float64`: what to call in place of `fn` in the second precision.
    - `batch_axis`: the axis of the examples in all arrays of `x` and in all outputs, if none of
        them reads another. Edits then run together as further examples, `batch_size=` of them in
        one call, which is many times as fast. It needs a function that is nothing but this one,
        without JAX around it; else they run one by one. If an example does read another, the check
        raises an error, or sees a leak. [`eqx_norms.causality.assert_independent`][] tells.

    **Returns:**

    A function for `assert_causal` and all others of this module. JAX code may call it as well,
    under `jax.jit` and `jax.vmap`, but not differentiate it.

    **Raises:**

    What `fn` raises, unchanged. `TypeError` if it returns something that is not an array, and
    `ValueError` if it returns another shape or dtype for another `x` of the same shape.
    """
    if not callable(fn):
        raise TypeError(f"fn must be a function of arrays, got {type(fn).__name__}")
    second = fn if in_float64 is None else in_float64
    run = lambda x, to: (fn if to is None else second)(x)
    return Host(run, getattr(fn, "__name__", "fn"), batch_axis)


class Host:
    """Runs `run(x, to)` beside JAX; `to` is the float dtype of the second precision, else None."""

    def __init__(
        self,
        run: Callable[[PyTree, np.dtype | None], PyTree],
        name: str,
        batch_axis: Integer | None = None,
    ):
        self.run, self.name = run, name
        self.batch_axis = batch_axis if batch_axis is None else operator.index(batch_axis)
        self.drew = False  # whether a call drew random numbers
        self.refused: dict[np.dtype, str] = {}  # why there is no other precision
        self._shapes: dict[Any, PyTree] = {}
        self._example: dict[Any, PyTree] = {}
        self._runs: dict[Any, bool] = {}

    def __call__(self, x: PyTree) -> PyTree:
        leaves, tree = jax.tree.flatten(x)
        if not any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
            return self._evaluated_alike(x)
        static = tuple(None if _is_array(leaf) else leaf for leaf in leaves)
        outs, out_tree = jax.tree.flatten(self.learn(x))
        call = _Call(self, tree, static, tuple(outs))
        return out_tree.unflatten(call.bind([*filter(_is_array, leaves)]))

    def _evaluated_alike(self, x: PyTree) -> PyTree:
        """What comes back, if it is of the shapes that came before."""
        out = self.evaluate(x)
        known, came = self._shapes.get(_key(x)), jax.tree.map(_struct, out)
        if known is not None and came != known:
            raise ValueError(
                f"{self.name} must return the same shapes and dtypes for every x of one shape, got "
                f"{came} after {known}"
            )
        return out

    def evaluate(self, x: PyTree, to: np.dtype | None = None) -> PyTree:
        """What comes back, as NumPy arrays."""
        x = jax.tree.map(lambda leaf: np.array(fetched(leaf)) if _is_array(leaf) else leaf, x)
        with _same_random_numbers() as drew:
            out = self.run(x, to)
        self.drew |= drew()
        return jax.tree.map(_output, out)

    def learn(self, x: PyTree) -> PyTree:
        """The shapes and dtypes that come of an x like this, by a call if they are not known."""
        key = _key(x)
        if key not in self._shapes:
            x = jax.tree.map(_zeros_if_traced, x)
            with np.errstate(all="ignore"):
                out = self.evaluate(x)
            self._shapes[key], self._example[key] = jax.tree.map(_struct, out), x
        return self._shapes[key]

    def runs_in(self, key: Any, to: np.dtype) -> bool:
        """Whether there is such a precision, as one call says."""
        if (key, to) not in self._runs:
            why = self._why_not(key, to)
            self._runs[key, to] = not why
            self.refused |= {to: why} if why else {}
        return self._runs[key, to]

    def _why_not(self, key: Any, to: np.dtype) -> str:
        x = jax.tree.map(lambda leaf: _cast(leaf, to), self._example[key])
        try:
            with np.errstate(all="ignore"):
                outs = jax.tree.leaves(self.evaluate(x, to))
        except Exception as error:  # what has no such form may raise what it likes
            return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        floats = [out for out in outs if jnp.issubdtype(out.dtype, jnp.inexact)]
        wrong = [out.dtype for out in floats if out.dtype != _wide_dtype(out.dtype, to)]
        if wrong:
            return f"it returned {wrong[0]}"
        narrow = to == np.float64 and any(map(_of_float32, floats))
        return "float32 holds all that it returned" * narrow


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class _Call:
    """The callback: a function of the arrays in x, in its own precision or `to`."""

    host: Host
    tree: Any
    static: tuple[Any, ...]
    outs: tuple[jax.ShapeDtypeStruct, ...]
    to: np.dtype | None = None

    def __repr__(self) -> str:
        # Without an address: traces are compared by their text.
        return f"host({self.host.name})"

    def bind(self, arrays: Sequence[Any]) -> list[Any]:
        if not any(isinstance(leaf, jax.core.Tracer) for leaf in arrays):
            return [*map(jnp.asarray, self(*arrays))]
        structs = [
            jax.ShapeDtypeStruct(out.shape, _canonical(self._dtype(out))) for out in self.outs
        ]
        return jax.pure_callback(self, structs, *arrays, vmap_method="sequential")

    def __call__(self, *arrays: Any) -> list[np.ndarray]:
        try:  # without a call of JAX, which must not be called here
            found = self.host.evaluate(self.whole([*map(np.asarray, arrays)]), self.to)
            return [self._checked(*pair) for pair in self._pairs(found)]
        except Exception as error:
            _raised.append(error)
            raise

    def whole(self, arrays: Sequence[Any]) -> PyTree:
        rest = iter(arrays)
        return self.tree.unflatten([next(rest) if s is None else s for s in self.static])

    def _dtype(self, out: jax.ShapeDtypeStruct) -> Any:
        return out.dtype if self.to is None else _wide_dtype(out.dtype, self.to)

    def _pairs(self, found: PyTree) -> Iterator[tuple[np.ndarray, jax.ShapeDtypeStruct]]:
        leaves = jax.tree.leaves(found)
        if len(leaves) != len(self.outs):
            raise ValueError(
                f"{self.host.name} returned {len(self.outs)} arrays, and {len(leaves)} for another "
                "x of the same shape; a check needs the same each time"
            )
        return zip(leaves, self.outs, strict=True)

    def _checked(self, found: np.ndarray, expected: jax.ShapeDtypeStruct) -> np.ndarray:
        dtype = self._dtype(expected)
        if found.shape != expected.shape or found.dtype != dtype:
            raise ValueError(
                f"{self.host.name} must return {dtype} of shape {expected.shape}, as at its first "
                f"call, for every x of one shape, got {found.dtype} of shape {found.shape}"
            )
        return found.astype(_canonical(dtype), copy=False)


def in_precision(eqn: jex.JaxprEqn, to: Any = None) -> Callable | None:
    """What runs a callback of `host` in another precision, by default the second, if anything."""
    if (call := _call_of(eqn)) is None:
        return None
    avals: list[Any] = [var.aval for var in eqn.invars]
    ins = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in avals]
    floats = [s.dtype for s in (*ins, *call.outs) if jnp.issubdtype(s.dtype, jnp.inexact)]
    exact = floats and all(np.finfo(dtype).dtype == np.float64 for dtype in floats)
    to = np.dtype(to or (np.float32 if exact else np.float64))
    if not call.host.runs_in(_key(call.whole(ins)), to):
        return None
    return lambda *args: dataclasses.replace(call, to=to).bind(args)


def is_beside(closed: jex.ClosedJaxpr) -> bool:
    """Whether to run it eagerly: XLA's threads slow torch. Not what JAX repeats or compiles."""
    here = sum(_call_of(eqn) is not None for eqn in opened(closed).eqns)
    return 0 < here == len([*_calls(opened(closed))])


def compiled(fn: Callable, closed: jex.ClosedJaxpr) -> Callable:
    """`fn`, which evaluates `closed`, under `jax.jit` if that is for it."""
    eagerly = lambda *leaves: fn(*map(jnp.asarray, leaves))
    return eagerly if is_beside(closed) else jit(fn)


def in_batches(
    fn: Callable, closed: jex.ClosedJaxpr, to: Any = None
) -> Callable[[Sequence[Any]], Sequence[Any]] | None:
    """`fn`, which evaluates `closed`, of stacked inputs; None where JAX is to run it."""
    return together(closed, to) or one_by_one(fn, closed)


def one_by_one(
    fn: Callable, closed: jex.ClosedJaxpr
) -> Callable[[Sequence[Any]], Sequence[Any]] | None:
    """The same with a call for each of the inputs."""

    def run(batch: Sequence[Any]) -> Sequence[Any]:
        outs = [fn(*map(jnp.asarray, leaves)) for leaves in zip(*batch, strict=True)]
        return tuple(map(jnp.stack, zip(*outs, strict=True)))

    return run if is_beside(closed) else None


def together(
    closed: jex.ClosedJaxpr, to: Any = None, constant: Callable[[Any], Any] = lambda c: c
) -> Callable[[Sequence[Any]], Sequence[Any]] | None:
    """What takes stacked inputs as the examples of one call; None unless `closed` is such a call.

    `constant` may put others in the place of what it holds, as the arrays of x that are `fixed`.
    """
    jaxpr = opened(closed)
    if len(jaxpr.eqns) != 1 or (call := _call_of(eqn := jaxpr.eqns[0])) is None:
        return None
    if call.host.batch_axis is None or not jaxpr.invars or eqn.outvars != jaxpr.outvars:
        return None
    if to is not None and in_precision(eqn, to) is None:
        return None
    atoms, axis = eqn.invars, call.host.batch_axis
    _require_examples([*(atom.aval.shape for atom in atoms), *(o.shape for o in call.outs)], axis)
    held = dict(zip(jaxpr.constvars, getattr(closed, "consts", ()), strict=True))

    def run(batch: Sequence[Any]) -> Sequence[Any]:
        count, given = len(batch[0]), dict(zip(jaxpr.invars, batch, strict=True))

        def read(atom: Any) -> Any:
            if not isinstance(atom, jex.Literal) and atom in given:
                return given[atom]
            value = constant(atom.val if isinstance(atom, jex.Literal) else held[atom])
            return np.broadcast_to(value, (count, *np.shape(value)))

        leaves = [_joined(np.asarray(read(atom)), axis) for atom in atoms]
        leaves = [leaf if to is None else _cast(leaf, np.dtype(to)) for leaf in leaves]
        stacked = [np.broadcast_to(np.empty((), o.dtype), (count, *o.shape)) for o in call.outs]
        outs = tuple(_struct(_joined(out, axis)) for out in stacked)
        found = dataclasses.replace(call, outs=outs, to=to and np.dtype(to))(*leaves)
        return [_apart(leaf, count, axis) for leaf in found]

    return run


def _require_examples(shapes: Sequence[tuple[int, ...]], axis: int) -> None:
    there = [-len(shape) <= axis < len(shape) for shape in shapes]
    if not all(there) or len({shape[axis] for shape in shapes}) != 1:
        raise ValueError(
            f"batch_axis={axis} must be the axis of the examples in every array of x and in every "
            f"output, got shapes {', '.join(map(str, shapes))}; leave it out, or add that axis"
        )


def _joined(stacked: np.ndarray, axis: int) -> np.ndarray:
    """The first axis goes into that of the examples, which is `axis` without it."""
    axis %= stacked.ndim - 1
    moved = np.moveaxis(stacked, 0, axis)
    return moved.reshape(*moved.shape[:axis], -1, *moved.shape[axis + 2 :])


def _apart(joined: np.ndarray, count: int, axis: int) -> np.ndarray:
    """The inverse of `_joined`."""
    axis %= joined.ndim
    rest = joined.shape[axis + 1 :]
    return np.moveaxis(joined.reshape(*joined.shape[:axis], count, -1, *rest), axis, 0)


def remarks(closed: jex.ClosedJaxpr) -> list[str]:
    """What a report must say of the functions that ran beside JAX."""
    notes = []
    for one in {id(call.host): call.host for call in _calls(opened(closed))}.values():
        if one.drew:
            notes += [
                f"{one.name} drew random numbers: each call starts from seed {_SEED}, so that they "
                "are the same for every edit."
            ]
        notes += [f"{one.name} does not run in {to} ({why})." for to, why in one.refused.items()]
    return notes


@contextlib.contextmanager
def running(*functions: Callable) -> Iterator[None]:
    """In which such functions keep 64-bit inputs, and errors are those that they raise."""
    _raised.clear()
    alone = all(isinstance(fn, Host) for fn in functions)
    with jax.enable_x64(True) if alone else contextlib.nullcontext():
        try:
            yield
        except Exception as error:
            original = own_error(error)
            if original is error:
                raise
            raise original from None


def own_error(error: Exception) -> Exception:
    """What a function raised beside JAX, if that is what `error` is about."""
    # JAX's own is a JaxRuntimeError or, outside of jit, a ValueError, with the other's text in it.
    theirs = [one for one in _raised if f"{type(one).__name__}: {one}" in str(error)]
    _raised.clear()
    return theirs[-1] if theirs else error


def within_reach(x: PyTree, *functions: Callable) -> PyTree:
    """`x` where the functions can take it: one beside JAX needs the whole of it in its process."""
    beside = any(isinstance(fn, Host) for fn in functions)
    return jax.tree.map(readable, x) if beside else x


def learn(fn: Callable, x: PyTree) -> None:
    """Lets a function beside JAX see real values at its first call, not zeros."""
    if isinstance(fn, Host):
        fn.learn(x)


def _calls(jaxpr: jex.Jaxpr) -> Iterator[_Call]:
    for eqn in jaxpr.eqns:
        if (call := _call_of(eqn)) is not None:
            yield call
    for inner in jex.subjaxprs(jaxpr):
        yield from _calls(inner)


def _call_of(eqn: jex.JaxprEqn) -> _Call | None:
    call = getattr(eqn.params.get("callback"), "callback_func", None)
    return call if isinstance(call, _Call) else None


def _key(x: PyTree) -> Any:
    leaves, tree = jax.tree.flatten(x)
    told = lambda leaf: (leaf.shape, str(leaf.dtype)) if _is_array(leaf) else repr(leaf)
    return tree, tuple(map(told, leaves))


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct)


@contextlib.contextmanager
def _same_random_numbers() -> Iterator[Callable[[], bool]]:
    """The global generators start from one seed and go on as before; tells if any was used."""
    torch = sys.modules.get("torch")
    states = lambda: (random.getstate(), np.random.get_state(), torch and torch.get_rng_state())
    kept = states()
    random.seed(_SEED)
    np.random.seed(_SEED)
    if torch is not None:
        torch.default_generator.manual_seed(_SEED)
    seeded = [*map(_text, states())]
    after = []
    try:
        yield lambda: after != seeded
    finally:
        after += map(_text, states())
        random.setstate(kept[0])
        np.random.set_state(kept[1])
        if torch is not None:
            torch.set_rng_state(kept[2])


def _text(state: Any) -> bytes:
    return pickle.dumps(state.numpy() if hasattr(state, "numpy") else state)


def _output(leaf: Any) -> np.ndarray:
    values = np.asarray(as_array(leaf))
    if values.dtype == object:
        raise TypeError(
            f"fn must return an array or a pytree of arrays, got a {type(leaf).__name__} in it"
        )
    return values


def _zeros_if_traced(leaf: Any) -> Any:
    return np.zeros(leaf.shape, leaf.dtype) if isinstance(leaf, jax.core.Tracer) else leaf


def _struct(values: np.ndarray) -> jax.ShapeDtypeStruct:
    # As NumPy has it: jax.ShapeDtypeStruct keeps 64 bits.
    return jax.ShapeDtypeStruct(values.shape, values.dtype)


def _canonical(dtype: Any) -> np.dtype:
    return jax.dtypes.canonicalize_dtype(dtype)


def _cast(leaf: Any, to: np.dtype) -> Any:
    return np.asarray(leaf).astype(_wide_dtype(leaf.dtype, to)) if _is_array(leaf) else leaf


def _wide_dtype(dtype: Any, to: np.dtype) -> Any:
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return np.result_type(to, np.complex64)
    return to if jnp.issubdtype(dtype, jnp.floating) else dtype


def _of_float32(values: np.ndarray) -> bool:
    """Whether float32 holds all of these numbers, and they are no short ones, as 0.5 is."""
    parts = np.stack([np.real(values), np.imag(values)]).ravel()
    parts = parts[np.isfinite(parts)]
    short = parts.astype(np.float16).astype(np.float64) == parts
    return not short.all() and bool((parts.astype(np.float32) == parts).all())
