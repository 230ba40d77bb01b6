"""How Sphinx builds the documentation: ``make docs``, offline, with warnings as errors.

Sphinx rather than mkdocs because torch, e3nn, PyG and neuraloperator use it, and the docstrings are in its language.
"""

import pathlib
import sys
import warnings

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
# Importing the optional packages for their signatures may warn; a reader of the pages is not concerned.
warnings.filterwarnings("ignore")

import torchlayers  # noqa: E402

project = "torchlayers"
author = "the torchlayers authors"
version = release = torchlayers.__version__
html_title = f"torchlayers {release}"

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "myst_parser",
]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
nitpicky = False

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_default_options = {"show-inheritance": True}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_custom_sections = ["Shape", "Source", "Units", "Shapes"]
napoleon_use_rtype = False
napoleon_use_ivar = True

html_theme = "furo"
html_static_path: list[str] = []
html_show_sphinx = False
html_copy_source = False
html_theme_options = {
    "navigation_with_keys": True,
    # Room for lines of 120 characters.
    "light_css_variables": {"font-size--small--2": "78%"},
}


def _join_names(app, what, name, obj, options, lines: list[str]) -> None:
    """Put the names of arguments that share a description on one line, where napoleon looks for them."""
    for index in range(len(lines) - 2, -1, -1):
        line = lines[index]
        if line.endswith(",") and ": " not in line and line[:1].isspace() and lines[index + 1].startswith(" "):
            lines[index : index + 2] = [f"{line} {lines[index + 1].lstrip()}"]


def setup(app) -> None:
    # Before napoleon, which reads the docstring at the default priority of 500.
    app.connect("autodoc-process-docstring", _join_names, priority=400)
