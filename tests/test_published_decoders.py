"""Ten decoders of transformers, right and wrong, by the checks of docs/published_decoders.md.

With the packages of the extra `published`, on Python 3.11:
`pip install -e ".[published]" && pytest -m published`. What is wrong in transformers 5.23.0 is
what its code says (`WHY` there); a later version may have mended it.
"""

import pathlib
import re

import pytest

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
    "recurrent_gemma": ["pieces", "interleaved"],
    "moshi": ["one at a time", "pieces", "interleaved"],
    "bamba": ["one at a time", "pieces", "interleaved"],
}


@pytest.mark.parametrize("family", WRONG)
def test_right_and_wrong_families(family, sweep):
    with sweep._decoders.quiet():
        decoder = sweep.built(family)
    names = ("causal", "right", "one at a time", "pieces", "interleaved")
    asked = {
        name: sweep.CHECKS[number].ask for name, number in zip(names, (0, 4, 6, 8, 10), strict=True)
    }
    for title in names:
        if family == "prophetnet" and title in ("pieces", "interleaved"):
            continue  # it refuses the one, and the other says no more
        report = asked[title](decoder)
        holds = report.status in sweep._decoders.GOOD
        assert holds == (title not in WRONG[family]), f"{title}: {report}"


def test_prophetnet_mended_in_one_line(sweep):
    decoder = sweep.built("prophetnet")
    with sweep.mended_prophetnet():
        assert sweep.causal(decoder).status.startswith("clear")
        assert sweep._cached(decoder).status == "rounding"
    assert sweep.causal(decoder).leak


@pytest.mark.usefixtures("sweep")
def test_the_page_of_other_frameworks():
    page = pathlib.Path(__file__).parent.parent / "docs" / "other_frameworks.md"
    scope = {}
    for code in re.findall(r"```py(?:thon)?\n(.*?)```", page.read_text(), re.DOTALL):
        exec(code, scope)
