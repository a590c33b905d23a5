"""What reads JAX programs, on a model with norms: `python -m benchmarks.readers` prints a table.

Exporters, interpreters and transformations of jaxprs, JAX's own among them, each in a process of
its own. They are none of the project's extras, and few are made for the newest JAX: install those
that you want to know of. `python -m benchmarks.readers folx quax` for some by name.
"""

import importlib.metadata
import multiprocessing
import os
import sys
import warnings

N, ROWS, TIMEOUT = 16, 4, 300


# ---- Each gives what came and what should have. They take a norm of one example.


def jax_export(norm):
    import jax
    import jax.export

    f, x = model(norm)
    loaded = jax.export.deserialize(jax.export.export(jax.jit(f))(x).serialize())
    return loaded.call(x), exact(x)


def jax_jet(norm):
    from jax.experimental.jet import jet

    f, x = model(norm)
    return jet(f, (x,), ([x],))[1][0], tangent(x)


def jax_sparsify(norm):
    from jax.experimental.sparse import sparsify

    f, x = model(norm)
    return sparsify(f)(x), exact(x)


def jax_checkify(norm):
    import jax
    from jax.experimental import checkify

    f, x = model(norm)
    return checkify.checkify(jax.jit(f), errors=checkify.float_checks)(x)[1], exact(x)


def jax_linear_transpose(norm):
    """Of the tangent map, as solvers take it."""
    import jax

    f, x = model(norm)
    (back,) = jax.linear_transpose(lambda t: jax.jvp(f, (x,), (t,))[1], x)(x)
    return back, gradient(x)


def jax_pallas_tpu(norm):
    """Lowered, for there is none to run it; its values are those of interpret mode."""
    import jax
    from jax.experimental import pallas as pl

    _, x = model(norm)

    def call(x, **how):
        def kernel(x_ref, y_ref):
            y_ref[...] = jax.vmap(norm)(x_ref[...])

        return pl.pallas_call(kernel, jax.ShapeDtypeStruct(x.shape, x.dtype), **how)(x)

    jax.jit(call).trace(x).lower(lowering_platforms=("tpu",))
    return call(x, interpret=True), exact(x)


def jax_jax2tf(norm):
    import tensorflow as tf
    from jax.experimental import jax2tf

    f, x = model(norm)
    return tf.function(jax2tf.convert(f), autograph=False)(x).numpy(), exact(x)


def _onnx(f, *args):
    import jax2onnx
    import numpy as np
    import onnxruntime

    proto = jax2onnx.to_onnx(f, [a.shape for a in args]).SerializeToString()
    session = onnxruntime.InferenceSession(proto, providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    return session.run(None, {n: np.asarray(a) for n, a in zip(names, args, strict=True)})[0]


def jax2onnx_value(norm):
    f, x = model(norm)
    return _onnx(f, x), exact(x)


def jax2onnx_gradient(norm):
    import jax

    f, x = model(norm)
    return _onnx(lambda x: jax.vjp(f, x)[1](x)[0], x), gradient(x)


def folx(norm):
    import folx
    import jax
    import jax.numpy as jnp

    f, x = model(norm)
    g = lambda x: jnp.sum(jnp.sin(f(x)))
    laplacian = lambda g: jnp.trace(jax.hessian(g)(x).reshape(x.size, x.size))
    plain = model(reference())[0]
    return folx.forward_laplacian(g)(x).laplacian, laplacian(lambda x: jnp.sum(jnp.sin(plain(x))))


def quax(norm):
    """Of an array type of its own, whose rules it asks for and which it else makes dense."""
    import jax.numpy as jnp
    import jax.random as jr
    import quax
    from quax.examples import lora

    f, x = model(norm)
    low_rank = lora.LoraArray(x, rank=1, scale=0.0, allow_materialise=True, key=jr.key(0))
    return jnp.asarray(quax.quaxify(f)(low_rank)), exact(x)


def kfac_jax(norm):
    import jax
    import jax.numpy as jnp
    import kfac_jax

    def loss(w, x):
        y = jax.vmap(norm)(x @ w)
        kfac_jax.register_squared_error_loss(y, jnp.zeros_like(y))
        return jnp.sum(jnp.square(y))

    return kfac_jax.BlockDiagonalCurvature(loss).num_blocks, 1


def oryx(norm):
    from oryx.core import reap, sow

    f, x = model(norm)
    return reap(lambda x: sow(f(x), name="y", tag="t"), tag="t")(x)["y"], exact(x)


def torchax(norm):
    import torchax

    f, x = model(norm)
    env = torchax.default_env()
    with env:
        y = torchax.interop.torch_view(f)(torchax.interop.torch_view(x))
    return torchax.interop.jax_view(y), exact(x)


def rehydrax(norm):
    import jax
    import rehydrax

    f, x = model(norm)
    exported = jax.export.export(jax.jit(f))(x)
    return rehydrax.rehydrate_stablehlo(exported.mlir_module())(x), exact(x)


def stablehlo_coreml(norm):
    """It converts; only a Mac runs the result."""
    import coremltools
    import jax
    import jax.export
    from jax._src.interpreters import mlir
    from jax._src.lib.mlir import ir
    from stablehlo_coreml.converter import convert

    f, x = model(norm)
    exported = jax.export.export(jax.jit(f))(x)
    with mlir.make_ir_context():
        program = convert(
            ir.Module.parse(exported.mlir_module()),
            minimum_deployment_target=coremltools.target.iOS18,
        )
    assert program.functions
    return exact(x), exact(x)


READERS = {
    "jax.export": (jax_export, "jax"),
    "jax.experimental.jax2tf": (jax_jax2tf, "tensorflow-cpu"),
    "jax2onnx": (jax2onnx_value, "jax2onnx"),
    "jax2onnx, gradient": (jax2onnx_gradient, "jax2onnx"),
    "stablehlo-coreml": (stablehlo_coreml, "stablehlo-coreml"),
    "rehydrax": (rehydrax, "rehydrax"),
    "torchax": (torchax, "torchax"),
    "folx": (folx, "folx"),
    "quax": (quax, "quax"),
    "kfac-jax": (kfac_jax, "kfac-jax"),
    "oryx": (oryx, "oryx"),
    "a Pallas kernel for TPU": (jax_pallas_tpu, "jax"),
    "jax.experimental.jet": (jax_jet, "jax"),
    "jax.experimental.sparse.sparsify": (jax_sparsify, "jax"),
    "jax.experimental.checkify": (jax_checkify, "jax"),
    "jax.linear_transpose": (jax_linear_transpose, "jax"),
}
NORMS = ("eqx.nn", "eqx_norms", "in plain()", "with eqx_norms.onnx")


# ---- The model, and what is right.


def model(norm):
    import jax
    import jax.numpy as jnp

    x = jnp.sin(jnp.arange(ROWS * N, dtype=jnp.float32)).reshape(ROWS, N)
    return lambda x: jax.vmap(norm)(x), x


def reference():
    import eqx_norms

    return eqx_norms.normalize_reference


def exact(x):
    return model(reference())[0](x)


def tangent(x):
    import jax

    return jax.jvp(model(reference())[0], (x,), (x,))[1]


def gradient(x):
    import jax

    return jax.vjp(model(reference())[0], x)[1](x)[0]


# ---- Running them.


def outcome(reader: str, kind: str) -> str:
    """`works`, `wrong by ...` or `refuses: ...`."""
    warnings.simplefilter("ignore")
    os.environ["JAX_PLATFORMS"] = "cpu"
    try:
        import contextlib

        import equinox as eqx
        import numpy as np

        import eqx_norms

        if kind == "with eqx_norms.onnx":
            import eqx_norms.onnx
        norms = eqx.nn if kind == "eqx.nn" else eqx_norms
        norm = norms.LayerNorm(N, use_weight=False, use_bias=False)
        with eqx_norms.plain() if kind == "in plain()" else contextlib.nullcontext():
            got, want = READERS[reader][0](norm)
        difference = np.abs(np.asarray(got, float) - np.asarray(want, float)).max()
        worst = float(difference / max(np.abs(np.asarray(want, float)).max(), 1))
        return "works" if worst < 1e-4 else f"wrong by {worst:.0e}"
    except Exception as error:
        text = (str(error).strip().splitlines() or [""])[0]
        return f"refuses: {type(error).__name__} {text}"[:120].strip()


def in_process(reader: str, kind: str) -> str:
    pool = multiprocessing.get_context("spawn").Pool(1)
    try:
        return pool.apply_async(outcome, (reader, kind)).get(TIMEOUT)
    except multiprocessing.TimeoutError:
        return f"no end in {TIMEOUT} s"
    finally:
        pool.terminate()


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def main() -> None:
    """Prints the table, row by row."""
    names = sys.argv[1:]
    print(f"| jax {version('jax')} | version | " + " | ".join(NORMS) + " |")
    print("|---" * (2 + len(NORMS)) + "|")
    for reader, (_, package) in READERS.items():
        if names and not any(name in reader for name in names):
            continue
        kinds = NORMS if package == "jax2onnx" else NORMS[:3]
        there = version(package)
        cells = [in_process(reader, kind) if there else "not installed" for kind in kinds]
        cells += [""] * (len(NORMS) - len(kinds))
        print(f"| {reader} | {there or ''} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
