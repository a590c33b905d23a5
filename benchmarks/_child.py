"""Processes of their own: one for each rival, in which it and ours are measured in turn."""

import contextlib
import importlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor

SETTINGS = {"KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu"}


@contextlib.contextmanager
def child() -> Iterator[Callable]:
    """`call("_speed.speed", *args)`, in a fresh process, the same one each time.

    By name, for the parent imports no array library: its threads would be in the way.
    """
    with children(1) as submit:
        yield lambda name, *args: submit(name, *args).result()


@contextlib.contextmanager
def children(count: int) -> Iterator[Callable[..., Future]]:
    """`submit("_speed.speed", *args)`, in one of so many processes."""
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(count, context, initializer=_start)
    try:
        yield lambda name, *args: pool.submit(_call, name, args)
    finally:
        pool.shutdown(cancel_futures=True)


def _start():
    # Ctrl-C is for the parent, which writes down what it has.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)


def _call(name: str, args: tuple):
    module, function = name.rsplit(".", 1)
    return getattr(importlib.import_module(f"{__package__}.{module}"), function)(*args)
