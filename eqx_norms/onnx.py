"""Norms for jax2onnx: with this imported, `jax2onnx.to_onnx` exports them and their derivatives.

jax2onnx has a rule for each operation of JAX, and refuses operations that it does not know. This
module adds rules for ours, which replace them by the operations that they are evaluated by. Most
of ours are identities, and leave nothing behind.
"""

import functools as ft

import jax
from jax.extend.core import Primitive

from ._op import MARKS, PRIMITIVES

try:
    from jax2onnx.converter.lowering_dispatch import lower_jaxpr_with_plugins
    from jax2onnx.plugins.plugin_system import (
        PLUGIN_REGISTRY,
        PrimitiveLeafPlugin,
        register_primitive,
    )
except ImportError as error:
    raise ImportError('eqx_norms.onnx needs jax2onnx: pip install "eqx-norms[onnx]"') from error


def _register(primitive: Primitive) -> None:
    @register_primitive(jaxpr_primitive=primitive.name)
    class _(PrimitiveLeafPlugin):
        def lower(self, ctx, eqn):
            shapes = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in eqn.invars]
            jaxpr = jax.make_jaxpr(ft.partial(primitive.impl, **eqn.params))(*shapes)
            for outer, inner in zip(eqn.invars, jaxpr.jaxpr.invars, strict=True):
                ctx.bind_value_for_var(inner, ctx.get_value_for_var(outer))
            lower_jaxpr_with_plugins(
                ctx=ctx, jaxpr=jaxpr.jaxpr, registry=PLUGIN_REGISTRY, source=primitive.name
            )
            for outer, inner in zip(eqn.outvars, jaxpr.jaxpr.outvars, strict=True):
                ctx.bind_value_for_var(outer, ctx.get_value_for_var(inner))


for _primitive in (*MARKS, *PRIMITIVES):
    _register(_primitive)
