"""Two processes of two devices each, that `jax.distributed` joins: every instrument, every layer.

Oracle: the same cases in this process, with four devices of its own; for the layers float64.
"""

import json
import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
import processes
import pytest

SCRIPT = pathlib.Path(processes.__file__)
SECONDS = 900  # A program that waits for the other process waits forever.


def in_two_processes(*cases):
    """What each of the processes says, by the names of the cases."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    env = os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"}  # half of the time
    started = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(index), port, *cases],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    try:
        ends = [process.communicate(timeout=SECONDS) for process in started]
    finally:
        for process in started:
            process.kill()
    lines = [[line for line in out.splitlines() if line.startswith('["')] for out, _ in ends]
    return [dict(map(json.loads, own)) for own in lines], [err for _, err in ends]


def assert_alike(a, b):
    """The same words, and numbers up to the rounding of sums in another order."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for name in a.keys() - {"text"}:  # which may print such a number
            assert_alike(a[name], b[name])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for pair in zip(a, b, strict=True):
            assert_alike(*pair)
    elif isinstance(a, float):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)
    else:
        assert a == b


@pytest.fixture(scope="module")
def told():
    return in_two_processes()


@pytest.mark.slow
@pytest.mark.parametrize("name", processes.CASES)
def test_two_processes_say_the_same_as_one(name, told):
    (first, second), errors = told
    assert name in first, errors[0][-2000:]
    assert name in second, errors[1][-2000:]
    np.testing.assert_equal(first[name], second[name])
    here = processes.CASES[name]()
    assert_alike(first[name], json.loads(json.dumps(here)))


@pytest.mark.slow
def test_the_page_runs_in_two_processes():
    """Every block of docs/many_devices.md, in two processes of four devices."""
    found, errors = in_two_processes("page")
    assert found == [{"page": 7}] * 2, [err[-2000:] for err in errors]
