"""Ours and one rival, in turn, in one process.

Every round times both, each time in the other order. A time is the median over rounds; a ratio is
the median of the rounds' own ratios, from which slow drifts of the machine cancel.

Each sample begins with a call that is not timed, for the state that the other side leaves is not
its own: memory that eqx.nn gave back to the system is what the next call pays for (ours then takes
half as long again at 4096x768), and torch's threads spin for a while after their work, on the cores
that ours needs.
"""

import gc
import math
import time
from collections.abc import Callable

import numpy as np

from ._cases import Case

LEAST, MOST = 3, 300  # rounds
SAMPLE = 2e-3  # seconds that a sample lasts at least: small rows get several calls
# How long the calls that are not timed go on. OpenMP's threads are asleep, or awake again and on
# cores of their own, after about 20 ms: then both sides take as long as they do alone.
SETTLE = {"torch": 30e-3}


def speed(rival: str, case: Case, seconds: float) -> list[dict]:
    """One row of the table, timed for about that many seconds, or for three rounds."""
    from ._works import thunk

    times = compare(thunk("ours", case), thunk(rival, case), seconds, SETTLE.get(rival, 0.0))
    return [case._asdict() | {"rival": rival} | times]


def compare(ours: Callable, theirs: Callable, seconds: float, settle: float = 0.0) -> dict:
    """Medians and quartiles of both times, in ms, and of their ratio."""
    sides = ours, theirs
    for run in sides:
        run()  # compiles
    least = max(SAMPLE, settle / 3)
    calls = [math.ceil(least / sample(run, 1, settle)) for run in sides]
    rounds, until = [], time.perf_counter() + seconds
    gc.collect()
    gc.disable()
    try:
        while len(rounds) < LEAST or (len(rounds) < MOST and time.perf_counter() < until):
            both = [0.0, 0.0]
            for side in (1, 0) if len(rounds) % 2 else (0, 1):
                both[side] = sample(sides[side], calls[side], settle)
            rounds.append(both)
    finally:
        gc.enable()
    return summary(np.array(rounds)) | {"calls": calls}


def sample(run: Callable, calls: int, settle: float) -> float:
    """Seconds that a call takes."""
    until = time.perf_counter() + settle
    run()
    while time.perf_counter() < until:
        run()
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
