"""Every ```python block of the documentation runs, and every link and picture is there.

The blocks of a page run from top to bottom; those of docstrings each alone, on arrays given here.
Links between pages are checked once more by `mkdocs build --strict`, which does not see the README.
"""

import pathlib
import re
import sys
import textwrap

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
import pytest
from draws import normal, seed
from slow import slow

import eqx_norms
from eqx_norms import diagnostics

ROOT = pathlib.Path(__file__).parent.parent
DOCS = ROOT / "docs"
# It is pinned to a release whose small CPU build is for Python 3.11.
TORCH_IS_LEFT_OUT = sys.version_info >= (3, 12)
# Those in a list, an admonition or a docstring are indented.
BLOCK = re.compile(r"^( *)```python[^\n]*\n(.*?)^\1```", re.MULTILINE | re.DOTALL)


def blocks(path):
    """The code blocks of a file, each behind as many newlines as put it on its own line."""
    text = path.read_text()
    return [
        "\n" * text[: found.start(2)].count("\n") + textwrap.dedent(found.group(2))
        for found in BLOCK.finditer(text)
    ]


def those_with_blocks(paths):
    return sorted(path for path in paths if blocks(path))


def run(code, path, namespace):
    # As a reader has them set, whose other libraries ask for it.
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        exec(compile(code, path, "exec"), namespace)


# The pages


PAGES = those_with_blocks([ROOT / "README.md", *DOCS.rglob("*.md")])


@pytest.fixture
def x64_as_before():
    yield
    jax.config.update("jax_enable_x64", False)


# All of them take as long as a third of the other tests: by default run those that are read first.
FIRST = {"README.md", "index.md", "getting_started.md"}
assert {page.name for page in PAGES} >= FIRST


@pytest.mark.usefixtures("x64_as_before")
@pytest.mark.parametrize(
    "page",
    [page if page.name in FIRST else slow(page) for page in PAGES],
    ids=lambda page: str(page.relative_to(DOCS) if DOCS in page.parents else page.name),
)
def test_code_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__docs__"}
    for code in blocks(page):
        if not ("import torch" in code and TORCH_IS_LEFT_OUT):
            run(code, page, namespace)


def test_every_block_was_found():
    fences = sum(page.read_text().count("```python") for page in TEXTS)
    assert sum(len(blocks(page)) for page in PAGES) == fences > 0


# The docstrings


MODULES = those_with_blocks((ROOT / "eqx_norms").rglob("*.py"))


def draw(*shape):
    return normal(jr.key(seed(0)), shape)


BATCH = {"features": 4, "x": draw(2, 5, 4)}
STREAM = eqx_norms.CumulativeNorm(4)
ADA = {"ada_layer_norm": eqx_norms.AdaLayerNorm(4, 3, key=jr.key(seed(0)))}
# What the text around a block speaks of.
GIVEN = {
    "_is_norm": [{"jnp": jnp, "model": eqx.nn.LayerNorm(4)}],
    "_replace": [{"model": eqx.nn.LayerNorm(4), "opt_state": (eqx.nn.LayerNorm(4), 0)}],
    "_cumulative_norm": [{"norm": STREAM, "x_t": draw(4), "x": draw(3, 4)}],
    "_layer_norm": [BATCH],
    "_plain": [{"x": draw(4), "v": draw(4)}],
    "_rms_norm": [BATCH],
    "_ada_layer_norm": [
        ADA | {"x": draw(4), "cond": draw(3), "gate": sum, "attention": lambda x: x},
        ADA | {"x": draw(2, 5, 4), "cond": draw(2, 3)},
    ],
    "_check": [{}, {}],
    "_host": [{}],
    "_torch": [{}],
    "_same": [{}],
    "_capture": [{"key": jr.key(seed(0)), "x": draw(8, 2), "jnp": jnp}],
    "_watch": [
        {
            "model": eqx.nn.Linear(2, 2, key=jr.key(seed(0))),
            "loss_fn": lambda model, x: jnp.mean(jax.vmap(model)(x) ** 2),
            "optim": optax.sgd(0.1),
            "opt_state": optax.sgd(0.1).init({}),
            "batches": [draw(8, 2)],
            "make_step": lambda model, opt_state, batch: (model, opt_state),
        }
    ],
    "_diagnose": [{"key": jr.key(seed(0)), "x": draw(8, 2), "jnp": jnp}],
}


# These compile more than all others together.
LONG = {
    "_ada_layer_norm",
    "_capture",
    "_cumulative_norm",
    "_diagnose",
    "_plain",
    "_torch",
    "_watch",
}
assert {module.stem for module in MODULES} >= LONG


@pytest.mark.parametrize(
    "module",
    [slow(module) if module.stem in LONG else module for module in MODULES],
    ids=lambda module: module.stem,
)
def test_docstring_blocks_run(module):
    imported = {"jax": jax, "eqx": eqx, **vars(eqx_norms), **vars(diagnostics)}
    for code, given in zip(blocks(module), GIVEN[module.stem], strict=True):
        if not ("import torch" in code and TORCH_IS_LEFT_OUT):
            run(code, module, imported | given)


# Links


TEXTS = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md")])
FENCE = re.compile(r"^( *)```.*?^\1```", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`[^`\n]*`")
LINK = re.compile(r"\]\((?!https?:|mailto:)([^)#\s]*)(?:#([^)\s]*))?\)")
HEADING = re.compile(r"^#+ (.*)", re.MULTILINE)


def anchors(path):
    """Of the headings, as mkdocs makes them."""
    text = FENCE.sub("", path.read_text())
    words = (re.sub(r"[^\w\s-]", "", heading).strip().lower() for heading in HEADING.findall(text))
    return {re.sub(r"[-\s]+", "-", heading) for heading in words}


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: str(text.relative_to(ROOT)))
def test_relative_links(text):
    for target, anchor in LINK.findall(CODE.sub("", FENCE.sub("", text.read_text()))):
        path = text.parent / target if target else text
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), f"{target}#{anchor}"


def test_links_were_found():
    found = LINK.findall("[a](b.md#c) [d](#e) ![f](g/h.png) [i](https://j.k)")
    assert found == [("b.md", "c"), ("", "e"), ("g/h.png", "")]
    assert "when-not-to-use-it" in anchors(ROOT / "README.md")


def test_home_has_the_commands_of_the_readme():
    commands = re.findall("^pip install -e .*", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert len(commands) == 2
    assert "\n".join(commands) in (DOCS / "index.md").read_text()
