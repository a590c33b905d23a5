"""Arrays that lie on the devices of several processes, as under `jax.distributed`.

No process can read one that is split, nor may a compiled program close over it. Each process makes
the same calls in the same order; then all that is needed are these doors.
"""

import functools as ft
import hashlib
from collections.abc import Callable, Iterable
from typing import Any

import equinox as eqx
import jax
import jax.core
import jax.extend.core as jex
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax.experimental import multihost_utils


def spans_processes(x: Any) -> bool:
    """Whether this is an array of which a part lies on the devices of another process."""
    concrete = isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer)
    return concrete and not x.is_fully_addressable


def fetched(x: Any) -> np.ndarray:
    """`x` as NumPy's, on every process."""
    if spans_processes(x) and not x.is_fully_replicated:
        jax.block_until_ready(x)  # One program at a time, as in `jit` below.
        with jax.ensure_compile_time_eval():  # A constant may be asked for in the midst of a trace.
            x = multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(x)


def readable(x: Any) -> Any:
    """`x`; as NumPy's if other processes hold a part of it."""
    return fetched(x) if spans_processes(x) else x


def fetch(tree: Any) -> Any:
    """As `jax.device_get`, also of what other processes hold."""
    return jax.device_get(jtu.tree_map(readable, tree))


def everywhere_the_same(arrays: Iterable[Any]) -> bool:
    """Whether the processes, each of which has these for itself, have the same bits in them."""
    digest = hashlib.sha256()
    for x in arrays:
        digest.update(np.asarray(x).tobytes())
    mine = np.frombuffer(digest.digest(), np.uint32)
    everyone = multihost_utils.process_allgather(mine)
    return bool((everyone == mine).all())


def laid_out(values: np.ndarray, sharding: jax.sharding.Sharding) -> np.ndarray | jax.Array:
    """As `jax.device_put`, which would ask whether all processes have the same `values`.

    What is on one device is left to JAX: put there, it could not meet what lies on a mesh.
    """
    if not isinstance(sharding, jax.sharding.NamedSharding):
        return values
    if jax.process_count() == 1:
        return jax.device_put(values, sharding)
    return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])


def jit(
    fn: Callable, static_argnums: int | tuple[int, ...] = (), compiler_options: Any = None
) -> Callable:
    """`jax.jit` of a function that may close over such arrays.

    With several processes its results are there before it returns. On CPUs two programs that
    exchange something must not run at a time: in JAX 0.10.2 they wait for each other forever.
    """
    options: Any = {"static_argnums": static_argnums, "compiler_options": compiler_options}
    alone = jax.jit(fn, **options)
    programs = {}

    @ft.wraps(fn)
    def run(*args):
        traced = any(isinstance(x, jax.core.Tracer) for x in jtu.tree_leaves(args))
        if traced or jax.process_count() == 1:
            return alone(*args)
        args = jtu.tree_map(lambda x: jnp.asarray(x) if isinstance(x, np.ndarray) else x, args)
        leaves, structure = jtu.tree_flatten(args)
        kinds = [jax.typeof(x) if eqx.is_array(x) else x for x in leaves]
        key = structure, *kinds, jax.config.jax_enable_x64  # pyright: ignore[reportAttributeAccessIssue]
        if key not in programs:
            programs[key] = _without_closure(fn, args, compiler_options)
        return jax.block_until_ready(programs[key](*args))

    return run


def _without_closure(fn: Callable, args: tuple, compiler_options: Any) -> Callable:
    """`fn` of such arguments, compiled, where what it closes over is handed to the program."""
    closed, out, static_out = eqx.filter_make_jaxpr(fn)(*args)
    handed = [spans_processes(const) for const in closed.consts]
    options: Any = {"compiler_options": compiler_options}

    @ft.partial(jax.jit, **options)
    def program(spanning, arrays):
        rest = iter(spanning)
        pairs = zip(closed.consts, handed, strict=True)
        consts = [next(rest) if is_handed else const for const, is_handed in pairs]
        return jex.jaxpr_as_fun(jex.ClosedJaxpr(closed.jaxpr, consts))(*arrays)

    spanning = [c for c, is_handed in zip(closed.consts, handed, strict=True) if is_handed]

    def run(*args):
        outs = program(spanning, jtu.tree_leaves(eqx.filter(args, eqx.is_array)))
        return eqx.combine(jtu.tree_unflatten(jtu.tree_structure(out), outs), static_out)

    return run
