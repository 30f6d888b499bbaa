"""The documentation's site: `make docs` builds it into docs/_build/html, without a network."""

import re
import sys
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx
from sphinx.util import inspect

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

project = "sglight"
author = "the sglight authors"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "mathml"]
exclude_patterns = ["_build"]

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3  # [text](page.md#a-heading) as on GitHub
nb_execution_mode = "off"  # tests/test_notebooks.py executes them; the site shows what they have kept

suppress_warnings = ["misc.highlighting_failure"]  # a shell command of several lines in a notebook

html_theme = "furo"
html_title = "sglight"
html_show_copyright = False
html_math_renderer = "mathml"
html_static_path = ["_static"]
html_css_files = ["site.css"]

default_role = "py:obj"  # `name` in a docstring links to what is documented here, and is code elsewhere
autodoc_typehints = "none"  # in the signature they hide the names
autodoc_member_order = "bysource"


def keep_together(app: Sphinx, docname: str, source: list[str]) -> None:
    """No line ends between a number and its deviation or unit: tables would have rows of two lines."""
    if not docname.startswith("notebooks/"):
        source[0] = re.sub(r"(?<=\d) (?=[±%]|\(\d)|(?<=±) ", "\N{NO-BREAK SPACE}", source[0])


def constructor(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, found: str | None, returns: str | None
) -> tuple[str, str] | None:
    """The arguments of a class whose ``__new__`` takes any, and hands them on."""
    if what != "class" or found != "(*args, **kwargs)":
        return None
    arguments = inspect.signature(obj.__init__, bound_method=True)
    return inspect.stringify_signature(arguments, show_annotation=False), ""


def setup(app: Sphinx) -> None:
    """Register the above."""
    app.connect("source-read", keep_together)
    app.connect("autodoc-process-signature", constructor)
