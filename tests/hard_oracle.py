"""Brute force against the proof: no edit may move what is unconnected.

Where one does, the same input is run operation by operation, to see whether it is excepted: because
an intermediate value became infinite or NaN, or a score was larger than assumed.
"""

from typing import NamedTuple

import hard_programs as programs
import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
from hard_programs import D, T

from eqx_norms._jaxprs import called, first_ref, opened
from eqx_norms.causality._loops import BODIES, rewritten
from eqx_norms.causality._meetings import sizes
from eqx_norms.causality._prove import Context, Question
from eqx_norms.causality._widen import trace


class Found(NamedTuple):
    dtype: str
    unsound: list  # of (output, input, edit)
    excused: int
    full: bool


def check(seed: int) -> Found:
    rng = np.random.default_rng(seed)
    dtype = str(rng.choice(programs.dtypes()))
    x = jnp.asarray(programs.draw(rng, dtype))
    fn = programs.program(seed, dtype)
    closed = trace(fn, [x])
    connected = Question(closed, [x], [0], [0]).connected(Context(assume_bounded=True))
    if first_ref(closed) is not None or connected.all():
        return Found(dtype, [], 0, True)
    edits = [x]
    for j in range(T):
        for _ in range(8):
            row = programs.draw(rng, dtype, 1, D)[0] if rng.random() < 0.8 else x[j] * 0 + 1
            edits.append(x.at[j].set(row.astype(dtype)))
    outs = np.asarray(jax.jit(lambda xs: jax.lax.map(lambda a: jex.jaxpr_as_fun(closed)(a)[0], xs))(jnp.stack(edits)))
    base = outs[0]
    unsound, excused = [], 0
    for k in range(1, len(edits)):
        j = (k - 1) // 8
        same = (outs[k] == base) | ((outs[k] != outs[k]) & (base != base))
        moved = ~same.all(1) & ~connected[:, j]
        if moved.any():
            if excepted(closed, edits[k]) or excepted(closed, x):
                excused += 1
            else:
                unsound.append((int(np.flatnonzero(moved)[0]), j, np.asarray(edits[k][j]).tolist()))
    return Found(dtype, unsound, excused, False)


def excepted(closed, x) -> bool:
    """Whether an intermediate value that depends on x becomes infinite or NaN."""
    assumed = Context(assume_bounded=True)
    Question(closed, [x], [0], [0]).connected(assumed)
    used = {name: assumed.meetings[name] for name in assumed.used}
    if used and float(sizes(closed, used)(x).max()) >= 1:
        return True
    return _broke(closed, [x], [True])[1]


def _broke(closed, args, depends):
    jaxpr = opened(closed)
    consts = getattr(closed, "consts", ())
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
    tainted = dict(zip(jaxpr.invars, depends, strict=True))
    literal = lambda atom: isinstance(atom, jex.Literal)
    read = lambda atom: atom.val if literal(atom) else values[atom]
    broke = False
    for eqn in jaxpr.eqns:
        operands = [read(atom) for atom in eqn.invars]
        taint = [not literal(a) and tainted.get(a, False) for a in eqn.invars]
        if (inner := called(eqn)) is not None:
            outs, found, marks = _broke(inner, operands, taint)
        elif eqn.primitive.name in BODIES:
            with jax.disable_jit():
                outs, found = rewritten(
                    eqn,
                    operands,
                    lambda body, xs, _: _broke(body, xs, [any(taint)] * len(xs))[:2],
                    False,
                    lambda a, b: bool(a) | bool(b),
                )
            marks = [any(taint)] * len(outs)
        else:
            outs = eqn.primitive.bind(
                *map(jnp.asarray, operands) if not _refs(eqn) else operands,
                **eqn.primitive.get_bind_params(eqn.params),
            )
            outs = outs if eqn.primitive.multiple_results else [outs]
            found = any(taint) and any(_spoiled(eqn, operands, out) for out in outs)
            marks = [any(taint)] * len(outs)
        broke = broke or bool(found)
        values.update(zip(eqn.outvars, outs, strict=True))
        tainted.update(zip(eqn.outvars, marks, strict=True))
    return [read(atom) for atom in jaxpr.outvars], broke, [
        not literal(a) and tainted.get(a, False) for a in jaxpr.outvars
    ]


def _refs(eqn):
    return any(hasattr(v.aval, "inner_aval") for v in [*eqn.invars, *eqn.outvars])


def _spoiled(eqn, operands, out) -> bool:
    """Whether numbers that are finite give one that is not: entry by entry, where shapes agree."""
    if not jnp.issubdtype(out.dtype, jnp.inexact):
        return False
    finite = lambda a: np.isfinite(np.asarray(a).astype(np.complex128))
    bad = ~finite(out)
    if not bad.any():
        return False
    numbers = [a for a in operands if jnp.issubdtype(jnp.result_type(a), jnp.inexact)]
    if all(np.shape(a) in ((), out.shape) for a in numbers):
        for a in numbers:
            bad = bad & finite(a)
        return bool(bad.any())
    return all(finite(a).all() for a in numbers)
