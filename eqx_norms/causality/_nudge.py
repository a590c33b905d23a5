"""Inputs beside those of an editor: chaos and ties show there what they are."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from .._processes import fetched
from ._edits import Edit, Editor
from ._widen import is_key


def beside(editor: Editor, by: float, seed: int = 0, wide: bool = False) -> Editor:
    """The same edits of an input whose floats are moved by up to `by` of their size.

    `wide` is for values that are float64. Equal numbers stay equal and zero stays zero, for a
    function may look for them; masks and tokens stay as they are.
    """
    leaves = [
        leaf if leaf.ids else leaf._replace(values=_moved(leaf.values, by, seed, wide))
        for leaf in editor.leaves
    ]
    return dataclasses.replace(editor, leaves=tuple(leaves))


@dataclasses.dataclass(frozen=True)
class Shaken(Editor):
    """Of each edit only its seed counts: the input is moved by so much of its size, of 0 not."""

    by: float = 0.0

    def apply(self, edit: Edit) -> tuple[np.ndarray, ...]:
        """The leaves, moved."""
        moved = beside(self, self.by * bool(edit.seed), edit.seed, wide=True)
        return tuple(leaf.values for leaf in moved.leaves)


def constants_beside(by: float, seed: int) -> tuple[Callable, Callable]:
    """For `widen`, of functions of tokens: its `constant` and `watch`, which move by as much.

    They move the constants, and the floats that integers become.
    """

    def constant(value: Any) -> Any:
        if is_key(value) or not jnp.issubdtype(jnp.result_type(value), jnp.inexact):
            return value
        return _moved(fetched(value), by, seed, wide=True)

    def watch(eqn: Any, args: Any, outs: Any, _: Any) -> Any:
        casts = eqn.primitive.name == "convert_element_type"
        if not (casts and jnp.issubdtype(args[0].dtype, jnp.integer)):
            return outs
        if not jnp.issubdtype(outs[0].dtype, jnp.floating):
            return outs
        return [out * (1 + by * jnp.sin(out + seed)) for out in outs]

    return constant, watch


# What rounds: sums, if they do; other arithmetic, unless the result is short, as a whole number is;
# and functions.
_SUMS = ("add", "add_any", "sub")
_ARITHMETIC = (
    "mul div sqrt square integer_pow cumsum cumprod reduce_sum reduce_prod dot_general "
    "conv_general_dilated fft"
).split()
_FUNCTIONS = (
    "acos acosh asin asinh atan atan2 atanh cbrt cos cosh cumlogsumexp digamma erf erf_inv erfc "
    "exp exp2 expm1 lgamma log log1p logistic pow rsqrt sin sinh tan tanh"
).split()
_SHORT, _HUGE = 2.0**26, 1e300


def rounded_anew(eqn: Any, args: Any, outs: Any, _: Any) -> Any:
    """For `widen` to float64, a `watch`: what an operation rounds moves by an eps, up or down.

    It does not look into loops. Numbers next to the largest, as masks are, stay finite.
    """
    name = eqn.primitive.name
    if not all(jnp.issubdtype(out.dtype, jnp.inexact) for out in outs):
        return outs
    if name in _SUMS:
        spared = _exact_sums(name, args[0], args[1], outs[0])
    elif name in _ARITHMETIC:
        spared = _short(outs[0])
    elif name in _FUNCTIONS:
        spared = False
    else:
        return outs
    return [_by_an_eps(out, spared) for out in outs]


def _exact_sums(name: str, a: Any, b: Any, total: Any) -> Any:
    """Which were not rounded, by Knuth's TwoSum."""
    b = -b if name == "sub" else b
    rest = total - a
    return (a - (total - rest)) + (b - rest) == 0


def _short(out: Any) -> Any:
    """Which have only zeros in the second half of their digits."""
    if jnp.iscomplexobj(out):
        return False
    digits = jnp.frexp(out)[0] * _SHORT
    return digits == jnp.round(digits)


def _by_an_eps(out: Any, spared: Any) -> Any:
    eps = float(jnp.finfo(out.dtype).eps)
    fixed = spared | (out == 0) | (jnp.abs(out) > _HUGE)
    up = jnp.sin(1e3 * jnp.frexp(jnp.real(out))[0]) > 0  # by its value: equal numbers move alike
    return jnp.where(fixed, out, out * jnp.where(up, 1 + eps, 1 - eps))


def _moved(values: np.ndarray, by: float, seed: int, wide: bool) -> np.ndarray:
    found, where = np.unique(values, return_inverse=True)
    factors = 1 + by * np.random.default_rng(seed).choice([-1, -0.5, 0.5, 1], size=found.shape)
    exact = found.astype(np.complex128 if np.iscomplexobj(found) else np.float64)
    moved = np.asarray((exact * factors)[where]).reshape(values.shape)
    return moved if wide else moved.astype(values.dtype)
