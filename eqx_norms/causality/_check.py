"""The entry points: edit what must not be read, compare what must not change."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray, PyTree

from .._real import Real
from ._edits import Edit, Editor, make_editor, mixing_edits, nothing, vocabulary
from ._inputs import Problem, make_problem, perturbed, require_same_length, traced
from ._judge import DIFFERS_FROM_ITSELF, function_eps, judge
from ._matrix import locate
from ._probe import make_probe
from ._report import CausalityReport
from ._rules import Kind, Rule
from ._widen import same_trace


class CausalityError(AssertionError):
    """An output reads an input that it must not read; `report` has the particulars."""

    def __init__(self, report: CausalityReport, err_msg: str = ""):
        self.report = report
        super().__init__(f"{err_msg}\n{report}" if err_msg else str(report))


def assert_causal(
    fn: Callable[[PyTree], PyTree],
    x: PyTree,
    *,
    axis: int = 0,
    out_axis: int | None = None,
    strict: bool = False,
    splits: Sequence[int] | str = "auto",
    scales: Sequence[Real] = (1.0, 10.0, 100.0),
    token_values: Sequence[int] | None = None,
    noise_ulps: Real = 64,
    confirm_x64: bool = True,
    batch_size: int = 8,
    key: PRNGKeyArray | None = None,
    perturb_params: Real | None = None,
    err_msg: str = "",
) -> CausalityReport:
    """Raises `CausalityError` if output `t` of `fn(x)` reads an input later than `t`.

    For every split `s` the inputs from `s` on are replaced, several times and at several
    scales, and the outputs before `s` are compared bit for bit with those of the unedited
    input. Values are compared, not gradients, so that rounding, argmax, routing, masks and
    stopped gradients hide nothing.

    A change above the noise level, `noise_ulps * eps * scale`, is a leak. A smaller one is run
    again with the whole function in float64: rounding shrinks there, a leak does not.

    That nothing changed is no proof. What the check cannot see: a branch whose parameters are
    zero (see `perturb_params`), a leak smaller than the last bit of the output, and a reaction
    to one special input value that no edit happened to draw.

    ```python
    import equinox as eqx
    import jax
    from eqx_norms.causality import assert_causal

    x = jax.random.normal(jax.random.key(0), (8, 4))
    report = assert_causal(jax.vmap(eqx.nn.LayerNorm(4)), x)
    ```

    **Arguments:**

    - `fn`: any function of one argument that JAX can trace: an Equinox module, or a closure
        over a Flax or Haiku one. Keys and other arguments go in by closure.
    - `x`: its input, an array or a pytree of arrays that share `axis`: floats of any dtype,
        complex numbers, integer tokens, bools. Its values should be typical ones.
    - `axis`: the axis of the positions in every array of `x`; at least 2 long.
    - `out_axis`: that in every array of the output, by default `axis`. It must be as long.
    - `strict`: output `t` must not read input `t` either, as where inputs are not yet shifted.
    - `splits`: `"auto"`, which is every split of up to 128 positions and 64 chosen ones above,
        or the splits to try.
    - `scales`: how large the replaced floats are, in units of the root mean square of `x`.
    - `token_values`: ids that mean something special, such as padding or the end of the text,
        and the largest id if `x` does not contain it. The ids that edits draw run to the
        largest of `x` and `token_values`.
    - `noise_ulps`: how many eps of the output's magnitude count as rounding.
    - `confirm_x64`: whether to re-run smaller changes in float64. If not, they count as noise.
    - `batch_size`: how many edited inputs are sent to the device at a time. One forward pass
        runs at a time, so that this costs memory for inputs and outputs only.
    - `key`: a JAX PRNG key for the edits; by default the same edits at each call.
    - `perturb_params`: the size of normal noise to add to every float array of `fn`, which must
        then be a pytree such as an Equinox module. Shows what zero-initialised branches hide.
    - `err_msg`: a line to begin the error message with.

    **Returns:**

    The [`eqx_norms.causality.CausalityReport`][].

    **Raises:**

    - `CausalityError`, an `AssertionError`, if a leak is found; it carries `.report`.
    - `ValueError` or `TypeError` if the question cannot be answered: `fn` differs from itself or
        is not finite on `x`, or the shapes, the axes or an option are wrong.
    """
    kind = "strictly causal" if strict else "causal"
    how = How(scales, token_values, noise_ulps, confirm_x64, batch_size, key, perturb_params)
    report = _check(kind, fn, x, axis, out_axis, splits, how)
    if report.leak:
        raise CausalityError(report, err_msg)
    return report


def assert_independent(
    fn: Callable[[PyTree], PyTree],
    x: PyTree,
    *,
    axis: int = 0,
    out_axis: int | None = None,
    splits: Sequence[int] | str = "auto",
    scales: Sequence[Real] = (1.0, 10.0, 100.0),
    token_values: Sequence[int] | None = None,
    noise_ulps: Real = 64,
    confirm_x64: bool = True,
    batch_size: int = 8,
    key: PRNGKeyArray | None = None,
    perturb_params: Real | None = None,
    err_msg: str = "",
) -> CausalityReport:
    """Raises `CausalityError` if output `b` of `fn(x)` reads an input other than `b`.

    This is the check for a batch axis: every example but one is replaced, and the output of
    that one must not change. It finds batch statistics and routing over a flattened batch.

    **Arguments:**

    As for [`eqx_norms.causality.assert_causal`][], where `axis` is now that of the examples and
    `splits` names the examples to keep, by default each of up to 128, else 64 of them.

    **Returns:**

    The [`eqx_norms.causality.CausalityReport`][].

    **Raises:**

    As [`eqx_norms.causality.assert_causal`][] does.
    """
    how = How(scales, token_values, noise_ulps, confirm_x64, batch_size, key, perturb_params)
    report = _check("independent", fn, x, axis, out_axis, splits, how)
    if report.leak:
        raise CausalityError(report, err_msg)
    return report


def check_causal(fn: Callable[[PyTree], PyTree], x: PyTree, **options) -> CausalityReport:
    """The report of [`eqx_norms.causality.assert_causal`][], leak or not; the same options."""
    try:
        return assert_causal(fn, x, **options)
    except CausalityError as error:
        return error.report


def check_independent(fn: Callable[[PyTree], PyTree], x: PyTree, **options) -> CausalityReport:
    """The report of [`eqx_norms.causality.assert_independent`][], leak or not; same options."""
    try:
        return assert_independent(fn, x, **options)
    except CausalityError as error:
        return error.report


class How(NamedTuple):
    """The options that both checks share, as `assert_causal` documents them."""

    scales: Sequence[Real]
    token_values: Sequence[int] | None
    noise_ulps: Real
    confirm_x64: bool
    batch_size: int
    key: PRNGKeyArray | None
    perturb_params: Real | None


def _check(
    kind: Kind,
    fn: Callable,
    x: PyTree,
    axis: int,
    out_axis: int | None,
    splits: Sequence[int] | str,
    how: How,
) -> CausalityReport:
    if how.batch_size < 1 or not how.noise_ulps >= 0:
        raise ValueError(
            "batch_size must be at least 1 and noise_ulps at least 0, got "
            f"batch_size={how.batch_size}, noise_ulps={how.noise_ulps}"
        )
    rng = np.random.default_rng(0)
    if how.perturb_params is not None:
        fn = perturbed(fn, how.perturb_params, rng)
    problem = make_problem(fn, x, axis, out_axis)
    require_same_length(problem, axis, out_axis)
    _require_same_trace(problem)
    editor = make_editor(problem.leaves, problem.in_axes, how.scales, how.token_values, how.key)
    rule = Rule(kind, problem.length)
    tried = rule.choose(splits, rng)

    # The unedited input comes first, to compare with, and once more at the end.
    trials = [*rule.edits(tried, editor.kinds), *mixing_edits(problem.length)]
    edits = [nothing(editor), *trials, nothing(editor)]
    probe = make_probe(problem.fn, editor, problem.out_axes, function_eps(problem), how.batch_size)
    verdict = judge(problem, probe, edits, rule.watch(edits), how.noise_ulps, how.confirm_x64)
    status, worst, notes = verdict.status, verdict.worst, list(verdict.notes)
    if status == "leak":
        matrix, joint, note = locate(problem, rule, verdict, edits, how.noise_ulps, how.confirm_x64)
    else:
        matrix, joint = _covered(rule, tried), False
        note = _inert(rule, edits, verdict.moved)
    return CausalityReport(
        leak=status == "leak",
        status=status,
        matrix=matrix,
        allowed=rule.allowed,
        worst=worst,
        scale=verdict.scale,
        noise=verdict.noise,
        splits=tried,
        possible_splits=len(rule.possible),
        edits=len(trials),
        joint=joint,
        notes=(*notes, *note, *_token_notes(editor), *_perturbed_note(how)),
        kind=kind,
    )


def _require_same_trace(problem: Problem) -> None:
    """What differs from one trace to the next: Python's and NumPy's random numbers, counters."""
    again = traced(problem.fn, problem.leaves)
    if same_trace(problem.closed, again):
        return
    # The text of a trace may also differ by an address. Then only the values can tell.
    one, two = (jax.jit(jex.jaxpr_as_fun(closed)) for closed in (problem.closed, again))
    for a, b in zip(one(*problem.leaves), two(*problem.leaves), strict=True):
        if not np.array_equal(a, b, equal_nan=jnp.issubdtype(a.dtype, jnp.inexact)):
            raise ValueError(DIFFERS_FROM_ITSELF)


def _covered(rule: Rule, tried: Sequence[int]) -> np.ndarray:
    """The matrix of a check that found nothing: 0 where an edit would have shown the pair."""
    edits = [Edit(rule.where(split), 0, 0) for split in tried]
    where = np.stack([edit.where for edit in edits]).astype(np.float32)
    return np.where(rule.watch(edits).T.astype(np.float32) @ where > 0, 0.0, np.nan)


def _inert(rule: Rule, edits: Sequence[Edit], moved: np.ndarray) -> list[str]:
    """A remark on outputs that no other input moves: a zero-initialised branch looks so."""
    if rule.kind == "independent":
        return []
    reads_another = np.zeros(rule.length, bool)
    for edit, row in zip(edits, moved, strict=True):
        reads_another |= row & ~edit.where
    reads_another[0] = True  # nothing comes before it
    count = int((~reads_another).sum())
    if not count:
        return []
    return [
        f"{count} of {rule.length} outputs react to no input but their own. If the model should "
        "mix positions, a zero-initialised branch may hide a leak: try perturb_params=0.02."
    ]


def _token_notes(editor: Editor) -> list[str]:
    notes = []
    for leaf in editor.leaves:
        if jnp.issubdtype(leaf.dtype, jnp.integer):
            ids = vocabulary(editor, leaf)
            source = "x and token_values" if editor.token_values else "x; token_values= adds ids"
            notes += [f"Tokens were drawn from {ids[0]} to {ids[-1]}, as found in {source}."]
    return notes


def _perturbed_note(how: How) -> list[str]:
    if how.perturb_params is None:
        return []
    return [f"Noise of size {how.perturb_params:g} was added to the parameters."]
