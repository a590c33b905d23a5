"""Who reads whom: every input edited alone, or gradients from every output."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from .._real import Real
from ._edits import Edit, TokenValues, at_one, make_editor, nothing, single_edits
from ._inputs import Problem, make_problem
from ._judge import Judge, Verdict, function_eps, require_sane_baseline
from ._probe import make_probe
from ._rules import Rule

_LOCATED_UP_TO = 128
_OWN_VALUES = 512
_COTANGENTS = 4
_NOISE_ULPS = 64


def dependency_matrix(
    fn: Callable[[PyTree], PyTree],
    x: PyTree,
    *,
    axis: int = 0,
    out_axis: int | None = None,
    method: Literal["perturb", "vjp"] = "perturb",
    scales: Sequence[Real] = (1.0, 10.0, 100.0),
    token_values: TokenValues = None,
    fixed: str | Iterable[str] = (),
    batch_size: int = 8,
    key: PRNGKeyArray | None = None,
) -> Float[np.ndarray, "T_out T_in"]:
    """Measures for each output position of `fn(x)` how it depends on each input position.

    With `method="perturb"`, entry `(t, j)` is the largest absolute change of output `t` when
    input `j` alone is edited, over several edits. 0 means that not a bit changed, or that the
    change is rounding, because it shrinks in float64. Where there is no telling, as behind a
    callback, the change stays. It does not see what takes two edits at once, such as a capacity
    that is just full.

    With `method="vjp"` it is the largest absolute gradient of input `j`, over four random
    projections of output `t`. A gradient is local and has no size of rounding to compare with:
    this method does not see what rounding, argmax, routing or a stopped gradient pass on, nor
    what a saturated or dead unit would pass on elsewhere, and a `custom_vjp` may tell it
    anything. Never project with ones: a norm's outputs have a fixed sum, so that the gradient of
    their sum is 0 however much they read.

    **Arguments:**

    - `method`: `"perturb"` or `"vjp"`.
    - `fn`, `x`, `axis`, `out_axis`, `scales`, `token_values`, `fixed`, `batch_size`, `key`: as for
        [`eqx_norms.causality.assert_causal`][]. The output may have any number of positions.

    **Returns:**

    A float64 NumPy array of shape `(T_out, T_in)`, a row for every output position.

    **Raises:**

    `ValueError` for an unknown method, a wrong axis, or a function that is not finite on `x` or
    not the same again; `TypeError` for `method="vjp"` of an `x` or an output that has no floats.
    """
    problem = make_problem(fn, x, axis, out_axis, fixed)
    if method == "vjp":
        return _vjp_matrix(problem, jr.key(0) if key is None else key)
    if method != "perturb":
        raise ValueError(f'method must be "perturb" or "vjp", got {method!r}')
    editor = make_editor(problem.leaves, problem.in_axes, scales, token_values, key, problem.names)
    probe = make_probe(problem.fn, editor, problem.out_axes, function_eps(problem), batch_size)
    edits = [nothing(editor), *single_edits(editor, range(problem.length)), nothing(editor)]
    changes = probe.measure(edits, "dependency matrix")
    require_sane_baseline(edits, changes, _NOISE_ULPS)
    judge = Judge(problem, probe, _NOISE_ULPS, confirm_x64=True)
    found = judge.tell(edits, np.ones_like(changes.broken), changes)
    size = np.where(found.leaks | found.undecided, found.changes.size, 0)
    return _by_input(size, edits, problem.length)


def locate(
    judge: Judge, rule: Rule, verdict: Verdict, edits: Sequence[Edit]
) -> tuple[Float[np.ndarray, "T T"], bool, list[str]]:
    """The matrix of a leak, whether only joint edits show it, and a remark."""
    positions = _positions(rule, verdict, edits)
    editor = judge.probe.editor
    singles = [nothing(editor), *single_edits(editor, positions)]
    matrix = _measured(judge, rule, verdict, singles)
    note = []
    if len(positions) < rule.length:
        note = [f"{len(positions)} of {rule.length} inputs were edited alone to locate the leak."]
    if (~rule.allowed & (matrix > 0)).any():
        return matrix, False, note
    # Those drew values of their own; what leaks may be the values of the edit that did.
    own, possible = _own_values(verdict, edits)
    matrix = np.fmax(matrix, _measured(judge, rule, verdict, [edits[0], *own]))
    if (~rule.allowed & (matrix > 0)).any():
        return matrix, False, note
    if len(own) < possible:
        note += [f"{len(own)} of {possible} values of the leaking edits were tried alone."]
    return _joint(rule, verdict, edits, matrix), True, note


def _own_values(verdict: Verdict, edits: Sequence[Edit]) -> tuple[list[Edit], int]:
    """Each position of the smallest leaking edits alone, up to 512, and how many there are."""
    outputs = np.flatnonzero(verdict.leaks.any(0)).tolist()
    rows = sorted({_smallest(verdict, edits, output) for output in outputs})
    every = [(row, at) for row in rows for at in np.flatnonzero(edits[row].where).tolist()]
    chosen = np.linspace(0, len(every) - 1, min(len(every), _OWN_VALUES)).astype(int)
    return [at_one(edits[row], at) for row, at in map(every.__getitem__, chosen)], len(every)


def _smallest(verdict: Verdict, edits: Sequence[Edit], output: int) -> int:
    """The number of the edit of fewest positions under which an output leaks."""
    rows = np.flatnonzero(verdict.leaks[:, output]).tolist()
    return min(rows, key=lambda row: int(edits[row].where.sum()))


def _measured(judge: Judge, rule: Rule, verdict: Verdict, singles: Sequence[Edit]) -> np.ndarray:
    """The matrix of edits of one position each; what is no leak is 0 in a forbidden cell."""
    watch = rule.watch(singles)
    found = judge.tell(singles, watch, judge.probe.measure(singles, "locating the leak"))
    changes = found.exact if verdict.in_float64 else found.changes
    return _by_input(np.where(watch & ~found.leaks, 0, changes.size), singles, rule.length)


def _by_input(size: np.ndarray, edits: Sequence[Edit], length: int) -> np.ndarray:
    matrix = np.full((size.shape[1], length), np.nan)
    for edit, row in zip(edits, size, strict=True):
        for position in np.flatnonzero(edit.where):
            matrix[:, position] = np.fmax(matrix[:, position], row)
    return matrix


def _joint(rule, verdict: Verdict, edits: Sequence[Edit], matrix: np.ndarray) -> np.ndarray:
    """Marks, for each leaking output, the first forbidden input of the smallest edit."""
    matrix = matrix.copy()
    for output in np.flatnonzero(verdict.leaks.any(0)).tolist():
        row = _smallest(verdict, edits, output)
        forbidden = edits[row].where & ~rule.allowed[output]
        matrix[output, int(forbidden.argmax())] = verdict.size[row, output]
    return matrix


def _positions(rule: Rule, verdict: Verdict, edits: Sequence[Edit]) -> list[int]:
    """All inputs, or of a long sequence those that the leaking splits point at, then others."""
    if rule.length <= _LOCATED_UP_TO:
        return list(range(rule.length))
    pointed = _pointed_at(rule, verdict, edits)
    spread = np.linspace(0, rule.length - 1, _LOCATED_UP_TO).astype(int).tolist()
    step = -(-len(pointed) // (_LOCATED_UP_TO // 2)) or 1
    return sorted(dict.fromkeys([*pointed[::step], *spread]))


def _pointed_at(rule: Rule, verdict: Verdict, edits: Sequence[Edit]) -> list[int]:
    """The inputs between the last edit that changes an output and the first that does not."""
    starts = np.array([int(edit.where.argmax()) for edit in edits])
    found = set()
    for output in np.flatnonzero(verdict.leaks.any(0)).tolist():
        last = starts[verdict.leaks[:, output]].max()
        found.update(range(last, min([*starts[starts > last], rule.length])))
    return sorted(found)


def _vjp_matrix(problem: Problem, key: PRNGKeyArray) -> Float[np.ndarray, "T_out T_in"]:
    ins = _float_axes(problem.leaves, problem.in_axes)
    outs = _float_axes(problem.outs, problem.out_axes)
    if not ins or not outs:
        which = "outputs, and fn returns" if ins else "inputs, and x has"
        raise TypeError(f'method="vjp" needs float {which} none; use method="perturb"')

    def differentiable(*leaves: Array) -> list[Array]:
        values = problem.fn(*leaves)
        return [values[i] for i in outs]

    @jax.jit
    def gradients(leaves, positions, keys):
        values, pullback = jax.vjp(differentiable, *leaves)

        def row(position_and_key):
            axes_of = zip(values, outs.values(), strict=True)
            grads = pullback([_at(value, axis, *position_and_key) for value, axis in axes_of])
            return [_largest(grads[i], axis) for i, axis in ins.items()]

        return jax.lax.map(row, (positions, keys))

    keys = jr.split(key, _COTANGENTS * problem.out_length)
    positions = jnp.tile(jnp.arange(problem.out_length), _COTANGENTS)
    rows = [np.asarray(leaf, np.float64) for leaf in gradients(problem.leaves, positions, keys)]
    return np.max(rows, 0).reshape(_COTANGENTS, problem.out_length, problem.length).max(0)


def _float_axes(leaves: Sequence[Any], axes: Sequence[int]) -> dict[int, int]:
    """The numbers of the float leaves, and their axes."""
    pairs = enumerate(zip(leaves, axes, strict=True))
    return {i: axis for i, (leaf, axis) in pairs if jnp.issubdtype(leaf.dtype, jnp.inexact)}


def _largest(grad: Array, axis: int) -> Array:
    """The largest entry at each position of `axis`."""
    return jnp.abs(grad).max(tuple(i for i in range(grad.ndim) if i != axis))


def _at(out: Array, axis: int, position: Array, key: PRNGKeyArray) -> Array:
    index = jnp.arange(out.shape[axis]).reshape([-1 if i == axis else 1 for i in range(out.ndim)])
    zeros = jnp.zeros_like(out)  # which are sharded as `out` is
    return jnp.where(index == position, zeros + jr.normal(key, out.shape, out.dtype), zeros)
