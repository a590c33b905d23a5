"""The kernels for CPUs, run, against float64; and the traps on the way from numba by XLA to them.

Rows are checked as in `test_pallas.py`, through the layers' functions: what calls them is checked
there by `test_batched.py`. What may hang or kill a process is tried in one of its own.
"""

import functools as ft
import math
import os
import subprocess
import sys
import warnings

import equinox as eqx
import jax
import jax.export
import jax.numpy as jnp
import jax.random as jr
import numba as numba  # of the extra `test`: without it, all of this would be the plain path
import numpy as np
import pytest
from draws import normal, seed
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from oracles import assert_close, assert_rounded_once, exact_norm, terms, ulps
from slow import slow
from test_transformations import NAMES, check, make_case, normalize_reference

from eqx_norms import (
    AdaLayerNorm,
    GroupNorm,
    LayerNorm,
    RMSNorm,
    group_norm,
    layer_norm,
    replace_norms,
    rms_norm,
)
from eqx_norms._op._form import Layout
from eqx_norms._op._kernels import _cpu

EPS = 2.0**-23
kernel_norm = {
    True: ft.partial(layer_norm, implementation="kernel"),
    False: ft.partial(rms_norm, implementation="kernel"),
}


def few(cases, quick):
    return [case if case in quick else slow(*case) for case in cases]


def calls(f, *args):
    """How many kernels its program calls."""
    return jax.jit(f).lower(*args).as_text().count("custom_call @eqx_norms_")


@ft.partial(jax.jit, static_argnames=("centre", "eps"))
def run(x, weight, bias, g, *, centre=True, eps=1e-5):
    """(y, dx, dweight, dbias), those that there are."""

    def f(x, weight, bias):
        return jax.vmap(lambda x: kernel_norm[centre](x, weight, bias, eps=eps))(x)

    y, vjp = jax.vjp(f, x, weight, bias)
    dx, *sums = vjp(g)
    return y, dx, *(s for s in sums if s is not None)


def draw(rows, n, dtype=np.float32):
    """x, weight, bias and a random cotangent: a constant one cancels in a norm."""
    rng = np.random.default_rng(seed(0))
    x, g = rng.normal(size=(2, rows, n))
    weight, bias = rng.normal(size=(2, n)) + 1
    return x, *(a.astype(dtype) for a in (weight, bias, g))


def check_rows(x, *others, centre=True, eps=1e-5, dtype=np.float32):
    x = x.astype(dtype)
    got = run(x, *others, centre=centre, eps=eps)
    want, size = (f(x, *others, centre=centre, eps=eps) for f in (exact_norm, terms))
    assert_close(got, want, size, max(x.shape))
    return got


over_batch = jax.vmap(lambda *args: kernel_norm[True](*args), (0, None, None))
each_norm = pytest.mark.parametrize("centre", (True, False), ids=("LayerNorm", "RMSNorm"))
# Of one entry; of less than a vector; of several chunks, and of several segments of a row.
SIZES = ((40, 1), (2, 2), (5, 17), (600, 129), (9000, 3), (3, 40_001), (1, 2**18 + 1))
ROWS, N = 23, 129


@each_norm
@pytest.mark.parametrize("rows, n", few(SIZES, ((5, 17), (600, 129))))
def test_sizes(rows, n, centre):
    check_rows(*draw(rows, n), centre=centre)


def each_row(values):
    return np.resize(values, ROWS)[:, None]


@each_norm
def test_offsets(centre):
    """Of the compiled whole: LLVM may fold what the mean in two parts keeps apart."""
    x, *others = draw(ROWS, N)
    check_rows(x + each_row((0, 1e2, 1e4, 1e6)), *others, centre=centre)


def test_an_origin_that_is_no_help():
    """The sums' origin is the mean of a few entries: here the only ones that lie elsewhere."""
    x, *others = draw(ROWS, N)
    x[:, :: N // 16] += each_row((1e2, 1e6, -1e8))
    check_rows(x, *others)


def test_rows_that_are_constant():
    """Exactly bias; and what there is of a gradient is 1 / sqrt(eps), however large the row."""
    offsets = each_row((0, 1, 0.1, 1e6, 1e9, 1e15, 1e30, 3e38))
    _, weight, bias, g = draw(ROWS, N)
    y, *_ = check_rows(np.broadcast_to(offsets, (ROWS, N)), weight, bias, g)
    assert (np.asarray(y) == bias).all()


@each_norm
@pytest.mark.parametrize("eps", (1e-5, slow(0.0), slow(1e-30)))
def test_scales(eps, centre):
    """From the smallest numbers to the largest; with a cotangent, for dx is g / x in size."""
    x, weight, bias, g = draw(ROWS, N)
    scales = each_row((1e-37, 1e-30, 1e-12, 1, 1e8, 1e12, 1e30, 1e38))
    x = (np.sign(x) + np.clip(x, -2, 2)) * scales
    g = (g * np.clip(scales, 1, 1e30)).astype(np.float32)
    check_rows(x, weight, bias, g, centre=centre, eps=eps)


def test_largest_numbers_of_both_signs():
    x, weight, bias, g = draw(ROWS, N)
    x = np.where(x > 0, 1, -1) * np.float64(np.finfo(np.float32).max)
    check_rows(x, weight, bias, g * np.float32(1e30))


@pytest.mark.slow
@each_norm
def test_float64(x64, centre):
    x, *others = draw(ROWS, N, np.float64)
    offsets = each_row((0, 1e6, 1e12))
    check_rows(x + offsets, *others, centre=centre, dtype=np.float64)


@pytest.mark.slow  # numba compiles two kernels for each dtype.
@pytest.mark.parametrize("dtype", ("bfloat16", "float16"))
@pytest.mark.parametrize("offset", (0, 10))
def test_half_precision_is_rounded_once(dtype, offset):
    x, weight, bias, g = draw(ROWS, N)
    x, g = jnp.asarray(x + offset, dtype), jnp.asarray(g, dtype)
    y, dx, *sums = run(x, weight, bias, g)
    want, size = (f(x, weight, bias, g) for f in (exact_norm, terms))
    assert y.dtype == dx.dtype == dtype
    assert_rounded_once(y, want.y, ulps(N) * EPS * size.y)
    assert_rounded_once(dx, want.dx, ulps(N) * EPS * size.dx)
    for got, exact, of in zip(sums, want[2:], size[2:], strict=True):
        assert got.dtype == jnp.float32
        assert (np.abs(got - exact) <= ulps(N) * EPS * of).all()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", (jnp.bfloat16, jnp.float16))
def test_rounding_of_every_size(dtype):
    """y is the bias where x is constant: as NumPy rounds it, ties and NaN too.

    But for subnormal numbers of float32, for XLA's threads take those for zero.
    """
    bits = np.random.default_rng(seed(3)).integers(0, 2**32, 2**16, dtype=np.uint32)
    bias = np.concatenate([bits.view(np.float32), each_float(dtype), np.float32([np.inf, np.nan])])
    with np.errstate(over="ignore", invalid="ignore"):
        want = np.where(np.abs(bias) < np.finfo(np.float32).tiny, 0, bias).astype(dtype)
    x = np.ones((1, len(bias)), dtype)
    (y,) = np.asarray(jax.jit(over_batch)(x, np.ones_like(bias), bias))
    np.testing.assert_array_equal(y.astype(np.float32), want.astype(np.float32))


def each_float(dtype):
    """And each that lies halfway to the next: a tie."""
    every = np.arange(2**16, dtype=np.uint16).view(dtype).astype(np.float32)
    every = np.sort(every[np.isfinite(every)])
    return np.concatenate([every, (every[1:] / 2 + every[:-1] / 2)])


@pytest.mark.parametrize("bad", (np.nan, np.inf, -np.inf))
def test_nan_and_inf_stay_in_their_row(bad):
    x, *others = draw(ROWS, N)
    x = x.astype(np.float32)
    clean = run(x, *others)
    x[3, 5] = bad
    y, dx, *_ = run(x, *others)
    assert np.isnan(y[3]).all() and np.isnan(dx[3]).all()
    rest = np.arange(ROWS) != 3
    assert np.array_equal(y[rest], clean[0][rest]) and np.array_equal(dx[rest], clean[1][rest])


@pytest.mark.parametrize("present", ((True, False), slow((False, True)), slow((False, False))))
def test_without_parameters(present):
    x, *params, g = draw(ROWS, N)
    x = x.astype(np.float32)
    params = [p if there else None for p, there in zip(params, present, strict=True)]
    filled = [np.full(N, 1 - i) if p is None else p for i, p in enumerate(params)]
    want, size = (f(x, *filled, g) for f in (exact_norm, terms))
    keep = lambda values: [values[i] for i in (0, 1, 2, 3) if i < 2 or present[i - 2]]
    for a, b, of in zip(run(x, *params, g), keep(want), keep(size), strict=True):
        assert (np.abs(a - b) <= ulps(N) * EPS * of).all()


# ---- The layers, whose weights are of entries, channels, groups, or of each example's own.


def norm_and_vjp(f, args, g):
    y, vjp = jax.vjp(f, *args)
    return y, *vjp(g)


def check_group_norm(shape, groups, dtype=np.float32):
    """Against the definition: each group a row, its weights repeated over its entries."""
    rng = np.random.default_rng(seed(1))
    (batch, channels), n = shape[:2], math.prod(shape[1:]) // groups
    x, g = rng.normal(size=(2, *shape)) + 3
    weight, bias = rng.normal(size=(2, channels)) + 1
    x, weight, bias, g = (a.astype(dtype) for a in (x, weight, bias, g))
    f = jax.vmap(
        lambda x, w, b: group_norm(x, groups, w, b, implementation="kernel"), (0, None, None)
    )
    got = jax.jit(ft.partial(norm_and_vjp, f))((x, weight, bias), g)
    assert calls(ft.partial(norm_and_vjp, f), (x, weight, bias), g) == 2
    in_rows = lambda a: np.broadcast_to(a, shape).reshape(batch, groups, n).swapaxes(0, 1)
    of_channel = lambda a: in_rows(a.reshape(1, channels, *[1] * (len(shape) - 2)))[:, 0]
    groups_of = [*map(in_rows, (x, g)), *map(of_channel, (weight, bias))]
    rows = [(xs, w, b, gs) for xs, gs, w, b in zip(*groups_of, strict=True)]
    each = [[f(*args) for args in rows] for f in (exact_norm, terms)]

    def as_came(results):
        y, dx = (np.stack([r[i] for r in results], 1).reshape(shape) for i in (0, 1))
        sums = (np.stack([r[i] for r in results]).reshape(channels, -1).sum(1) for i in (2, 3))
        return type(results[0])(y, dx, *sums)

    assert_close(got, as_came(each[0]), as_came(each[1]), max(n, batch))


@pytest.mark.parametrize(
    "shape, groups",
    few(
        (((3, 6, 5, 7), 2), ((3, 8), 4), ((5, 4, 3), 4), ((3, 4, 9), 1), ((40, 128, 20, 20), 32)),
        (((3, 6, 5, 7), 2), ((3, 8), 4)),
    ),
)
def test_group_norm(shape, groups):
    check_group_norm(shape, groups)


def test_weights_of_each_example(getkey):
    """An AdaLayerNorm over a batch of sequences; and an ensemble, which is the same to a kernel."""
    x, g = normal(getkey(), (2, 5, 3, 40))
    weight, bias = normal(getkey(), (2, 5, 40))
    f = jax.vmap(jax.vmap(kernel_norm[True], (0, None, None)))
    got = jax.jit(ft.partial(norm_and_vjp, f))((x, weight, bias), g)
    assert calls(ft.partial(norm_and_vjp, f), (x, weight, bias), g) == 2
    for i in range(len(x)):
        args = x[i], weight[i], bias[i], g[i]
        assert_close([a[i] for a in got], exact_norm(*args), terms(*args), 40)


def test_gradients_of_each_example(getkey):
    x, g = normal(getkey(), (2, 5, 40))
    weight, bias = normal(getkey(), (2, 40))
    of_one = lambda x, weight, bias, g: norm_and_vjp(kernel_norm[True], (x, weight, bias), g)
    got = jax.jit(jax.vmap(of_one, (0, None, None, 0)))(x, weight, bias, g)
    for i in range(len(x)):
        args = x[i : i + 1], weight, bias, g[i : i + 1]
        one = got[0][i : i + 1], got[1][i : i + 1], got[2][i], got[3][i]
        assert_close(one, exact_norm(*args), terms(*args), 40)


MAKERS = {
    "LayerNorm": lambda **how: LayerNorm(8, **how),
    "RMSNorm": lambda **how: RMSNorm(8, **how),
    "GroupNorm": lambda **how: GroupNorm(2, 8, **how),
    "AdaLayerNorm": lambda **how: AdaLayerNorm(8, 3, key=jr.key(0), **how),
    "replaced": lambda **how: replace_norms(eqx.nn.GroupNorm(2, 8), **how),
}


@pytest.mark.parametrize("name", MAKERS)
def test_every_layer_takes_its_name(name, getkey):
    args = (normal(getkey(), (4, 8)), *[normal(getkey(), (4, 3))] * (name == "AdaLayerNorm"))
    by_kernel, plain = (jax.vmap(MAKERS[name](**how)) for how in ({"implementation": "kernel"}, {}))
    assert calls(by_kernel, *args) == 1 and calls(plain, *args) == 0
    np.testing.assert_allclose(jax.jit(by_kernel)(*args), plain(*args), rtol=0, atol=64 * EPS)


@pytest.mark.parametrize("make", (GroupNorm, AdaLayerNorm))
def test_a_name_that_is_none(make):
    how = {"key": jr.key(0)} if make is AdaLayerNorm else {}
    with pytest.raises(ValueError, match=r'"xla" or "kernel".*got \'numba\''):
        make(2, 8, implementation="numba", **how)


# ---- The same bits, whatever the threads; and how rows are shared out.


def test_the_same_bits_at_each_call():
    """Of sums in several parts, by however many threads had time."""
    args = draw(600, 257)
    first = run(*args)
    for _ in range(20):
        for a, b in zip(first, run(*args), strict=True):
            assert np.array_equal(a, b)


@pytest.mark.parametrize("wide", (0, 4))
def test_chunks_are_all_rows_once(wide):
    rng = np.random.default_rng(seed(2))
    for _ in range(300):
        rows, channels = rng.integers(1, 70, 3), int(2 ** rng.integers(0, 12))
        plan = _cpu.plan(Layout(*map(int, rows), channels, int(rng.integers(1, 50))), True, wide)
        parts = plan.by_outer, plan.by_params, plan.by_inner
        assert all(1 <= by <= size for by, size in zip(parts, rows, strict=True))
        assert plan.chunks == math.prod(parts) <= 2 * 64
        if wide and plan.run == 1 and plan.partials:
            # What partial sums write is small beside dx.
            assert 2 * plan.by_outer * plan.by_inner * 4 <= plan.outer * plan.inner


# ---- In all transformations.

CASE = make_case(
    ft.partial(LayerNorm, implementation="kernel"),
    jax.jit(lambda *args: kernel_norm[True](*args)),
    normalize_reference,
    shape=(6,),
    param_shape=(6,),
)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_layer_norm_jitted_under(name):
    check(name, CASE, jnp.float32)


# ---- Where there is none.


def gradient(f):
    return jax.grad(lambda *args: jnp.sum(jnp.sin(f(*args))), (0, 1, 2))


masked = jax.vmap(lambda x, w, b: kernel_norm[True](x, w, b, where=x > 0), (0, None, None))


def arrays(*batch, n=40):
    return jnp.ones((*batch, n)), jnp.ones(n), jnp.zeros(n)


@pytest.mark.parametrize(
    "f, args",
    (
        (masked, arrays(8)),
        (over_batch, arrays(0)),
        (over_batch, arrays(8, n=0)),
        (jax.vmap(layer_norm, (0, None, None)), arrays(8)),
    ),
    ids=("mask", "no example", "empty example", "default"),
)
def test_no_kernel(f, args):
    assert not calls(f, *args)


@pytest.mark.parametrize("axis_type", (AxisType.Auto, AxisType.Explicit))
def test_no_kernel_in_a_jit_over_several_devices(axis_type):
    mesh = jax.make_mesh((8,), ("d",), axis_types=(axis_type,))
    x, weight, bias = arrays(8)
    x = jax.device_put(x, NamedSharding(mesh, P("d")))
    assert not calls(gradient(over_batch), x, weight, bias)


def test_kernels_inside_shard_map(getkey):
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    specs = P("d"), P(), P()
    f = jax.shard_map(over_batch, mesh=mesh, in_specs=specs, out_specs=P("d"))
    args = normal(getkey(), (16, 40)), *normal(getkey(), (2, 40))
    assert calls(gradient(f), *args) == 2
    got, want = (jax.jit(gradient(each))(*args) for each in (f, over_batch))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


def test_an_export_has_none():
    exported = jax.export.export(jax.jit(gradient(over_batch)))(*arrays(8))
    assert "eqx_norms_" not in exported.mlir_module()


# ---- Processes of their own.

PROGRAM = """
import os, sys, threading
import jax, jax.numpy as jnp, numpy as np
{before}
from eqx_norms import layer_norm
norm = jax.vmap(lambda x, w, b: layer_norm(x, w, b, implementation="kernel"), (0, None, None))

@jax.jit
def run(x, w, b):
    return jax.grad(lambda *args: jnp.sum(jnp.sin(norm(*args))), (0, 1, 2))(x, w, b)

x = np.random.default_rng(0).normal(size=(600, 257)).astype(np.float32)
args = x, np.ones(257, np.float32), np.zeros(257, np.float32)
is_kernel = "custom_call @eqx_norms_" in run.lower(*args).as_text()
{then}
print("done")
"""


def process(then, before="", python=(), **environment):
    program = PROGRAM.format(then=then, before=before)
    # The tests' eight devices, if it does not say otherwise.
    env = os.environ | environment
    done = subprocess.run(
        [sys.executable, *python, "-c", program],
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0 and done.stdout.endswith("done\n"), (done.stdout, done.stderr)
    return done


TRAPS = {
    # The child, which has no threads of the pool, uses Python and ends.
    "fork after use": """
assert is_kernel
run(*args)
import warnings
warnings.simplefilter("ignore")
child = os.fork()
if child == 0:
    os._exit(np.dot(x, x.T).shape != (600, 600))
assert os.waitpid(child, 0)[1] == 0
run(*args)
""",
    "two devices of eight": """
assert is_kernel
want = run(*args)
for device in jax.devices()[:2]:
    got = run(*jax.device_put(args, device))
    assert got[0].devices() == {device}
    assert all(np.array_equal(a, b) for a, b in zip(got, want))
""",
    "donation": """
want = jax.jit(norm)(*args)
donated = jax.jit(norm, donate_argnums=0)
for _ in range(3):
    given = jnp.array(x)
    got = donated(given, *args[1:])
    assert np.array_equal(got, want) and given.is_deleted()
""",
    "8 programs at once": """
want = [np.asarray(a) for a in run(*args)]
wrong = []
def work():
    for _ in range(20):
        wrong.extend(not np.array_equal(a, b) for a, b in zip(run(*args), want))
threads = [threading.Thread(target=work) for _ in range(8)]
[t.start() for t in threads]
[t.join() for t in threads]
assert len(wrong) == 8 * 20 * 3 and not any(wrong)
""",
    # A callback holds a thread of the pool, and waits for a program that shares its work out.
    "a pool that is held": """
inner = lambda _: np.asarray(run(*args)[0]).sum()
@jax.jit
def outer(y):
    both = [jax.pure_callback(inner, jax.ShapeDtypeStruct((), jnp.float32), y[i]) for i in (0, 1)]
    return sum(both) + run(*args)[0].sum()
assert np.isfinite(outer(jnp.ones(2)))
""",
    "caches cleared": """
want = run(*args)
for _ in range(3):
    jax.clear_caches()
    assert all(np.array_equal(a, b) for a, b in zip(run(*args), want))
""",
    "Ctrl-C": """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # Started in the background it is ignored.
timer = threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT))
timer.start()
try:
    while True:
        run(*args)
except KeyboardInterrupt:
    pass
run(*args)
""",
    "nothing leaks": """
import resource
def size():
    for _ in range(200):
        jax.block_until_ready(run(*args))
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()
first = min(size() for _ in range(3))
# A block of 300 kB a call, of 600 calls.
assert min(size() for _ in range(3)) - first < 2**25
""",
    "a scan": """
def loss(w, b):
    step = lambda h, _: (h + norm(h, w, b), None)
    return jnp.sum(jax.lax.scan(step, x, None, 3)[0] ** 2)
got = jax.jit(jax.grad(loss))(*args[1:])
assert np.isfinite(got).all()
""",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAPS)
def test_trap(name):
    if sys.platform == "win32" and name in ("fork after use", "nothing leaks", "Ctrl-C"):
        pytest.skip("of POSIX")
    before = "jax.config.update('jax_num_cpu_devices', 8)"
    process(TRAPS[name], before=before if "devices" in name else "")


@pytest.mark.slow
def test_a_pool_of_one_thread():
    """With the bits of a pool of several: `sched_setaffinity` is what sizes it."""
    then = "print([np.asarray(a).tobytes().hex()[:4000] for a in run(*args)])"
    before = "os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])"
    assert process(then, before=before).stdout == process(then).stdout


def plain_with_one_warning(says, before, **environment):
    """The values of the plain path; under the default, nothing is said."""
    done = process(
        """
import warnings
assert not is_kernel
with warnings.catch_warnings():
    warnings.simplefilter("error")
    jax.vmap(layer_norm)(x)
    jax.jit(jax.vmap(layer_norm))(x)
    jax.jit(lambda x: norm(x, *args[1:]))(x)
assert all(np.isfinite(a).all() for a in run(*args))
""",
        before=before,
        **environment,
    )
    assert done.stderr.count("takes the plain path on this CPU") == 1, done.stderr
    assert says in done.stderr, done.stderr


@pytest.mark.slow
def test_without_numba():
    before = """
import importlib.metadata
version = importlib.metadata.version
def no_numba(name):
    if name == "numba":
        raise importlib.metadata.PackageNotFoundError(name)
    return version(name)
importlib.metadata.version = no_numba
"""
    plain_with_one_warning('they need numba: pip install "eqx-norms[cpu]"', before)


OTHERS = {
    "an old numba": (
        "they need numba",
        "import importlib.metadata; importlib.metadata.version = lambda name: '0.1.2'",
    ),
    "an unknown platform": (
        "and this is 'riscv64'",
        "import platform; platform.machine = lambda: 'riscv64'",
    ),
    "no folder for a cache": (
        "NUMBA_CACHE_DIR",
        "import numba.core.caching as c; c.CompileResultCacheImpl._locator_classes = []",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_plain_with(name):
    plain_with_one_warning(*OTHERS[name])


def test_warning_is_no_error_twice(monkeypatch):
    """Said once in a process, also where warnings are shown always."""
    _cpu._missing.cache_clear()
    monkeypatch.setattr(_cpu, "_what_is_missing", lambda: "a reason")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert not calls(over_batch, *arrays(3)) and not calls(over_batch, *arrays(4))
        assert [str(w.message) for w in caught] == [
            '`implementation="kernel"` takes the plain path on this CPU: a reason'
        ]
    finally:
        _cpu._missing.cache_clear()
