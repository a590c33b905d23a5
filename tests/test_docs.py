"""Every ```python block of the documentation runs, page by page, and every link leads somewhere.

`mkdocs build --strict` checks the links between pages; here are those that it does not see.
"""

import pathlib
import re
import sys
import textwrap

import jax
import pytest

ROOT = pathlib.Path(__file__).parent.parent
DOCS = ROOT / "docs"
# It is pinned to a release whose small CPU build is for Python 3.11.
TORCH_IS_LEFT_OUT = sys.version_info >= (3, 12)
# Those in a list or an admonition are indented.
BLOCK = re.compile(r"^( *)```python[^\n]*\n(.*?)^\1```", re.MULTILINE | re.DOTALL)


def blocks(page):
    """The code of a page, each block behind as many newlines as put it on its own line."""
    text = page.read_text()
    return [
        "\n" * text[: found.start(2)].count("\n") + textwrap.dedent(found.group(2))
        for found in BLOCK.finditer(text)
    ]


PAGES = sorted(page for page in DOCS.rglob("*.md") if blocks(page))


@pytest.fixture
def x64_as_before():
    yield
    jax.config.update("jax_enable_x64", False)


@pytest.mark.usefixtures("x64_as_before")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_code_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__docs__"}
    # As a reader has them set, whose other libraries ask for it.
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        for code in blocks(page):
            if not ("import torch" in code and TORCH_IS_LEFT_OUT):
                exec(compile(code, page, "exec"), namespace)


def test_every_block_was_found():
    fences = sum(page.read_text().count("```python") for page in DOCS.rglob("*.md"))
    assert sum(len(blocks(page)) for page in PAGES) == fences > 0
