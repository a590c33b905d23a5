"""The verdicts on functions that once got a wrong one, and those of another checkout beside them.

    python -m benchmarks.verdicts
    python -m benchmarks.verdicts --before ../other/checkout

For every function the table says what is true and what the check says of it: its status, the
beginning of an error, or what was asked. `--before` runs the same file on another checkout of this
library, in a process of its own. The function is wrong where the line is marked.
"""

import argparse
import json
import os
import subprocess
import sys
import warnings

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec as P

from eqx_norms import RMSNorm
from eqx_norms.causality import (
    assert_causal,
    assert_reads,
    check_causal,
    check_same,
    dependency_matrix,
)

T = 8
X = jr.normal(jr.key(0), (T,))
LONG = jr.normal(jr.key(1), (2048,))
TRI = np.tri(T, dtype=bool)
CASES = []


def case(section, name, wanted):
    """Enters a function that returns a verdict; right is what begins with one of `wanted`."""
    return lambda run: CASES.append((section, name, wanted.split(" or "), run))


def status(fn, x, **options):
    return check_causal(fn, x, **options).status


def proof(fn, x=X, **options):
    return check_causal(fn, x, prove=True, **options).status


# 1. The question that was meant

BATCH = jr.normal(jr.key(2), (4, 10, 8))
centred = jax.vmap(lambda s: s - s.mean(0))


def warned(run):
    """What `CausalityWarning` says, as a word, and the status."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = run()
    told = [w for w in caught if w.category.__name__ == "CausalityWarning"]
    return "a warning" if told else report.status


@case("1", "the batch axis was asked", "a warning")
def _():
    return warned(lambda: assert_causal(centred, BATCH))


@case("1", "... with a proof", "a warning")
def _():
    return warned(lambda: assert_causal(centred, BATCH, prove=True))


@case("1", "... GPT without a mask, tokens (16, 32)", "a warning")
def _():
    table = jr.normal(jr.key(3), (50, 8))
    one = lambda ids: jax.nn.softmax(table[ids] @ table[ids].T) @ table[ids]
    return warned(lambda: assert_causal(jax.vmap(one), jr.randint(jr.key(4), (16, 32), 0, 50)))


@case("1", "... with a rule", "a warning")
def _():
    return warned(lambda: assert_reads(centred, BATCH, np.tri(4, dtype=bool)))


@case("1", "the axis of time", "leak")
def _():
    return status(centred, BATCH, axis=1)


@case("1", "which array leaks, target or known", "'target'")
def _():
    x = {"target": X, "known": X[::-1]}
    shifted = lambda x: jnp.roll(x["target"], -1) + jnp.cumsum(x["known"])
    text = str(check_causal(shifted, x))
    return "'target'" if "Only 'target' leaks" in text else "not said"


@case("1", "triu in the place of tril", "the other way round")
def _():
    fn = lambda x: jax.nn.softmax(jnp.where(TRI.T, jnp.outer(x, x), -jnp.inf)) @ x
    text = str(check_causal(fn, X)).replace("\n", " ")
    return "the other way round" if "way round" in text else "not said"


# 2. Proved, and out[0] moves with x[-1]


def by_ref(write):
    def fn(x):
        ref = jax.new_ref(jnp.zeros(T))
        write(ref, x)
        return x + ref[...]

    return fn


def added(ref, x):
    ref[...] += x[::-1]


def stored(ref, x):
    ref[...] = x[::-1]


def scanned(ref, x):
    def step(_, i):
        ref[T - 1 - i] = x[i]
        return None, None

    lax.scan(step, None, jnp.arange(T))


def looped(ref, x):
    lax.fori_loop(0, T, lambda i, _: ref.__setitem__(T - 1 - i, x[i]), None)


for _name, _write in [
    ("a Ref, stored", stored),
    ("a Ref, added to", added),
    ("a Ref in a scan", scanned),
    ("a Ref in a fori_loop", looped),
    ("a Ref in jit", lambda ref, x: jax.jit(stored)(ref, x)),
]:
    case("2", _name, "leak")(lambda write=_write: proof(by_ref(write)))
    case("2", f"{_name}, edits alone", "leak")(lambda write=_write: status(by_ref(write), X))


@case("2", "a mask that is none, of prices", "leak")
def _():
    return proof(lambda s: s + jnp.maximum(s[::-1] - 50_000.0, 0), 50_000 + 100 * X)


@case("2", "a mask that is none, beside an exponential", "leak")
def _():
    return proof(lambda s: jnp.exp((s[::-1] - 50_000.0) / 100), 50_000 + 100 * X)


IDS = jnp.arange(T, dtype=jnp.uint32)


@case("2", "neg of unsigned integers", "leak")
def _():
    flag = lambda x: -(x[::-1] > 3).astype(jnp.uint32) > 1
    return proof(lambda x: jnp.where(flag(x), x + 1, x), IDS, token_values=(9,))


@case("2", "exp2 by the bounds of exp", "leak")
def _():
    fn = lambda x: jnp.where(jnp.exp2(jnp.where(x[::-1] > 0, -120.0, -100.0)) > 1e-33, x, 0)
    return proof(fn)


@case("2", "the fill of a take out of range", "leak")
def _():
    table = jnp.zeros(3, jnp.int32)
    far = lambda x: jnp.where(x[::-1] > 0, 5, 0)
    return proof(lambda x: jnp.where(jnp.take(table, far(x), mode="fill") == 0, x, 0.0))


@case("2", "an index in uint32, cast to int32", "leak")
def _():
    fn = lambda x: x[jnp.where(x[::-1] > 0, jnp.uint32(0), jnp.uint32(T - 1)).astype(jnp.int32)]
    return proof(fn)


@case("2", "abs at INT_MIN", "leak")
def _():
    low = jnp.iinfo(jnp.int32).min
    size = lambda x: jnp.abs(jnp.where(x[::-1] > 0, low, 1))
    return proof(lambda x: jnp.where(jnp.maximum(size(x), 0) == 0, x, 0.0))


@case("2", "integers that wrap", "leak")
def _():
    top = jnp.iinfo(jnp.int32).max
    return proof(lambda x: jnp.where(jnp.where(x[::-1] > 0, top, 1) + 1 < 0, x, 0.0))


@case("2", "rounding of float8", "leak")
def _():
    eight = lambda a: a.astype(jnp.float8_e4m3fn).astype(jnp.float32)
    return proof(lambda x: jnp.where(eight(jnp.where(x[::-1] > 0, 17.0, 18.0)) > 17.5, x, 0.0))


@case("2", "underflow of a product, in float32 alone", "undecided")
def _():
    fn = lambda x: jnp.where(jnp.where(x[::-1] > 0, 1e-30, 1.0) * 1e-30 > 0, x, 0.0)
    return proof(fn)


@case("2", "a pole: what is promised excepts it", "as long as no intermediate")
def _():
    fn = lambda p: jnp.tri(T) @ jnp.log(p)
    text = str(check_causal(fn, jnp.abs(X) + 1, prove=True)).replace("\n", " ")
    said = text[text.index("as long as no intermediate") :] if "as long as" in text else text
    return said[:26]


for _name, _zero in [("np.zeros(())", np.zeros(())), ("np.float32(0)", np.float32(0))]:
    _gate = lambda zero=_zero: proof(lambda x: x + zero * x[::-1])
    case("2", f"a gate {_name}: a parameter", "clear")(_gate)

GATES = np.zeros(3)


@case("2", "a gate that is an entry of np.zeros(3)", "clear")
def _():
    return proof(lambda x: x + GATES[1] * x[::-1])


@case("2", "a gate in a variable of nnx, np.zeros(())", "clear")
def _():
    gate = nnx.Param(np.zeros(()))
    return proof(lambda x: x + gate[...] * x[::-1])


# 3. Rounding that is not


@case("3", "a float16 that overflows", "imprecise")
def _():
    h = 40 + jnp.abs(jr.normal(jr.key(5), (300,))).astype(jnp.float16)
    naive = lambda h: h / jnp.sqrt(jnp.sum(h * h, dtype=jnp.float16))
    ours = lambda h: (h / h.max()) / jnp.sqrt(jnp.sum((h / h.max()) ** 2))
    return check_same(naive, ours, h).status


@case("3", "variance in one pass, offset 1e4", "imprecise")
def _():
    x = 1e4 + jr.normal(jr.key(6), (64,))
    return check_same(lambda x: (x * x).mean() - x.mean() ** 2, jnp.var, x).status


@case("3", "1 - cos(x), small x", "imprecise")
def _():
    return check_same(lambda x: 1 - jnp.cos(x), lambda x: 2 * jnp.sin(x / 2) ** 2, 1e-4 * X).status


@case("3", "log(1 + x), small x", "imprecise")
def _():
    return check_same(lambda x: jnp.log(1 + x), jnp.log1p, 1e-9 * X).status


@case("3", "a gate on an overflow, float16", "undecided")
def _():
    gate = lambda x: jnp.where(jnp.isinf(jnp.sum(x * x)), 0, 1).astype(jnp.float16)
    return status(lambda x: x * gate(x), (50 * X).astype(jnp.float16))


for _eps in (1e-3, 1e-4, 1e-5, 1e-6):

    @case("3", f"RMSNorm in float16, eps {_eps}", "rounding or same bits")
    def _(eps=_eps):
        norm = RMSNorm(64, eps=eps, dtype=jnp.float16)
        formula = lambda x: x * lax.rsqrt((x * x).mean() + jnp.asarray(eps, x.dtype))
        return check_same(norm, formula, jr.normal(jr.key(7), (64,), jnp.float16)).status


def convolved(x):
    kernel = jnp.exp(-jnp.arange(len(x)) / 3)
    return jnp.fft.irfft(jnp.fft.rfft(x, 2 * len(x)) * jnp.fft.rfft(kernel, 2 * len(x)))[: len(x)]


@case("3", "an FFT and 30 chaotic steps", "undecided or clear")
def _():
    chaos = lambda y: lax.fori_loop(0, 30, lambda i, y: 3.9 * y * (1 - y), y)
    return status(lambda x: chaos(jax.nn.sigmoid(convolved(x))), X)


@case("3", "an FFT and rounding", "undecided or clear")
def _():
    return status(lambda x: jnp.round(convolved(x) * 4).astype(jnp.int8), X)


# 4. Where the edits do not look


def ahead(every, length=2048):
    where = np.minimum(np.arange(length) + (np.arange(length) % every == every - 1), length - 1)
    return lambda x: jnp.cumsum(x)[where]


case("4", "one ahead at every 192nd of 2048, with a proof", "leak")(lambda: proof(ahead(192), LONG))
for _every, _length in [(77, 1000), (100, 1000), (125, 1000), (192, 2048), (200, 2048)]:
    case("4", f"one ahead at every {_every}th of {_length}", "leak")(
        lambda every=_every, length=_length: status(ahead(every, length), LONG[:length])
    )


@case("4", "a length counted from zeros", "leak")
def _():
    return status(lambda x: jnp.cumsum(x) + (x != 0).sum(), X)


@case("4", "assert_same of a shard_map and a plain x", "rounding or same bits")
def _():
    mesh = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    both = dict(mesh=mesh, in_specs=P("d"), out_specs=P("d"))
    return check_same(jax.shard_map(jnp.tanh, **both), jnp.tanh, X).status


@case("4", "assert_same with a sharding constraint", "rounding or same bits")
def _():
    mesh = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = lambda x: lax.with_sharding_constraint(x, NamedSharding(mesh, P("d")))
    return check_same(lambda x: spread(jnp.tanh(x)), jnp.tanh, X).status


@case("4", "assert_same under set_mesh", "rounding or same bits")
def _():
    with jax.set_mesh(jax.make_mesh((4,), ("d",))):
        return check_same(lambda x: x + x, lambda x: 2 * x, X).status


# 5. Crashes and words


@case("5", "fori_loop with traced bounds", "proved or clear")
def _():
    one = lambda x: lambda t: lax.fori_loop(0, t + 1, lambda i, s: s + x[i], 0.0)
    return proof(lambda x: jax.vmap(one(x))(jnp.arange(T)))


@case("5", "device_put of a tuple", "proved")
def _():
    return proof(lambda x: jnp.cumsum(jax.device_put((x, 2 * x))[0]))


@case("5", "a NumPy function", "TypeError: fn must be made of JAX operations")
def _():
    return proof(lambda x: np.cumsum(np.asarray(x)))


@case("5", "flax.nnx in train mode", "ValueError: fn must leave its modules")
def _():
    norm = nnx.BatchNorm(4, rngs=nnx.Rngs(0))
    return status(lambda x: norm(x), jr.normal(jr.key(8), (T, 4)))


@case("5", "... of a clone", "leak")
def _():
    norm = nnx.BatchNorm(4, rngs=nnx.Rngs(0))
    return status(lambda x: nnx.clone(norm)(x), jr.normal(jr.key(8), (T, 4)))


@case("5", "a second argument of fn", "TypeError: fn must take one argument")
def _():
    return status(lambda x, mask: x, X)


@case("5", "an option by position", "TypeError: assert_causal(fn, x) takes options by name")
def _():
    return assert_causal(jnp.cumsum, X, 0).status


@case("5", "gradients of NaN in a large matrix", "NaN")
def _():
    x = jr.normal(jr.key(9), (T, 4096))
    # The derivative of sqrt at 0, times 0.
    fn = lambda x: x + jnp.sqrt(0 * x[::-1])
    matrix = dependency_matrix(fn, x, method="vjp")
    return "NaN" if np.isnan(matrix[0, -1]) else "finite"


def child():
    """Prints the verdicts of this process's package, a line of JSON for each."""
    for _, _, _, run in CASES:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                verdict = run()
        except Exception as error:
            verdict = f"{type(error).__name__}: {' '.join(str(error).split())}"
        print(json.dumps(verdict), flush=True)


def verdicts(root):
    """Of the package in another directory, in a process of its own, on four devices of the CPU."""
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
    environment = {**os.environ, "PYTHONPATH": os.path.abspath(root), "XLA_FLAGS": flags}
    ran = subprocess.run(
        [sys.executable, os.path.abspath(__file__), "--child"],
        env=environment,
        capture_output=True,
        text=True,
        cwd=root,
    )
    lines = ran.stdout.splitlines()
    if len(lines) != len(CASES):
        raise RuntimeError(f"the run in {root} ended early:\n{ran.stderr[-2000:]}")
    return [*map(json.loads, lines)]


def cell(verdict, wanted):
    """A verdict in a few words, in bold where it is wrong."""
    short = verdict if len(verdict) <= 48 else verdict[:45] + "..."
    return short if verdict.startswith(tuple(wanted)) else f"**{short}**"


def main():
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--before", help="another checkout")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return child()
    here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    roots = {"before": options.before, "now": here} if options.before else {"now": here}
    columns = [verdicts(root) for root in roots.values()]
    print(f"JAX {jax.__version__}\n\n| | what | right is | {' | '.join(roots)} |")
    print("|---" * (3 + len(roots)) + "|")
    for (section, name, wanted, _), *row in zip(CASES, *columns, strict=True):
        cells = " | ".join(cell(verdict, wanted) for verdict in row)
        print(f"| {section} | {name} | {' or '.join(wanted)} | {cells} |")
    wrong = sum(
        not verdict.startswith(tuple(case[2]))
        for case, verdict in zip(CASES, columns[-1], strict=True)
    )
    print(f"\nWrong now: {wrong} of {len(CASES)}.")


if __name__ == "__main__":
    main()
