"""Whether decoders as people write them are proved, and what the proof has no rule for.

    python -m benchmarks.proofs
    python -m benchmarks.proofs --without-rule
    python -m benchmarks.proofs --without-rule --write    # into docs/causality.md
    python -m benchmarks.proofs --functions               # which functions meet them

The table is of one block of each kind, in seconds of processor time with all that a check does
around the proof. The list is of the primitives of this JAX: those that jax.lax, jax.numpy, jax.nn,
jax.random and jax.scipy are written with, and those that jax.extend lists.
"""

import argparse
import contextlib
import inspect
import itertools
import pathlib
import re
import sys
import textwrap
import time
import warnings

import flax.nnx as nnx
import haiku as hk
import jax
import jax.extend.core as jex
import jax.numpy as jnp
import jax.random as jr
import jax.scipy.linalg
import jax.scipy.signal
import jax.scipy.special
from jax.sharding import AxisType, PartitionSpec as P

from eqx_norms.causality import check_causal
from eqx_norms.causality._proof._flow import RULES

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "causality.md"
WIDTH, HEADS = 64, 4


def nnx_attention(length):
    attention = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=nnx.Rngs(0))
    mask = nnx.make_causal_mask(jnp.ones((1, length))) > 0
    return lambda x: attention(x[None], mask=mask)[0]


def haiku_attention(length):
    def attend(x):
        init = hk.initializers.VarianceScaling()
        mask = jnp.tri(length, dtype=bool)[None]
        return hk.MultiHeadAttention(HEADS, WIDTH // HEADS, w_init=init)(x, x, x, mask=mask)

    model = hk.without_apply_rng(hk.transform(attend))
    params = model.init(jr.key(0), jnp.zeros((length, WIDTH)))
    return lambda x: model.apply(params, x)


def jax_attention(x):
    heads = x.reshape(len(x), HEADS, -1)
    return jax.nn.dot_product_attention(heads, heads, heads, is_causal=True).reshape(x.shape)


def with_sinks(x):
    """A window of 64, and the first 4 positions."""
    t = jnp.arange(len(x))
    near = (t[:, None] - t < 64) | (t < 4)
    mask = jnp.tri(len(x), dtype=bool) & near
    return jax.nn.softmax(jnp.where(mask, x @ x.T / 8, -jnp.inf)) @ x


def rotated(x):
    """RoPE on interleaved pairs."""
    angle = jnp.arange(len(x))[:, None] * 100.0 ** -jnp.linspace(0, 1, WIDTH // 2)
    a, b = x[:, 0::2], x[:, 1::2]
    turned = jnp.stack(
        [a * jnp.cos(angle) - b * jnp.sin(angle), a * jnp.sin(angle) + b * jnp.cos(angle)], -1
    ).reshape(x.shape)
    mask = jnp.tri(len(x), dtype=bool)
    return jax.nn.softmax(jnp.where(mask, turned @ turned.T, -1e9)) @ x


def mamba2(x):
    """A causal convolution, a gate, and the state-space dual as one matrix."""
    kernel = jnp.ones((4, 1, WIDTH)) / 4
    mixed = jax.lax.conv_general_dilated(
        x[None], kernel, (1,), [(3, 0)], None, None, ("NWC", "WIO", "NWC"), WIDTH
    )[0]
    u, b, c = jax.nn.silu(mixed), x[:, :16], x[:, 16:32]
    log_decay = jnp.cumsum(-jax.nn.softplus(x[:, 32:33]), 0)
    mask = jnp.tri(len(x), dtype=bool)
    decay = jnp.where(mask, jnp.exp(jnp.where(mask, log_decay - log_decay.T, 0)), 0)
    return jnp.einsum("ts,tn,sn,sd->td", decay, c, b, u) * jax.nn.silu(x)


def rwkv(x):
    """Token shift, and the weighted sum of RWKV-4 by a scan."""
    shifted = jnp.pad(x, ((1, 0), (0, 0)))[:-1]
    k, v, r = 0.5 * (x + shifted), shifted, jax.nn.sigmoid(x)

    def step(state, row):
        top, bottom, largest = state
        k, v = row
        now = jnp.maximum(largest, k)
        a, b = jnp.exp(largest - now), jnp.exp(k - now)
        top, bottom = a * top + b * v, a * bottom + b
        return (top, bottom, now), top / bottom

    zero = jnp.zeros(WIDTH)
    return r * jax.lax.scan(step, (zero, zero, zero - 30.0), (k, v))[1]


def retnet(x, chunk=64):
    """Retention by chunks: inside of them a matrix, between them a state."""
    t = jnp.arange(chunk)
    decay = jnp.where(t[:, None] >= t, 0.9 ** (t[:, None] - t).astype(float), 0)

    def one(state, q):
        inner = (q @ q.T * decay) @ q
        cross = (q @ state) * (0.9 ** (t + 1.0))[:, None]
        state = 0.9**chunk * state + (q * (0.9 ** (chunk - 1.0 - t))[:, None]).T @ q
        return state, inner + cross

    chunks = x.reshape(-1, chunk, WIDTH)
    return jax.lax.scan(one, jnp.zeros((WIDTH, WIDTH)), chunks)[1].reshape(x.shape)


def cached(x):
    """One token at a time, with a cache of keys and values."""

    def step(carry, row):
        cache, t = carry
        cache = jax.lax.dynamic_update_slice(cache, row[None], (t, 0))
        scores = jnp.where(jnp.arange(len(x)) <= t, cache @ row, -jnp.inf)
        return (cache, t + 1), jax.nn.softmax(scores) @ cache

    return jax.lax.scan(step, (jnp.zeros_like(x), 0), x)[1]


def ring(x):
    """Keys and values go around four devices; each keeps its queries."""
    mesh = jax.make_mesh((4,), ("seq",), axis_types=(AxisType.Auto,))
    next_one = [(k, (k + 1) % 4) for k in range(4)]

    def local(q):
        me, size = jax.lax.axis_index("seq"), len(q)

        def step(carry, k):
            largest, bottom, top, kv = carry
            rows, columns = me * size + jnp.arange(size), (me - k) % 4 * size + jnp.arange(size)
            scores = jnp.where(rows[:, None] >= columns, q @ kv.T / 8, -jnp.inf)
            now = jnp.maximum(largest, scores.max(1))
            weights, scale = jnp.exp(scores - now[:, None]), jnp.exp(largest - now)
            top = scale[:, None] * top + weights @ kv
            bottom = scale * bottom + weights.sum(1)
            return (now, bottom, top, jax.lax.ppermute(kv, "seq", next_one)), None

        zero = 0 * q[:, 0]
        carry, _ = jax.lax.scan(step, (zero - 1e30, zero, 0 * q, q), jnp.arange(4))
        return carry[2] / carry[1][:, None]

    return jax.shard_map(local, mesh=mesh, in_specs=P("seq"), out_specs=P("seq"))(x)


DECODERS = {
    "attention of flax.nnx": nnx_attention,
    "attention of Haiku": haiku_attention,
    "`jax.nn.dot_product_attention`": lambda _: jax_attention,
    "a sliding window with sinks": lambda _: with_sinks,
    "RoPE of interleaved pairs, by `jnp.stack`": lambda _: rotated,
    "a Mamba-2 block": lambda _: mamba2,
    "RWKV-4's weighted sum": lambda _: rwkv,
    "RetNet by chunks": lambda _: retnet,
    "a cache of keys and values in a scan": lambda _: cached,
    "a ring in `shard_map` on 4 devices": lambda _: ring,
}


def decoders(length):
    print(f"\n| at {length} positions | status | s |\n|---|---|---|")
    x = jr.normal(jr.key(0), (length, WIDTH))
    for name, make in DECODERS.items():
        fn = make(length)
        start = time.process_time()
        report = check_causal(fn, x, prove=True, splits=(length // 2,))
        seconds = time.process_time() - start
        why = f" ({report.obstacles[0]})" if report.obstacles else ""
        print(f"| {name} | {report.status}{why} | {seconds:.1f} |", flush=True)


# A call is gone through, a loop has its own rule, what has no operands is a constant, Refs are
# refused, and what passes between devices is only inside of a `shard_map`, which is gone through.
GONE_THROUGH = (
    "call closed_call composite core_call custom_jvp_call custom_vjp_call custom_lin eval_jaxpr "
    "jit remat2 scan while cond iota empty empty2 iota_2x32_shape platform_index get swap "
    "addupdate all_gather all_gather_invariant all_gather_reduced all_to_all axis_index pbroadcast "
    "pcast pmax pmin ppermute preduced psum psum_invariant pvary reduce_scatter custom_linear_solve"
)


# Parts of the names of the modules that hold what jax.lax, jax.numpy, jax.nn, jax.random and
# jax.scipy are written with.
HOLD = {"lax", "nn", "numpy", "random", "scipy", "cudnn"}


def primitives():
    """The names of all that jax.extend lists, and of what the modules of these packages hold."""
    modules = [jex.primitives]
    for name, module in sys.modules.items():
        package, *parts = name.split(".")
        if package == "jax" and HOLD & {*parts} and not {"experimental", "parallel"} & {*parts}:
            modules.append(module)
    held = [x for module in modules for x in vars(module).values()]
    return {x.name.replace("-", "_") for x in held if isinstance(x, jex.Primitive)}


def without_rule():
    """The names of the primitives that connect all that goes in with all that comes out."""
    return sorted(primitives() - {*RULES, *GONE_THROUGH.split()})


def functions():
    """Public functions that meet a primitive without a rule, by what it is, traced on arrays of
    some shapes and dtypes; and how many could be traced so, of how many.
    """
    modules = [jnp, jnp.linalg, jnp.fft, jax.nn, jax.lax.linalg, jr]
    modules += [jax.scipy.special, jax.scipy.signal, jax.scipy.linalg, jax.scipy.stats]
    array, found, traced, total = jax.ShapeDtypeStruct, {}, 0, 0
    kinds = [array(s, d) for s in ((4, 4), (4,), ()) for d in (jnp.float32, jnp.int32, bool)]
    kinds += [jax.eval_shape(lambda: jr.key(0)), array((2, 4, 4), jnp.float32)]
    tries = [[kind] * n for kind in kinds for n in (1, 2, 3)] + [*itertools.permutations(kinds, 2)]
    without = {*without_rule()}
    for module in modules:
        for name, fn in vars(module).items():
            if name.startswith("_") or not inspect.isfunction(inspect.unwrap(fn)):
                continue
            met, total = names_of(fn, tries), total + 1
            traced += met is not None
            for primitive in without & (met or set()):
                found.setdefault(primitive, []).append(f"{module.__name__}.{name}")
    return found, traced, total


def names_of(fn, tries):
    """The primitives in the program of a function, of the first operands that it takes."""
    kinds = [p.kind for p in inspect.signature(fn).parameters.values() if p.default is p.empty]
    count = len([kind for kind in kinds if kind < inspect.Parameter.VAR_POSITIONAL])
    for operands in [o for o in tries if len(o) == max(count, 1)]:
        with contextlib.suppress(Exception):
            return {eqn.primitive.name for eqn in equations(jax.make_jaxpr(fn)(*operands))}


def equations(closed):
    """All of a jaxpr, those of what it holds as well."""
    for eqn in getattr(closed, "jaxpr", closed).eqns:
        yield eqn
        for inner in jex.jaxprs_in_params(eqn.params):
            yield from equations(inner)


def on_the_page():
    """The version and the names of each list on the page."""
    text = PAGE.read_text()
    found = re.findall(_LIST, text)
    return {version: set(names.split()) for version, names in found}


_LIST = r"```text\nJAX (\S+)\n((?:[a-z0-9_ ]+\n)+)```"


def write():
    """Puts the list of this JAX in the place of the one on the page."""
    lines = textwrap.fill(" ".join(without_rule()), 100)
    new = f"```text\nJAX {jax.__version__}\n{lines}\n```"
    text = PAGE.read_text()
    old = re.compile(_LIST.replace(r"(\S+)", re.escape(jax.__version__)))
    if not old.search(text):
        raise ValueError(f"{PAGE.name} has no list of JAX {jax.__version__} to replace: add one.")
    PAGE.write_text(old.sub(lambda _: new, text))


def main():
    """Prints the table, or the list."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--length", type=int, default=512, help="positions")
    parser.add_argument("--without-rule", action="store_true", help="that list alone")
    parser.add_argument("--write", action="store_true", help="put it into the page")
    parser.add_argument("--functions", action="store_true", help="those that meet them")
    options = parser.parse_args()
    if options.functions:
        found, traced, total = functions()
        for primitive, names in sorted(found.items()):
            print(f"{primitive}: {', '.join(names)}")
        print(f"{traced} of {total} functions were traced.")
        return
    if options.without_rule:
        print(textwrap.fill(" ".join(without_rule()), 100))
        if options.write:
            write()
        return
    warnings.simplefilter("ignore")
    jax.config.update("jax_num_cpu_devices", 4)
    decoders(options.length)


if __name__ == "__main__":
    main()
