"""The entry points: edit what must not be read, compare what must not change."""

from collections.abc import Callable, Iterable, Sequence
from typing import Literal, NamedTuple

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray, PyTree

from .._real import Real
from ._edits import MASK, Edit, Editor, TokenValues, called, make_editor, mixing_edits, nothing
from ._inputs import Problem, make_problem, perturbed, require_same_length, traced
from ._judge import DIFFERS_FROM_ITSELF, Judge, function_eps
from ._matrix import locate
from ._probe import make_probe
from ._prove import Proof, Question, prove
from ._report import CausalityReport
from ._rules import Kind, Rule
from ._widen import same_trace


class CausalityError(AssertionError):
    """An output reads an input that it must not, or nothing can tell; see its `report`."""

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
    token_values: TokenValues = None,
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
    the outputs before `s` are compared bit for bit with those of the unedited input. Edits with
    one scale and one sign throughout are added until there are 144, or at one split in 16 above
    128 positions. Values are compared, not gradients, so that rounding, argmax, routing, masks
    and stopped gradients hide nothing.

    What changes is run again with the whole function in float64 (in float32 if it is one of
    float64): rounding shrinks with the precision, a leak does not. Only casts to float8 and
    float4 stay, as quantisation. Where there is no float64 form, as of a callback or a kernel
    between input and output, size must do: `noise_ulps * eps * scale`, a hundred times that for
    edits a hundred times as large. What lies below is undecided there, and refused.

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
        complex numbers, integer tokens, bools. Its values should be typical ones. An array that
        holds only 0 and 1, such as a mask, is edited within them; but not if it is all of `x`
        and constant.
    - `axis`: the axis of the positions in every array of `x`; at least 2 long.
    - `out_axis`: that in every array of the output, by default `axis`. It must be as long.
    - `strict`: output `t` must not read input `t` either, as where inputs are not yet shifted.
    - `splits`: `"auto"`, which is every split of up to 128 positions and 64 of more, at and beside
        powers of two and where that leaves the widest gaps; or the splits to try.
    - `scales`: how large the replaced floats are, in units of the root mean square of `x`.
    - `token_values`: ids that mean something special, such as padding or the end of the text,
        and the largest id if `x` does not contain it. The ids that edits draw run to the
        largest of `x` and `token_values`. For every array of integers that holds more than 0
        and 1; or for some by name, as in `{"ids": (0, 49), "text.segment": (3,)}`.
    - `fixed`: the names of what is left alone, as in `"mask"` or `("mask", "text.segment")`. It is
        given to `fn` as it is, so that it need not have positions, nor be an array.
    - `noise_ulps`: how many eps of the output's magnitude count as rounding: eps of float64 where
        changes are re-run in it, else of the least precise dtype in the function.
    - `confirm_x64`: whether to re-run changes in a second precision. If not, those below the
        noise level pass as rounding. In bfloat16 that level is half the output.
    - `batch_size`: how many edited inputs are sent to the device at a time. One forward pass
        runs at a time, so that this costs memory for inputs and outputs only.
    - `key`: a JAX PRNG key for the edits; by default the same edits at each call.
    - `perturb_params`: the size of normal noise to add to the parameters of `fn`, which must then
        be a pytree such as an Equinox module. Shows what zero-initialised branches hide.
    - `trainable`: which arrays these are, a filter spec as in `equinox.partition`. By default
        every float array but those of zeros and ones, which are masks, and what an
        `equinox.nn.State` or `StateIndex` holds. A mask of other numbers or running statistics
        elsewhere, which noise would make wrong, are left out by hand.
    - `prove`: whether to ask the structure of the traced function first. Where no chain of
        operations leads from an input to an output that must not read it, that holds for every
        finite input of this shape and any finite values of the floating-point parameters; the
        status is `"proved"`, and no edit is run. Else the edits decide, and a report without a leak
        names the operations in the way. `"required"` raises unless proved.
    - `assume_bounded`: whether the proof may take scores that meet a mask of a large negative
        number to be below a tenth of its size. `report.assumptions` says where it did.
    - `err_msg`: a line to begin the error message with.

    **Returns:**

    The [`eqx_norms.causality.CausalityReport`][].

    **Raises:**

    - `CausalityError`, an `AssertionError`, if a leak is found or the status is `"undecided"`; it
        carries `.report`. The message says what to do.
    - `ValueError` or `TypeError` if the question cannot be answered: `fn` differs from itself or
        is not finite on `x`, or the shapes, the axes or an option are wrong.
    """
    kind = "strictly causal" if strict else "causal"
    how = How(
        scales,
        token_values,
        fixed,
        noise_ulps,
        confirm_x64,
        batch_size,
        key,
        perturb_params,
        trainable,
        prove,
        assume_bounded,
    )
    report = _check(kind, fn, x, axis, out_axis, splits, how)
    _require_sound(report, prove, err_msg)
    return report


def assert_independent(
    fn: Callable[[PyTree], PyTree],
    x: PyTree,
    *,
    axis: int = 0,
    out_axis: int | None = None,
    splits: Sequence[int] | str = "auto",
    scales: Sequence[Real] = (1.0, 10.0, 100.0),
    token_values: TokenValues = None,
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
    how = How(
        scales,
        token_values,
        fixed,
        noise_ulps,
        confirm_x64,
        batch_size,
        key,
        perturb_params,
        trainable,
        prove,
        assume_bounded,
    )
    report = _check("independent", fn, x, axis, out_axis, splits, how)
    _require_sound(report, prove, err_msg)
    return report


def _require_sound(report: CausalityReport, prove: bool | str, err_msg: str) -> None:
    unproved = prove == "required" and report.status != "proved"
    if report.leak or report.status == "undecided" or unproved:
        raise CausalityError(report, err_msg)


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
    token_values: TokenValues
    fixed: str | Iterable[str]
    noise_ulps: Real
    confirm_x64: bool
    batch_size: int
    key: PRNGKeyArray | None
    perturb_params: Real | None
    trainable: PyTree | None
    prove: bool | Literal["required"]
    assume_bounded: bool


def _check(
    kind: Kind,
    fn: Callable,
    x: PyTree,
    axis: int,
    out_axis: int | None,
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
    fn, noise_notes = _with_noise(fn, how, rng)
    problem = make_problem(fn, x, axis, out_axis, how.fixed)
    require_same_length(problem, axis, out_axis)
    _require_same_trace(problem)
    rule = Rule(kind, problem.length)
    proof = _proof(problem, rule, how) if how.prove else None
    if proof is not None and proof.holds:
        return _proved(rule, proof)
    editor = make_editor(
        problem.leaves, problem.in_axes, how.scales, how.token_values, how.key, problem.names
    )
    tried = rule.choose(splits, rng)

    # The unedited input comes first, to compare with, and once more at the end.
    trials = [*rule.edits(tried, editor.kinds), *mixing_edits(problem.length)]
    edits = [nothing(editor), *trials, nothing(editor)]
    probe = make_probe(problem.fn, editor, problem.out_axes, function_eps(problem), how.batch_size)
    judge = Judge(problem, probe, how.noise_ulps, how.confirm_x64)
    try:
        verdict = judge.verdict(edits, rule.watch(edits))
    except ValueError as error:
        for note in noise_notes:
            error.add_note(note)
        raise
    leak = verdict.status == "leak"
    if leak:
        matrix, joint, note = locate(judge, rule, verdict, edits)
    else:
        matrix, joint = rule.covered(tried), False
        matrix[verdict.undecided.any(0)] = np.nan
        note = _inert(rule, edits, verdict.moved)
    return CausalityReport(
        leak=leak,
        status=verdict.status,
        matrix=matrix,
        allowed=rule.allowed,
        worst=verdict.worst,
        scale=verdict.scale,
        noise=verdict.noise,
        splits=tried,
        possible_splits=len(rule.possible),
        edits=len(trials),
        joint=joint,
        notes=(*verdict.notes, *note, *_token_notes(editor), *noise_notes),
        kind=kind,
        obstacles=proof.obstacles if proof is not None else (),
    )


def _proof(problem: Problem, rule: Rule, how: How) -> Proof:
    question = Question(problem.closed, problem.leaves, problem.in_axes, problem.out_axes)
    return prove(question, rule.allowed, how.assume_bounded)


def _proved(rule: Rule, proof: Proof) -> CausalityReport:
    """The report of what needs no edit: 0 where an output cannot read an input, NaN elsewhere."""
    return CausalityReport(
        leak=False,
        status="proved",
        matrix=np.where(proof.connected, np.nan, 0).astype(np.float32),
        allowed=rule.allowed,
        worst=0.0,
        scale=0.0,
        noise=0.0,
        splits=(),
        possible_splits=len(rule.possible),
        edits=0,
        joint=False,
        notes=(),
        kind=rule.kind,
        assumptions=proof.assumptions,
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
