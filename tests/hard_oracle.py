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
from eqx_norms.causality._proof._known import Known
from eqx_norms.causality._proof._meetings import sizes
from eqx_norms.causality._proof._prove import Context, Question, _by_position, _input
from eqx_norms.causality._widen import trace


class Found(NamedTuple):
    """Of one program: how many results were held against the edits, those of which one reads what
    it is not connected with, as (step, output, input), and how many were excepted.
    """

    results: int
    unsound: list
    excepted: int


def check(seed: int, short: bool = False) -> Found:
    """Of one program and one input; of a short one, several inputs, for its edits cost less."""
    rng = np.random.default_rng(seed)
    dtype = _dtype(seed // programs.ALIKE if short else seed)
    first = programs.draw(rng, dtype)
    make = programs.short if short else programs.program
    closed = trace(make(seed, dtype), [jnp.asarray(first)])
    if first_ref(closed) is not None:
        return Found(0, [], 0)
    outs = _outputs(closed, first, Context(assume_bounded=True))
    connected = np.stack([_by_position([out], [0], T) for out in outs])
    if connected.all():
        return Found(0, [], 0)
    plain, whole = (short and seed % 15 == 1), seed % (15 if short else 4) == 0
    inputs = [first, *(programs.draw(rng, dtype) for _ in range(3 * (short and not plain)))]
    edits = [_edited(rng, x) for x in inputs]
    results = _run(closed, np.concatenate(edits), plain, whole)
    unsound, excused = [], 0
    for which, x in enumerate(edits):
        mine = slice(which * len(x), (which + 1) * len(x))
        for step, (out, links) in enumerate(zip(results, connected, strict=True)):
            moves = _changed(out[mine])
            for k in range(1, len(x)):
                j = (k - 1) // _EDITS
                wrong = np.flatnonzero(moves[k] & ~links[:, j])
                if not wrong.size:
                    continue
                if excepted(closed, x[k], step) or excepted(closed, x[0], step):
                    excused += 1
                else:
                    unsound.append((step, int(wrong[0]), j))
    return Found(int((~connected.all((1, 2))).sum()), sorted(set(unsound)), excused)


def _dtype(seed: int) -> str:
    return str(np.random.default_rng(seed).choice(programs.dtypes()))


def _outputs(closed, x, context: Context) -> list[Known]:
    """What is known of each result."""
    return Question(closed, [x], [0], [0])._outputs(context, [_input(x, 0, np.arange(T))])


_EDITS = 8


def _edited(rng, x: np.ndarray) -> np.ndarray:
    """x, and x with another row j: so many edits for each j."""
    edits = np.stack([x] * (1 + T * _EDITS))
    rows = programs.draw(rng, str(x.dtype), T * _EDITS, D)
    edits[np.arange(1, len(edits)), np.arange(T * _EDITS) // _EDITS] = rows
    return edits


def _run(closed, xs: np.ndarray, plain: bool, whole: bool) -> list[np.ndarray]:
    """The results for each x: one by one; compiled as a whole; or by `vmap`, operation by
    operation, each of which is compiled once for all programs.
    """
    fn = lambda a: _inlined(closed, [a])
    if plain:
        rows = [list(map(np.asarray, fn(jnp.asarray(x)))) for x in xs]
        return list(map(np.stack, zip(*rows, strict=True)))
    run = jax.jit(lambda a: jax.lax.map(fn, a)) if whole else jax.vmap(fn)
    return list(map(np.asarray, run(jnp.asarray(xs))))


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
    _outputs(closed, x, meeting)
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
