"""Ten decoders of transformers, right and wrong, by the checks of docs/published_decoders.md.

With the packages of the extra `published`, on Python 3.11:
`pip install -e ".[published]" && pytest -m published`. What is wrong in transformers 5.23.0 is
what its code says (`WHY` there); a later version may have mended it.
"""

import pytest
import test_docs

pytestmark = pytest.mark.published


@pytest.fixture(scope="module")
def sweep():
    import torch

    from benchmarks import published_decoders

    torch.set_num_threads(1)
    return published_decoders


# What does not hold, of the checks that are asked here.
WRONG = {
    "llama": [],
    "bart": [],
    "qwen3_moe": [],
    "gpt2": [],
    "mamba2": [],
    "prophetnet": ["causal", "right", "one at a time"],
    "mamba": ["pieces"],
    "recurrent_gemma": ["one at a time", "pieces", "interleaved"],
    "moshi": ["one at a time", "pieces", "interleaved"],
    "bamba": ["one at a time", "pieces", "interleaved"],
}


# By the numbers that the page gives the questions, less one.
ASKED = {0: "causal", 4: "right", 6: "one at a time", 8: "pieces", 10: "interleaved"}


@pytest.mark.parametrize("family", WRONG)
def test_right_and_wrong_families(family, sweep):
    checks = [sweep.CHECKS[number] for number in ASKED]
    found = sweep._decoders.answers(family, sweep.built, checks, verbose=False)
    answers = dict(zip(ASKED.values(), found.values(), strict=True))
    if family == "prophetnet":  # it refuses the one, and the other says no more
        del answers["pieces"], answers["interleaved"]
    assert [title for title, word in answers.items() if word != "ok"] == WRONG[family], answers


def test_prophetnet_mended_in_one_line(sweep):
    decoder = sweep.built("prophetnet")
    with sweep.mended_prophetnet():
        assert sweep.causal(decoder).status.startswith("clear")
        assert sweep._cached(decoder).status == "rounding"
    assert sweep.causal(decoder).leak


@pytest.mark.usefixtures("sweep")
def test_the_page_of_other_frameworks():
    page, scope = test_docs.DOCS / "other_frameworks.md", {}
    for code in test_docs.blocks(page):
        test_docs.run(code, page, scope)
