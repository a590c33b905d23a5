"""Where every random draw of the tests begins: `pytest --draw N` shifts all of them.

A test passes for any draw; one that passes only for the draw it was written with states no bound.
"""

shift = 0  # set by conftest.py


def seed(n: int = 0) -> int:
    """For `np.random.default_rng` and `jr.key`: another seed for each n and each `--draw`."""
    return n + 1_000_003 * shift
