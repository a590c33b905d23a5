"""Decoders of Keras Hub, right and wrong, by the checks of docs/published_decoders.md.

With the packages of the extra `published-jax`:
`pip install -e ".[published-jax]" && pytest -m published_jax`. What is wrong in Keras Hub 0.32.0 is
what its code says (`WHY` there); a later version may have mended it.
"""

import jax
import pytest

pytestmark = pytest.mark.published_jax

NAMES = ("causal", "batch", "left", "right", "at once", "one at a time", "pieces", "windows")
WRONG = {"Llama": [], "GPTNeoX": ["one at a time", "pieces"], "Qwen, windows": ["windows"]}


@pytest.mark.parametrize("family", WRONG)
def test_right_and_wrong_families(family):
    from benchmarks import published_jax_decoders as sweep

    # Keras promotes types and ranks.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        answers = sweep.answers(family, verbose=False)
    found = dict(zip(NAMES, answers.values(), strict=True))
    assert [name for name, answer in found.items() if answer not in ("ok", "-")] == WRONG[family]
