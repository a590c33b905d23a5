"""What the numbers of a model say is wrong: rules, thresholds and their reasons.

Every rule looks at statistics alone. A comparison with NaN is false, so that behind a value that is
not finite, which has a finding of its own, nothing else is found.
"""

import math
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from ._measure import Measured, Parameter, Row

THRESHOLDS = {
    "non-finite": 0,
    "no gradient": 0,
    "dead": 0.5,
    "saturated": 0.5,
    "exploding gradient": 1e3,
    "vanishing gradient": 1e-3,
    "rank collapse": 1.1,
    "growing activations": 1e2,
    "range": 0.25,
    "outlier": 1e2,
    "lost update": 0.5,
    "large update": 0.1,
    "small update": 1e-5,
    "tied": 1,
    "initial loss": 1.0,
}
KINDS = (
    "non-finite",
    "dead",  # Ahead of what no gradient reaches because of it.
    "no gradient",
    "saturated",
    "exploding gradient",
    "vanishing gradient",
    "rank collapse",
    "growing activations",
    "range",
    "update ratio",
    "initial loss",
)
_EXAMPLES = 16  # Of so few, half of the units of a healthy layer can be silent by chance.
_DEPTH = 4  # Fewer layers have no trend.
_UNITS = 8  # Fewer units, or examples, have no rank to lose.


class Finding(NamedTuple):
    """One thing that is wrong, and where.

    - `kind`: one of those that [`eqx_norms.diagnostics.diagnose`][] lists.
    - `where`: the path of a submodule or of a parameter; `""` is the model itself, `"loss_fn"` what
        is computed outside of it, `"args"` what it is given.
    - `value`, `threshold`: the figure, and the limit that it is beyond.
    - `advice`: what it means, and what to look at first.
    """

    kind: str
    where: str
    value: float
    threshold: float
    advice: str


def find(measured: Measured, args_non_finite: bool, classes: int | None) -> tuple[Finding, ...]:
    """All findings, the worst first: by kind, and in a kind by how far beyond the threshold."""
    found = [
        *_not_finite(measured, args_non_finite),
        *_no_gradient(measured.parameters),
        *_dead(measured.rows),
        *_saturated(measured.rows),
        *_trends(measured),
        *_collapsed(measured.rows),
        *_out_of_range(measured),
        *_updates(measured.parameters),
        *_tied(measured.parameters),
        *_initial_loss(measured.loss, classes),
    ]
    return tuple(sorted(found, key=_severity))


def _severity(finding: Finding) -> tuple[int, float]:
    beyond = abs(math.log(max(finding.value, 1e-30) / max(finding.threshold, 1e-30)))
    return KINDS.index(finding.kind), -beyond


# ---- Not finite: where it was born.


def _not_finite(measured: Measured, args_non_finite: bool) -> Iterator[Finding]:
    parameters = measured.parameters
    matters = not math.isfinite(measured.loss) or any(
        p.statistics["non_finite"] or p.statistics["grad_non_finite"] for p in parameters
    )
    if not matters:
        return  # An infinity that masks something, say.
    bad = [p for p in parameters if p.statistics["non_finite"] > 0]
    for p in bad:
        advice = "A parameter is NaN or infinite before the step: look at the steps before."
        yield Finding("non-finite", p.path, p.statistics["non_finite"], 0, advice)
    if args_non_finite:
        advice = "What the function is given is NaN or infinite already: look at the data."
        yield Finding("non-finite", "args", 1, 0, advice)
    if not bad and not args_non_finite:
        yield _birth(measured)


def _birth(measured: Measured) -> Finding:
    forward = [row for row in measured.returns if row.statistics["non_finite"] > 0]
    born = [row for row in forward if not row.statistics.get("input_non_finite", 0)]
    if born:
        row = born[0]
        advice = (
            f"The first output that is not finite, of finite inputs, is that of this {row.type}. "
            "Look for a division by zero, a logarithm or root of it, or an overflow."
        )
        return Finding("non-finite", row.path, row.statistics["non_finite"], 0, advice)
    if forward or not math.isfinite(measured.loss):
        advice = "It is computed between the submodules or in the loss, from finite outputs."
        return Finding("non-finite", "loss_fn", 1, 0, advice)
    return _birth_in_the_backward(measured)


def _birth_in_the_backward(measured: Measured) -> Finding:
    # From the last call to the first; a submodule begins after the one it stands in.
    rows = [row for row in measured.rows[::-1] if "grad_non_finite" in row.statistics]
    cause = (
        "Its output and the derivative there are finite, what it passes back is not. Look for a "
        "root or a norm of zero, a power, or a `jnp.where` whose unused branch is not finite: put "
        "a second `where` around the argument."
    )
    for row in rows:
        numbers = row.statistics
        if not numbers["grad_non_finite"] and numbers.get("grad_input_non_finite", 0):
            return Finding("non-finite", row.path, 1, 0, cause)
    bad = [p for p in measured.parameters if p.statistics["grad_non_finite"] > 0]
    for row in rows:
        own = [p for p in bad if is_in(p.path, row.path)]
        if own and not row.statistics["grad_non_finite"]:
            return Finding("non-finite", row.path, own[0].statistics["grad_non_finite"], 0, cause)
    return Finding("non-finite", "loss_fn", 1, 0, cause)


def is_in(parameter: str, module: str) -> bool:
    inside = parameter[len(module) :][:1] in (".", "[", "")
    return not module or (parameter.startswith(module) and inside)


# ---- Gradients that do not arrive.


def _no_gradient(parameters: Sequence[Parameter]) -> Iterator[Finding]:
    zero = {p.path for p in parameters if _gets_none(p)}
    advice = (
        "The loss does not change with these parameters. Look for a branch that is not used, a "
        "`stop_gradient`, an integer or a comparison on the way, or units that are all dead behind."
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


def _gets_none(p: Parameter) -> bool:
    return p.statistics["grad_largest"] == 0 and not p.statistics.get("reached", False)


def _prefixes(path: str) -> list[str]:
    ends = [0, *(m.start() for m in re.finditer(r"[.\[]", path)), len(path)]
    return [path[:end] for end in dict.fromkeys(ends)]


def _dead(rows: Sequence[Row]) -> Iterator[Finding]:
    limit = THRESHOLDS["dead"]
    found = _largest([row for row in rows if _examples(row) >= _EXAMPLES], "dead", limit)
    for where, dead in found.items():
        advice = (
            "So many units are silent in the whole batch, and get no gradient to wake up by. Look "
            "at the learning rate, the bias and the scale of what comes before."
        )
        yield Finding("dead", where, dead, limit, advice)
    for row in rows:
        # A function that is not recognised can be as silent.
        silent = row.statistics.get("grad_silent", 0)
        if row.path not in found and row.type in _LINEAR and limit < silent < 1:
            if _examples(row) >= _EXAMPLES:
                advice = (
                    "So many units get no gradient from any example: what comes after is flat, or "
                    "does not read them."
                )
                yield Finding("dead", row.path, silent, limit, advice)


_LINEAR = ("Linear", "Conv1d", "Conv2d", "Conv3d")


def _largest(rows: Sequence[Row], name: str, limit: float) -> dict[str, float]:
    """By path, the largest of a statistic over the calls and steps, where it is above `limit`."""
    found = {}
    for row in rows:
        share = row.statistics.get(name, 0)
        if share > limit:
            found[row.path] = max(share, found.get(row.path, 0))
    return found


def _examples(row: Row) -> int:
    return math.prod(row.shape[:-1])


def _saturated(rows: Sequence[Row]) -> Iterator[Finding]:
    limit = THRESHOLDS["saturated"]
    for where, share in _largest(rows, "saturated", limit).items():
        advice = (
            "So many entries are where the activation function is flat: less than a tenth of its "
            "largest slope. Look at the gain of the weights and the scale of the inputs."
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
    yield from best.values()


def families(measured: Measured) -> list[list[Row]]:
    """Rows of layers that follow one another: of one path up to an index, or else of one type.

    Steps of a scan are layers if the parameters are stacked; in time, the same layer comes again.
    """
    stacked = {}
    for p in measured.parameters:
        for prefix in _prefixes(p.path):
            stacked.setdefault(prefix, []).append(p.shape[:1])
    by_path, by_type = {}, {}
    for row in measured.rows:
        if row.call or row.part or row.is_function:
            continue
        owns = stacked.get(row.path)
        if row.step:
            if owns and len(row.step) == 1 and len(set(owns)) == 1 and row.path:
                by_path.setdefault((row.path, "{}"), []).append(row)
            continue
        by_path.setdefault((folded(row.path), row.type), []).append(row)
        if owns and row.path:
            by_type.setdefault(row.type, []).append(row)
    deep = [rows for rows in by_path.values() if len(rows) >= _DEPTH]
    done = {rows[0].type for rows in deep}
    rest = [rows for cls, rows in by_type.items() if cls not in done]
    return deep + [rows for rows in rest if len(rows) >= _DEPTH]


def folded(path: str) -> str:
    """The path without its first index."""
    return re.sub(r"\[\d+\]", "[i]", path, count=1)


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
            f"Its factor {run}, by the slope of its logarithm: no learning rate suits both. Look "
            "at the gain of the weights, saturated functions, and for skips and norms."
        )
        return Finding("vanishing gradient", rows[0].path, change, low, advice)
    if change > high:
        advice = (
            f"Its factor {run}, by the slope of its logarithm: no learning rate suits both. Look "
            "at the gain of the weights, and whether there are norms."
        )
        return Finding("exploding gradient", rows[0].path, change, high, advice)
    return None


def _growth(family: Sequence[Row]) -> Finding | None:
    rows = [row for row in family if row.statistics["rms"] > 0]
    change = 10.0 ** _slope([row.statistics["rms"] for row in rows])
    limit = THRESHOLDS["growing activations"]
    if change <= limit:
        return None
    advice = (
        f"The factor of the rms from {rows[0].name} to {rows[-1].name}, by the slope of its "
        "logarithm; sums of L blocks grow by √L. Look at the gain of the weights, and for a norm."
    )
    return Finding("growing activations", rows[-1].path, change, limit, advice)


def _collapsed(rows: Sequence[Row]) -> Iterator[Finding]:
    limit = THRESHOLDS["rank collapse"]
    before = 0.0
    for row in rows:
        rank = row.statistics.get("effective_rank", math.nan)
        if row.is_function or min(_examples(row), row.shape[-1] if row.shape else 0) < _UNITS:
            continue
        if rank < limit and before >= 2:
            advice = (
                f"All examples point along one direction; the effective rank was {before:.2g} "
                "before. Look for attention without skips, biases that outweigh the inputs, and "
                "norms."
            )
            yield Finding("rank collapse", row.path, rank, limit, advice)
            return
        before = max(before, rank) if math.isfinite(rank) else before


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
            advice = "The largest entry, over the largest float16: a little more is infinite."
            yield Finding("range", row.path, value, limit, advice)
        elif row.dtype in ("float16", "bfloat16") and numbers.get("tiny", 0) > limit:
            done.add(row.path)
            advice = (
                f"So many entries of the derivative are below the smallest normal {row.dtype}, and "
                "lose digits or vanish. Multiply the loss, and divide the gradient again."
            )
            yield Finding("range", row.path, numbers["tiny"], limit, advice)
        elif row.dtype == "bfloat16" and 0 < numbers["std"] < 2**-9 * abs(numbers["mean"]):
            done.add(row.path)
            value = numbers["std"] / abs(numbers["mean"])
            advice = (
                "The spread over the mean: bfloat16 has 8 bits, in which such numbers are all one."
            )
            yield Finding("range", row.path, value, 2**-9, advice)
    limit = THRESHOLDS["outlier"]
    for p in measured.parameters:
        if limit < p.statistics["outlier"] < math.inf:
            advice = (
                "The rms of the largest row, over that of the median row: one row drowns the "
                "others wherever it is read. Look at how it was initialised or loaded."
            )
            yield Finding("range", p.path, p.statistics["outlier"], limit, advice)


# ---- Updates.


def _updates(parameters: Sequence[Parameter]) -> Iterator[Finding]:
    lost = THRESHOLDS["lost update"]
    for p in parameters:
        if p.statistics.get("lost", 0) > lost:
            advice = (
                f"So many entries stay as they are, for their update is lost in rounding to "
                f"{p.dtype}. Keep the parameters in float32, and compute in {p.dtype}."
            )
            yield Finding("update ratio", p.path, p.statistics["lost"], lost, advice)
    weights = [p for p in parameters if len(p.shape) > 1 and "update_ratio" in p.statistics]
    ratios = [p.statistics["update_ratio"] for p in weights]
    typical = [r for r in ratios if 0 < r < math.inf]
    if not typical:
        return
    large, small = THRESHOLDS["large update"], THRESHOLDS["small update"]
    middle = float(np.median(typical))
    if small <= middle <= large:
        return
    worst, limit, cure = (
        (max(typical), large, "lower") if middle > large else (min(typical), small, "raise")
    )
    advice = (
        f"The rms of a step over that of the weight, of the median weight; here it is {worst:.2g}. "
        f"About 1e-3 is usual: {cure} the learning rate."
    )
    yield Finding("update ratio", weights[ratios.index(worst)].path, middle, limit, advice)


def _tied(parameters: Sequence[Parameter]) -> Iterator[Finding]:
    for p in parameters:
        if p.same_as is not None:
            advice = (
                f"It holds the numbers of {p.same_as}: drawn with the same key, or tied. Two tied "
                "arrays are two parameters, each with a step of its own, and part: type "
                "`equinox.nn.Shared`."
            )
            yield Finding("update ratio", p.path, 2, THRESHOLDS["tied"], advice)


def _initial_loss(loss: float, classes: int | None) -> Iterator[Finding]:
    limit = THRESHOLDS["initial loss"]
    if classes is not None and loss - math.log(classes) > limit:
        advice = (
            f"The loss above log({classes}), that of a uniform guess. Look at the scale of the "
            "logits, and whether the loss is a sum where it should be a mean."
        )
        yield Finding("initial loss", "loss_fn", loss - math.log(classes), limit, advice)
