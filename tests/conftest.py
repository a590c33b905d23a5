"""Every test runs under the strictest settings that a user may have switched on."""

import os
import tempfile
import zlib

import jax

# Eight host devices, for the sharding tests; before the backend starts.
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

import draws
import jax.random as jr
import pytest


def pytest_addoption(parser):
    parser.addoption("--draw", type=int, default=0, help="shifts every random draw of the tests")
    parser.addoption("--programs", type=int, default=100, help="how many hard programs are drawn")
    parser.addoption("--optimised", action="store_true", help="compiles programs as users do")
    parser.addoption("--part", default="0/1", help="K/N: part K of N of the tests, by their names")


def pytest_configure(config):
    draws.shift = config.getoption("--draw")
    if not config.getoption("--optimised"):
        compile_fast()
    compile_once(config)


def pytest_collection_modifyitems(config, items):
    part, parts = map(int, config.getoption("--part").split("/"))
    chosen = [item for item in items if zlib.crc32(item.nodeid.encode()) % parts == part % parts]
    config.hook.pytest_deselected(items=[item for item in items if item not in {*chosen}])
    items[:] = chosen


def compile_fast():
    """Programs are small and run once: to compile them for speed is a third of the tests' time.

    What XLA fuses stays, only LLVM optimises less. The backend, and the scripts that tests start,
    find this in the environment.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_backend_optimization_level" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_backend_optimization_level=0".strip()


def compile_once(config):
    """Programs that are the same, in whatever test or process, are compiled once in a run.

    By JAX's own cache, in a directory of this run alone: a seventh of the time. The workers of
    pytest-xdist and the scripts that tests start find it in the environment.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    directory = tempfile.TemporaryDirectory(prefix="eqx_norms_tests_")
    config.add_cleanup(directory.cleanup)
    for name, value in {
        "jax_compilation_cache_dir": directory.name,
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }.items():
        os.environ[name.upper()] = str(value)
        jax.config.update(name, value)


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """JAX keeps every program that it has compiled: gigabytes, after a thousand tests."""
    yield
    jax.clear_caches()


@pytest.fixture
def getkey():
    """A function that gives a new random key at each call, the same ones in each run."""
    counter = iter(range(1_000_000))
    return lambda: jr.fold_in(jr.key(draws.seed(20240607)), next(counter))


@pytest.fixture
def x64():
    """Float64 by default: arrays, keys and modules that the test makes."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def optax_promotes():
    """Its Adam takes a Python float to the power of an integer array."""
    with jax.numpy_dtype_promotion("standard"):
        yield
