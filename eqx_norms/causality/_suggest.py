"""What to look at, where the pattern of the pairs in a report tells."""

import math

import numpy as np
from jaxtyping import Bool, Int


def of_the_rule(report) -> list[str]:
    """Where the rule of a `CausalityReport` may be at fault and not the model."""
    leaking = report.leaking()
    alone = report.kind == "reads" and not report.joint and leaking.any()
    return _at_padding(report, leaking) if alone else []


def suggestions(report) -> list[str]:
    """For the leaks and the blind pairs of a `CausalityReport`; mostly there are none."""
    leaks = [] if of_the_rule(report) else _of_leaks(report)
    return [*leaks, *_of_blindness(report)]


def _of_leaks(report) -> list[str]:
    leaking = report.leaking()
    if report.joint or not leaking.any():
        return []
    patterns = [_one_step, _turned, _all_alike]
    if report.kind == "reads":
        patterns = [_complement, _segments, _padding, _window, *patterns, _mask]
    found = (pattern(report, leaking) for pattern in patterns)
    return next(filter(None, found), [])


def _measured(report) -> Bool[np.ndarray, "T_out T_in"]:
    """The forbidden pairs that were measured."""
    return ~report.allowed & ~np.isnan(report.matrix)


def _ahead(pairs: Bool[np.ndarray, "T_out T_in"]) -> Int[np.ndarray, "T_out T_in"]:
    """How far the input lies ahead of the output, in each head if there are more outputs."""
    outputs, inputs = pairs.shape
    return np.arange(inputs) - (np.arange(outputs) % inputs)[:, None]


_EVERYTHING = (
    "look for a norm, mean or softmax over the sequence axis, a layer that lacks its jax.vmap over "
    "positions, or a mask that is missing, the other way round in several layers, or of 0 and 1 "
    "and added, which hides nothing."
)
_BATCH = (
    "look for statistics over the batch (a norm over its axis, BatchNorm in training) or a layer "
    "that lacks its jax.vmap over examples."
)
_ALIKE = {
    "causal": f"All pairs leak alike: {_EVERYTHING}",
    "strictly causal": f"All pairs leak alike: {_EVERYTHING}",
    "reads": f"All forbidden pairs leak alike: {_EVERYTHING}",
    "independent": f"All pairs leak alike: {_BATCH}",
}


def _all_alike(report, leaking) -> list[str]:
    changes = report.matrix[_measured(report)]
    alike = (changes > 0).mean() >= 0.9 and np.median(changes) >= 0.01 * changes.max()
    return [_ALIKE[report.kind]] if alike else []


def _one_step(report, leaking) -> list[str]:
    """Every leak reaches equally far ahead, and at least half of the pairs that do so leak."""
    ahead = _ahead(leaking)
    steps = np.unique(ahead[leaking])
    possible = (_measured(report) & (ahead == steps[0])).sum()
    if len(steps) > 1 or leaking.sum() <= max(2, possible / 2):
        return []
    if steps[0] == 0 and 0 < len(report.arrays) < len(report.names):
        return ["Every leak is of the output's own step."]
    return [_step_in_words(int(steps[0]), report.kind)]


def _turned(report, leaking) -> list[str]:
    """What comes later is read, what comes earlier is not, of each head and within each segment.

    Let off are outputs that read everything, as where a softmax finds every score masked.
    """
    outputs, inputs = leaking.shape
    if report.kind == "independent" or outputs % inputs or leaking.sum() < 3:
        return []
    ahead, group = _ahead(leaking), _groups(report.allowed)
    same = np.ones_like(leaking) if group is None else group[:, None] == group
    told = same & ~np.isnan(report.matrix)
    later = ~report.allowed & (ahead > 0) & told
    rows = ~(leaking.any(1) & (~same | (report.matrix > 0))[:, :-1].all(1)) & later.any(1)
    earlier = report.allowed & (ahead < 0) & told & rows[:, None]
    next_one = later & (ahead == 1) & rows[:, None]
    if not (earlier.any() and next_one.any()) or (report.matrix[earlier] > 0).any():
        return []
    if not leaking[next_one].all():
        return []
    return [
        "What comes later is read and what comes earlier is not: look for a mask that is the other "
        "way round, as triu in place of tril or True for what is hidden, or a scan from the end."
    ]


def _complement(report, leaking) -> list[str]:
    """Outputs that leak read all that is forbidden them, and of what they may at most one input.

    That one is their own. What a chain of pairs does not lead to, as other examples, is left out.
    """
    rows, told = leaking.any(1, keepdims=True), ~np.isnan(report.matrix)
    may = (report.allowed & told).sum(1)
    reads = (report.allowed & (report.matrix > 0)).sum(1)
    telling = rows[:, 0] & (may > 1)
    if leaking.sum() < 3 or not telling.any() or (reads[telling] > 1).any():
        return []
    if (rows & ~leaking & _measured(report) & _connected(report.allowed | leaking)).any():
        return []
    return [
        "What is forbidden is read and what is allowed is not: look for a mask that is the other "
        "way round, True for what is hidden."
    ]


def _step_in_words(step: int, kind: str) -> str:
    if step == 0:
        return (
            "Every leak is of the output's own input: look for inputs that are not shifted by one, "
            "or for a mask that lets the diagonal through."
        )
    if kind == "independent":
        where = f"{abs(step)} {'later' if step > 0 else 'earlier'}"
        return f"Every leak reaches the example {where}: look for a roll or a shift of the batch."
    if step < 0:
        return f"Every leak reaches {-step} back: look for a mask or a dilation of another width."
    return f"Every leak reaches {step} ahead: look for a mask or a shift off by {step}."


# Patterns of other rules. What a rule was made of is read off `allowed`.


def _at_padding(report, leaking) -> list[str]:
    """Leaks only of outputs that read everything, and whose inputs no other output may read."""
    outputs = leaking.any(1)
    if len(outputs) != leaking.shape[1] or outputs.all():
        return []
    whole = (report.allowed | leaking)[outputs].all()
    if not whole or report.allowed[~outputs][:, outputs].any():
        return []
    return [
        f"All leaks are of {named(report.outputs, outputs, 'output')}. Each reads every input, and "
        "no other output may read what stands there: if all of these outputs are padding, which "
        "is thrown away, let them off by rules.let_off(rule, mask)."
    ]


def _segments(report, leaking) -> list[str]:
    """Leaks between groups of positions that nothing allowed connects, and none within."""
    group = _groups(report.allowed)
    if group is None:
        return []
    if leaking.sum() < 3 or (leaking & (group[:, None] == group)).any():
        return []
    first, *others = report.inputs.lengths
    if others and np.array_equal(group, np.arange(len(group)) // math.prod(others)):
        return [f"Every leak crosses from one of the {first} examples to another: {_BATCH}"]
    # With two segments, or padding in front, the array does not tell which of them it is.
    outputs, inputs = np.flatnonzero(leaking.any(1)), np.flatnonzero(leaking.any(0))
    padding = "" if np.intersect1d(outputs, inputs).size else " or padding"
    return [
        "Every leak crosses from one segment to another: look for a mask that ignores the segment "
        f"ids{padding}. Positions that are reset hide nothing."
    ]


def _groups(allowed: Bool[np.ndarray, "T_out T_in"]) -> Int[np.ndarray, " T"] | None:
    """The number of the segment of each position; None unless there are some of several positions.

    Positions are in one segment if a chain of allowed pairs connects them.
    """
    if allowed.shape[0] != allowed.shape[1]:
        return None
    connected = allowed | allowed.T
    group = np.full(len(allowed), -1)
    count = 0
    while (group < 0).any():
        new = np.arange(len(allowed)) == (group < 0).argmax()
        while new.any():
            group[new] = count
            new = connected[new].any(0) & (group < 0)
        count += 1
    return group if 1 < count < len(group) else None


def _connected(pairs: Bool[np.ndarray, "T_out T_in"]) -> Bool[np.ndarray, "T_out T_in"]:
    """Which inputs a chain of pairs leads to from each output."""
    outputs, inputs = pairs.shape
    both = np.zeros((outputs + inputs, outputs + inputs), bool)
    both[:outputs, outputs:] = pairs
    group = _groups(both)
    return np.ones_like(pairs) if group is None else group[:outputs, None] == group[outputs:]


def _padding(report, leaking) -> list[str]:
    """Leaks from a few inputs that no output which counts may read."""
    outputs, inputs = leaking.any(1), leaking.any(0)
    square = len(outputs) == len(inputs)
    others = ~inputs if square else outputs
    possible = (_measured(report) & inputs).sum()
    if leaking.sum() <= max(2, possible / 2) or inputs.mean() >= 0.5:
        return []
    if report.allowed[others][:, inputs].any() or (square and (outputs & inputs).any()):
        return []
    text = report.allowed & outputs[:, None] & ~(np.eye(*leaking.shape, dtype=bool) & square)
    text &= ~np.isnan(report.matrix)
    how = "that is not masked"
    if text.any() and not (report.matrix[text] > 0).any():
        how = "whose mask is the other way round: it is read, and what may be read is not"
    return [
        f"Every leak comes from {named(report.inputs, inputs)}, which no other output may read: "
        f"look for padding {how}."
    ]


def _window(report, leaking) -> list[str]:
    allowed = report.allowed
    first = np.where(allowed.any(1), allowed.argmax(1), 0)
    before = first[:, None] - np.arange(allowed.shape[1])
    return _edge(leaking, before, "before the first", "window")


def _mask(report, leaking) -> list[str]:
    allowed = report.allowed
    end = allowed.shape[1] - 1
    last = np.where(allowed.any(1), end - allowed[:, ::-1].argmax(1), end)
    after = np.arange(allowed.shape[1]) - last[:, None]
    return _edge(leaking, after, "after the last", "mask")


def _edge(leaking, beyond, end: str, what: str) -> list[str]:
    """Leaks of all inputs up to so many beyond those that an output may read."""
    steps = np.unique(beyond[leaking])
    width = int(steps[-1])
    rows = leaking.any(1, keepdims=True)
    whole = np.array_equal(leaking, (beyond > 0) & (beyond <= width) & rows)
    if steps[0] < 1 or not whole or rows.sum() < 3:
        return []
    which = "the input" if width == 1 else f"one of the {width} inputs"
    how = f"that is {width} too wide" if (beyond > width).any() else "that is missing"
    return [
        f"Every leak is of {which} just {end} that the output may read: look for a {what} {how}."
    ]


def _of_blindness(report) -> list[str]:
    missing = report.missing()
    if not missing.any():
        return []
    asked = report.required & ~np.isnan(report.matrix)
    square = asked.shape[0] == asked.shape[1]
    own = np.eye(*asked.shape, dtype=bool) & square
    read = report.matrix > 0
    only_own = not (read & ~own).any() and (asked & own).any()
    if square and np.array_equal(missing, asked & ~own) and only_own:
        return [
            "Only the diagonal is read: look for a mask of the wrong shape or meaning, as of "
            "eye(T), or for a branch that starts at zero (perturb_params=0.02 moves it)."
        ]
    if square and np.array_equal(missing, asked & own):
        return ["No output reads its own input: look for a mask or a shift off by 1."]
    if np.array_equal(missing, asked) and read.any():
        return [
            "Nothing that must be read is read, but other inputs are: look for a mask that is the "
            "other way round or shifted, or for rows and columns of required= that are swapped."
        ]
    if np.array_equal(missing, asked):
        return ["Nothing is read: look for a branch that starts at zero (perturb_params=0.02)."]
    columns = missing.any(0) & ~(asked & ~missing).any(0)
    if np.array_equal(missing, asked & columns):
        who = "No output that must" if read[:, columns].any() else "Nobody"
        return [f"{who} reads {named(report.inputs, columns)}: look for a mask that hides that."]
    rows = missing.any(1) & ~(asked & ~missing).any(1)
    if np.array_equal(missing, asked & rows[:, None]):
        return [f"Nothing that it must is read by {named(report.outputs, rows, 'output')}."]
    return _too_narrow(asked, missing)


def _too_narrow(asked, missing) -> list[str]:
    """Blind pairs that are the first few of every row."""
    rank = np.cumsum(asked, 1) * asked  # 1 for the first input that is asked for
    widest = int(rank[missing].max())
    full = asked & (asked.sum(1, keepdims=True) == asked.sum(1).max())
    if np.array_equal(missing, full & (rank <= widest)) and widest < asked.sum(1).max() / 2:
        which = "the first input" if widest == 1 else f"one of the first {widest} inputs"
        return [
            f"What is not read is always {which} that the output must read: look for a window "
            f"that is {widest} too short."
        ]
    return []


def named(positions, mask, noun: str = "input") -> str:
    """`input 3`, `inputs 3 to 5`, or `inputs 3, 5, ...`."""
    numbers = np.flatnonzero(mask).tolist()
    if len(numbers) == 1:
        return f"{noun} {positions.name(numbers[0])}"
    if numbers[-1] - numbers[0] == len(numbers) - 1:
        return f"{noun}s {positions.name(numbers[0])} to {positions.name(numbers[-1])}"
    more = ", ..." if len(numbers) > 3 else ""
    return f"{noun}s {', '.join(positions.name(number) for number in numbers[:3])}{more}"
