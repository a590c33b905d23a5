"""One process for each rival, in which it and ours are measured in turn."""

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor

RATHER_THAN_FAIL = {"KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "2"}


@contextlib.contextmanager
def child() -> Iterator[Callable]:
    """A function that calls another in a fresh process, the same one each time."""
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(1, context, initializer=_start)
    try:
        yield lambda function, *args: pool.submit(function, *args).result()
    finally:
        pool.shutdown(cancel_futures=True)


def _start():
    # Ctrl-C is for the parent, which writes down what it has.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for name, value in RATHER_THAN_FAIL.items():
        os.environ.setdefault(name, value)
