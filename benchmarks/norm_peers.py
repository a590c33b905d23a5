"""Norms of other libraries: names, eps, dtypes, and errors against float64.

    pip install -e ".[masks]" && python -m benchmarks.norm_peers
    python -m benchmarks.norm_peers page

On Python 3.11, where torch's CPU build is small. Each library computes as it does by default, but
for eps=1e-5; a column says what its own is. What an offset does is asked of float32 numbers from
N(offset, 1) in rows of 1024; "half" of float16 numbers with a spread of 300, of which the result
should have a spread of 1; "constant" of rows of 1e6 / 3, of which it should be 0. For GroupNorm
each row is a group: of 8 channels of 8 x 16, in images of 4 groups.

With `page` it runs the blocks of docs/moving.md that load parameters of these libraries.
"""

import contextlib
import functools as ft
import pathlib
import re
import sys
import tempfile
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

ROWS, WIDTH, EPS = 16, 1024, 1e-5
OFFSETS = (0.0, 1e4, 1e6)


class Peer(NamedTuple):
    """`y(x, weight, bias)` and `vjp(x, g)` with weight 1 and bias 0, of and to NumPy arrays."""

    names: str
    eps: str
    y: Callable[..., Any]
    vjp: Callable[..., Any] | None = None


def of_jax(f) -> tuple[Callable, Callable]:
    def y(x, weight, bias):
        return np.asarray(jax.jit(f)(*map(jnp.asarray, (x, weight, bias))))

    def vjp(x, g):
        one, zero = jnp.ones(WIDTH), jnp.zeros(WIDTH)
        pull = lambda x, g: jax.vjp(lambda x: f(x, one, zero), x)[1](g)[0]
        return np.asarray(jax.jit(pull)(x, g))

    return y, vjp


def ours(rms: bool) -> Peer:
    from eqx_norms import layer_norm, rms_norm

    run = lambda x, w, b: jax.vmap(lambda x: rms_norm(x, w) if rms else layer_norm(x, w, b))(x)
    return Peer("`weight`, `bias`", "1e-5", *of_jax(run))


def equinox(rms: bool) -> Peer:
    import equinox as eqx

    cls = eqx.nn.RMSNorm if rms else eqx.nn.LayerNorm

    def run(x, w, b):
        layer = eqx.tree_at(lambda m: (m.weight, m.bias), cls(WIDTH, eps=EPS), (w, b))
        return jax.vmap(layer)(x)

    return Peer("`weight`, `bias`", "1e-5", *of_jax(run))


def linen(rms: bool) -> Peer:
    import flax.linen as nn

    layer = (nn.RMSNorm if rms else nn.LayerNorm)(epsilon=EPS)
    params = lambda w, b: {"params": {"scale": w} if rms else {"scale": w, "bias": b}}
    return Peer("`scale`, `bias`", "1e-6", *of_jax(lambda x, w, b: layer.apply(params(w, b), x)))


def nnx(rms: bool) -> Peer:
    from flax import nnx as nn

    def run(x, w, b):
        layer = (nn.RMSNorm if rms else nn.LayerNorm)(WIDTH, epsilon=EPS, rngs=nn.Rngs(0))
        layer.scale = nn.Param(w)
        if not rms:
            layer.bias = nn.Param(b)
        return layer(x)

    return Peer("`scale`, `bias`", "1e-6", *of_jax(run))


def haiku(rms: bool) -> Peer:
    import haiku as hk

    def run(x, w, b):
        if rms:
            f, params = lambda x: hk.RMSNorm(-1, EPS)(x), {"rms_norm": {"scale": w}}
        else:
            f = lambda x: hk.LayerNorm(-1, True, True, EPS)(x)
            params = {"layer_norm": {"scale": w, "offset": b}}
        return hk.transform(f).apply(params, None, x)

    return Peer("`scale`, `offset`", "1e-5", *of_jax(run))


def penzai(rms: bool) -> Peer:
    from penzai import pz

    def run(x, w, b):
        named = pz.nx.wrap(x).tag("rows", "features")
        one = pz.nn.RMSStandardize if rms else pz.nn.Standardize
        y = one(across="features", epsilon=EPS)(named)
        scale, shift = (pz.nx.wrap(a).tag("features") for a in (w, b))
        y = y * scale if rms else y * scale + shift
        return y.untag("rows", "features").unwrap()

    return Peer("`scale.weights`, `shift.bias`", "1e-6", *of_jax(run))


def tokamax(rms: bool) -> Peer:
    import tokamax as tk

    def run(x, w, b):
        options = {"axis": -1, "epsilon": EPS, "implementation": "xla"}
        if rms:
            return tk.layer_norm(x, w, None, subtract_mean=False, **options)
        return tk.layer_norm(x, w, b, **options)

    return Peer("`scale`, `offset`", "1e-6", *of_jax(run))


def standardize(rms: bool) -> Peer:
    return Peer("none", "1e-5", *of_jax(lambda x, w, b: jax.nn.standardize(x, epsilon=EPS)))


def keras(rms: bool) -> Peer:
    import os

    os.environ["KERAS_BACKEND"] = "jax"
    import keras

    cls = keras.layers.RMSNormalization if rms else keras.layers.LayerNormalization

    def run(x, w, b):
        layer = cls(epsilon=EPS, dtype=keras.DTypePolicy(_mixed(x.dtype)))
        layer.build((None, WIDTH))
        return layer.stateless_call([w] if rms else [w, b], [], x)[0]

    names, eps = ("`scale`", "1e-6") if rms else ("`gamma`, `beta`", "1e-3")
    return Peer(names, eps, *of_jax(run))


def _mixed(dtype) -> str:
    name = jnp.dtype(dtype).name
    return name if name == "float32" else f"mixed_{name}"


def of_torch(run):
    """The output and the gradient in x of a function of tensors, for arrays."""
    import torch as th

    to = lambda a: th.tensor(np.asarray(a, np.float32)).to(getattr(th, np.dtype(a.dtype).name))

    def y(x, weight, bias):
        out = run(to(x), to(weight), to(bias))
        return np.asarray(out.float()).astype(jnp.dtype(str(out.dtype).removeprefix("torch.")))

    def vjp(x, g):
        x = to(x).requires_grad_()
        run(x, th.ones(WIDTH), th.zeros(WIDTH)).backward(to(g))
        return x.grad.numpy()

    return y, vjp


def torch(rms: bool) -> Peer:
    from torch.nn import functional as F

    def run(x, w, b):
        if rms:
            return F.rms_norm(x, (WIDTH,), w, EPS)
        return F.layer_norm(x, (WIDTH,), w, b, EPS)

    return Peer("`weight`, `bias`", "float32's" if rms else "1e-5", *of_torch(run))


def mlx(rms: bool) -> Peer:
    import mlx.core as mx

    def run(x, w, b):
        return mx.fast.rms_norm(x, w, EPS) if rms else mx.fast.layer_norm(x, w, b, EPS)

    to = lambda a: mx.array(np.asarray(a, np.float32)).astype(getattr(mx, np.dtype(a.dtype).name))
    back = lambda a: np.array(a.astype(mx.float32)).astype(jnp.dtype(str(a.dtype).split(".")[-1]))

    def vjp(x, g):
        pull = lambda x: run(x, mx.ones(WIDTH), mx.zeros(WIDTH))
        return back(mx.vjp(pull, [to(x)], [to(g)])[1][0])

    return Peer("`weight`, `bias`", "1e-5", lambda *args: back(run(*map(to, args))), vjp)


def tinygrad(rms: bool) -> Peer:
    import os

    os.environ.setdefault("DEV", "PYTHON")  # Its interpreter, which asks for no compiler.
    from tinygrad import Tensor, dtypes, nn

    def run(x, w, b):
        layer = (nn.RMSNorm if rms else nn.LayerNorm)(WIDTH, eps=EPS)
        layer.weight = w
        if not rms:
            layer.bias = b
        return layer(x)

    to = lambda a: Tensor(np.asarray(a, np.float32)).cast(getattr(dtypes, np.dtype(a.dtype).name))

    def y(x, weight, bias):
        out = run(*map(to, (x, weight, bias)))
        name = {"half": "float16", "float": "float32", "__bf16": "bfloat16"}[out.dtype.name]
        return out.float().numpy().astype(jnp.dtype(name))

    def vjp(x, g):
        x = to(x)
        y = run(x, Tensor.ones(WIDTH), Tensor.zeros(WIDTH))
        return (y * to(g)).sum().gradient(x)[0].numpy()

    return Peer("`weight`, `bias`", "1e-6" if rms else "1e-5", y, vjp)


def onnxruntime(rms: bool) -> Peer:
    import onnx
    import onnxruntime as ort
    from onnx import TensorProto, helper

    kinds = {
        "float32": TensorProto.FLOAT,
        "float16": TensorProto.FLOAT16,
        "bfloat16": TensorProto.BFLOAT16,
    }

    def y(x, weight, bias):
        kind, params = kinds[x.dtype.name], ["w"] if rms else ["w", "b"]
        op = "RMSNormalization" if rms else "LayerNormalization"
        node = helper.make_node(op, ["x", *params], ["y"], epsilon=EPS, axis=-1)
        inputs = [helper.make_tensor_value_info("x", kind, x.shape)]
        inputs += [
            helper.make_tensor_value_info(p, kinds[weight.dtype.name], [WIDTH]) for p in params
        ]
        out = helper.make_tensor_value_info("y", kind, x.shape)
        graph = helper.make_graph([node], "norm", inputs, [out])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
        onnx.checker.check_model(model)
        session = ort.InferenceSession(model.SerializeToString())
        given = {"x": x, "w": weight} | ({} if rms else {"b": bias})
        return session.run(None, given)[0]

    return Peer("`scale`" if rms else "`Scale`, `B`", "1e-5", y)


# ---- GroupNorm.

IMAGES, GROUPS, CHANNELS = (4, 32, 8, 16), 4, 32


def of_images(f, back=lambda y: y):
    """Of `f`, which takes images, and a weight and bias of the channels."""

    def run(x, w, b):
        return back(f(x.reshape(IMAGES), w[:CHANNELS], b[:CHANNELS])).reshape(ROWS, WIDTH)

    return run


def of_images_of_jax(f, *, channels_last=False) -> tuple[Callable, Callable]:
    def run(x, w, b):
        if not channels_last:
            return f(x, w, b)
        return jnp.moveaxis(f(jnp.moveaxis(x, 1, -1), w, b), -1, 1)

    return of_jax(of_images(run))


def our_groups(_) -> Peer:
    from eqx_norms import group_norm

    f = lambda x, w, b: jax.vmap(lambda x: group_norm(x, GROUPS, w, b))(x)
    return Peer("`weight`, `bias`", "1e-5", *of_images_of_jax(f))


def equinox_groups(_) -> Peer:
    import equinox as eqx

    def f(x, w, b):
        layer = eqx.nn.GroupNorm(GROUPS, CHANNELS, eps=EPS)
        return jax.vmap(eqx.tree_at(lambda m: (m.weight, m.bias), layer, (w, b)))(x)

    return Peer("`weight`, `bias`", "1e-5", *of_images_of_jax(f))


def linen_groups(_) -> Peer:
    import flax.linen as nn

    layer = nn.GroupNorm(GROUPS, epsilon=EPS)
    f = lambda x, w, b: layer.apply({"params": {"scale": w, "bias": b}}, x)
    return Peer("`scale`, `bias`", "1e-6", *of_images_of_jax(f, channels_last=True))


def haiku_groups(_) -> Peer:
    import haiku as hk

    def f(x, w, b):
        norm = hk.transform(lambda x: hk.GroupNorm(GROUPS, eps=EPS)(x))
        return norm.apply({"group_norm": {"scale": w, "offset": b}}, None, x)

    return Peer("`scale`, `offset`", "1e-5", *of_images_of_jax(f, channels_last=True))


def keras_groups(_) -> Peer:
    import os

    os.environ["KERAS_BACKEND"] = "jax"
    import keras

    def f(x, w, b):
        policy = keras.DTypePolicy(_mixed(x.dtype))
        layer = keras.layers.GroupNormalization(GROUPS, epsilon=EPS, dtype=policy)
        layer.build(x.shape)
        return layer.stateless_call([w, b], [], x)[0]

    return Peer("`gamma`, `beta`", "1e-3", *of_images_of_jax(f, channels_last=True))


def torch_groups(_, channels_last=False) -> Peer:
    import torch as th
    from torch.nn import functional as F

    layout = th.channels_last if channels_last else th.contiguous_format
    f = lambda x, w, b: F.group_norm(x.contiguous(memory_format=layout), GROUPS, w, b, EPS)
    run = of_images(f, lambda y: y.contiguous())
    return Peer("`weight`, `bias`", "1e-5", *of_torch(run))


def mlx_groups(_) -> Peer:
    """With torch's groups: its own are strided, of every fourth channel here."""
    import mlx.core as mx
    import mlx.nn as nn

    def f(x, w, b):
        layer = nn.GroupNorm(GROUPS, CHANNELS, EPS, pytorch_compatible=True)
        layer.weight, layer.bias = w, b
        return mx.moveaxis(layer(mx.moveaxis(x, 1, -1)), -1, 1)

    run = of_images(f)
    to = lambda a: mx.array(np.asarray(a, np.float32)).astype(getattr(mx, np.dtype(a.dtype).name))
    back = lambda a: np.array(a.astype(mx.float32)).astype(jnp.dtype(str(a.dtype).split(".")[-1]))

    def vjp(x, g):
        pull = lambda x: run(x, mx.ones(WIDTH), mx.zeros(WIDTH))
        return back(mx.vjp(pull, [to(x)], [to(g)])[1][0])

    return Peer("`weight`, `bias`", "1e-5", lambda *args: back(run(*map(to, args))), vjp)


def onnxruntime_groups(_) -> Peer:
    import onnx
    import onnxruntime as ort
    from onnx import TensorProto, helper

    kinds = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16}

    def f(x, w, b):
        node = helper.make_node(
            "GroupNormalization", ["x", "w", "b"], ["y"], epsilon=EPS, num_groups=GROUPS
        )
        info = lambda name, a: helper.make_tensor_value_info(name, kinds[a.dtype.name], a.shape)
        given = {"x": x, "w": w, "b": b}
        inputs = [info(name, a) for name, a in given.items()]
        graph = helper.make_graph([node], "norm", inputs, [info("y", x)])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
        onnx.checker.check_model(model)
        return ort.InferenceSession(model.SerializeToString()).run(None, given)[0]

    return Peer("`scale`, `bias`", "1e-5", of_images(f))


GROUP_PEERS = {
    "eqx_norms": our_groups,
    "eqx.nn": equinox_groups,
    "flax.linen": linen_groups,
    "haiku": haiku_groups,
    "keras": keras_groups,
    "torch": torch_groups,
    "torch, channels_last": ft.partial(torch_groups, channels_last=True),
    "mlx": mlx_groups,
    "onnxruntime": onnxruntime_groups,
}
PEERS = {
    "eqx_norms": ours,
    "eqx.nn": equinox,
    "flax.linen": linen,
    "flax.nnx": nnx,
    "haiku": haiku,
    "keras": keras,
    "penzai": penzai,
    "tokamax": tokamax,
    "jax.nn.standardize": standardize,
    "torch": torch,
    "mlx": mlx,
    "tinygrad": tinygrad,
    "onnxruntime": onnxruntime,
}


def exact(x, rms: bool):
    x = np.float64(x)
    x = x if rms else x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + EPS)


def exact_vjp(x, g, rms: bool):
    x, g = np.float64(x), np.float64(g)
    mean = lambda a: a.mean(-1, keepdims=True)
    xc = x if rms else x - mean(x)
    rstd = 1 / np.sqrt(mean(xc**2) + EPS)
    return rstd * (g - (0 if rms else mean(g)) - xc * rstd * mean(g * xc * rstd))


def row(make: Callable[[bool], Peer], rms: bool) -> list[str]:
    rng = np.random.default_rng(0)
    peer = make(rms)
    one, zero = np.ones(WIDTH, np.float32), np.zeros(WIDTH, np.float32)
    cells = [peer.names, peer.eps]
    draws = {offset: rng.normal(size=(ROWS, WIDTH)) + offset for offset in OFFSETS}
    draws = {offset: x.astype(np.float32) for offset, x in draws.items()}
    g = rng.normal(size=(ROWS, WIDTH)).astype(np.float32)
    for x in draws.values():
        cells.append(_off(peer.y(x, one, zero), exact(x, rms)))
    for x in draws.values():
        cells.append("" if peer.vjp is None else _off(peer.vjp(x, g), exact_vjp(x, g, rms)))
    constant = np.full((ROWS, WIDTH), 1e6 / 3, np.float32)
    cells.append("" if rms else _number(np.abs(peer.y(constant, one, zero)).max()))
    cells.append(_tried(lambda: f"{_half(peer):.2g}"))
    cells.append(_tried(lambda: _mixed_result(peer)))
    return cells


def _half(peer: Peer) -> float:
    x = (300 * np.random.default_rng(0).normal(size=(ROWS, WIDTH))).astype(np.float16)
    params = np.ones(WIDTH, np.float16), np.zeros(WIDTH, np.float16)
    return float(np.sqrt(np.mean(np.float64(peer.y(x, *params)) ** 2)))


def _mixed_result(peer: Peer) -> str:
    x = np.random.default_rng(0).normal(size=(ROWS, WIDTH)).astype(jnp.bfloat16)
    return np.dtype(peer.y(x, np.ones(WIDTH, np.float32), np.zeros(WIDTH, np.float32)).dtype).name


def _tried(cell: Callable[[], str]) -> str:
    try:
        return cell()
    except Exception as error:  # Of any library, for what it does not take.
        return type(error).__name__


def _off(got, want) -> str:
    """Relative to the largest entry, as y is of a size of its own."""
    return _number(np.abs(np.float64(got) - want).max() / np.abs(want).max())


def _number(value: float) -> str:
    return f"{value:.0e}" if np.isfinite(value) and value else "0" if value == 0 else "NaN"


def run_page() -> None:
    """The first block of the page, those of Flax and Haiku, and what the tests cannot run."""
    page = (pathlib.Path(__file__).parent.parent / "docs" / "moving.md").read_text()
    first = page[: page.index("## From equinox.nn")]
    code = first + page[page.index("## From Flax") : page.index("## What has no counterpart")]
    scope: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        for language, block in re.findall(r"```(py(?:thon)?)\n(.*?)```", code, re.DOTALL):
            exec(block, scope)
            if language == "py":
                print("runs:", *re.findall(r"^(?:import|from) (\w+)", block, re.MULTILINE))


def main() -> None:
    warnings.simplefilter("ignore")
    if sys.argv[1:] == ["page"]:
        return run_page()
    offsets = [f"{offset:.0e}" if offset else "0" for offset in OFFSETS]
    titles = ["names", "eps", *(f"y {o}" for o in offsets), *(f"dx {o}" for o in offsets)]
    titles += ["constant", "half", "bf16 with float32 weights"]
    kinds = ("LayerNorm", PEERS, False), ("RMSNorm", PEERS, True), ("GroupNorm", GROUP_PEERS, False)
    for kind, peers, rms in kinds:
        print(f"\n{kind}\n\n| | {' | '.join(titles)} |")
        print("|---" * (len(titles) + 1) + "|")
        for name, make in peers.items():
            if rms and make is standardize:
                continue
            try:
                cells = row(make, rms)
            except Exception as error:
                cells = [f"{type(error).__name__}: {str(error)[:150]}"]
            print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
