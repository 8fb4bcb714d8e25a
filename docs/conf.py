"""Sphinx's settings for the site: `sphinx-build -W -n -b html docs FOLDER`."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from _site import api, command_line, gallery, mirrored  # noqa: E402

import rmfx  # noqa: E402

if TYPE_CHECKING:
    from sphinx.application import Sphinx

# It calls what Sphinx 10 will not have, and says so at every name.
warnings.filterwarnings("ignore", module=r"sphinx_autodoc_typehints\.")

project, author = "rmfx", "the rmfx authors"
copyright = "the rmfx authors; Apache-2.0"
release = version = rmfx.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "_site.docstrings",  # between the two: what they do to docstrings runs in this order
    "sphinx_autodoc_typehints",
    "sphinx_copybutton",
]
exclude_patterns = ["_site"]

# ---- pages --------------------------------------------------------------------------------------
myst_heading_anchors = 4  # links to headings as a code host has them
myst_enable_extensions = ["deflist"]
smartquotes_action = "D"  # dashes alone: "auto" is code

# ---- the API ------------------------------------------------------------------------------------
python_use_unqualified_type_names = True
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_class_signature = "mixed"
napoleon_numpy_docstring = False
napoleon_use_rtype = False
nitpick_ignore_regex = [
    ("py:data", "Ellipsis"),
    ("py:.*", r"(torch|captum|collections|typing|fx|nn|hypothesis|os|pathlib|argparse)\b.*"),
]

# ---- looks --------------------------------------------------------------------------------------
html_theme = "furo"
html_title = f"rmfx {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
pygments_style = "friendly"
pygments_dark_style = "monokai"
copybutton_exclude = ".linenos, .gp, .go"


def setup(app: Sphinx) -> dict[str, Any]:
    """Make the pages that are made from other files, before Sphinx looks for pages."""
    made = HERE / "made"
    mirrored.write(made)
    gallery.write(made)
    command_line.write(made)
    api.write(made)
    app.connect("source-read", mirrored.follow)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
