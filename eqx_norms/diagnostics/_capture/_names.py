"""Values that `fn` names by `jax.ad_checkpoint.checkpoint_name`.

They are equations of a public primitive. But `jax.vmap` leaves the batch axis of one where the last
operation put it, and nothing in the program says whether a derivative was taken through it. So
while a function is traced of which named values are looked for, and in that thread only, two rules
of the primitive do a little more than JAX's own.
"""

import contextlib
import functools as ft
from collections.abc import Collection, Iterator
from contextvars import ContextVar

import jax.numpy as jnp
import jax.tree_util as jtu
from jax.extend.core.primitives import name_p
from jax.interpreters import ad, batching

from ._tag import Call, Place


class WithinDerivative(str):
    """The name of a value of which the traced function computes a derivative as well."""

    __slots__ = ()


def as_names(names: str | Collection[str]) -> tuple[str, ...]:
    names = (names,) if isinstance(names, str) else names
    if not isinstance(names, Collection) or not all(isinstance(name, str) for name in names):
        raise TypeError(
            "`names` must be a name that `fn` gives by `jax.ad_checkpoint.checkpoint_name`, or "
            f"several, but it is {names!r}. Type for instance `names=('scores', 'hidden')`."
        )
    return tuple(names)


def named_call(name: str, level: int) -> Call:
    """What a tag would know of this value."""
    call = Call(Place(()), level, jtu.tree_structure(0), None, "the value of that name")
    return call.within_derivative() if isinstance(name, WithinDerivative) else call


_looked_for: ContextVar[bool] = ContextVar("looked_for", default=False)


@contextlib.contextmanager
def batches_in_front() -> Iterator[None]:
    """Within it, named values have the axes of `jax.vmap` in front, the outermost first."""
    _exchange_rules()
    token = _looked_for.set(True)
    try:
        yield
    finally:
        _looked_for.reset(token)


@ft.cache
def _exchange_rules() -> None:
    """Once, for rules that do what JAX's own do wherever no named value is looked for."""

    def batch(arrays, axes, *, name):
        [x], [axis] = arrays, axes
        if _looked_for.get():
            x, axis = jnp.moveaxis(x, axis, 0), 0
        return name_p.bind(x, name=name), axis

    def jvp(primals, tangents, *, name):
        [x], [dx] = primals, tangents
        name = WithinDerivative(name) if _looked_for.get() else name
        return name_p.bind(x, name=name), dx

    batching.primitive_batchers[name_p] = batch
    ad.primitive_jvps[name_p] = jvp
