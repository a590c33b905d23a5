"""The norm classes of transformers against the lines of docs/published_norms.md, to the bit.

    pip install -e ".[published]" && pytest -m published

Theirs are the oracle, run by torch.
"""

import pathlib
import re

import jax
import pytest

from benchmarks import published_models, published_norms as published

pytestmark = pytest.mark.published
PAGE = pathlib.Path(__file__).parent.parent / "docs" / "published_norms.md"
CASES = [
    (key, name, dtype)
    for key, formula in published.FORMULAS.items()
    for name in formula.classes
    for dtype in published.DTYPES
]


@pytest.fixture(autouse=True)
def as_models_are_written():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def test_every_norm_of_this_version_is_known():
    found = published.of_each_class()
    unknown = [name for name, stand in found.items() if stand is None]
    assert not unknown, f"norms whose code no class of benchmarks/published_norms.py has: {unknown}"
    stands = {name for formula in published.FORMULAS.values() for name in formula.classes}
    assert stands | {*published.NOT_RUN} <= {*found}


def test_the_page_has_the_lines_that_are_run():
    page = PAGE.read_text()
    for formula in published.FORMULAS.values():
        assert formula.lines in page


@pytest.mark.parametrize("key, name, dtype", CASES)
def test_bits(key, name, dtype):
    """Two ways to sum squares differ in float32's last bits; a tie between two numbers of half
    precision then falls to another side. Where a number for a whole row is rounded to half
    precision, a tie of that moves the row."""
    theirs, ours = published.theirs_and_ours(published.FORMULAS[key], name, dtype)
    equal, most_ulps = published.share(theirs, ours)
    assert equal > (0.98 if key == "op by op" else 0.999)
    # An ulp of what is normalised is up to two of its product; a bias may cancel that to less.
    assert most_ulps <= 2 or key.startswith(("layer", "group"))


@pytest.mark.parametrize(
    "model, options, configured, found",
    [
        ("DeepseekV3", {"num_hidden_layers": 1, "rms_norm_eps": 1e-5}, 1e-5, {1e-5, 1e-6}),
        ("ConvNext", {}, 1e-12, {1e-6, 1e-12}),
        ("BioGpt", {"num_hidden_layers": 1}, 1e-12, {1e-5}),
        ("Cvt", {}, 1e-12, {1e-5}),
        ("Perceiver", {"num_self_attends_per_block": 1}, 1e-12, {1e-5}),
        ("Glm", {"num_hidden_layers": 1}, 1.5625e-7, {1.5625e-7}),
    ],
)
def test_eps_of_the_modules(model, options, configured, found):
    """The page's second table, of models without numbers."""
    import torch
    import transformers

    config = getattr(transformers, f"{model}Config")(**options)
    with torch.device("meta"):
        modules = transformers.AutoModel.from_config(config).modules()
    eps = {
        getattr(module, name)
        for module in modules
        if "Norm" in type(module).__name__ and "Batch" not in type(module).__name__
        for name in ("eps", "variance_epsilon")
        if hasattr(module, name)
    }
    written = {value for key, value in config.to_dict().items() if "norm" in key and "eps" in key}
    assert (eps, written) == (found, {configured})


@pytest.mark.parametrize("family", published_models.FAMILIES)
def test_a_small_model(family):
    """In float32 it is the same function. In bfloat16 products are summed in another order, and a
    tie goes on to all later layers; the other order of roundings is in every layer."""
    right, guess, in_float32 = published_models.compared(family)
    assert in_float32 < 1e-5
    assert right > 0.7 and guess < 0.4


def test_the_page_loads_safetensors(tmp_path, monkeypatch):
    """All code of docs/moving.md that needs torch, for the block of safetensors builds on it."""
    monkeypatch.chdir(tmp_path)
    page = (PAGE.parent / "moving.md").read_text()
    page = page[: page.index("## From Flax")]
    scope = {}
    for code in re.findall(r"```py(?:thon)?\n(.*?)```", page, re.DOTALL):
        exec(code, scope)
    assert "load_file" in scope
