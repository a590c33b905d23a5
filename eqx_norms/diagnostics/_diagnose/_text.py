"""A diagnosis for the terminal: findings, then a table of 88 columns."""

import itertools
import math
import re
import textwrap
from collections import Counter
from collections.abc import Sequence
from typing import Any

from ..._real import Real

WIDTH = 88  # What fits beside both sidebars of the documentation, and in most terminals.
_FOLD = 24  # So many rows are shown one by one.
_COLUMNS = {
    "mean": "mean",
    "std": "std",
    "rms": "rms",
    "largest": "largest",
    "dead": "dead",
    "flat": "saturated",
    "rank": "effective_rank",
    "grad": "grad_rms",
}
_OF_PARAMETERS = {
    "rms": "rms",
    "largest": "largest",
    "grad": "grad_rms",
    "update": "update_ratio",
}
_CELL = 7


def as_text(diagnosis: Any) -> str:
    parts = [
        _findings(diagnosis),
        _table("call", diagnosis.calls, _COLUMNS),
        _table("parameter", diagnosis.parameters, _OF_PARAMETERS),
        _not_looked_at(diagnosis.not_looked_at),
    ]
    return "\n\n".join(part for part in parts if part)


def number(x: Real | None) -> str:
    """Two digits, in six characters or fewer, one more for a minus."""
    if x is None:
        return ""
    if not math.isfinite(x) or x == 0:
        return f"{x:g}"
    mantissa, exponent = f"{x:.1e}".split("e")
    power = int(exponent)
    if not -3 <= power < 4:
        return f"{mantissa}e{power}"
    return f"{float(f'{x:.1e}'):.{max(0, 1 - power)}f}"


def _findings(diagnosis: Any) -> str:
    found = diagnosis.findings
    looked = (
        f"{_count(len(diagnosis.calls), 'call')}, {_count(len(diagnosis.parameters), 'parameter')}"
    )
    loss = f"loss {diagnosis.loss:.4g}"
    if not found:
        return f"{loss}; nothing found in {looked}"
    lines = [f"{loss}; {_count(len(found), 'finding')} in {looked}"]
    # Advice that several have in common is given once.
    for (kind, advice), group in itertools.groupby(found, lambda f: (f.kind, f.advice)):
        places = [f"{f.where or 'the model'} ({number(f.value)})" for f in group]
        limit = number(next(f.threshold for f in found if (f.kind, f.advice) == (kind, advice)))
        head = f"{kind}, threshold {limit}: {', '.join(places)}"
        lines += ["", *textwrap.wrap(head, WIDTH, subsequent_indent="  ")]
        lines += textwrap.wrap(advice, WIDTH, initial_indent="  ", subsequent_indent="  ")
    return "\n".join(lines)


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"


def _table(what: str, rows: Sequence[Any], columns: dict[str, str]) -> str:
    if not rows:
        return ""
    columns = {
        head: name for head, name in columns.items() if any(name in r.statistics for r in rows)
    }
    room = WIDTH - (_CELL + 1) * len(columns)
    lines = [_line(what, "", list(columns), room)]
    for group in _groups(rows):
        lines += _shown(group, columns, room)
    return "\n".join(lines)


def _line(left: str, right: str, cells: Sequence[str], room: int) -> str:
    """`left` has a line of its own where both do not fit: layers differ anywhere in their names.
    So has `right`, where it is wider than its column by itself.
    """
    ahead = ""
    if left and len(left) + 1 + len(right) > room:
        ahead, left = f"{_cut(left)}\n", ""
    if len(right) > room:
        ahead, right = f"{ahead}  {_cut(right, WIDTH - 2)}\n", ""
    numbers = "".join(f" {cell:>{_CELL}}" for cell in cells)
    return f"{ahead}{left}{right:>{room - len(left)}}{numbers}".rstrip()


def _cut(name: str, width: int = WIDTH) -> str:
    """Near its front, if it is longer than a line."""
    front = width // 4
    return name if len(name) <= width else f"{name[:front]}…{name[front + 1 - width :]}"


def _groups(rows: Sequence[Any]) -> list[list[Any]]:
    """Rows that differ in one index, or in the step of a scan, together; few rows each alone."""
    groups = {}
    for row in rows:
        steps = getattr(row, "step", ())
        alone = len(rows) <= _FOLD and not steps
        key = id(row) if alone else (_pattern(row), _kind(row))
        groups.setdefault(key, []).append(row)
    return [
        part
        for group in groups.values()
        for part in ([group] if len(group) > 2 else [[r] for r in group])
    ]


def _pattern(row: Any) -> str:
    name = getattr(row, "name", row.path)
    if getattr(row, "step", ()):
        return re.sub(r"\{.*\}", "{i}", name)
    return _NUMBER.sub("[i]", name, 1) if _NUMBER.search(name) else _COUNTED.sub("_[i]", name, 1)


_NUMBER = re.compile(r"\[\d+\]|#\d+")
_COUNTED = re.compile(r"_\d+\b")  # as flax.linen names its modules


def _kind(row: Any) -> str:
    sizes = ",".join(map(str, row.shape))
    short = row.dtype.replace("bfloat", "bf").replace("float", "f")
    return f"{getattr(row, 'type', '')} {short}[{sizes}]".strip()


def _label(row: Any) -> str:
    return getattr(row, "name", row.path) or "the model"


def _shown(group: list[Any], columns: dict[str, str], room: int) -> list[str]:
    values = {name: [row.statistics.get(name) for row in group] for name in columns.values()}
    if len(group) == 1:
        cells = [number(column[0]) for column in values.values()]
        return [_line(_label(group[0]), _kind(group[0]), cells, room)]
    known = {name: [v for v in column if v is not None] for name, column in values.items()}
    low = [number(min(column)) if column else "" for column in known.values()]
    high = [number(max(column)) if column else "" for column in known.values()]
    pattern = f"{_pattern(group[0])} x{len(group)}"
    return [
        _line(pattern, _kind(group[0]), low, room),
        _line(f"  to{_extremes(group)}", "", high, room),
    ]


def _extremes(group: list[Any]) -> str:
    """Which row has the smallest gradient, and which the largest."""
    grads = [
        (row.statistics["grad_rms"], i)
        for i, row in enumerate(group)
        if "grad_rms" in row.statistics
    ]
    if not grads:
        return ""
    return f" (grad: {_index(group, min(grads)[1])} to {_index(group, max(grads)[1])})"


def _index(group: list[Any], i: int) -> str:
    label = _label(group[i])
    found = re.search(rf"\{{.*\}}|{_NUMBER.pattern}", label) or _COUNTED.search(label)
    return found[0] if found else f"[{i}]"


def _not_looked_at(reasons: dict[str, str]) -> str:
    """Calls and steps of one submodule together, and so what has the same reason."""
    by_reason = {}
    for where, reason in reasons.items():
        name = re.sub(r"#\d+|\{[\d, ]*\}", "", where) or "the model"
        counts = by_reason.setdefault(reason, Counter())
        counts[name] += 1
    lines = []
    for reason, counts in by_reason.items():
        names = [f"{name} x{n}" if n > 1 else name for name, n in counts.items()]
        more = f" and {len(names) - _NAMES} more" if len(names) > _NAMES else ""
        text = f"not looked at: {', '.join(names[:_NAMES])}{more}: {reason}"
        lines += textwrap.wrap(text, WIDTH, subsequent_indent="  ")
    return "\n".join(lines)


_NAMES = 12  # So many are listed for one reason.
