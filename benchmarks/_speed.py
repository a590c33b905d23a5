"""Ours and one rival, in turn, in one process.

Every round times both, each time in the other order. A time is the median over rounds; a ratio is
the median of the rounds' own ratios, from which slow drifts of the machine cancel.
"""

import gc
import math
import time
from collections.abc import Callable

import numpy as np

from ._cases import Case

LEAST, MOST = 5, 300  # rounds
SAMPLE = 2e-3  # seconds that a sample lasts at least: small rows get several calls


def speed(rival: str, case: Case, seconds: float) -> dict:
    """One row of the table, timed for about that many seconds, or for five rounds."""
    from ._works import thunk

    row = case._asdict() | {"rival": rival}
    return row | compare(thunk("ours", case), thunk(rival, case), seconds)


def compare(ours: Callable, theirs: Callable, seconds: float) -> dict:
    """Medians and quartiles of both times, in ms, and of their ratio."""
    for run in (ours, theirs, ours, theirs):  # compile, then warm up
        run()
    calls = [max(1, math.ceil(SAMPLE / sample(run, 1))) for run in (ours, theirs)]
    gc.collect()
    gc.disable()
    try:
        rounds, until = [], time.perf_counter() + seconds
        while len(rounds) < LEAST or (len(rounds) < MOST and time.perf_counter() < until):
            both = [(0, ours), (1, theirs)]
            if len(rounds) % 2:
                both.reverse()
            rounds.append([t for _, t in sorted((i, sample(run, calls[i])) for i, run in both)])
    finally:
        gc.enable()
    return summary(np.array(rounds)) | {"calls": calls}


def sample(run: Callable, calls: int) -> float:
    """Seconds that a call takes."""
    started = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - started) / calls


def summary(rounds: np.ndarray) -> dict:
    """From an array of (ours, theirs) in seconds: the figures of the JSON."""
    figures = {
        "ours_ms": 1e3 * rounds[:, 0],
        "rival_ms": 1e3 * rounds[:, 1],
        "ratio": rounds[:, 0] / rounds[:, 1],
    }
    result: dict = {"rounds": len(rounds)}
    for name, values in figures.items():
        low, middle, high = (float(f"{q:.4g}") for q in np.percentile(values, (25, 50, 75)))
        result |= {name: middle, f"{name}_quartiles": [low, high]}
    return result
