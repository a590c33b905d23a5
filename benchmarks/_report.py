"""The results as Markdown: targets first, what missed them, then every table, folded."""

import itertools
import math
import re
import statistics

from ._cases import CHANNELS, DTYPES, GROUPS, JAX_RIVALS, LAYERS, NAMES, RIVALS, SINGLE, WORKS
from ._targets import Outcome, by_case, outcomes, speed_limit

TARGETS = "## Targets"
LARGE = 2**20  # entries; what takes less is mostly the cost of a call
BYTES = {
    "residuals": "kept for the backward",
    "one layer": "temporaries, one layer, forward and backward",
    "scan": "temporaries, gradient of an 8-layer scan",
    "unrolled": "temporaries, gradient of 12 unrolled layers",
}


def report(*runs: dict) -> str:
    """All tables that the runs have rows for: section by section, and in each run by run.

    A section that is the same in all of them stands once.
    """
    found = {machine(results): _sections(results) for results in runs}
    longest_first = sorted(found.values(), key=len, reverse=True)
    first, *headings = dict.fromkeys(heading for parts in longest_first for heading in parts)
    parts = [of_all(first, found), ranges(runs), *(of_all(one, found) for one in headings)]
    return "\n\n".join(part for part in parts if part) + "\n"


def of_all(heading: str, found: dict[str, dict[str, str]]) -> str:
    """A section with what each run has for it. Targets are open, the other tables folded."""
    bodies = {name: parts.get(heading) for name, parts in found.items()}
    texts = list(dict.fromkeys(bodies.values()))
    fold = heading not in ("", TARGETS)
    if len(texts) > 1:
        texts = [
            folded(name, body) if fold and _is_table(body) else f"**{name}**\n\n{body}"
            for name, body in bodies.items()
            if body
        ]
    elif fold:
        texts = [folded("The table", body) if body and _is_table(body) else body for body in texts]
    return "\n\n".join(filter(None, [heading, *texts]))


def _is_table(body: str) -> bool:
    return "|---" in body


def folded(summary: str, body: str) -> str:
    """Shown at a click, on the site and on GitHub."""
    return f'<details markdown="1">\n<summary>{summary}</summary>\n\n{body}\n\n</details>'


def machine(results: dict) -> str:
    """Its processor, without the words that all of them have."""
    return re.sub(r"\(\w+\)| CPU\b| Processor\b| @.*", "", results["environment"]["cpu"])


def _sections(results: dict) -> dict[str, str]:
    """What stands below each heading; the first has none."""
    parts = [
        targets(outcomes(results)),
        *(speed(results["speed"], work) for work in WORKS),
        bytes_table(results["bytes"]),
        compile_table(results["compile"]),
        *(accuracy(results["accuracy"], at) for at in ("offset", "scale")),
        notes(results),
    ]
    return {"": environment(results)} | dict(part.split("\n\n", 1) for part in parts if part)


def table(head: list[str], rows: list[list[str]]) -> str:
    line = lambda cells: "| " + " | ".join(cells) + " |"
    rule = "|" + "|".join("---" if i == 0 else "---:" for i in range(len(head))) + "|"
    return "\n".join([line(head), rule, *map(line, rows)])


def environment(results: dict) -> str:
    env = results["environment"]
    cpu = ", ".join(filter(None, (env["cpu"], env.get("vectors"))))
    versions = ", ".join(f"{name} {version}" for name, version in env["versions"].items())
    cores = f"{env['cores']} core{'s' if env['cores'] > 1 else ''}"
    return (
        f"{env['date']}, {cores} ({cpu}), Python {env['python']}, {versions}. "
        f"The run took {results['minutes']:.0f} minutes."
        + (" It was interrupted: what follows is not all." if results["interrupted"] else "")
    )


def ranges(runs: tuple[dict, ...]) -> str:
    """Our time over theirs, from the best to the worst of the large shapes that every run has."""
    measured = {machine(results): by_case(results["speed"]) for results in runs}
    in_all = lambda case: all(case in rows for rows in measured.values())
    cases = [c for c in next(iter(measured.values())) if in_all(c) and math.prod(c.shape) >= LARGE]
    columns = list(itertools.product(("eqx", "torch"), measured))
    lines = []
    for kind in itertools.product(LAYERS, SINGLE, DTYPES):
        same = [case for case in cases if (case.layer, case.work, case.dtype) == kind]
        ratios = [
            [rows[rival]["ratio"] for rows in map(measured[name].get, same) if rival in rows]
            for rival, name in columns
        ]
        if same:
            what = f"{kind[0]}, {WORKS[kind[1]].lower()}"
            lines.append([what, kind[2], *map(_spread, ratios)])
    if not lines:
        return ""
    head = ["", "dtype", *(f"{NAMES[rival]}, {name}" for rival, name in columns)]
    shapes = ", ".join(dict.fromkeys(case.rows for case in cases))
    return f"## Over the shapes: our time over theirs\n\nOver {shapes}.\n\n" + table(head, lines)


def _spread(values: list[float]) -> str:
    if not values:
        return ""
    low, high = _figure(min(values)), _figure(max(values))
    return low if low == high else f"{low} to {high}"


def targets(found: list[Outcome]) -> str:
    """How often each target is met, and a table of what missed it."""
    if not found:
        return ""
    groups: dict[str, list[Outcome]] = {}
    for outcome in found:
        groups.setdefault(outcome.target, []).append(outcome)
    rows, misses = [], []
    for target, group in sorted(groups.items()):
        verdicts = [o.verdict for o in group]
        values = [o.value for o in group]
        limits = dict.fromkeys(_limit(o) for o in group)
        counts = [str(verdicts.count(v)) for v in ("met", "within noise", "missed")]
        rows.append([target, " or ".join(limits), _spread(values), *counts])
        misses += [[target, o.where, _figure(o.value)] for o in group if o.verdict == "missed"]
    head = ["target", "limit", "measured", "met", "within noise", "missed"]
    listed = "No target is missed."
    if misses:
        listed = folded(f"The {len(misses)} that missed", table(["target", "where", ""], misses))
    return f"{TARGETS}\n\n{table(head, rows)}\n\n{listed}"


def _limit(outcome: Outcome) -> str:
    sign = "≥" if outcome.at_least else "≤"
    noise = f" (noise: {_figure(outcome.noise)})" if outcome.noise != outcome.limit else ""
    return f"{sign} {_figure(outcome.limit)}{noise}"


def _figure(value: float) -> str:
    return f"{value:.2f}" if 0.005 <= abs(value) < 1e4 else _exponent(value)


def _exponent(value: float) -> str:
    """`1e-06` as `1e-6`, `1e+06` as `1e6`."""
    if not math.isfinite(value):
        return "not finite"
    digits, power = f"{value:.0e}".split("e")
    return f"{digits}e{int(power)}"


def speed(rows: list[dict], work: str) -> str:
    """Our time over theirs, a column for each rival; bold where that misses the target."""
    cases = {case: rivals for case, rivals in by_case(rows).items() if case.work == work}
    if not cases:
        return ""
    present = [rival for rival in RIVALS if any(rival in rivals for rivals in cases.values())]
    lines = []
    for case, rivals in sorted(cases.items(), key=lambda item: _order(cases, item[0])):
        ours = statistics.median(row["ours_ms"] for row in rivals.values())
        cells = [_ratio(work, rival, rivals.get(rival)) for rival in present]
        lines.append([f"{case.layer} {case.rows}", case.dtype, f"{ours:.3g} ms", *cells])
    head = ["", "dtype", "ours", *(NAMES[rival] for rival in present)]
    return f"## {WORKS[work]}: our time over theirs\n\n{_limits(work)}" + table(head, lines)


def _order(cases, case):
    """By layer; within it, as measured."""
    layers = list(dict.fromkeys(c.layer for c in cases))
    return layers.index(case.layer), list(cases).index(case)


def _limits(work: str) -> str:
    texts = []
    for rival, name in (("eqx", "against each JAX library"), ("torch", "against torch")):
        if limits := speed_limit(work, rival):
            texts.append(f"at most {limits[0]:g} {name}")
    return f"Target: {', '.join(texts)}; **bold** where missed.\n\n" if texts else ""


def _ratio(work: str, rival: str, row: dict | None) -> str:
    if row is None:
        return ""
    limits = speed_limit(work, rival)
    text = f"{row['ratio']:.2f}"
    return f"**{text}**" if limits and row["ratio"] > limits[1] else text


def bytes_table(rows: list[dict]) -> str:
    if not rows:
        return ""
    found = {(r["measure"], r["rows"], r["dtype"], r["rival"]): r["bytes"] for r in rows}
    present = [rival for rival in ("ours", *JAX_RIVALS) if any(r["rival"] == rival for r in rows)]
    keys = sorted(dict.fromkeys(key[:3] for key in found), key=lambda k: list(BYTES).index(k[0]))
    cell = lambda key, rival: f"{found[*key, rival]:.2f}" if (*key, rival) in found else ""
    lines = [
        [BYTES[key[0]], key[1], key[2], *(cell(key, rival) for rival in present)] for key in keys
    ]
    head = ["bytes an element of x", "rows x n", "dtype", *(NAMES[rival] for rival in present)]
    return "## Memory: bytes an element\n\n" + table(head, lines)


def compile_table(rows: list[dict]) -> str:
    if not rows:
        return ""
    found = {(r["rival"], r["dtype"], r["part"]): r for r in rows}
    lines = []
    for rival, dtype in dict.fromkeys(key[:2] for key in found):
        parts = [found[rival, dtype, part] for part in ("trace", "compile", "both")]
        both = parts[-1]
        times = [f"{both['ours_ms']:.0f} ms", f"{both['rival_ms']:.0f} ms"]
        lines.append([NAMES[rival], dtype, *times, *(f"{part['ratio']:.2f}" for part in parts)])
    head = ["", "dtype", "ours", "theirs", "trace", "compile", "both"]
    return "## Trace and compile 12 layers: our time over theirs\n\n" + table(head, lines)


def accuracy(rows: list[dict], at: str) -> str:
    """A table each for y, dx, dweight; dbias, a plain sum of g, is in the JSON."""
    rows = [row for row in rows if row["at"] == at]
    if not rows:
        return ""
    values = list(dict.fromkeys(row["value"] for row in rows))
    tables = []
    for name in ("y", "dx", "dweight"):
        found = {(row["rival"], row["value"]): row[name] for row in rows}
        lines = [
            [NAMES[rival], *(_error(found[rival, value]) for value in values)]
            for rival in NAMES
            if (rival, values[0]) in found
        ]
        tables.append(table([f"{name}, at {at}", *map(_power_of_ten, values)], lines))
    x = "x ~ N(offset, 1)" if at == "offset" else "x ~ N(0, scale²)"
    return f"## Worst errors, {x}, float32\n\n" + "\n\n".join(tables)


def _power_of_ten(value: float) -> str:
    return f"{value:g}" if value in (0, 1) else _exponent(value)


def _error(value: float | None) -> str:
    return _exponent(math.inf if value is None else value)


def notes(results: dict) -> str:
    texts = [f"- {NAMES[rival]} is not installed, and left out." for rival in results["left_out"]]
    texts += [
        f"- {NAMES[row['rival']]}, {row['what']}, failed: `{row['error']}`"
        for row in results["failed"]
    ]
    if any(row["layer"] == "GroupNorm" for row in results["speed"]):
        texts.append(
            f"- GroupNorm takes rows x n as (rows / {GROUPS}, {CHANNELS} channels in {GROUPS} "
            f"groups, n / {CHANNELS // GROUPS}): that many means, over that many entries."
        )
    return "## Notes\n\n" + "\n".join(texts) if texts else ""
