"""A hook of mkdocs: formulas become MathML, which browsers draw without any JavaScript."""

import html
import re

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError

# What pymdownx.arithmatex makes of $...$ and $$...$$.
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_page_content(content, **_):
    return FORMULA.sub(_mathml, content)


def _mathml(formula):
    tag, latex = formula.groups()
    latex = html.unescape(latex)
    math = convert(latex, display="block" if tag == "div" else "inline")
    if "\\" in math:  # latex2mathml passes on what it does not know.
        raise PluginError(f"latex2mathml does not know all commands of {latex!r}")
    return f'<{tag} class="math">{math}</{tag}>'
