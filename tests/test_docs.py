"""Every ```python block of the documentation runs, page by page, from top to bottom."""

import pathlib
import re

import pytest

DOCS = pathlib.Path(__file__).parent.parent / "docs"
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page):
    """The code of a page, each block behind as many newlines as put it on its own line."""
    text = page.read_text()
    return [
        "\n" * text[: found.start(1)].count("\n") + found.group(1) for found in BLOCK.finditer(text)
    ]


PAGES = sorted(page for page in DOCS.rglob("*.md") if blocks(page))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_code_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__docs__"}
    for code in blocks(page):
        exec(compile(code, page, "exec"), namespace)


def test_pages_with_code_were_found():
    assert DOCS / "causality.md" in PAGES
