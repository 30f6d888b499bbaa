"""The documentation's site: `make docs` builds it into docs/_build/html, without a network."""

import sys
from pathlib import Path

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
html_math_renderer = "mathml"

default_role = "py:obj"  # `name` in a docstring links to what is documented here, and is code elsewhere
autodoc_typehints = "none"  # in the signature they hide the names
autodoc_member_order = "bysource"
