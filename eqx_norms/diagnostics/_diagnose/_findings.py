"""What the numbers of a model say is wrong: rules, thresholds and their reasons.

Every rule looks at statistics, and at what the traced program says of a call. What is not finite
has a finding of its own; every other rule asks for finite figures, and holds for a NaN never.
"""

import functools as ft
import itertools
import math
import operator
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from ._measure import ALIKE, Measured, Parameter, Row
from ._survey import is_in, when
from ._trial import SMALL, typical_ratio

THRESHOLDS = {
    "non-finite": 0,
    "no gradient": 0,
    "cancelled gradient": 1e-5,
    "identical examples": 1,
    "identical units": 1,
    "no activation": 1,
    "dead": 0.75,  # A field of colours that was learning had 0.66 in a layer.
    "saturated": 0.75,
    "exploding gradient": 1e3,
    "vanishing gradient": 1e-3,
    "rank collapse": 1.1,
    "growing activations": 1e2,
    "growth in one call": 1e6,
    "range": 0.25,
    "outlier": 1e2,
    "lost update": 0.5,
    "large update": 0.2,  # Adam's first step of 3e-3 is .15 of weights of .02.
    "small update": SMALL,
    "tied": 1,
    "initial loss": 1.0,
}
KINDS = (
    "non-finite",
    "identical examples",
    "dead",  # Ahead of what no gradient reaches because of it.
    "cancelled gradient",
    "no gradient",
    "identical units",
    "no activation",
    "saturated",
    "exploding gradient",
    "vanishing gradient",
    "rank collapse",
    "growing activations",
    "range",
    "update ratio",
    "initial loss",
)
_EXAMPLES = 16  # Of fewer, many of the units of a healthy layer can be silent by chance.
_FIRING = 0.1  # Where the others fire less often, as in a sparse code, some are silent by chance.
_DEPTH = 4  # Fewer layers have no trend.
_UNITS = 8  # Fewer units, or examples, have no rank to lose.


class Finding(NamedTuple):
    """One thing that is wrong, and where.

    - `kind`: one of those that [`eqx_norms.diagnostics.diagnose`][] lists.
    - `where`: the path of a submodule or of a parameter; `""` is the model itself, `"loss_fn"` what
        is computed outside of it, `"args"` what it is given, `"optimiser"` its state or rate.
    - `value`, `threshold`: the figure, and the limit that it is beyond.
    - `advice`: what it means, and what to look at first.
    - `step`, `example`, `share`: of a call that makes something not finite, the first step of the
        loops around it in which it does, in the order of the computation, as `capture` counts them
        (backward, the last step of a loop comes first); in that step the first example,
        a number for each axis of `jax.vmap`, the outermost first, and the share of such examples.
        Where nothing is vmapped, examples are the entries of all axes but the last.
    """

    kind: str
    where: str
    value: float
    threshold: float
    advice: str
    step: tuple[int, ...] = ()
    example: tuple[int, ...] | None = None
    share: float | None = None


def find(
    measured: Measured, args_bad: str, classes: int | None, unseen: Collection[str] = ()
) -> tuple[Finding, ...]:
    """All findings, the worst first: by kind, and in a kind by how far beyond the threshold.

    **Arguments:**

    - `args_bad`: where there is NaN or inf, except -inf, in what the function was given.
    - `unseen`: the paths of the submodules whose calls were not looked at.
    """
    found = [
        *_not_finite(measured, args_bad, unseen),
        *_identical_examples(measured.rows),
        *_no_gradient(measured),
        *_cancelled(measured),
        *_identical_units(measured.parameters),
        *_no_activation(measured.linear_pairs),
        *_unless_learnt(measured, [*_dead(measured.rows), *_saturated(measured.rows)]),
        *_trends(measured),
        *_collapsed(measured.rows),
        *_out_of_range(measured),
        *_updates(measured),
        *_unless_learnt(measured, [*_small_updates(measured)]),
        *_tied(measured),
        *_initial_loss(measured, classes),
    ]
    return tuple(sorted(found, key=_severity))


def _unless_learnt(measured: Measured, found: list[Finding]) -> list[Finding]:
    """What does no harm in a model that has learnt what its parameters can, or comes of that."""
    return [] if found and measured.has_learnt() else found


def _severity(finding: Finding) -> tuple[int, float]:
    beyond = abs(math.log(max(finding.value, 1e-30) / max(finding.threshold, 1e-30)))
    return KINDS.index(finding.kind), -beyond


# ---- Not finite: where it was born.


def _not_finite(measured: Measured, args_bad: str, unseen: Collection[str]) -> Iterator[Finding]:
    yield from _not_finite_update(measured)
    finite_loss = math.isfinite(measured.loss)
    if finite_loss and not any(p.statistics["grad_non_finite"] for p in measured.parameters):
        return  # An infinity that masks something, say.
    bad = [p for p in measured.parameters if p.statistics["non_finite"] > 0]
    for p in bad:
        advice = "A parameter is NaN or infinite before this step: look at the steps before it."
        yield Finding("non-finite", p.path, p.statistics["non_finite"], 0, advice)
    if bad:
        return
    if finite_loss:
        yield _birth_in_the_backward(measured, unseen)
        return
    born = _birth(measured, args_bad)
    if args_bad:
        advice = (
            "What the function is given is NaN or infinite already: look at the data. First in "
            f"{args_bad}."
        )
        yield Finding("non-finite", "args", 1, 0, advice)
    elif measured.held_nan and born is None:
        advice = (
            "An array that the function was not given, but holds, is NaN already: look at the data "
            "or constants that it takes from around it."
        )
        yield Finding("non-finite", "loss_fn", 1, 0, advice)
    elif born is None:
        yield Finding("non-finite", "loss_fn", 1, 0, _between(measured, unseen))
    if born is not None:
        yield born


def _not_finite_update(measured: Measured) -> Iterator[Finding]:
    if any(p.statistics["grad_non_finite"] for p in measured.parameters):
        return
    bad = [p for p in measured.parameters if p.statistics.get("update_non_finite", 0) > 0]
    if bad or measured.state_non_finite:
        share = max((p.statistics["update_non_finite"] for p in bad), default=1)
        what = f": the next step makes {bad[0].path} NaN or infinite" if bad else ""
        advice = (
            "The gradients are finite, but the optimiser's state or its learning rate is not"
            f"{what}. Look at the steps before, at what was loaded, and at the schedule."
        )
        yield Finding("non-finite", "optimiser", share, 0, advice)


def _between(measured: Measured, unseen: Collection[str]) -> str:
    advice = "It is computed between the submodules or in the loss"
    advice += ", from finite outputs." if measured.rows else "."
    if unseen:
        advice += f" Or in what was not looked at: {', '.join(map(repr, unseen))}."
    return advice


def _birth(measured: Measured, args_bad: str) -> Finding | None:
    """The first call that makes a NaN of what has none.

    Where infinity went into it, or there is no NaN, the first that makes an infinity of finite
    inputs. Of -inf that is one that can only have overflown: other modules mask with it.
    """
    rows = measured.returns
    born = next((row for row in rows if _of(row, "nan") and not _of(row, "input_nan")), None)
    if born is None or _of(born, "input_inf"):
        overflown = (row for row in rows if _overflows(row) and not _of(row, "input_non_finite"))
        born = next(overflown, born)
    if born is None and measured.loss == math.inf:
        infinite = (row for row in rows if _of(row, "non_finite"))
        born = next((row for row in infinite if not _of(row, "input_non_finite")), None)
    if born is None or (args_bad and _of(born, "input_inf")):
        return None
    advice = (
        f"This {born.type} is the first whose inputs are finite and whose output is not. Look for "
        "a division by zero, a logarithm or root of zero, or an overflow."
    )
    if _of(born, "input_non_finite"):
        advice = (
            f"This {born.type} makes a NaN of infinite inputs. Look for a mask in which nothing is "
            "left, and for 0 times infinity."
        )
    return _in_example(born, "bad", born.statistics["non_finite"], advice)


def _in_example(row: Row, name: str, value: float, advice: str) -> Finding:
    """A finding that says where in a call something first is not finite."""
    first, share = (row.statistics.get(f"{name}_{end}") for end in ("first", "share"))
    shape = row.places_shape
    finding = Finding("non-finite", row.path, value, 0, advice, row.step)
    places = []
    if row.step:
        places.append(f"step {_numbers(row.step)}")
    if first is not None and share is not None and shape:
        example = tuple(map(int, np.unravel_index(int(first), shape)))
        finding = finding._replace(example=example, share=share)
        word = "example" if row.seen.examples or row.seen.batched else "position"
        of = math.prod(shape)
        places.append(f"{word} {_numbers(example)}; {round(share * of)} of {of} {word}s")
    if not places:
        return finding
    return finding._replace(advice=f"{advice} First in {', in '.join(places)}.")


def _numbers(index: tuple[int, ...]) -> str:
    return str(index[0]) if len(index) == 1 else str(index)


def _of(row: Row, name: str) -> bool:
    return row.statistics.get(name, 0) > 0


def _overflows(row: Row) -> bool:
    return _of(row, "inf") or (row.type in _LINEAR and _of(row, "non_finite"))


_LINEAR = ("Linear", "Conv1d", "Conv2d", "Conv3d", "Dense", "DenseGeneral", "LinearGeneral", "Conv")


def _birth_in_the_backward(measured: Measured, unseen: Collection[str]) -> Finding:
    advice = (
        "Its output and the derivative there are finite, but what it passes back is not. Look for "
        "a root or a norm of zero, a power, or a `jnp.where` whose unused branch is not finite. "
        "For the last, put a second `where` around the argument."
    )
    # From the last call to the first; a submodule begins after the one it stands in.
    rows = sorted(measured.rows, key=lambda row: when(row.seen.begins, row.step))[::-1]
    rows = [row for row in rows if "grad_non_finite" in row.statistics]
    # Of several arrays that are returned, any may bring back a NaN from elsewhere.
    key = lambda row: (row.path, row.call, row.step)
    reached = {key(row) for row in rows if row.statistics["grad_non_finite"]}
    for row in rows:
        # Inside a derivative, that of an output is not all that comes back through a call.
        if key(row) in reached or row.seen.differentiated:
            continue
        if row.statistics.get("grad_input_non_finite", 0):
            return _in_example(row, "grad_input_bad", 1.0, advice)
    paths = {row.path for row in rows if row.statistics["grad_non_finite"]}
    for p in measured.parameters:
        seen = [row for row in rows if row.path and is_in(p.path, row.path)]
        safe = seen and not any(row.path in paths or row.seen.differentiated for row in seen)
        if p.statistics["grad_non_finite"] > 0 and safe:
            advice = (
                "Its derivative is not finite, though those at all outputs are. Look for a root or "
                "a norm of zero, of the parameter itself: in its module, or in a penalty."
            )
            return Finding("non-finite", p.path, p.statistics["grad_non_finite"], 0, advice)
    advice = (
        "All outputs are finite, and a derivative that comes back to them is not. Look in the "
        "loss, and between the submodules, for a root or a norm of zero, a power, or a `jnp.where` "
        "whose unused branch is not finite: put a second `where` around the argument."
    )
    if unseen:
        advice += f" Or in what was not looked at: {', '.join(map(repr, unseen))}."
    return Finding("non-finite", "loss_fn", 1, 0, advice)


# ---- Examples and units that are all the same.


def _identical_examples(rows: Sequence[Row]) -> Iterator[Finding]:
    # What is the same is rounding behind a norm over the batch.
    behind = ft.reduce(operator.or_, (1 << r.seen.output for r in rows if r.type == "BatchNorm"), 0)
    known = [
        row.statistics["inputs_alike"]
        for row in rows
        if "inputs_alike" in row.statistics and not row.seen.inputs & behind
    ]
    if known and min(known) == 1:
        advice = (
            f"At the input of every submodule all examples of the batch, {ALIKE} or more, are the "
            "same. Look at how batches are drawn, and at broadcasting."
        )
        yield Finding("identical examples", "args", 1, 1, advice)


def _identical_units(parameters: Sequence[Parameter]) -> Iterator[Finding]:
    for p in parameters:
        if p.statistics["identical_units"] > 0:
            advice = (
                "All units have the same weights and get the same gradient: they stay one unit for "
                "ever. Draw the weights at random."
            )
            yield Finding("identical units", p.path, 1, 1, advice)


def _no_activation(pairs: Sequence[tuple[str, str]]) -> Iterator[Finding]:
    for one, two in pairs:
        advice = (
            f"Its output goes unchanged into {two}, and nowhere else, so the two are one linear "
            "layer. Look for a forgotten activation function."
        )
        yield Finding("no activation", one, 2, 1, advice)


# ---- Gradients that do not arrive.


def _no_gradient(measured: Measured) -> Iterator[Finding]:
    parameters = measured.parameters
    zero = {p.path for p in parameters if _gets_none(p)}
    if not math.isfinite(measured.loss):
        return  # A NaN sends none back through some functions.
    if len(zero) == len(parameters) and abs(measured.loss) < 1e-6:
        return  # But for rounding it is 0: nothing is left to learn, as of a margin that is kept.
    zero -= {path for path in zero if _shifts_all(path, measured.rows)}
    advice = (
        "The loss does not change with these parameters. Look for a branch that is not used, a "
        "`stop_gradient`, an integer or a comparison on the way, two factors that are both zero, "
        "or units that are all dead behind."
    )
    done = set()
    for p in parameters:
        if p.path not in zero or p.path in done:
            continue
        where = next(
            prefix
            for prefix in _prefixes(p.path)
            if all(q.path in zero for q in parameters if is_in(q.path, prefix))
        )
        done |= {q.path for q in parameters if is_in(q.path, where)}
        yield Finding("no gradient", where, 0, 0, advice)


def _shifts_all(path: str, rows: Sequence[Row]) -> bool:
    """Whether it is a bias of which the gradient is zero because the loss is the same for outputs
    that are all shifted: it is of a difference, say, or of the derivative of an energy.
    """
    module, _, name = path.rpartition(".")
    return name == "bias" and any(
        row.path == module and (row.seen.differentiated or row.statistics.get("grad_rms", 0) > 0)
        for row in rows
    )


def _cancelled(measured: Measured) -> Iterator[Finding]:
    limit = THRESHOLDS["cancelled gradient"]
    for row in measured.rows:
        spread = row.statistics.get("grad_spread", math.nan)
        if spread <= limit:
            advice = (
                f"The derivative at the output of this {row.type} is the same for all that it "
                "averages, and the sum of what a norm returns is constant: what comes before gets "
                "rounding for a gradient. Look for a plain sum or mean behind it, as a pooling "
                "behind an InstanceNorm."
            )
            yield Finding("cancelled gradient", row.path, spread, limit, advice)


def _gets_none(p: Parameter) -> bool:
    return p.statistics["grad_largest"] == 0 and not p.statistics.get("reached", False)


def _prefixes(path: str) -> list[str]:
    ends = [0, *(m.start() for m in re.finditer(r"[.\[]", path)), len(path)]
    return [path[:end] for end in dict.fromkeys(ends)]


def _dead(rows: Sequence[Row]) -> Iterator[Finding]:
    limit = THRESHOLDS["dead"]
    judged = [row for row in rows if row.examples >= _EXAMPLES and _could_fire(row.statistics)]
    for where, dead in _largest(judged, "dead", limit).items():
        advice = (
            "This share of the units is silent in the whole batch, and gets no gradient to wake "
            "up by. Look at the learning rate, the bias and the scale of what comes before."
        )
        yield Finding("dead", where, dead, limit, advice)


def _could_fire(numbers: dict[str, float]) -> bool:
    """Whether the examples differ, and the other units fire so often that silence is no chance."""
    firing = numbers.get("firing", 1)
    return numbers.get("distinct", 0) >= _EXAMPLES and firing >= _FIRING


def _largest(rows: Sequence[Row], name: str, limit: float) -> dict[str, float]:
    """By path, the largest of a statistic over the calls and steps, where it is above `limit`."""
    found = {}
    for row in rows:
        share = row.statistics.get(name, 0)
        if share > limit:
            found[row.path] = max(share, found.get(row.path, 0))
    return found


def _saturated(rows: Sequence[Row]) -> Iterator[Finding]:
    limit = THRESHOLDS["saturated"]
    judged = [row for row in rows if not (row.seen.gate or "time" in row.seen.kinds)]
    scores = [row for row in judged if row.type == "softmax"]
    for where, share in _largest(scores, "saturated", limit).items():
        advice = (
            "In this share of the rows of its softmax one weight is 1 and all others are 0, so "
            "that the scores get no gradient. Look at the scale of the queries and keys."
        )
        yield Finding("saturated", where, share, limit, advice)
    rest = [row for row in judged if not (row.type == "softmax" or row.seen.ends)]
    for where, share in _largest(rest, "saturated", limit).items():
        advice = (
            "This share of the entries is where the activation function is flat: its slope is "
            "below a tenth of its largest. Look at the gain of the weights and the scale of the "
            "inputs."
        )
        yield Finding("saturated", where, share, limit, advice)


# ---- Trends over depth.


def _trends(measured: Measured) -> Iterator[Finding]:
    best = {}
    for family in families(measured):
        for finding in (_gradient_trend(family), _growth(family)):
            if finding is None:
                continue
            other = best.get(finding.kind)
            if other is None or _severity(finding) < _severity(other):
                best[finding.kind] = finding
    in_one = _growth_in_one_call(measured.rows, measured.data_rms)
    if in_one is not None and "growing activations" not in best:
        best["growing activations"] = in_one
    yield from best.values()


def families(measured: Measured) -> list[list[Row]]:
    """Rows of layers that follow one another: of one path up to a number, of which each is computed
    from the one before.

    Steps of a scan are layers where each has parameters of its own; in time the same comes again.
    """
    by_path = {}
    for row in measured.rows:
        kinds = row.seen.kinds
        if row.call or row.part or row.is_function or "time" in kinds or kinds.count("layer") > 1:
            continue
        member = tuple(i for i, kind in zip(row.step, kinds, strict=True) if kind == "member")
        of = row.path if "layer" in kinds else folded(row.path)
        by_path.setdefault((of, row.type, "layer" in kinds, member), []).append(row)
    return [rows for rows in by_path.values() if len(rows) >= _DEPTH and _is_chain(rows)]


def _is_chain(rows: Sequence[Row]) -> bool:
    if "layer" in rows[0].seen.kinds:
        return True
    return all(b.seen.inputs >> a.seen.output & 1 for a, b in itertools.pairwise(rows))


def folded(path: str) -> str:
    """The path without its first number."""
    return re.sub(r"\d+", "i", path, count=1)


def _slope(values: Sequence[float]) -> float:
    """The decades over the whole depth, of the line that fits best; 0 if none fits well."""
    y = np.array(values)
    if len(y) < _DEPTH or not (np.isfinite(y).all() and (y > 0).all()):
        return 0.0
    depth = np.arange(len(y))
    log = np.log10(y)
    line = np.polyfit(depth, log, 1)
    rest = np.var(log - np.polyval(line, depth))
    return float(line[0] * (len(y) - 1)) if rest <= 0.5 * np.var(log) else 0.0


def _gradient_trend(family: Sequence[Row]) -> Finding | None:
    rows = [row for row in family if row.statistics.get("grad_rms", 0) > 0]
    decades = _slope([row.statistics["grad_rms"] for row in rows])
    change = 10.0**-decades
    low, high = THRESHOLDS["vanishing gradient"], THRESHOLDS["exploding gradient"]
    run = f"from {rows[-1].name} back to {rows[0].name}" if rows else ""
    if change < low:
        advice = (
            f"This is its factor {run}, by the slope of its logarithm. No learning rate suits "
            "both. Look at the gain of the weights, saturated functions, and for skips and norms."
        )
        return Finding("vanishing gradient", rows[0].path, change, low, advice)
    if change > high:
        advice = (
            f"This is its factor {run}, by the slope of its logarithm. No learning rate suits "
            "both. Look at the gain of the weights, and whether there are norms."
        )
        return Finding("exploding gradient", rows[0].path, change, high, advice)
    return None


def _growth(family: Sequence[Row]) -> Finding | None:
    rows = [row for row in family if row.statistics["rms"] > 0]
    change = 10.0 ** _slope([row.statistics["rms"] for row in rows])
    limit = THRESHOLDS["growing activations"]
    if not change > limit:
        return None
    advice = (
        f"This is the factor of the rms from {rows[0].name} to {rows[-1].name}, by the slope of "
        "its logarithm. Sums of L blocks grow by √L. Look at the gain of the weights, and for a "
        "norm."
    )
    return Finding("growing activations", rows[-1].path, change, limit, advice)


def _growth_in_one_call(rows: Sequence[Row], data: float) -> Finding | None:
    """Of the last call that returns so much more than the largest number that it is given, than any
    of the data, which may be in units that make it large, and than 1.
    """
    limit = THRESHOLDS["growth in one call"]
    for row in rows[::-1]:
        size = row.statistics["rms"] / max(1.0, data, row.statistics.get("input_largest", math.inf))
        if limit < size < math.inf:
            advice = (
                "This is the rms of what it returns, divided by the largest of what it is given. "
                "Look at what is multiplied many times, as in a recurrence."
            )
            return Finding("growing activations", row.path, size, limit, advice)
    return None


def _collapsed(rows: Sequence[Row]) -> Iterator[Finding]:
    """The first layer behind which no rank is left, up to the end.

    What has a rank again later, as the queries of a pooling that are the same for all examples,
    and one step in time, in which all may be, collapse nothing. Nor does an output: its mean may be
    large on purpose.
    """
    limit = THRESHOLDS["rank collapse"]
    ranked = _ranks(rows)
    start = next((i for i in range(len(ranked), 0, -1) if not ranked[i - 1][1] < limit), 0)
    behind = [(row, rank) for row, rank in ranked[start:] if row.seen.hidden]
    before = max((rank for _, rank in ranked[:start]), default=0.0)
    if behind and before >= 2:
        advice = (
            f"All examples point along one direction; the effective rank was {before:.2g} "
            "before. Look for attention without skips, biases that outweigh the inputs, and "
            "norms."
        )
        yield Finding("rank collapse", behind[0][0].path, behind[0][1], limit, advice)


def _ranks(rows: Sequence[Row]) -> list[tuple[Row, float]]:
    """In the order of the computation: of a scan all calls in one step, then all in the next. Of
    steps in time the largest. Members of an ensemble are left out.
    """
    judged = [
        row
        for row in rows
        if row.has_units
        and not row.is_function
        and "member" not in row.seen.kinds
        and min(row.examples, row.shape[-1]) >= _UNITS
        and math.isfinite(row.statistics.get("effective_rank", math.nan))
    ]
    found = []
    for loops, group in itertools.groupby(judged, lambda row: row.seen.loops):
        best = {}
        for row in sorted(group, key=lambda row: row.step) if loops else group:
            pairs = zip(row.step, row.seen.kinds, strict=True)
            depth = tuple(i for i, kind in pairs if kind == "layer")
            rank = row.statistics["effective_rank"]
            here = row.path, row.call, row.part, depth
            if here not in best or rank > best[here][1]:
                best[here] = (row, rank)
        found += best.values()
    return found


# ---- Ranges of dtypes, and outliers.


def _out_of_range(measured: Measured) -> Iterator[Finding]:
    limit = THRESHOLDS["range"]
    done = set()
    for row in [*measured.rows, *measured.parameters]:
        numbers = row.statistics
        if row.path in done:
            continue
        if row.dtype == "float16" and limit < numbers["largest"] / 65504 < math.inf:
            done.add(row.path)
            value = numbers["largest"] / 65504
            advice = (
                "This is the largest entry, divided by the largest float16. A little more is "
                "infinite."
            )
            yield Finding("range", row.path, value, limit, advice)
        elif row.dtype in ("float16", "bfloat16") and numbers.get("tiny", 0) > limit:
            done.add(row.path)
            advice = (
                f"This share of the derivative is below the smallest normal {row.dtype}. These "
                "entries lose digits or vanish. Multiply the loss, and divide the gradient again."
            )
            yield Finding("range", row.path, numbers["tiny"], limit, advice)
        elif _is_one_number(row):
            done.add(row.path)
            value = numbers["std"] / abs(numbers["mean"])
            advice = (
                "This is the spread, divided by the mean. bfloat16 has 8 bits, in which such "
                "numbers are all the same."
            )
            yield Finding("range", row.path, value, 2**-9, advice)
    limit = THRESHOLDS["outlier"]
    for p in measured.parameters:
        if limit < p.statistics["outlier"] < math.inf:
            advice = (
                "This is the rms of the largest row, divided by that of the row at the upper "
                "quartile. The largest row drowns the others wherever it is read. Look at how it "
                "was initialised or loaded."
            )
            yield Finding("range", p.path, p.statistics["outlier"], limit, advice)


def _is_one_number(row: Row | Parameter) -> bool:
    """Of outputs. The weight of a norm, say, starts as ones."""
    of_call = isinstance(row, Row) and not row.is_function and row.dtype == "bfloat16"
    return of_call and 0 < row.statistics["std"] < 2**-9 * abs(row.statistics["mean"])


# ---- Updates.


def _updates(measured: Measured) -> Iterator[Finding]:
    parameters, trial = measured.parameters, measured.trial
    lost = THRESHOLDS["lost update"]
    for p in parameters:
        if p.dtype in ("float16", "bfloat16") and p.statistics.get("lost", 0) > lost:
            advice = (
                f"This share of the entries does not change, because their update is lost in "
                f"rounding to {p.dtype}. Keep the parameters in float32, and compute in {p.dtype}."
            )
            yield Finding("update ratio", p.path, p.statistics["lost"], lost, advice)
    if trial.get("never", 0) > 0:
        advice = (
            "There are gradients, but no update moves any parameter, wherever a schedule may "
            "stand. Look for a learning rate of zero."
        )
        yield Finding("update ratio", "optimiser", 0, SMALL, advice)
    yield from (Finding("update ratio", *doubt) for doubt in measured.doubts)
    middle = typical_ratio(parameters)
    if middle is not None and middle > (limit := THRESHOLDS["large update"]):
        yield _update(parameters, middle, limit, max, "Lower the learning rate.")


def _small_updates(measured: Measured) -> Iterator[Finding]:
    middle, limit = typical_ratio(measured.parameters), THRESHOLDS["small update"]
    if middle is not None and middle < limit and measured.trial.get("longer", 0) > 0.5:
        why = "One of the usual size goes down as steeply at its end: raise the learning rate."
        yield _update(measured.parameters, middle, limit, min, why)


def _update(
    parameters: Sequence[Parameter], middle: float, limit: float, pick: Callable, why: str
) -> Finding:
    weights = [p for p in parameters if len(p.shape) > 1 and "update_ratio" in p.statistics]
    ratios = {p.path: p.statistics["update_ratio"] for p in weights}
    worst = pick((r, path) for path, r in ratios.items() if 0 < r < math.inf)
    advice = (
        f"This is the rms of a step, divided by that of the weight, for the median weight. For "
        f"this one it is {worst[0]:.2g}. About 1e-3 is usual. {why}"
    )
    return Finding("update ratio", worst[1], middle, limit, advice)


def _tied(measured: Measured) -> Iterator[Finding]:
    parameters = measured.parameters
    trained = {p.path for p in parameters if p.statistics["grad_largest"] > 0}
    for p in parameters:
        if p.same_as is not None and {p.path, p.same_as} <= trained:
            advice = (
                f"It holds the numbers of {p.same_as}. They were drawn with the same key, or are "
                "meant to be tied. Two tied arrays are two parameters, which take different steps "
                f"and drift apart: {measured.to_share}."
            )
            yield Finding("update ratio", p.path, 2, THRESHOLDS["tied"], advice)


def _initial_loss(measured: Measured, classes: int | None) -> Iterator[Finding]:
    limit = THRESHOLDS["initial loss"]
    confident = _confidently_wrong(measured.rows)
    classes = confident if classes is None else classes
    if classes is None or not limit < measured.loss - math.log(classes) < math.inf:
        return
    advice = (
        f"This is how far the loss is above log({classes}), that of a uniform guess. Look at the "
        "scale of the logits, and whether the loss is a sum where it should be a mean."
    )
    yield Finding("initial loss", "loss_fn", measured.loss - math.log(classes), limit, advice)


def _confidently_wrong(rows: Sequence[Row]) -> int | None:
    """Of how many classes the model is sure of one, and wrong in most examples, as the derivatives
    of a cross-entropy say, or of two in most entries, and wrong in a quarter of these; `None` if
    it is not.
    """
    for row in rows[::-1]:
        numbers = row.statistics
        if numbers.get("sure", 0) > 0.5 and numbers.get("wrong_and_sure", 0) > 0.25:
            return 2
        enough = row.has_units and row.examples >= _UNITS and row.shape[-1] >= _UNITS
        if enough and numbers.get("wrong", 0) > 0.5 and numbers.get("confident", 0) > 0.9:
            return row.shape[-1]
    return None
