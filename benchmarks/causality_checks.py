"""How often the usual checks for leaks are right, on the functions that our own tests use.

    python benchmarks/causality_checks.py

Each check gets the same function and the same x, and answers True for a leak, False for none,
None where it does not apply: tokens have no gradient and no NaN. In a batch, the other examples
take the place of the future. `--seed` draws other edits; `--dtype` is that of all floats.
"""

import argparse
import pathlib
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from eqx_norms.causality import check_causal, check_independent

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "tests"))
import causality_zoo as zoo

T, D, B, IDS = 8, 4, 4, 16


class Case(NamedTuple):
    """A function, its input, the pairs (output, input) that are forbidden, and whether it leaks."""

    name: str
    fn: object
    x: jax.Array
    kind: str
    forbidden: np.ndarray
    leaks: bool
    rng: np.random.Generator


def cases(dtype, seed):
    """The whole zoo, its inputs made as in tests/test_causality.py."""
    floats = lambda *shape: jr.normal(jr.key(1), shape, jnp.float32).astype(dtype)
    rows, tokens = floats(T, D), jr.randint(jr.key(2), (T,), 1, IDS)
    future = ~np.tri(T, dtype=bool)
    branch = {"zero_initialised_branch": zoo.ZeroInitialisedBranch(D)}
    for causal, leaky, x, kind, forbidden in (
        (zoo.CAUSAL, zoo.LEAKY | branch, rows, "causal", future),
        (zoo.CAUSAL_TOKENS, zoo.LEAKY_TOKENS, tokens, "causal", future),
        (zoo.STRICT, zoo.NOT_STRICT, rows, "strict", future | np.eye(T, dtype=bool)),
        (zoo.INDEPENDENT, zoo.BATCH_LEAKS, floats(B, 5, D), "independent", ~np.eye(B, dtype=bool)),
    ):
        for name, fn in (causal | leaky).items():
            rng = np.random.default_rng(seed)
            yield Case(name, fn, x, kind, forbidden, name in leaky, rng)


def is_tokens(x):
    return jnp.issubdtype(x.dtype, jnp.integer)


def splits(case):
    """For every split, the positions to edit; for a batch, every example but one."""
    at = np.arange(len(case.x))
    return [at != s if case.kind == "independent" else at >= s for s in at]


def gradient(case, draw):
    """Whether the gradient of a weighted sum of output t is not 0 at a forbidden input."""
    if is_tokens(case.x):
        return None
    out = jax.eval_shape(case.fn, case.x)
    pull = jax.jit(lambda cotangent: jax.vjp(case.fn, case.x)[1](cotangent)[0])
    for t, forbidden in enumerate(case.forbidden):
        cotangent = np.zeros(out.shape)
        cotangent[t] = draw(out.shape[1:])
        if (np.asarray(pull(jnp.asarray(cotangent, out.dtype)))[forbidden] != 0).any():
            return True
    return False


def gradient_of_a_sum(case):
    """The gradient of `fn(x)[t].sum()`: Karpathy's recipe for training neural networks."""
    return gradient(case, np.ones)


def gradient_of_a_random_sum(case):
    """The same with random weights in the sum: `dependency_matrix(fn, x, method="vjp")`."""
    return gradient(case, case.rng.standard_normal)


def outputs(case, fill, edits):
    """The outputs that must not see an edit, with it and without, from one compiled function."""
    run = jax.jit(lambda x: case.fn(x))
    before = np.asarray(run(case.x))
    for where in edits:
        blind = case.forbidden[:, where].all(1)
        mask = where.reshape(-1, *[1] * (case.x.ndim - 1))
        edited = jnp.where(mask, jnp.asarray(fill(case), case.x.dtype), case.x)
        yield np.asarray(run(edited))[blind], before[blind]


def nan_poisoning(case):
    """NaN in the future, looking for NaN in the past: a trick that needs no tolerance."""
    if is_tokens(case.x):
        return None
    return any(np.isnan(after).any() for after, _ in outputs(case, lambda _: np.nan, splits(case)))


def other_values(case):
    """Fresh values of the same scale as x; for tokens, any id."""
    if is_tokens(case.x):
        return case.rng.integers(0, IDS, case.x.shape)
    return case.rng.standard_normal(case.x.shape)


def edit(case, edits):
    pairs = outputs(case, other_values, edits)
    return any(not np.array_equal(after, before) for after, before in pairs)


def every_split(case):
    """Each split edited once: what a careful unit test of a decoder does."""
    return edit(case, splits(case))


def one_split(case):
    """The second half edited: what most unit tests of a decoder do."""
    return edit(case, [np.arange(len(case.x)) >= len(case.x) // 2])


def last_position(case):
    """The last token edited: the shortest such test."""
    return edit(case, [np.arange(len(case.x)) == len(case.x) - 1])


def truncation(case):
    """`fn(x[:s])` against `fn(x)[:s]`: tests of caches and of streaming, where it comes free."""
    if case.kind == "strict":
        return None  # There is no output t without input t.
    whole = np.asarray(case.fn(case.x), np.float64)
    parts = [slice(0, s) for s in range(1, len(whole))]
    if case.kind == "independent":
        parts = [slice(b, b + 1) for b in range(len(whole))]
    try:
        pairs = [(np.asarray(case.fn(case.x[s]), np.float64), whole[s]) for s in parts]
    except (TypeError, ValueError, IndexError):
        return None  # It needs the full length.
    return not all(np.allclose(short, full, 1e-5, 1e-5) for short, full in pairs)


def report(case, **options):
    """Of this library, asked the question that the function is about."""
    if case.kind == "independent":
        return check_independent(case.fn, case.x, **options)
    options["pointwise"] = True  # some are; the question is only whether there is a leak
    return check_causal(case.fn, case.x, strict=case.kind == "strict", **options)


def ours(case):
    """What this library does, at its defaults."""
    return report(case).leak


def proof(case):
    """The structure alone: what it cannot prove counts as a leak, as under `prove="required"`."""
    return report(case, prove=True).status != "proved"


CHECKS = {
    "gradient of a sum, anything but 0": gradient_of_a_sum,
    "gradient of a random sum, anything but 0": gradient_of_a_random_sum,
    "NaN in the future, NaN in the past": nan_poisoning,
    "truncate, compare to 1e-5": truncation,
    "edit the last position, compare exactly": last_position,
    "edit from the middle on, compare exactly": one_split,
    "edit from every position on, compare exactly": every_split,
    "`check_causal`, `check_independent`": ours,
    '`prove="required"`': proof,
}


def main():
    """Prints the table, and below it the names behind the numbers."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float64"])
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    jax.config.update("jax_enable_x64", options.dtype == "float64")

    leaky = [case.leaks for case in cases(options.dtype, options.seed)]
    print(f"{len(leaky)} functions: {leaky.count(False)} causal, {leaky.count(True)} leaky\n")
    print("| check | right | missed leaks | false alarms | not applicable |\n|---|---|---|---|---|")
    names = []
    for check, run in CHECKS.items():
        found = {"right": [], "missed leaks": [], "false alarms": [], "not applicable": []}
        for case in cases(options.dtype, options.seed):
            said, wrong = run(case), "missed leaks" if case.leaks else "false alarms"
            column = "not applicable" if said is None else "right" if said == case.leaks else wrong
            found[column].append(case.name)
        print(f"| {check} |", " | ".join(str(len(those)) for those in found.values()), "|")
        names += [f"\n{check}"]
        names += [f"  {c}: {', '.join(those)}" for c, those in found.items() if c != "right"]
    print(*names, sep="\n")


if __name__ == "__main__":
    main()
