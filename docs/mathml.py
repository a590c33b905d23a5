"""A hook of mkdocs: formulas become MathML, which browsers draw without any JavaScript."""

import html
import re

from latex2mathml.converter import convert

# What pymdownx.arithmatex makes of $...$ and $$...$$.
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_page_content(content, **_):
    return FORMULA.sub(_mathml, content)


def _mathml(formula):
    tag, latex = formula.groups()
    math = convert(html.unescape(latex), display="block" if tag == "div" else "inline")
    return f'<{tag} class="math">{math}</{tag}>'
