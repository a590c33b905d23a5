"""Where a layer was wrong or refused what `equinox.nn` takes: what comes now, and what came before.

    python -m benchmarks.drop_in
    python -m benchmarks.drop_in --before ../other/checkout

One line for each kind, a Markdown table: "right" is a value that was compared, with float64, with
`equinox.nn` or with plain JAX; an error stands by its name. Before: another checkout of this
library, in the same run. On eight devices of the CPU.
"""

import argparse
import contextlib
import functools as ft
import json
import os
import pathlib
import subprocess
import sys
import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import eqx_norms
from eqx_norms import GroupNorm, LayerNorm, layer_norm, replace_norms

plain = getattr(eqx_norms, "plain", contextlib.nullcontext)
ROOT = pathlib.Path(__file__).parent.parent
CASES = {}


def case(title):
    return lambda f: CASES.setdefault(title, f)


def alike(a, b, rtol=1e-5):
    for one, two in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        one, two = np.asarray(one, np.float64), np.asarray(two, np.float64)
        error = np.abs(one - two).max(initial=0) / (np.abs(two).max(initial=0) or 1)
        if not error <= rtol:
            return f"wrong: {error:.0e} off"
    return "right"


def normal(*shape, seed=0):
    return jr.normal(jr.key(seed), shape)


@case("1. float64 under `jax_explicit_x64_dtypes`")
def explicit_x64():
    x, g = np.random.default_rng(0).normal(size=(2, 8))
    run = lambda x, g: (lambda y, vjp: (y, *vjp(g)))(*jax.vjp(layer_norm, x))
    jax.config.update("jax_explicit_x64_dtypes", "allow")
    try:
        got = run(*(jnp.asarray(a, dtype=jnp.float64) for a in (x + 1e9, g)))
    finally:
        jax.config.update("jax_explicit_x64_dtypes", "warn")
    with jax.enable_x64(True):
        return alike(got, run(jnp.asarray(x + 1e9), jnp.asarray(g)), 1e-6)


@case("2. `axis_name=` of a vmap with the name of a mesh axis, under jit")
def a_name_twice():
    mesh = jax.make_mesh((4,), ("parts",), axis_types=(AxisType.Auto,))
    x, g, weight = normal(4, 8), normal(4, 8, seed=1), normal(8, seed=2)

    def in_parts(x, weight):
        one = lambda x, w: layer_norm(x, w, axis_name="parts")
        return jax.vmap(one, axis_name="parts")(x.reshape(2, -1), weight.reshape(2, -1)).ravel()

    def grad(f, wrap):
        specs = dict(in_specs=(P("parts"), P()), out_specs=P("parts"), check_vma=False)
        rows = jax.shard_map(lambda x, w: wrap(f)(x[0], w)[None], mesh=mesh, **specs)
        return jax.jit(jax.grad(lambda *args: jnp.sum(g * rows(*args)), (0, 1)))(x, weight)

    return alike(grad(in_parts, jax.jit), grad(layer_norm, lambda f: f), 1e-4)


@case("3. one example masked whole, `eps=0`: dweight of the batch")
def fully_masked():
    x, where = normal(3, 5), jnp.ones((3, 5), bool).at[1].set(False)

    def dweight(keep):
        f = jax.vmap(lambda x, m, w: layer_norm(x, w, where=m, eps=0.0), (0, 0, None))
        return jax.grad(lambda w: jnp.sum(jnp.sin(f(x[keep], where[keep], w))))(jnp.ones(5))

    return alike(dweight(jnp.arange(3)), dweight(jnp.array([0, 2])))


@case("4. a parameter that `eqx.partition` took away")
def missing():
    _, static = eqx.partition(LayerNorm(4), eqx.is_array)
    static(normal(4))
    return "no error"


@case("4. a weight beside `use_weight=False`")
def denied():
    def of(layer):
        norm = layer(4, use_weight=False, use_bias=False)
        is_none = lambda leaf: leaf is None
        return eqx.tree_at(lambda n: n.weight, norm, normal(4, seed=1), is_leaf=is_none)

    return alike(of(LayerNorm)(normal(4)), of(eqx.nn.LayerNorm)(normal(4)))


@case("5. NumPy parameters of a GroupNorm, under jit, checkpoint and scan")
def numpy_parameters():
    def of(layer):
        norm = layer(2, 4)
        norm = jax.tree.map(lambda a: np.asarray(a) if eqx.is_array(a) else a, norm)
        step = jax.checkpoint(lambda x: norm(x))
        f = lambda x: jax.lax.scan(lambda c, _: (step(c), None), x, length=2)[0]
        return jax.jit(f)(normal(4, 6))

    return alike(of(GroupNorm), of(eqx.nn.GroupNorm))


@case("6. inside a kernel of one's own, for a TPU")
def own_kernel():
    from jax.experimental import pallas as pl

    def kernel(x_ref, y_ref):
        y_ref[...] = jax.vmap(layer_norm)(x_ref[...])

    shape = jax.ShapeDtypeStruct((8, 128), jnp.float32)
    f = lambda x: pl.pallas_call(kernel, out_shape=shape)(x)
    with plain():
        jax.jit(f).trace(shape).lower(lowering_platforms=("tpu",))
    return "lowers, by `plain`"


@case("7. exporters that know JAX's own primitives alone")
def known_primitives():
    with plain():
        text = str(jax.make_jaxpr(jax.grad(lambda x: layer_norm(x)[0]))(normal(4)))
    return "an unknown primitive" if "eqx_norms_" in text else "none but JAX's own, by `plain`"


@case("8. `jax.linear_transpose` in the weight, kernels")
def transposed():
    x, w, g = normal(3, 6)
    f = lambda w: layer_norm(x, w, implementation="pallas")
    return alike(jax.linear_transpose(f, w)(g), jax.vjp(f, w)[1](g))


@case("9. eps of JAX and NumPy")
def eps():
    numbers = jnp.finfo(jnp.bfloat16).eps, jnp.float32(1e-3), np.asarray(1e-3)
    got = [LayerNorm(4, eps=one)(normal(4)) for one in numbers]
    return alike(got, [LayerNorm(4, eps=float(one))(normal(4)) for one in numbers])


@case("10. an ensemble without its vmap")
def ensemble():
    eqx.filter_vmap(lambda key: LayerNorm(4))(jr.split(jr.key(0), 3))(normal(4))
    return "no error"


@case("11. an empty example, kernels, for a TPU")
def empty():
    f = jax.vmap(ft.partial(layer_norm, implementation="pallas"))
    jax.jit(f).trace(jnp.ones((8, 0))).lower(lowering_platforms=("tpu",))
    return "lowers"


@case("11. under `jax_error_checking_behavior_divide`")
def divide():
    jax.config.update("jax_error_checking_behavior_divide", "raise")
    try:
        got = jax.jit(layer_norm)(normal(4))
    finally:
        jax.config.update("jax_error_checking_behavior_divide", "ignore")
    return alike(got, layer_norm(normal(4)))


@case("12. x and weight split over one axis of an explicit mesh")
def fsdp():
    mesh = jax.make_mesh((4,), ("b",), axis_types=(AxisType.Explicit,))
    x, weight = normal(8, 16), normal(16, seed=1)
    grad = jax.grad(lambda w, x: jnp.sum(jnp.sin(jax.vmap(lambda x: layer_norm(x, w))(x))))
    with jax.set_mesh(mesh):
        split = (jax.device_put(a, NamedSharding(mesh, P("b"))) for a in (weight, x))
        got = jax.jit(grad)(*split)
    return alike(got, grad(weight, x), 1e-4)


@case("13. `elementwise_affine=`, a shape of (), a list of axis names")
def drop_in():
    def of(layer):
        affine = layer((4,), elementwise_affine=False)
        names = jax.vmap(layer(4, axis_name=["i"]) if layer is LayerNorm else lambda x: x)
        return affine(normal(4)), layer(())(jnp.ones(())), names

    (a, b, _), (c, d, _) = of(LayerNorm), of(eqx.nn.LayerNorm)
    return alike((a, b), (c, d))


@case("14. x in float8")
def float8():
    layer_norm(jnp.ones(4, jnp.float8_e4m3fn))
    return "no error"


@case("15. `replace_norms` where there is nothing to exchange")
def nothing():
    state = optax.sgd(0.1).init(eqx.filter(eqx.nn.Linear(2, 2, key=jr.key(0)), eqx.is_array))
    replace_norms(state)
    return "no error"


@case("15. ... of a notebook's cell that runs twice")
def twice():
    norm = replace_norms(eqx.nn.LayerNorm(4))
    return alike(replace_norms(norm)(normal(4)), norm(normal(4)))


def answers():
    warnings.simplefilter("ignore")  # deprecations of `elementwise_affine=`
    found = {}
    for title, run in CASES.items():
        try:
            found[title] = run()
        except Exception as error:
            words = str(error).strip().splitlines() or ["no message"]
            found[title] = f"{type(error).__name__}: {words[0][:70]}"
    return found


def of(checkout):
    """The answers of another checkout, from a process that imports it."""
    env = os.environ | {"PYTHONPATH": str(pathlib.Path(checkout).resolve())}
    command = [sys.executable, __file__, "--child"]
    run = subprocess.run(command, env=env, stdout=subprocess.PIPE, check=True)
    return json.loads(run.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", metavar="CHECKOUT")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        jax.config.update("jax_num_cpu_devices", 8)
        return print(json.dumps(answers()))
    columns = {"now": of(ROOT)}
    if args.before:
        columns = {"before": of(args.before)} | columns
    print(f"jax {jax.__version__}\n\n| | " + " | ".join(columns) + " |")
    print("|---|" + "---|" * len(columns))
    for title in CASES:
        print(f"| {title} | " + " | ".join(c[title] for c in columns.values()) + " |")


if __name__ == "__main__":
    main()
