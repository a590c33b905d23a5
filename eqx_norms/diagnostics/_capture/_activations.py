"""Which operations of a traced program are activation functions."""

import functools as ft
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal

from ..._jaxprs import opened
from .._once import jit_once


class Activation(NamedTuple):
    """An activation function, by its name, and the slope below which it counts as flat.

    `slopes` are where, and how steep it is there. Both are `None` where only one end is flat:
    there, entries on the flat side are what the function is for. `by_hand` is a `jnp.maximum` with
    0, which may be something else. A softmax has an `axis`, counted from the last.
    """

    name: str
    flat: float | None = None
    slopes: tuple[np.ndarray, np.ndarray] | None = None
    by_hand: bool = False
    axis: int | None = None


# `jax.jit` and `jax.custom_jvp` leave these names in a jaxpr. What stands in `_PRIMITIVES` comes
# from jax.nn and jnp alike.
_NAMED = {
    fn.__name__: fn
    for fn in (
        jax.nn.relu,
        jax.nn.relu6,
        jax.nn.elu,
        jax.nn.selu,
        jax.nn.celu,
        jax.nn.leaky_relu,
        jax.nn.silu,
        jax.nn.hard_silu,
        jax.nn.softplus,
        jax.nn.sparse_plus,
        jax.nn.log_sigmoid,
        jax.nn.hard_tanh,
        jax.nn.hard_sigmoid,
        jax.nn.sparse_sigmoid,
        jax.nn.soft_sign,
        jax.nn.squareplus,
        jax.nn.mish,
    )
}
_PRIMITIVES = {"tanh": jnp.tanh, "logistic": jax.nn.sigmoid}
# All that `recognised` may return.
NAMES = (*_NAMED, "tanh", "sigmoid", "gelu", "softmax")


def activation_of(fn: Callable, name: str) -> Activation:
    """`fn` as one, if it can be hashed, as a bound method of a module with arrays cannot."""
    try:
        return _activation_of(fn, name)
    except TypeError:
        return Activation(name)


@ft.cache
def _activation_of(fn: Callable, name: str) -> Activation:
    """With a tenth of the largest slope as the limit, if `fn` is flat at both ends."""
    z = np.linspace(-30, 30, 6001, dtype=np.float32)
    try:
        with jax.ensure_compile_time_eval():
            both = jit_once(jax.vmap(jax.value_and_grad(fn)))(z)
            values, slopes = map(np.abs, map(np.asarray, both))
    except Exception:  # Whatever `fn` is, it is no function of one number.
        return Activation(name)
    limit = 0.1 * slopes.max()
    # Where it is exactly 0 it is silent, as relu6 is on its left, and that is what it is for.
    if max(slopes[0], slopes[-1]) < limit and min(values[0], values[-1]) > 0:
        return Activation(name, float(limit), (z, slopes))
    return Activation(name)


def recognised(jaxpr: Any, i: int) -> tuple[Activation, int] | None:
    """The activation function that equation `i` computes, and which operand it takes."""
    eqn = jaxpr.eqns[i]
    name = eqn.primitive.name
    if name in _PRIMITIVES and not _is_part_of_another(jaxpr, i):
        return activation_of(_PRIMITIVES[name], _PRIMITIVES[name].__name__), 0
    if name == "max" and not eqn.outvars[0].aval.weak_type:
        zero = [isinstance(a, Literal) and np.ndim(a.val) == 0 and a.val == 0 for a in eqn.invars]
        if sum(zero) == 1 and eqn.outvars[0].aval.shape:
            return Activation("relu", by_hand=True), zero.index(False)
    if name == "sub" and (axis := _axis_of_softmax(jaxpr, i)) is not None:
        return Activation("softmax", axis=axis), 0
    if name == "mul" and (half := _half_of_gelu(jaxpr, i)) is not None:
        return activation_of(jax.nn.gelu, "gelu"), half
    inner = eqn.params.get("jaxpr") if name == "jit" else eqn.params.get("call_jaxpr")
    fn = _NAMED.get(opened(inner).debug_info.func_name) if inner is not None else None
    if fn is not None and eqn.invars[0].aval.shape == eqn.outvars[0].aval.shape:
        return activation_of(fn, fn.__name__), 0
    return None


def _axis_of_softmax(jaxpr: Any, i: int) -> int | None:
    """The axis of a softmax of which equation `i` subtracts the maximum, `None` if it does not.

    Its exponential is divided by a sum. Of a log-softmax nothing is.
    """
    x, top = jaxpr.eqns[i].invars
    before = {eqn.outvars[0]: eqn for eqn in jaxpr.eqns[max(0, i - _SOFTMAX) : i] if eqn.outvars}
    eqn = None if isinstance(top, Literal) else before.get(top)
    while eqn is not None and eqn.primitive.name in ("broadcast_in_dim", "stop_gradient", "max"):
        moving = [atom for atom in eqn.invars if not isinstance(atom, Literal)]
        eqn = before.get(moving[0]) if len(moving) == 1 else None
    if eqn is None or eqn.primitive.name != "reduce_max" or eqn.invars[0] is not x:
        return None
    exps = _uses(jaxpr, i)
    if [use.primitive.name for use in exps] != ["exp"] or len(eqn.params["axes"]) != 1:
        return None
    uses = {use.primitive.name for use in _uses(jaxpr, jaxpr.eqns.index(exps[0]))}
    # What has 16 bits is summed in float32.
    is_softmax = uses in ({"reduce_sum", "div"}, {"convert_element_type", "div"})
    return eqn.params["axes"][0] - len(x.aval.shape) if is_softmax else None


_SOFTMAX = 8  # equations, of which it has four at most, with some of other origin between


def result_of_softmax(jaxpr: Any, i: int) -> int:
    """The equation that divides, of a softmax in which equation `i` subtracts the maximum."""
    [exp] = _uses(jaxpr, i)
    divides = lambda eqn: eqn.primitive.name == "div" and eqn.invars[0] is exp.outvars[0]
    return next(j for j, eqn in enumerate(jaxpr.eqns) if divides(eqn))


def _uses(jaxpr: Any, i: int) -> list[Any]:
    [out] = jaxpr.eqns[i].outvars
    return [eqn for eqn in jaxpr.eqns[i + 1 :] if any(atom is out for atom in eqn.invars)]


def _half_of_gelu(jaxpr: Any, i: int) -> int | None:
    """Which operand of equation `i` is the input of a gelu, if it is the last of `jax.nn.gelu`.

    That is `x * (.5 * (1 + tanh(√(2/π) * (x + .0447 * x**3))))`, or `(.5 * x) * erfc(-x * √.5)`,
    of which half of the input is an operand. JAX leaves no name in the jaxpr.
    """
    before = {eqn.outvars[0]: eqn for eqn in jaxpr.eqns[max(0, i - _GELU) : i] if eqn.outvars}
    made_by = lambda atom: None if isinstance(atom, Literal) else before.get(atom)

    def inner(atom: Any, chain: Sequence[tuple[str, int | float | None]]) -> Any:
        """What the operations of a chain, the last one first, were applied to."""
        for name, number in chain:
            eqn = made_by(atom)
            if eqn is None or eqn.primitive.name != name:
                return None
            rest = [a for a in eqn.invars if not (number and _is_about(a, number))]
            if len(rest) != 1:
                return None
            [atom] = rest
        return atom

    one, two = jaxpr.eqns[i].invars
    x = inner(two, [("erfc", None), ("mul", 0.5**0.5), ("neg", None)])
    if x is not None and x is inner(one, [("mul", 0.5)]):
        return 0
    total = made_by(inner(two, [("mul", 0.5), ("add", 1), ("tanh", None), ("mul", 0.79788)]))
    if total is not None and total.primitive.name == "add" and total.invars[0] is one:
        cubed = inner(total.invars[1], [("mul", 0.044715), ("integer_pow", None)])
        return 0 if cubed is one else None
    return None


_GELU = 16  # equations, of which it has nine at most, with some of other origin between


def _is_about(atom: Any, number: int | float) -> bool:
    """Whether it is this number, rounded to the dtype."""
    known = isinstance(atom, Literal) and np.ndim(atom.val) == 0
    return known and abs(float(atom.val) - number) < 0.01 * number


def _is_part_of_another(jaxpr: Any, i: int) -> bool:
    """Whether it is the tanh of a gelu or of a sigmoid, or the sigmoid of a silu."""
    eqn = jaxpr.eqns[i]
    out = eqn.outvars[0]
    for use in jaxpr.eqns[i + 1 :]:
        if any(atom is out for atom in use.invars):
            one = any(isinstance(a, Literal) and np.all(a.val == 1) for a in use.invars)
            gate = use.primitive.name == "mul" and any(a is eqn.invars[0] for a in use.invars)
            if gate or (one and use.primitive.name == "add"):
                return True
    return False
