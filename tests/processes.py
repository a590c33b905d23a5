"""What each of several processes does in test_processes.py: `python processes.py INDEX PORT`.

Every case lays its arrays over a mesh of four devices, and returns what can be written as JSON. It
runs in one process of four devices and in two of two, and must say the same.
"""

import json
import os
import pathlib
import re
import sys
import traceback

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from eqx_norms import layer_norm, rms_norm
from eqx_norms.causality import (
    assert_causal,
    assert_independent,
    assert_reads,
    check_causal,
    check_same,
    dependency_matrix,
    host,
    rules,
)
from eqx_norms.diagnostics import Watch, activation_stats, capture, capture_grads, diagnose

T, D, B = 8, 4, 4


def drawn(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def mesh(axis_type=AxisType.Auto):
    return jax.make_mesh((4,), ("d",), axis_types=(axis_type,))


def put(array, *spec):
    """`array` over the four devices of all processes."""
    array, sharding = np.asarray(array), NamedSharding(mesh(), P(*spec))
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def told(report):
    """The verdict, who reads whom that must not, and all that it prints."""
    forbidden = np.argwhere(~report.allowed & (report.matrix > 0)).tolist()
    return dict(status=report.status, forbidden=forbidden, edits=report.edits, text=str(report))


def running_mean(x):
    return jnp.cumsum(x, axis=0) / jnp.arange(1, len(x) + 1, dtype=x.dtype)[:, None]


def centred(x):
    return x - x.mean(axis=0, keepdims=True)


class Mixer(eqx.Module):
    """Each step a sum of `w`-mapped steps; causal, or not."""

    w: jax.Array
    causal: bool = eqx.field(static=True)

    def __call__(self, x):
        values = jnp.tanh(x @ self.w)
        return running_mean(values) if self.causal else centred(values)


def mixer(causal, *spec):
    return Mixer(put(drawn(1, D, D), *spec), causal)


CASES = {}


def case(fn):
    CASES[fn.__name__] = fn
    return fn


@case
def x_split_over_time():
    x = put(drawn(0, T, D), "d")
    return [told(check_causal(fn, x)) for fn in (running_mean, centred)]


@case
def a_batch_that_is_split():
    x = put(drawn(0, B, T, D), "d")
    along_time = told(check_causal(jax.vmap(running_mean), x, axis=1))
    return [along_time, told(assert_independent(jax.vmap(centred), x))]


@case
def parameters_split_in_a_module():
    return told(check_causal(mixer(False, "d"), drawn(0, T, D)))


@case
def parameters_split_by_closure():
    w, x = put(drawn(1, D, D), None, "d"), put(drawn(0, T, D), "d")
    return told(check_causal(lambda x: running_mean(x @ w), x))


@case
def parameters_split_and_fixed():
    x = {"x": drawn(0, T, D), "w": put(drawn(1, D, D), "d")}
    return told(check_causal(lambda x: centred(x["x"] @ x["w"]), x, fixed="w"))


@case
def perturbed_parameters():
    zero = Mixer(put(np.zeros((D, D), np.float32), "d"), causal=False)
    return told(check_causal(zero, drawn(0, T, D), perturb_params=0.1))


@case
def proofs():
    x = put(drawn(0, T, D), "d")
    return [
        told(assert_causal(mixer(True, "d"), x, prove="required")),
        told(assert_causal(lambda x: running_mean(jax.vmap(layer_norm)(x)), x, prove=True)),
    ]


@case
def outputs_that_are_split():
    sharding = NamedSharding(mesh(), P("d"))
    fn = lambda x: jax.lax.with_sharding_constraint(running_mean(x), sharding)
    x = put(drawn(0, T, D))
    return told(check_causal(fn, x))


@case
def rules_and_what_must_be_read():
    x = put(drawn(0, T, D), "d")
    allowed = rules.causal(T)
    return told(assert_reads(running_mean, x, allowed, required=allowed))


@case
def several_axes():
    x = put(drawn(0, 2, T, D), None, "d")
    flat = lambda x: running_mean(x.reshape(2 * T, D)).reshape(2, T, D)
    return told(check_causal(flat, x, axis=(0, 1)))


@case
def matrices():
    x = put(drawn(0, T, D), "d")
    pairs = (centred, "perturb"), (running_mean, "vjp")
    return [(dependency_matrix(fn, x, method=method) > 0).tolist() for fn, method in pairs]


@case
def same_functions():
    x, w = put(drawn(0, T, D), "d"), put(drawn(1, D, D), "d")
    normed = lambda x, **options: jax.vmap(lambda row: layer_norm(row, **options))(x @ w)
    one, three = normed, lambda x: normed(x, eps=1e-2)
    two = lambda x: jax.nn.standardize(x @ w, epsilon=1e-5)
    return [check_same(one, other, x).status for other in (one, two, three)]


@case
def ring_attention():
    """Blocks of keys and values go round; the mask may forget where they come from."""

    def attend(right):
        def of_a_part(x):
            here, n = jax.lax.axis_index("d"), x.shape[0]
            at = here * n + jnp.arange(n)
            scores, values = [], []
            block = x
            for step in range(4):
                source = (here + step) % 4
                there = source * n + jnp.arange(n) if right else here * n + jnp.arange(n)
                seen = there[None] <= at[:, None]
                scores.append(jnp.where(seen, x @ block.T, -jnp.inf))
                values.append(block)
                block = jax.lax.ppermute(block, "d", [(i, (i - 1) % 4) for i in range(4)])
            weights = jax.nn.softmax(jnp.concatenate(scores, axis=1), axis=1)
            return weights @ jnp.concatenate(values)

        return jax.shard_map(of_a_part, mesh=mesh(), in_specs=P("d"), out_specs=P("d"))

    x = put(drawn(0, T, D), "d")
    return [told(check_causal(attend(right), x)) for right in (True, False)]


@case
def statistics_of_what_is_split():
    x = put(drawn(0, T, D), "d")
    stats = activation_stats(x, (16, 50, 84))
    own = activation_stats(drawn(0, T, D), (16, 50, 84))
    np.testing.assert_allclose(np.hstack(stats), np.hstack(own), rtol=1e-5, atol=1e-6)
    return stats.percentiles.tolist()


def mlp(*spec):
    model = eqx.nn.MLP(D, D, 8, 2, key=jax.random.key(3))
    rng = np.random.default_rng(4)
    lay = lambda x: put(0.5 * rng.normal(size=x.shape).astype(np.float32), *spec)
    return jax.tree.map(lambda x: lay(x) if eqx.is_array(x) else x, model)


def loss(model, x):
    return jnp.mean((jax.vmap(model)(x) - x) ** 2)


@case
def captured():
    x, model = put(drawn(0, T, D), "d"), mlp("d")
    out, values = capture(lambda m, x: jax.vmap(m)(x), model, x, where=eqx.nn.Linear)
    value, _, grads, _ = capture_grads(loss, model, x, where=eqx.nn.Linear)
    return numbers(dict(out=out, loss=value, values=values, grads=grads))


@case
def diagnosed():
    x, model = put(drawn(0, 2 * T, D), "d"), mlp("d")
    dead = eqx.tree_at(lambda m: m.layers[0].bias, model, put(np.full(8, -30, np.float32)))
    diagnosis = diagnose(loss, dead, x)
    return [[[found.kind, found.where] for found in diagnosis.findings], diagnosis.scalars()]


@case
def watched():
    x, model = put(drawn(0, T, D), "d"), mlp("d")
    watch = Watch(loss, where=eqx.nn.Linear)
    looks = [watch.measure(model, x) for _ in range(2)]
    if jax.process_index() == 0:
        watch.plot(looks)
    # Of the counts, one may be next to its bin.
    return [numbers([x for x in jax.tree.leaves(look) if x.dtype.kind == "f"]) for look in looks]


@case
def explicit_axes():
    sharding = NamedSharding(mesh(AxisType.Explicit), P("d"))
    array = drawn(0, B, T, D)
    x = jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
    model = eqx.nn.Lambda(jnp.tanh)
    loss = lambda model, x: jnp.mean(jnp.sin(model(x)))
    run = jax.jit(lambda x: capture_grads(loss, model, x, where=eqx.nn.Lambda)[:3])
    found = numbers([*jax.block_until_ready(run(x)), activation_stats(x)[:4]])
    return [told(check_causal(jax.vmap(centred), x, axis=1)), found]


@case
def beside_jax():
    x = put(drawn(0, T, D), "d")
    causal = told(check_causal(host(lambda x: np.cumsum(x, axis=0)), x))
    same = check_same(host(lambda x: np.cumsum(x, axis=0)), lambda x: jnp.cumsum(x, axis=0), x)
    return [causal, same.status]


@case
def parts_that_differ():
    """Each process has a part of its own where all must have the same."""
    parts, message = drawn(jax.process_index(), T, D), ""
    try:
        check_causal(mixer(True, "d"), parts)
    except ValueError as error:
        message = str(error)
    assert ("jax.make_array_from_process_local_data" in message) == (jax.process_count() > 1)


LAYOUTS = {
    "batch": ((("d",), ()), ()),
    "FSDP": ((("d",), ()), ("d",)),
    "tensor parallel": (((None, None, "d"), ()), ("d",)),
    "sequence": (((None, "d"), ()), ()),
}


@case
def layers_against_float64():
    x, g = drawn(0, B, T, 8), drawn(5, B, T, 8)
    weight, bias = 1 + drawn(6, 8), drawn(7, 8)
    f64 = lambda *arrays: [a.astype(np.float64) for a in arrays]

    def derivatives(norm, has_bias):
        def of(x, weight, bias, g):
            more = (bias,) if has_bias else ()
            f = lambda x, weight, *more: jax.vmap(jax.vmap(lambda x: norm(x, weight, *more)))(x)
            loss = lambda *args: jnp.sum(g * f(*args))
            return f(x, weight, *more), jax.grad(loss, tuple(range(2 + has_bias)))(x, weight, *more)

        return of

    done = []
    for name, norm, has_bias in (("layer", layer_norm, True), ("rms", rms_norm, False)):
        of = derivatives(norm, has_bias)
        with jax.enable_x64(True):
            want = jax.device_get(jax.jit(of)(*f64(x, weight, bias, g)))
        for layout, ((spec, _), own) in LAYOUTS.items():
            args = put(x, *spec), put(weight, *own), put(bias, *own), put(g, *spec)
            got = jax.tree.map(gathered, jax.block_until_ready(jax.jit(of)(*args)))
            for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
                # Sums of 32 products of numbers of size one.
                np.testing.assert_allclose(a, b, rtol=1e-5, atol=3e-5, err_msg=f"{name} {layout}")
            done.append(f"{name}, {layout}")
    return done


def gathered(x):
    split = isinstance(x, jax.Array) and not x.is_fully_addressable
    return multihost_utils.process_allgather(x, tiled=True) if split else x


def numbers(tree):
    """Of each array the numbers, by its path."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path): np.ravel(gathered(x)).tolist() for path, x in leaves}


def results(chosen=None):
    for name, fn in CASES.items():
        if chosen and name not in chosen:
            continue
        try:
            yield name, fn()
        except Exception:
            yield name, traceback.format_exc()


def page():
    """Runs the blocks of docs/many_devices.md, which want eight devices; how many there are."""
    text = (pathlib.Path(__file__).parents[1] / "docs" / "many_devices.md").read_text()
    found, namespace = re.findall(r"```python\n(.*?)```", text, re.DOTALL), {}
    for code in found:
        exec(compile(code, "many_devices.md", "exec"), namespace)
    return len(found)


def main(index, port):
    of_page = sys.argv[3:] == ["page"]
    jax.config.update("jax_num_cpu_devices", 4 if of_page else 2)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, index)
    if of_page:
        print(json.dumps(["page", page()]), flush=True)
        return
    for name, result in results(sys.argv[3:]):
        print(json.dumps([name, result]), flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:3]))
    sys.stdout.flush()
    os._exit(0)
