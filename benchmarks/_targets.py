"""What each figure should come to, and whether it does. Written before the figures were."""

import math
from collections import defaultdict
from typing import NamedTuple

from ._cases import JAX_RIVALS, NAMES, Case, shape_of

# Our time over a rival's, at most; and up to where more than that may be noise.
SPEED = {
    ("forward", "jax"): (1.0, 1.05),
    ("backward", "jax"): (0.67, 0.67),
    ("backward", "torch"): (1.0, 1.0),
    ("stack", "jax"): (1.0, 1.05),
    ("decoder", "jax"): (1.0, 1.05),
}
SPEED_NAMES = {
    "forward": "forward",
    "backward": "forward + backward",
    "stack": "gradient of 12 MLP blocks",
    "decoder": "training step of the decoder",
}
ITEM = {"float32": 4, "bfloat16": 2, "float16": 2}
ONE_LAYER = {"float32": 0, "bfloat16": 2, "float16": 2}  # bytes an element
SCALARS = 1 / 8  # bytes an element that one layer's temporaries may have besides: 32 of 256
MODEL = {
    ("scan", "float32"): 0.6,
    ("scan", "bfloat16"): 0.6,
    ("unrolled", "float32"): 0.8,
    ("unrolled", "bfloat16"): 0.6,
}
COMPILE = 1.1
ERROR, RIVALS_ERROR = 1e-6, 1e-3


class Outcome(NamedTuple):
    """A figure beside its target; `noise` is up to where a miss may be noise."""

    target: str
    where: str
    value: float
    limit: float
    noise: float
    at_least: bool = False

    @property
    def verdict(self) -> str:
        if self.at_least:
            return "met" if self.value >= self.limit else "missed"
        if self.value <= self.limit:
            return "met"
        return "within noise" if self.value <= self.noise else "missed"


def speed_limit(work: str, rival: str) -> tuple[float, float] | None:
    return SPEED.get((work, "jax" if rival in JAX_RIVALS else rival))


def outcomes(results: dict) -> list[Outcome]:
    """Of everything that was measured and has a target."""
    return [
        *_speed(results["speed"]),
        *_bytes(results["bytes"]),
        *_compile(results["compile"]),
        *_accuracy(results["accuracy"]),
    ]


def by_case(rows: list[dict]) -> dict[Case, dict[str, dict]]:
    """For each case, the row of each rival."""
    table: dict[Case, dict[str, dict]] = defaultdict(dict)
    for row in rows:
        table[Case(*(row[key] for key in Case._fields))][row["rival"]] = row
    return table


def _speed(rows):
    for case, rivals in by_case(rows).items():
        where = f"{case.layer} {case.rows} {case.dtype}"
        ratios = {rival: row["ratio"] for rival, row in rivals.items()}
        in_jax = {rival: ratio for rival, ratio in ratios.items() if rival in JAX_RIVALS}
        if in_jax and (limits := speed_limit(case.work, "eqx")):
            best = max(in_jax, key=in_jax.__getitem__)  # the fastest: ours is the most beside it
            name = f"{SPEED_NAMES[case.work]}, time over the best JAX rival's"
            if case.work == "backward":
                name += f", {case.dtype}"
            yield Outcome(name, f"{where} ({NAMES[best]})", in_jax[best], *limits)
        if "torch" in ratios and (limits := speed_limit(case.work, "torch")):
            name = "forward + backward, time over torch's"
            yield Outcome(name, where, ratios["torch"], *limits)


def _bytes(rows):
    table = {(r["measure"], r["rows"], r["dtype"], r["rival"]): r["bytes"] for r in rows}
    for (measure, shape, dtype, rival), value in table.items():
        if rival != "ours":
            continue
        where = f"{shape} {dtype}"
        if measure == "residuals":
            examples, n = shape_of(shape)
            least = ITEM[dtype] + 12 / n + 4 / examples
            name = "residuals, over x in its dtype, 12 bytes an example and the weight"
            yield Outcome(name, where, round(value / least, 3), 1.0, 1.0)
        elif measure == "one layer":
            limit = ONE_LAYER[dtype] + SCALARS
            name = f"temporaries of one layer, bytes an element, {dtype}"
            yield Outcome(name, where, value, limit, limit)
        elif (measure, dtype) in MODEL and (measure, shape, dtype, "eqx") in table:
            layers = {"scan": "an 8-layer scan", "unrolled": "12 unrolled layers"}[measure]
            limit = MODEL[measure, dtype]
            ratio = value / table[measure, shape, dtype, "eqx"]
            name = f"temporaries of {layers}, over eqx.nn's, {dtype}"
            yield Outcome(name, where, ratio, limit, limit)


def _compile(rows):
    for row in rows:
        if row["rival"] == "eqx" and row["part"] == "both":
            name = "trace and compile 12 layers, time over eqx.nn's"
            yield Outcome(name, row["dtype"], row["ratio"], COMPILE, COMPILE)


def _accuracy(rows):
    worst: dict[str, float] = defaultdict(float)
    for row in rows:
        errors = [row[name] for name in ("y", "dx", "dweight", "dbias")]
        error = max(math.inf if e is None else e for e in errors)
        if row["rival"] == "ours":
            where = f"{row['at']} {row['value']:g}"
            yield Outcome(f"worst error, at every {row['at']}", where, error, ERROR, ERROR)
        elif row["at"] == "offset":
            worst[row["rival"]] = max(worst[row["rival"]], error)
    for rival, error in worst.items():
        name = "worst error of every rival, at an offset"
        yield Outcome(name, NAMES[rival], error, RIVALS_ERROR, RIVALS_ERROR, at_least=True)
