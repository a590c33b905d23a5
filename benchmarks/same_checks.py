"""How often `allclose` is right about two functions, on the pairs that our own tests use.

    python benchmarks/same_checks.py                    # float32
    python benchmarks/same_checks.py --dtype bfloat16   # each some minutes, most of it compiling

Each check gets both functions and the same x, and says whether they are the same. `--draw` draws
other parameters and inputs.
"""

import argparse
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from eqx_norms.causality import check_same

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "tests"))
import draws
import same_zoo as zoo


def allclose(one, two, x, rtol, atol):
    a, b = (np.asarray(jax.jit(lambda x, fn=fn: fn(x))(x), np.float64) for fn in (one, two))
    return bool(np.allclose(a, b, rtol, atol, equal_nan=True))


def ours(one, two, x):
    status = check_same(one, two, x).status
    return None if status == "undecided" else status in ("same bits", "rounding")


def checks(dtype):
    """By name; of `torch.testing.assert_close` the defaults for the dtype."""
    of_torch = {"float32": (1.3e-6, 1e-5), "bfloat16": (1.6e-2, 1e-5)}[dtype]
    tolerances = {
        "`allclose`, 1e-5": (1e-5, 1e-5),
        "`allclose`, 1e-3": (1e-3, 1e-3),
        f"as torch.testing, {of_torch[0]:g} and {of_torch[1]:g}": of_torch,
    }
    by_size = {
        name: lambda *pair, at=at: allclose(*pair, rtol=at[0], atol=at[1])
        for name, at in tolerances.items()
    }
    return by_size | {"`check_same`": ours}


def main():
    """Prints the table, and below it the names behind the numbers."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--draw", type=int, default=0)
    options = parser.parse_args()
    draws.shift = options.draw

    found = {check: {} for check in checks(options.dtype)}
    for name in tqdm(zoo.SAME | zoo.DIFFERENT, unit="pair"):
        pair = zoo.pair(name, jnp.dtype(options.dtype))
        for check, says in checks(options.dtype).items():
            answer, right = says(*pair), name in zoo.SAME
            wrong = "false alarms" if right else "missed differences"
            how = "undecided" if answer is None else "right" if answer == right else wrong
            found[check].setdefault(how, []).append(name)
    print(f"{len(zoo.SAME)} pairs that are the same, {len(zoo.DIFFERENT)} that are not\n")
    columns = "right", "missed differences", "false alarms", "undecided"
    print(f"| {options.dtype} | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    for check, names in found.items():
        print(f"| {check} |", " | ".join(str(len(names.get(c, []))) for c in columns), "|")
    for check, names in found.items():
        print(f"\n{check}")
        for column in columns[1:]:
            if column in names:
                print(f"  {column}: {', '.join(names[column])}")


if __name__ == "__main__":
    main()
