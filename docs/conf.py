"""The site of the documentation: `sphinx-build -W docs docs/_build` writes it. It needs no network.

Equations become MathML, which browsers render themselves, so no script is loaded from elsewhere.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.utils.math import latex2mathml

sys.path.insert(0, str(Path(__file__).parents[1]))

project = "grpo"
author = "The grpo developers"
html_title = "grpo"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4  # headings are link targets, as on GitHub

html_theme = "furo"
html_theme_options = {"sidebar_hide_name": False}
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
html_show_copyright = False
toc_object_entries_show_parents = "all"
html_math_renderer = "mathml"

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
napoleon_google_docstring = True
napoleon_use_ivar = True
# The docstrings have Markdown's code spans: a single backquote is a literal.
default_role = "literal"


def _visit_inline_math(writer: Any, node: nodes.math) -> None:
    writer.body.append(latex2mathml.tex2mathml(node.astext(), as_block=False))
    raise nodes.SkipNode


def _visit_math_block(writer: Any, node: nodes.math_block) -> None:
    equation = latex2mathml.tex2mathml(node.astext(), as_block=True)
    writer.body.append(f'<div class="math">{equation}</div>')
    raise nodes.SkipNode


def setup(app: Any) -> None:
    """Registers the renderer of equations."""
    app.add_html_math_renderer("mathml", (_visit_inline_math, None), (_visit_math_block, None))
