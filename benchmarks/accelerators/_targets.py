"""What each figure should come to, and whether it does. Written before the figures were."""

import math

from .._targets import Outcome
from ._cases import LAYER_WORKS, MODELS, NO_NORM, PALLAS, PLATFORMS, Case

COST = {"h100": "bytes"}  # elsewhere cycles
WHOLE = 1.02  # of eqx.nn's bytes or cycles, at most
NARROW = 0.97  # ... of a model that learns a LayerNorm in bfloat16, on the H100
SCAN = {"float32": 0.75, "bfloat16": 0.5}  # of the temporaries of eqx.nn's
# Of the kernels on the H100: bytes an element, of which x, y, x, g and dx are 20 or 10; and the
# norm's part of the bytes of MLP blocks, of eqx.nn's.
KERNELS = {"float32": 22, "bfloat16": 12}
KERNELS_IN_MLP = {"float32": 0.95, "bfloat16": 0.6}


def by_case(rows: list[dict]) -> dict[Case, dict]:
    return {Case(*(row[field] for field in Case._fields)): row for row in rows}


def ratio(found: dict[Case, dict], case: Case, key: str, library="eqx", part=False) -> float | None:
    """Ours, of which `case` is, over theirs; if asked, of the norm's `part` alone.

    None if one of them is missing, or theirs costs nothing: as a part, no hundredth of the whole.
    """
    without = found.get(case._replace(library=NO_NORM, layer="")) if part else {key: 0}
    ours, theirs = found.get(case), found.get(case._replace(library=library))
    if ours is None or theirs is None or without is None:
        return None
    share = theirs[key] - without[key]
    return None if share <= 0.01 * theirs[key] else (ours[key] - without[key]) / share


def outcomes(results: dict) -> list[Outcome]:
    """Of every row that has a target."""
    found = by_case(results["layers"] + results["models"])
    judged = []
    for case in found:
        if case.library == "ours":
            judged += [_cost(found, case), _temporaries(found, case)]
        elif case.library == PALLAS:
            judged += [_kernels(found, case), _kernels_in_mlp(found, case)]
    return [outcome for outcome in judged if outcome is not None]


def _cost(found, case):
    value = ratio(found, case, "cost")
    if value is None:
        return None
    what = "one layer" if case.work in LAYER_WORKS else "a model"
    name = (
        f"{PLATFORMS[case.platform]}, {COST.get(case.platform, 'cycles')} of {what}, over eqx.nn's"
    )
    limit = WHOLE
    of_weights = what == "a model" and "norms fixed" not in case.work
    if of_weights and case[:4] == ("h100", "ours", "LayerNorm", "bfloat16"):
        name, limit = f"{name}, LayerNorm bfloat16", NARROW
    return Outcome(name, _where(case), value, limit, limit)


def _temporaries(found, case):
    value = ratio(found, case, "temporaries")
    if value is None or "scan" not in case.work:
        return None
    name = f"{PLATFORMS[case.platform]}, temporaries of a scan, over eqx.nn's, {case.dtype}"
    where, limit = _where(case), SCAN[case.dtype]
    without = found.get(case._replace(library=NO_NORM, layer=""))
    if without is not None:
        theirs = found[case._replace(library="eqx")]["temporaries"]
        where += f" (without norms {without['temporaries'] / theirs:.2f})"
    return Outcome(name, where, value, limit, limit)


def _kernels(found, case):
    if case.work != "backward":
        return None
    name = f"{PLATFORMS[case.platform]}, bytes an element of one layer, kernels, {case.dtype}"
    limit = KERNELS[case.dtype]
    return Outcome(name, _where(case), found[case]["cost"] / math.prod(case.shape), limit, limit)


def _kernels_in_mlp(found, case):
    value = ratio(found, case, "cost", part=True)
    if value is None or case.work != "mlp":
        return None
    name = f"{PLATFORMS[case.platform]}, bytes of the norms in a model, kernels, over eqx.nn's"
    limit = KERNELS_IN_MLP[case.dtype]
    return Outcome(f"{name}, {case.dtype}", _where(case), value, limit, limit)


def _where(case: Case) -> str:
    work = f"{case.rows} {case.work}" if case.work in LAYER_WORKS else f"{MODELS[case.work]},"
    return f"{work} {case.layer} {case.dtype}"
