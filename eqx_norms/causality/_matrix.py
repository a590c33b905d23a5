"""Who reads whom: every input edited alone, or gradients from every output."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from .._largest import largest
from .._processes import fetch, jit
from .._real import Real
from ._call import options_by_name
from ._edits import Edit, Editor, TokenValues, at_one, make_editor, nothing, single_edits
from ._host import in_batches, running
from ._inputs import Axes, Problem, make_problem
from ._judge import Judge, Verdict, function_eps, require_sane_baseline
from ._probe import make_probe
from ._torch import understood
from ._trials import Rule, alike

_ALONE_UP_TO = 128
_OWN_VALUES = 512
_BY_ARRAY = 256
_ENTRIES = 2**24
_COTANGENTS = 4
_NOISE_ULPS = 64


@options_by_name
def dependency_matrix(
    fn: Callable[[PyTree], PyTree],
    x: PyTree,
    *,
    axis: Axes = 0,
    out_axis: Axes | None = None,
    method: Literal["perturb", "vjp"] = "perturb",
    scales: Sequence[Real] = (1.0, 10.0, 100.0),
    token_values: TokenValues = None,
    allowed_values: TokenValues = None,
    fixed: str | Iterable[str] = (),
    batch_size: int = 8,
    key: PRNGKeyArray | None = None,
) -> Float[np.ndarray, "T_out T_in"]:
    """Measures for each output position of `fn(x)` how it depends on each input position.

    With `method="perturb"`, entry `(t, j)` is the largest absolute change of output `t` when
    input `j` alone is edited, over several edits. 0 means that not a bit changed, or that the
    change is rounding, because it shrinks in float64. If nothing can tell, as behind a callback,
    the change stays. This method does not see what takes two edits at once, such as a capacity
    that is just full.

    With `method="vjp"` it is the largest absolute gradient of input `j`, over four random
    projections of output `t`. A gradient is local and has no size of rounding to compare with.
    This method does not see what rounding, argmax, routing or a stopped gradient pass on, nor
    what a saturated or dead unit would pass on elsewhere. A `custom_vjp` may tell it anything. An
    entry is NaN if such a gradient is. Never project with ones: the outputs of a norm have a
    fixed sum, so the gradient of their sum is 0 however much they read.

    **Arguments:**

    - `method`: `"perturb"` or `"vjp"`.
    - `fn`, `x`, `axis`, `out_axis`, `scales`, `token_values`, `allowed_values`, `fixed`,
        `batch_size`, `key`: as for [`eqx_norms.causality.assert_causal`][]. The output may have any
        number of positions.

    **Returns:**

    A float64 NumPy array of shape `(T_out, T_in)`, a row for every output position.

    **Raises:**

    - `ValueError` for an unknown method, a wrong axis, or a function that is not finite on `x` or
        gives two answers for it.
    - `TypeError` for `method="vjp"` if `x` or the output has no floats.
    """
    if method not in ("perturb", "vjp"):
        raise ValueError(f'method must be "perturb" or "vjp", got {method!r}')
    fn = understood(fn)
    with running(fn):
        problem = make_problem(fn, x, axis, out_axis, fixed)
        if method == "vjp":
            return _vjp_matrix(problem, jr.key(0) if key is None else key)
        editor = make_editor(
            problem.leaves,
            problem.in_axes,
            scales,
            token_values,
            key,
            problem.names,
            allowed_values,
        )
        return _perturbed_matrix(problem, editor, batch_size)


def _perturbed_matrix(
    problem: Problem, editor: Editor, batch_size: int
) -> Float[np.ndarray, "T_out T_in"]:
    of_probe = editor, problem.out_axes, function_eps(problem), batch_size
    beside = in_batches(problem.fn, problem.closed)
    probe = make_probe(problem.fn, *of_probe, beside=beside)
    edits = [nothing(editor), *single_edits(editor, range(problem.length)), nothing(editor)]
    changes = probe.measure(edits, "dependency matrix")
    require_sane_baseline(problem, edits, changes, _NOISE_ULPS)
    judge = Judge(problem, probe, _NOISE_ULPS, confirm_x64=True)
    found = judge.tell(edits, np.ones_like(changes.broken), changes)
    size = np.where(found.leaks | found.undecided, found.changes.size, 0)
    return _by_input(size, edits, problem.length)


def locate(
    judge: Judge, rule: Rule, verdict: Verdict, edits: Sequence[Edit]
) -> tuple[Float[np.ndarray, "T_out T_in"], bool, list[str]]:
    """The matrix of a leak, whether only joint edits show it, and a remark."""
    positions = _positions(rule, verdict, edits)
    editor = judge.probe.editor
    singles = [nothing(editor), *single_edits(editor, positions)]
    matrix = _measured(judge, rule, verdict, singles)
    note = []
    length = rule.allowed.shape[1]
    if len(positions) < length:
        note = [f"{len(positions)} of {length} inputs were edited alone to locate the leak."]
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


def where_in_output(judge: Judge, verdict: Verdict, edits: Sequence[Edit]) -> list[str]:
    """Remarks on a leak that is in some examples, heads or features of the output alone."""
    problem = judge.problem
    size = sum(math.prod(out.shape) for out in problem.outs)
    if len(problem.out_lengths) > 1 or size > _ENTRIES:
        return []
    notes = []
    leaves = _leaking_entries(judge, verdict, edits)
    for number, (leaf, time) in enumerate(zip(leaves, problem.out_axes, strict=True)):
        array = f" of array {number}" if len(leaves) > 1 else ""
        for axis in range(leaf.ndim):
            some = np.flatnonzero(leaf.any(tuple(i for i in range(leaf.ndim) if i != axis)))
            if axis != time and 0 < len(some) < leaf.shape[axis]:
                which = ", ".join(map(str, some[:5])) + ", ..." * (len(some) > 5)
                notes += [
                    f"In the output{array} the leak was seen at {which} of axis {axis} alone."
                ]
    return notes


def _leaking_entries(
    judge: Judge, verdict: Verdict, edits: Sequence[Edit]
) -> list[Bool[np.ndarray, "..."]]:
    """Of each array of the output, what as many leaking edits as fit a batch change for certain."""
    probe = judge.probe_of(verdict)
    rows = _evenly(np.flatnonzero(verdict.leaks.any(1)), probe.batch_size)
    outputs = zip(
        probe.outputs([edits[0]]), probe.outputs([edits[row] for row in rows]), strict=True
    )
    found = []
    for (base, edited), axis in zip(outputs, probe.out_axes, strict=True):
        with np.errstate(invalid="ignore"):  # inf - inf
            change = np.abs(edited - base)
        finite = lambda values: np.where(np.isfinite(values), np.abs(values), 0).max()
        rounding = float(judge.noise_ulps) * probe.eps * max(finite(base), finite(edited))
        leaking = np.expand_dims(
            verdict.leaks[rows], [i for i in range(1, base.ndim) if i != axis + 1]
        )
        found.append((~(change <= rounding) & leaking).any(0))
    return found


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
    return _by_input(_sizes(judge, watch, verdict, singles), singles, rule.allowed.shape[1])


def _sizes(judge: Judge, watch, verdict: Verdict, edits: Sequence[Edit]) -> np.ndarray:
    found = judge.tell(edits, watch, judge.probe.measure(edits, "locating the leak"))
    changes = found.exact if verdict.in_float64 else found.changes
    return np.where(watch & ~found.leaks, 0, changes.size)


def by_array(
    judge: Judge, rule: Rule, verdict: Verdict, edits: Sequence[Edit], matrix, joint: bool
) -> dict[str, Float[np.ndarray, "T_out T_in"]]:
    """The part of the leaks in `matrix` that each array of the input makes when it alone is edited.

    For 32 of the inputs that leak, or all if they are fewer.
    """
    editor = judge.probe.editor
    leaking = ~rule.allowed & (matrix > 0)
    if len(editor.leaves) < 2 or not leaking.any():
        return {}
    if joint:
        outputs = np.flatnonzero(verdict.leaks.any(0)).tolist()
        chosen = [edits[row] for row in sorted({_smallest(verdict, edits, t) for t in outputs})]
    else:
        columns = _evenly(np.flatnonzero(leaking.any(0)), 32)
        chosen = [*single_edits(editor, columns, budget=_BY_ARRAY // len(editor.leaves))]
    alone = [e._replace(only=i) for i in range(len(editor.leaves)) for e in chosen]
    rows = [nothing(editor), *alone]
    sizes = _sizes(judge, rule.watch(rows), verdict, rows)[1:].reshape(-1, len(chosen), len(matrix))
    found = {}
    for leaf, size in zip(editor.leaves, sizes, strict=True):
        if joint:
            own = np.where(leaking, size.max(0)[:, None], 0)
        else:
            own = _by_input(size, chosen, matrix.shape[1])
        if (~rule.allowed & (own > 0)).any():
            found[leaf.name] = own
    return found


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
    length = rule.allowed.shape[1]
    if length <= _ALONE_UP_TO:
        return list(range(length))
    pointed = _pointed_at(verdict, edits)
    step = -(-len(pointed) // (_ALONE_UP_TO // 2)) or 1
    return sorted(dict.fromkeys([*pointed[::step], *_evenly(np.arange(length))]))


def _evenly(positions: np.ndarray, most: int = _ALONE_UP_TO) -> list[int]:
    """`most` of the positions, or all if they are fewer."""
    count = min(len(positions), most)
    return positions[np.linspace(0, len(positions) - 1, count).astype(int)].tolist()


def _pointed_at(verdict: Verdict, edits: Sequence[Edit]) -> list[int]:
    """What the smallest edit that changes an output replaces, and no edit within it does."""
    where = np.stack([edit.where for edit in edits])
    found = np.zeros(where.shape[1], bool)
    for outputs in alike(verdict.leaks.T).values():
        if verdict.leaks[:, outputs[0]].any():
            row = where[_smallest(verdict, edits, outputs[0])]
            within = ~(where & ~row).any(1) & (where.sum(1) < row.sum())
            found |= row & ~where[within].any(0)
    return np.flatnonzero(found).tolist()


def measure_required(
    judge: Judge, required: Bool[np.ndarray, "T_out T_in"]
) -> tuple[Float[np.ndarray, "T_out T_in"], list[str]]:
    """How far each output moves as each input is edited alone, and remarks.

    0 where the edits of an input do not move an output by more than rounding, neither in the
    function's own precision nor, for pairs that are `required`, in float64 and by edits of every
    kind. An output that every edit of an input made NaN or infinite has moved.
    """
    editor = judge.probe.editor
    columns = np.flatnonzero(required.any(0))
    positions = _evenly(columns)
    edits = [nothing(editor), *single_edits(editor, positions), nothing(editor)]
    changes = judge.probe.measure(edits, "required pairs")
    require_sane_baseline(judge.problem, edits, changes, judge.noise_ulps)
    notes = [
        f"{len(positions)} of {len(columns)} inputs were edited alone for what must be read, "
        f"with {len(edits) - 2} edited inputs."
    ]
    matrix = _by_input(judge.beyond_rounding(changes), edits, editor.length)
    matrix[_by_input(~changes.broken, edits, editor.length) == 0] = np.inf
    doubtful = np.flatnonzero((required & (matrix == 0)).any(0)).tolist()
    if doubtful:
        again = [nothing(editor), *single_edits(editor, doubtful, every_kind=True)]
        sizes, more = judge.second_look(again)
        if sizes is None:  # then whatever changes at all counts
            sizes = judge.probe.measure(again, "required pairs").size
        matrix = np.fmax(matrix, _by_input(sizes, again, editor.length))
        notes += more
    return matrix, notes


def _vjp_matrix(problem: Problem, key: PRNGKeyArray) -> Float[np.ndarray, "T_out T_in"]:
    ins = _float_axes(problem.leaves, problem.in_axes)
    outs = _float_axes(problem.outs, problem.out_axes)
    if not ins or not outs:
        which = "outputs, and fn returns" if ins else "inputs, and x has"
        raise TypeError(f'method="vjp" needs float {which} none; use method="perturb"')

    def differentiable(*leaves: Array) -> list[Array]:
        values = problem.fn(*leaves)
        return [values[i] for i in outs]

    @jit
    def gradients(leaves, positions, keys):
        values, pullback = jax.vjp(differentiable, *leaves)

        def row(position_and_key):
            axes_of = zip(values, outs.values(), strict=True)
            grads = pullback([_at(value, axis, *position_and_key) for value, axis in axes_of])
            return [_largest(grads[i], axis) for i, axis in ins.items()]

        return jax.lax.map(row, (positions, keys))

    keys = jr.split(key, _COTANGENTS * problem.out_length)
    positions = jnp.tile(jnp.arange(problem.out_length), _COTANGENTS)
    rows = fetch(gradients(problem.leaves, positions, keys))
    largest = np.max([row.astype(np.float64) for row in rows], 0)
    return largest.reshape(_COTANGENTS, problem.out_length, problem.length).max(0)


def _float_axes(leaves: Sequence[Any], axes: Sequence[int]) -> dict[int, int]:
    """The numbers of the float leaves, and their axes."""
    pairs = enumerate(zip(leaves, axes, strict=True))
    return {i: axis for i, (leaf, axis) in pairs if jnp.issubdtype(leaf.dtype, jnp.inexact)}


def _largest(grad: Array, axis: int) -> Array:
    """The largest entry at each position of `axis`."""
    return largest(grad, tuple(i for i in range(grad.ndim) if i != axis))


def _at(out: Array, axis: int, position: Array, key: PRNGKeyArray) -> Array:
    index = jnp.arange(out.shape[axis]).reshape([-1 if i == axis else 1 for i in range(out.ndim)])
    zeros = jnp.zeros_like(out)  # which are sharded as `out` is
    return jnp.where(index == position, zeros + jr.normal(key, out.shape, out.dtype), zeros)
