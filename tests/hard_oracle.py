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
from eqx_norms.causality._prove import Context, Question, _by_position, _input
from eqx_norms.causality._widen import trace


class Found(NamedTuple):
    """Of one program: how many results were held against the edits, those of which one reads what
    it is not connected with, as (step, output, input), and how many were excepted.
    """

    results: int
    unsound: list
    excepted: int


def check(seed: int) -> Found:
    rng = np.random.default_rng(seed)
    dtype = str(rng.choice(programs.dtypes()))
    x = programs.draw(rng, dtype)
    closed = trace(programs.program(seed, dtype), [jnp.asarray(x)])
    if first_ref(closed) is not None:
        return Found(0, [], 0)
    context = Context(assume_bounded=True)
    outs = Question(closed, [x], [0], [0])._outputs(context, [_input(x, 0, np.arange(T))])
    connected = np.stack([_by_position([out], [0], T) for out in outs])
    edits = [x]
    for j in range(T):
        for _ in range(8):
            edits.append(x.copy())
            edits[-1][j] = programs.draw(rng, dtype, 1, D)[0]
    # Compiled as a whole, one program in four; the others by `vmap`, operation by operation, which
    # compiles each of these once for all programs.
    fn = lambda a: _inlined(closed, [a])
    run = jax.jit(lambda xs: jax.lax.map(fn, xs)) if seed % 4 == 0 else jax.vmap(fn)
    changed = [_changed(np.asarray(out)) for out in run(jnp.asarray(np.stack(edits)))]
    unsound, excused = [], 0
    for step, (moves, links) in enumerate(zip(changed, connected, strict=True)):
        for j in range(T):
            for k in range(1 + 8 * j, 9 + 8 * j):
                if not (moves[k] & ~links[:, j]).any():
                    continue
                if excepted(closed, edits[k], step) or excepted(closed, x, step):
                    excused += 1
                else:
                    unsound.append((step, int(np.flatnonzero(moves[k] & ~links[:, j])[0]), j))
    return Found(int((~connected.all((1, 2))).sum()), sorted(set(unsound)), excused)


def _inlined(closed, args):
    """The results, every call in it gone through."""
    jaxpr = opened(closed)
    consts = getattr(closed, "consts", ())
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
    read = lambda atom: atom.val if isinstance(atom, jex.Literal) else values[atom]
    for eqn in jaxpr.eqns:
        operands, inner = [read(atom) for atom in eqn.invars], called(eqn)
        if inner is not None:
            outs = _inlined(inner, operands)
        else:
            outs = eqn.primitive.bind(*operands, **eqn.primitive.get_bind_params(eqn.params))
            outs = outs if eqn.primitive.multiple_results else [outs]
        values.update(zip(eqn.outvars, outs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _changed(outs: np.ndarray) -> np.ndarray:
    """`[k, t]`: whether edit k changes output t of the unedited input, which comes first."""
    base = outs[:1]
    return ~((outs == base) | ((outs != outs) & (base != base))).all(2)


def excepted(closed, x, step: int) -> bool:
    """Whether, on the way to the result of a step, an intermediate value that depends on x becomes
    infinite or NaN, or scores are larger than assumed.
    """
    jaxpr = opened(closed)
    x = jnp.asarray(x)
    meeting = Context(assume_bounded=True)
    Question(closed, [x], [0], [0]).connected(meeting)
    used = {name: meeting.meetings[name] for name in meeting.used}
    if used and float(sizes(closed, used)(x).max()) >= 1:
        return True
    needed = {jaxpr.outvars[step]} if isinstance(jaxpr.outvars[step], jex.Var) else set()
    for eqn in reversed(jaxpr.eqns):
        if needed & set(eqn.outvars):
            needed |= {atom for atom in eqn.invars if isinstance(atom, jex.Var)}
    return _broke(closed, [x], [True], needed)[1]


def _broke(closed, args, depends, needed=None):
    jaxpr = opened(closed)
    consts = getattr(closed, "consts", ())
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
    tainted = dict(zip(jaxpr.invars, depends, strict=True))
    literal = lambda atom: isinstance(atom, jex.Literal)
    read = lambda atom: atom.val if literal(atom) else values[atom]
    broke = False
    for eqn in jaxpr.eqns:
        if needed is not None and not needed & set(eqn.outvars):
            continue
        operands = [read(atom) for atom in eqn.invars]
        taint = [not literal(a) and tainted.get(a, False) for a in eqn.invars]
        if (inner := called(eqn)) is not None:
            outs, found, marks = _broke(inner, operands, taint)
        elif eqn.primitive.name in BODIES:
            reads = any(taint)
            inside = lambda body, xs, _, reads=reads: _broke(body, xs, [reads] * len(xs))[:2]
            with jax.disable_jit():
                either = lambda a, b: bool(a) | bool(b)
                outs, found = rewritten(eqn, operands, inside, False, either)
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
    if needed is not None:
        return [], broke, []
    return (
        [read(atom) for atom in jaxpr.outvars],
        broke,
        [not literal(a) and tainted.get(a, False) for a in jaxpr.outvars],
    )


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
