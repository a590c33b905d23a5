"""The entry points: edit what must not be read, compare what must not change."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, PRNGKeyArray, PyTree

from .._processes import fetched, jit, readable
from .._real import Real
from ._call import options_by_name
from ._edits import (
    MASK,
    Edit,
    Editor,
    TokenValues,
    called,
    elsewhere,
    make_editor,
    mixing_edits,
    nothing,
    pure_mixing_edits,
)
from ._held import Held, held_numbers, with_arrays
from ._host import in_batches, remarks, running
from ._inputs import (
    Axes,
    Problem,
    make_problem,
    perturbed,
    place,
    require_same_length,
    traced,
)
from ._judge import DIFFERS_FROM_ITSELF, Judge, function_eps
from ._matrix import by_array, locate, measure_required, where_in_output
from ._positions import Labels, Positions, make_positions
from ._probe import make_probe
from ._proof import Proof, Question, prove, sizes
from ._question import nothing_is_read, warn
from ._report import CausalityReport
from ._suggest import named
from ._torch import understood
from ._trials import Rule
from ._widen import same_trace
from .rules import Align, causal, independent, unread_rows

# How many edits of another input there are, with it a batch of 8; and how many positions the other
# inputs have together, of at most four.
_ELSEWHERE, _PLACES = 7, 64
_OPENED = (
    "The leak was not seen at x, and is at another input, drawn up to ten times as large: look for "
    "a branch, as of lax.cond or jnp.where, that depends on values."
)


class CausalityError(AssertionError):
    """An output reads an input that it must not, or nothing can tell; see its `report`."""

    def __init__(self, report: CausalityReport, err_msg: str = ""):
        self.report = report
        super().__init__(f"{err_msg}\n{report}" if err_msg else str(report))


@options_by_name
def assert_causal(
    fn: Callable[[PyTree], PyTree],
    x: PyTree,
    *,
    axis: Axes = 0,
    out_axis: Axes | None = None,
    strict: bool = False,
    align: Align | None = None,
    complete: bool = False,
    pointwise: bool = False,
    labels: Labels = None,
    out_labels: Labels = None,
    splits: Sequence[int] | str = "auto",
    scales: Sequence[Real] = (1.0, 10.0, 100.0),
    token_values: TokenValues = None,
    allowed_values: TokenValues = None,
    fixed: str | Iterable[str] = (),
    noise_ulps: Real = 64,
    confirm_x64: bool = True,
    batch_size: int = 8,
    key: PRNGKeyArray | None = None,
    perturb_params: Real | None = None,
    trainable: PyTree | None = None,
    prove: bool | Literal["required"] = False,
    assume_bounded: bool = True,
    err_msg: str = "",
) -> CausalityReport:
    """Raises `CausalityError` if output `t` of `fn(x)` reads an input later than `t`.

    For every split `s` the inputs from `s` on are replaced, each position at its own scale, and
    the outputs before `s` are compared bit for bit with those of the unedited input. Further edits
    have one scale and one sign throughout, or are 0, until there are 144 edits. If there are more
    than 128 positions, 4 of the splits have these. Values are compared, not gradients, so rounding,
    argmax, routing, masks and stopped gradients hide nothing.

    Every change is run again with the whole function in float64 (in float32 if the function is one
    of float64). Rounding shrinks with the precision, and a leak does not. Only casts to float8 and
    float4 stay, as quantisation. A callback or a kernel between input and output has no float64
    form. There the size of the change decides. The limit is `noise_ulps * eps * scale`, and a
    hundred times that for edits a hundred times as large. What lies below is undecided and refused.

    What an output may read stays as it is in `x`. Only 7 edits, or up to 28 of a short `x`, start
    from other inputs. Their floats are drawn at the size of those of `x` and at ten times that;
    tokens and masks stay. A leak that is seen there alone stands behind a branch, and the report
    says so.

    If nothing changed, that is no proof. The check cannot see a branch whose parameters are zero
    (see `perturb_params`), a leak smaller than the last bit of the output, or a reaction to one
    special input value that no edit happened to draw.

    ```python
    import equinox as eqx
    import jax
    from eqx_norms.causality import assert_causal

    x = jax.random.normal(jax.random.key(0), (8, 4))
    attention = eqx.nn.MultiheadAttention(2, 4, key=jax.random.key(1))
    mask = jax.numpy.tri(8, dtype=bool)
    report = assert_causal(lambda x: attention(x, x, x, mask=mask), x)
    ```

    **Arguments:**

    - `fn`: any function of one argument that JAX can trace: an Equinox module, or a closure
        over a Flax or Haiku one. Keys and other arguments go in by closure.
    - `x`: its input, an array or a pytree of arrays that share `axis`: floats of any dtype,
        complex numbers, integer tokens, bools. Its values should be typical ones. An array that
        holds only 0 and 1, such as a mask, is edited within 0 and 1, unless it is all of `x`
        and constant.
    - `axis`: the axis of the positions in every array of `x`; at least 2 long. It may be a tuple of
        axes. The positions are then all index tuples in C order, like the pixels of an image.
    - `out_axis`: the axis of the positions in every array of the output, by default `axis`. It must
        be as long, unless `align` is given.
    - `strict`: output `t` must not read input `t` either, because inputs are not yet shifted.
    - `align`: for an output of another length. It is `"start"` if the first output stands at the
        first input, and `"end"` if the last stands at the last, as behind a cache. The check is
        then [`eqx_norms.causality.assert_reads`][] of `rules.causal(T_out, T_in, align=align)`.
    - `complete`: whether output `t` must also read every input that it may; see `required` of
        [`eqx_norms.causality.assert_reads`][].
    - `pointwise`: says that no output is meant to read another position, as in a norm of each
        token. Without it, a `CausalityWarning` is given if no output does, because along a batch
        axis every model is causal. [`eqx_norms.causality.assert_independent`][] tests that outputs
        read no other position.
    - `labels`: what to call the inputs in reports and plots beside their numbers, such as the text
        `"anna"`. For several axes the labels are nested like the axes, or in C order.
    - `out_labels`: what to call the outputs. The default is `labels`, if there are as many.
    - `splits`: the splits to try, or `"auto"`. That is every split of up to 128 positions, and 68
        splits if there are more: at powers of two, at the ends of chunks of as many lengths as
        possible, and where that leaves the widest gaps. `prove` narrows them down to what it
        leaves open.
    - `scales`: how large the replaced floats are, in units of the root mean square of `x`.
    - `token_values`: ids that mean something special, such as padding or the end of the text,
        and the largest id if `x` does not contain it. The ids that edits draw run to the
        largest of `x` and `token_values`. They hold for every array of integers with more than 0
        and 1 in it, or for some by name, as in `{"ids": (0, 49), "text.segment": (3,)}`.
    - `allowed_values`: the ids that edits may use, such as `range(4, 32000)`, or by name as above.
        Use it to leave out padding or the place of an image. By default these are the ids from 0 to
        the largest.
    - `fixed`: the names of what is left alone, as in `"mask"` or `("mask", "text.segment")`. It is
        given to `fn` as it is, so it need not have positions, nor be an array.
    - `noise_ulps`: how many eps of the output's magnitude count as rounding. It is the eps of
        float64 if changes are re-run in it, else that of the least precise dtype in the function.
    - `confirm_x64`: whether to re-run changes in a second precision. If not, those below the
        noise level pass as rounding. In bfloat16 that level is half the output.
    - `batch_size`: how many edited inputs are sent to the device at a time. One forward pass
        runs at a time, so this costs memory for inputs and outputs only.
    - `key`: a JAX PRNG key for the edits; by default the same edits at each call.
    - `perturb_params`: the size of normal noise to add to the parameters of `fn`, which must then
        be a pytree such as an Equinox module. Shows what zero-initialised branches hide.
    - `trainable`: which arrays get this noise, a filter spec as in `equinox.partition`. By default
        these are all float arrays except arrays of zeros and ones, which are masks, and what an
        `equinox.nn.State` or `StateIndex` holds. Leave out by hand what noise would make wrong,
        such as a mask of other numbers or running statistics elsewhere.
    - `prove`: whether to ask the structure of the traced function first. The status is `"proved"`
        if no chain of operations leads from an input to an output that must not read it. That
        holds for every finite input of this shape and any finite values of the floating-point
        parameters, as long as no intermediate value becomes infinite or NaN (what the program
        makes of its own constants aside). Otherwise the edits decide, and a report without a leak
        names the operations in the way. `"required"` raises unless the rule is proved.
    - `assume_bounded`: whether the proof may assume that scores are below a tenth of a mask of a
        large negative number that they meet on the way to an exponential. The scores are looked at
        on `x` and on every edit. If one is larger, there is no proof. `report.assumptions` says
        where the proof assumed it.
    - `err_msg`: a line to begin the error message with.

    **Returns:**

    The [`eqx_norms.causality.CausalityReport`][].

    **Warns:**

    `CausalityWarning`, a `UserWarning`, if no output reads another position; see `pointwise`.

    **Raises:**

    - `CausalityError`, an `AssertionError`, if a leak is found or the status is `"undecided"`; it
        carries `.report`. The message says what to do.
    - `ValueError` or `TypeError` if the question cannot be answered, because `fn` differs from
        itself or is not finite on `x`, or because the shapes, the axes or an option are wrong.
    """
    kind = "strictly causal" if strict else "causal"
    how = _how(locals())

    if align not in (None, "start", "end"):
        raise ValueError(f'align must be "start" or "end", got {align!r}')

    def rule(problem: Problem) -> Rule:
        if align is None:
            require_same_length(problem, axis, out_axis, or_align=True)
        lengths = problem.out_length, problem.length
        allowed = causal(*lengths, strict=strict, align=align)
        if lengths[0] != lengths[1]:
            return _given(problem, allowed, allowed if complete else None)
        return Rule(kind, allowed, allowed if complete else None)

    return _assert(rule, fn, x, splits, how)


@options_by_name
def assert_independent(
    fn: Callable[[PyTree], PyTree],
    x: PyTree,
    *,
    axis: Axes = 0,
    out_axis: Axes | None = None,
    labels: Labels = None,
    out_labels: Labels = None,
    splits: Sequence[int] | str = "auto",
    scales: Sequence[Real] = (1.0, 10.0, 100.0),
    token_values: TokenValues = None,
    allowed_values: TokenValues = None,
    fixed: str | Iterable[str] = (),
    noise_ulps: Real = 64,
    confirm_x64: bool = True,
    batch_size: int = 8,
    key: PRNGKeyArray | None = None,
    perturb_params: Real | None = None,
    trainable: PyTree | None = None,
    prove: bool | Literal["required"] = False,
    assume_bounded: bool = True,
    err_msg: str = "",
) -> CausalityReport:
    """Raises `CausalityError` if output `b` of `fn(x)` reads an input other than `b`.

    This is the check for a batch axis. All examples except one are replaced, and the output of
    that one must not change. It finds batch statistics and routing over a flattened batch.

    **Arguments:**

    They are those of [`eqx_norms.causality.assert_causal`][]. `axis` is now the axis of the
    examples. `splits` names the examples to keep, by default each of up to 128, else 68 of them.

    **Returns:**

    The [`eqx_norms.causality.CausalityReport`][].

    **Raises:**

    As [`eqx_norms.causality.assert_causal`][] does.
    """
    how = _how(locals())

    def rule(problem: Problem) -> Rule:
        require_same_length(problem, axis, out_axis)
        return Rule("independent", independent(problem.length))

    return _assert(rule, fn, x, splits, how)


@options_by_name
def assert_reads(
    fn: Callable[[PyTree], PyTree],
    x: PyTree,
    allowed: Bool[Array | np.ndarray, "*T_out T_in"],
    *,
    required: Bool[Array | np.ndarray, "*T_out T_in"] | None = None,
    axis: Axes = 0,
    out_axis: Axes | None = None,
    pointwise: bool = False,
    labels: Labels = None,
    out_labels: Labels = None,
    scales: Sequence[Real] = (1.0, 10.0, 100.0),
    token_values: TokenValues = None,
    allowed_values: TokenValues = None,
    fixed: str | Iterable[str] = (),
    noise_ulps: Real = 64,
    confirm_x64: bool = True,
    batch_size: int = 8,
    key: PRNGKeyArray | None = None,
    perturb_params: Real | None = None,
    trainable: PyTree | None = None,
    prove: bool | Literal["required"] = False,
    assume_bounded: bool = True,
    err_msg: str = "",
) -> CausalityReport:
    """Raises `CausalityError` if an output of `fn(x)` reads an input that `allowed` forbids it.

    For every distinct row of `allowed`, all that it forbids is replaced, and the outputs that may
    read none of that must not change. If there are more than 128 distinct rows, 68 are tried, and
    the report says so. A row that forbids nothing cannot be tested.
    [`eqx_norms.causality.assert_causal`][] is this check for one rule. It says how a leak is told
    from rounding, and what the check cannot see.

    With `required`, outputs must also read what they are meant to. Each input is edited alone, or
    128 of them if there are more. It has to move the outputs that must read it by more than
    rounding, in the function's own precision or in float64. If it does not, the status is
    `"blind"`.

    ```python
    import jax
    import jax.numpy as jnp
    import numpy as np
    from eqx_norms.causality import assert_reads, rules

    documents = np.array([0, 0, 0, 1, 1, 1, 1, 1])
    allowed = rules.causal(8) & rules.segments(documents)
    attend = lambda x: jax.nn.softmax(jnp.where(allowed, x @ x.T, -jnp.inf)) @ x
    x = jax.random.normal(jax.random.key(0), (8, 4))
    report = assert_reads(attend, x, allowed, required=allowed)
    ```

    **Arguments:**

    - `fn`, `x`: a function and its input, as for [`eqx_norms.causality.assert_causal`][].
    - `allowed`: `allowed[t, j]` says whether output `t` may read input `j`. Any boolean array of
        shape `(T_out, T_in)` will do; [`eqx_norms.causality.rules`][] makes the usual ones. If
        positions lie along several axes, it may keep them apart, as `(heads, T_out, T_in)` does for
        `out_axis=(0, 1)`.
    - `required`: `required[t, j]` says whether output `t` must read input `j`. It must be within
        `allowed`.
    - the other options: as for [`eqx_norms.causality.assert_causal`][]. The output may have any
        number of positions, along any axes.

    **Returns:**

    The [`eqx_norms.causality.CausalityReport`][].

    **Warns:**

    `CausalityWarning` if some outputs may read other positions, and none was found to; see
    `pointwise`.

    **Raises:**

    - `CausalityError` if a leak is found, or a required pair is not read, or nothing can tell; it
        carries `.report`.
    - `ValueError` or `TypeError` if `allowed` or `required` have another shape or dtype, if what is
        required is not allowed, if nothing is forbidden nor required, and otherwise as
        [`eqx_norms.causality.assert_causal`][] does.
    """
    how = _how(locals())
    return _assert(lambda problem: _given(problem, allowed, required), fn, x, "auto", how)


@options_by_name
def check_causal(fn: Callable[[PyTree], PyTree], x: PyTree, **options) -> CausalityReport:
    """The report of [`eqx_norms.causality.assert_causal`][], leak or not; the same options."""
    try:
        return assert_causal(fn, x, **options)
    except CausalityError as error:
        return error.report


@options_by_name
def check_independent(fn: Callable[[PyTree], PyTree], x: PyTree, **options) -> CausalityReport:
    """The report of [`eqx_norms.causality.assert_independent`][], leak or not; same options."""
    try:
        return assert_independent(fn, x, **options)
    except CausalityError as error:
        return error.report


@options_by_name
def check_reads(
    fn: Callable[[PyTree], PyTree],
    x: PyTree,
    allowed: Bool[Array | np.ndarray, "*T_out T_in"],
    **options,
) -> CausalityReport:
    """The report of [`eqx_norms.causality.assert_reads`][], leak or not; the same options."""
    try:
        return assert_reads(fn, x, allowed, **options)
    except CausalityError as error:
        return error.report


class How(NamedTuple):
    """The options that all checks share, as `assert_causal` documents them."""

    axis: Axes
    out_axis: Axes | None
    labels: Labels
    out_labels: Labels
    scales: Sequence[Real]
    token_values: TokenValues
    allowed_values: TokenValues
    fixed: str | Iterable[str]
    noise_ulps: Real
    confirm_x64: bool
    batch_size: int
    key: PRNGKeyArray | None
    perturb_params: Real | None
    trainable: PyTree | None
    prove: bool | Literal["required"]
    assume_bounded: bool
    err_msg: str
    pointwise: bool


def _how(arguments: Mapping[str, Any]) -> How:
    """Of the arguments of a check, those that all have; other rules than the causal never warn."""
    arguments = {"pointwise": True, **arguments}
    return How(**{name: arguments[name] for name in How._fields})


def _assert(
    rule: Callable[[Problem], Rule],
    fn: Callable,
    x: PyTree,
    splits: Sequence[int] | str,
    how: How,
) -> CausalityReport:
    fn = understood(fn)
    with running(fn):
        report = _check(rule, fn, x, splits, how)
    unproved = how.prove == "required" and report.status != "proved"
    if report.status in ("leak", "undecided", "blind") or unproved:
        raise CausalityError(report, how.err_msg)
    return report


def _check(
    make_rule: Callable[[Problem], Rule],
    fn: Callable,
    x: PyTree,
    splits: Sequence[int] | str,
    how: How,
) -> CausalityReport:
    if how.prove not in (True, False, "required"):
        raise ValueError(f'prove must be True, False or "required", got {how.prove!r}')
    if how.batch_size < 1 or not how.noise_ulps >= 0:
        raise ValueError(
            "batch_size must be at least 1 and noise_ulps at least 0, got "
            f"batch_size={how.batch_size}, noise_ulps={how.noise_ulps}"
        )
    rng = np.random.default_rng(0)
    fn, known_notes = _with_noise(fn, how, rng)
    problem = make_problem(fn, x, how.axis, how.out_axis, how.fixed)
    rule = make_rule(problem)
    outputs, inputs = make_positions(problem, how.labels, how.out_labels)
    known_notes += _dead(rule, outputs)
    common: dict[str, Any] = dict(
        allowed=rule.allowed, kind=rule.kind, outputs=outputs, inputs=inputs
    )
    _require_same_trace(problem)
    proof = _proof(fn, x, problem, rule, how, splits) if how.prove else None
    report = _proved(rule, proof, common) if proof is not None and proof.holds else None
    if report is not None and rule.required is None:
        report = dataclasses.replace(report, notes=tuple(known_notes))
        return _questioned(report, problem, how)
    editor = _editor(problem, how)
    of_probe = editor, problem.out_axes, function_eps(problem), how.batch_size
    beside = in_batches(problem.fn, problem.closed)
    probe = make_probe(problem.fn, *of_probe, beside=beside)
    judge = Judge(problem, probe, how.noise_ulps, how.confirm_x64)
    try:
        if report is None:
            common["obstacles"] = proof.obstacles if proof is not None else ()
            connected = proof.connected if proof is not None else None
            tried = rule.choose(splits, rng, connected)
            report = _edited(judge, rule, tried, splits == "auto", common)
            if report.status.startswith("clear") and len(tried):
                report = _elsewhere(report, judge, rule, tried, splits == "auto", common)
            if proof is not None:
                report = _narrowed(report, rule, proof)
            elif splits == "auto" and not report.leak:
                report = dataclasses.replace(report, notes=(*_untried(report), *report.notes))
        if rule.required is not None:
            report = _completed(report, judge, rule.required)
    except ValueError as error:
        for note in known_notes:
            error.add_note(note)
        raise
    known_notes += remarks(problem.closed)
    report = dataclasses.replace(report, notes=(*report.notes, *known_notes))
    return _questioned(report, problem, how)


def _questioned(report: CausalityReport, problem: Problem, how: How) -> CausalityReport:
    """The report; with a remark, and a warning, if it can hardly answer what was meant."""
    if not report.pointwise:
        return report
    remark = "No output reads another position, as is meant (pointwise=True)."
    if not how.pointwise:
        asked = str(report.inputs)
        remark = nothing_is_read(problem, asked, zero_branch=report.status != "proved")
        warn(remark)
    return dataclasses.replace(report, notes=(remark, *report.notes))


def _edited(
    judge: Judge, rule: Rule, tried: Sequence[int], auto: bool, common: Mapping[str, Any]
) -> CausalityReport:
    """The report on what must not be read, by edits."""
    editor = judge.probe.editor
    # The unedited input comes first, to compare with, and once more at the end.
    mixing = mixing_edits(editor.length, both=rule.kind == "reads")
    trials = [*rule.edits(tried, editor.kinds, auto), *mixing]
    edits = [nothing(editor), *trials, nothing(editor)]
    verdict = judge.verdict(edits, rule.watch(edits))
    leak = verdict.status == "leak"
    pointwise, count, arrays = False, len(trials), {}
    if leak:
        matrix, joint, note = locate(judge, rule, verdict, edits)
        arrays = by_array(judge, rule, verdict, edits, matrix, joint)
        note += where_in_output(judge, verdict, edits)
    else:
        matrix, joint = rule.covered(tried), False
        matrix[verdict.undecided.any(0)] = np.nan
        silent = _silent(rule, edits, verdict.moved)
        if _all_alone(rule, silent):
            more = [nothing(editor), *pure_mixing_edits(editor.length, editor.kinds)]
            changes, count = judge.probe.measure(more), count + len(more) - 1
            silent &= _silent(rule, more, changes.broken | (changes.ulps > 0))
            pointwise = _all_alone(rule, silent)
        note = [] if pointwise else _inert(rule, silent)
    return CausalityReport(
        leak=leak,
        status=verdict.status,
        matrix=matrix,
        worst=verdict.worst,
        scale=verdict.scale,
        noise=verdict.noise,
        splits=tuple(tried),
        possible_splits=len(rule.possible),
        edits=count,
        joint=joint,
        pointwise=pointwise,
        arrays=arrays,
        names=judge.problem.names,
        notes=(*verdict.notes, *note, *_untestable(rule), *_token_notes(editor)),
        **common,
    )


def _elsewhere(
    report: CausalityReport,
    judge: Judge,
    rule: Rule,
    tried: Sequence[int],
    auto: bool,
    common: Mapping[str, Any],
) -> CausalityReport:
    """A clear report; or that of a leak behind a branch that the values of `x` do not open.

    What an output may read is as in `x` in all other edits, so that a branch on it is taken in one
    way. What is less than rounding at the other input, or undecided there, is passed over.
    """
    floats = any(leaf.ids is None for leaf in judge.probe.editor.leaves)
    count = min(4, -(-_PLACES // judge.problem.length)) if floats else 0
    for number in range(count):
        editor = elsewhere(judge.probe.editor, number)
        other = dataclasses.replace(judge, probe=dataclasses.replace(judge.probe, editor=editor))
        splits = [tried[k * len(tried) // _ELSEWHERE] for k in range(_ELSEWHERE)]
        trials = [Edit(rule.where(s), 0, 3_100_000 + k) for k, s in enumerate(splits)]
        edits = [nothing(editor), *trials]
        changes = other.probe.measure(edits)
        seen = rule.watch(edits) & (other.beyond_rounding(changes) > 0)
        if changes.broken[0].any() or not seen.any():
            continue
        try:
            found = _edited(other, rule, tried, auto, common)
        except ValueError:  # NaN or another output at each call: of other inputs it says nothing
            continue
        if found.leak:
            return dataclasses.replace(found, notes=(_OPENED, *found.notes))
    others = count * _ELSEWHERE
    said = f"What an output may read was as in x, and in {others} of the edits as in other inputs."
    if not floats:
        said = "What an output may read was as in x: a branch on it was taken in that way alone."
    return dataclasses.replace(report, edits=report.edits + others, notes=(*report.notes, said))


def _narrowed(report: CausalityReport, rule: Rule, proof: Proof) -> CausalityReport:
    """The report of the edits, with what the structure says although it proves less than asked."""
    left = len(rule.open(proof.connected))
    matrix = np.where(rule.allowed | proof.connected, report.matrix, np.float32(0))
    closed = len(rule.possible) - left
    note = f"{closed} more need no edit: nothing that must not be read is connected there."
    return dataclasses.replace(
        report,
        matrix=matrix.astype(report.matrix.dtype),
        possible_splits=left,
        notes=(note, *report.notes) if closed else report.notes,
    )


def _completed(
    report: CausalityReport, judge: Judge, required: Bool[np.ndarray, "T_out T_in"]
) -> CausalityReport:
    """The report that also says whether what must be read is read."""
    moved, notes = measure_required(judge, required)
    matrix = np.where(report.allowed & ~np.isnan(moved), moved, report.matrix)
    blind = bool((required & (matrix == 0)).any())
    status = report.status
    if blind and status not in ("leak", "undecided"):
        notes += ["Beside that: " + str(report).split("\n")[0]]
        status = "blind"
    return dataclasses.replace(
        report,
        status=status,
        blind=blind,
        matrix=matrix,
        required=required,
        notes=(*report.notes, *notes),
    )


def _given(problem: Problem, allowed: Any, required: Any) -> Rule:
    """The rule that the user wrote."""
    allowed = _pairs("allowed", allowed, problem)
    if required is not None:
        required = _pairs("required", required, problem)
        wrong = np.argwhere(required & ~allowed)
        if len(wrong):
            output, source = problem.output(wrong[0, 0]), place(wrong[0, 1], problem.in_lengths)
            raise ValueError(
                f"required must lie within allowed, but output {output} must read input {source}, "
                "which it may not; pass required & allowed, or allow it"
            )
    if allowed.all() and (required is None or not required.any()):
        raise ValueError(
            "allowed forbids nothing, so that there is nothing to check; pass required= to ask "
            "that outputs read what they may"
        )
    return Rule("reads", allowed, required if required is None or required.any() else None)


def _pairs(name: str, values: Any, problem: Problem) -> Bool[np.ndarray, "T_out T_in"]:
    values, shape = fetched(values), (problem.out_length, problem.length)
    if values.shape == (*problem.out_lengths, *problem.in_lengths):
        values = values.reshape(shape)
    if values.dtype != np.bool_:
        raise TypeError(
            f"{name} must be a boolean array, got {values.dtype}; write {name} != 0 if that is "
            "what it means"
        )
    if values.shape != shape:
        raise ValueError(
            f"{name} must have shape (T_out, T_in) = {shape}, a row for every output position and "
            f"a column for every input position, got {values.shape}{_reshaped(name, values, shape)}"
        )
    return values


def _reshaped(name: str, values: np.ndarray, shape: tuple[int, int]) -> str:
    """What to write instead, where the shape tells."""
    if values.shape == shape[::-1]:
        return f"; write {name}.T if its rows are inputs"
    *stack, outputs, inputs = values.shape if values.ndim > 2 else (0, 0)
    if (outputs, inputs) != shape:
        return ""
    if math.prod(stack) == 1:
        return f"; write {name}[{', '.join('0' * len(stack))}]"
    return (
        "; for heads that fn returns name their axis as well, as in out_axis=(0, 1), and for the "
        "examples of a batch write rules.each of the stack, with axis=(0, 1)"
    )


def _proof(
    fn: Callable,
    x: PyTree,
    problem: Problem,
    rule: Rule,
    how: How,
    splits: Sequence[int] | str,
) -> Proof:
    def proved(closed: jex.ClosedJaxpr, held: Held) -> tuple[jex.ClosedJaxpr, Proof]:
        near = jex.ClosedJaxpr(closed.jaxpr, [*map(readable, closed.consts)])
        question = Question(
            near, problem.leaves, problem.in_axes, problem.out_axes, problem.out_lengths, held
        )
        return closed, prove(question, rule.allowed, how.assume_bounded)

    tries = (proved(*trace) for trace in _with_parameters(fn, x, problem, how))
    closed, proof = next(tries)
    if not proof.holds:
        closed, proof = next(tries, (closed, proof))
    if not proof.meetings:
        return proof
    # What was assumed of scores has to hold on x, and on every edit that would be tried.
    editor = _editor(problem, how)
    tried = rule.choose(splits, np.random.default_rng(0))
    mixing = mixing_edits(editor.length, both=rule.kind == "reads")
    trials = rule.edits(tried, editor.kinds, splits == "auto")
    edits = [nothing(editor), *trials, *mixing]
    scores = make_probe(sizes(closed, proof.meetings), editor, (), 0.0, how.batch_size).evaluate(
        edits
    )
    return proof.confirmed(scores)


def _with_parameters(
    fn: Callable, x: PyTree, problem: Problem, how: How
) -> Iterator[tuple[jex.ClosedJaxpr, Held]]:
    """Traces in which parameters are no numbers of the program, and those that are all the same.

    NumPy scalars are, and entries of NumPy arrays. Where they cannot be told by their place, they
    are by their value. What NumPy makes of its own arrays is no parameter: so these are replaced
    only after a proof that met an entry of theirs among the numbers, and failed.
    """

    def told(all_of_them: bool) -> tuple[jex.ClosedJaxpr, Held] | None:
        try:
            copy = with_arrays(fn, all_of_them)
            closed = make_problem(copy, x, how.axis, how.out_axis, how.fixed).closed
            return closed, held_numbers(copy)
        except Exception:  # it needed NumPy's own, for a shape or as a static argument
            return None

    held = held_numbers(fn)
    closed, left = (told(False) if held.numbers else None) or (problem.closed, held)
    yield closed, left
    if left.arrays and left.were_met and (again := told(True)) is not None:
        yield again


def _editor(problem: Problem, how: How) -> Editor:
    return make_editor(
        problem.leaves,
        problem.in_axes,
        how.scales,
        how.token_values,
        how.key,
        problem.names,
        how.allowed_values,
    )


def _proved(rule: Rule, proof: Proof, common: Mapping[str, Any]) -> CausalityReport:
    """The report of what needs no edit: 0 where an output cannot read an input, NaN elsewhere."""
    others = proof.connected & ~np.eye(*rule.allowed.shape, dtype=bool)
    return CausalityReport(
        leak=False,
        status="proved",
        matrix=np.where(proof.connected, np.nan, 0).astype(np.float32),
        worst=0.0,
        scale=0.0,
        noise=0.0,
        splits=(),
        possible_splits=len(rule.possible),
        edits=0,
        joint=False,
        notes=(),
        assumptions=proof.assumptions,
        pointwise=_asks_who_mixes(rule) and not others.any(),
        **common,
    )


def _require_same_trace(problem: Problem) -> None:
    """What differs from one trace to the next: Python's and NumPy's random numbers, counters."""
    again = traced(problem.fn, problem.leaves)
    if same_trace(problem.closed, again):
        return
    # The text of a trace may also differ by an address. Then only the values can tell.
    one, two = (jit(jex.jaxpr_as_fun(closed)) for closed in (problem.closed, again))
    outs = (map(fetched, run(*problem.leaves)) for run in (one, two))
    for a, b in zip(*outs, strict=True):
        if not np.array_equal(a, b, equal_nan=jnp.issubdtype(a.dtype, jnp.inexact)):
            raise ValueError(DIFFERS_FROM_ITSELF)


def _asks_who_mixes(rule: Rule) -> bool:
    """Whether outputs may read other positions, and nothing is said of whether they do."""
    if rule.kind == "independent" or rule.required is not None:
        return False
    outputs, inputs = rule.allowed.shape
    return outputs == inputs and bool(_may_mix(rule.allowed).any())


def _silent(
    rule: Rule, edits: Sequence[Edit], moved: Bool[np.ndarray, "E T_out"]
) -> Bool[np.ndarray, " T_out"]:
    """The outputs that no other input moves, of those that may read another."""
    if not _asks_who_mixes(rule):
        return np.zeros(len(rule.allowed), bool)
    silent = _may_mix(rule.allowed)
    for edit, row in zip(edits, moved, strict=True):
        silent &= ~row | edit.where
    return silent


def _may_mix(allowed: Bool[np.ndarray, "T T"]) -> Bool[np.ndarray, " T"]:
    """Who may read another; the first may not under the causal rule."""
    return allowed.sum(1) > allowed.diagonal()


def _all_alone(rule: Rule, silent: Bool[np.ndarray, " T_out"]) -> bool:
    """Whether the test shows nothing."""
    return bool(silent.any()) and np.array_equal(silent, _may_mix(rule.allowed))


def _inert(rule: Rule, silent: Bool[np.ndarray, " T_out"]) -> list[str]:
    """A remark on outputs that no other input moves: a zero-initialised branch looks so."""
    if not silent.any():
        return []
    option = "required=" if rule.kind == "reads" else "complete=True"
    return [
        f"{silent.sum()} of {len(silent)} outputs react to no input but their own. If the model "
        "should mix positions, a zero-initialised branch may hide a leak: try perturb_params=0.02. "
        f"{option} asks whether outputs read what they may."
    ]


def _untried(report: CausalityReport) -> list[str]:
    """A remark on what more splits than were tried would show."""
    if len(report.splits) == report.possible_splits:
        return []
    return [
        "A leak that only the others show, as at the borders of chunks of an odd length, is "
        "missed. prove=True tries those where the structure of fn leaves a leak possible."
    ]


def _untestable(rule: Rule) -> list[str]:
    """A remark on outputs that may read everything; of the causal rule one always may."""
    count = int(rule.allowed.all(1).sum()) if rule.kind == "reads" else 0
    verb = "is" if count == 1 else "are"
    return [
        f"{count} of {len(rule.allowed)} outputs may read every input, and {verb} not tested."
    ] * bool(count)


def _dead(rule: Rule, outputs: Positions) -> list[str]:
    """A remark on outputs that may read nothing, because many masks mean something else by that."""
    dead = unread_rows(rule.allowed)
    if not dead.any():
        return []
    return [
        f"Nothing may be read by {named(outputs, dead, 'output')}. If a mask hides a whole row, "
        "most libraries return an average of everything there, and others zeros or NaN. "
        "rules.unread_rows finds such rows. rules.let_off says that nobody looks at them."
    ]


def _token_notes(editor: Editor) -> list[str]:
    notes = []
    for leaf in editor.leaves:
        if leaf.ids is None or leaf.values.dtype == np.bool_:
            continue
        if leaf.ids == MASK:
            more = (
                "; token_values= adds ids" if jnp.issubdtype(leaf.values.dtype, jnp.integer) else ""
            )
            notes += [f"{called(leaf.name)} holds only 0 and 1, and was edited within them{more}."]
            continue
        what = f"{called(leaf.name)} was" if leaf.name else "Tokens were"
        first, last = leaf.ids.drawn[0], leaf.ids.drawn[-1]
        if leaf.ids.allowed:
            notes += [f"{what} drawn from {len(leaf.ids.drawn)} ids, {first} to {last}, as given."]
            continue
        source = "x and token_values" if leaf.ids.given else "x; token_values= adds ids"
        notes += [f"{what} drawn from {first} to {last}, as found in {source}."]
    return notes


def _with_noise(fn: Callable, how: How, rng: np.random.Generator) -> tuple[Callable, list[str]]:
    if how.perturb_params is None:
        return fn, []
    fn, skipped = perturbed(fn, how.perturb_params, rng, how.trainable)
    note = f"Noise of size {how.perturb_params:g} was added to the parameters."
    if skipped:
        more = ", ..." if len(skipped) > 3 else ""
        note += f" It was not added to {', '.join(skipped[:3])}{more}."
    return fn, [f"{note} If it moved what is no parameter, say what is one: trainable=."]
