"""Sphinx builds the guide from these Markdown files: `make docs`.

Sphinx, as lightly's and mmsegmentation's documentation is: it takes the API from
docstrings, and a link to a page, heading or name that does not exist ends the build.
"""

import re
import sys
from importlib.metadata import version as installed_version
from pathlib import Path

from sphinx.application import Sphinx

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

project = "STELLAR plugin"
author = "The STELLAR plugin authors"
release = version = installed_version("stellar-plugin")

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
    "_ext.mathml",
    "_ext.reference",
    "_ext.source_pages",
]
exclude_patterns = ["_build", "_ext", "_static", "figures"]
html_theme = "furo"
html_title = project
html_show_copyright = False
html_static_path = ["_static"]
html_css_files = ["guide.css", "pictures.css"]
html_favicon = "_static/mark.svg"
html_theme_options = {
    "light_logo": "wordmark.svg",
    "dark_logo": "wordmark_dark.svg",
    "sidebar_hide_name": True,
    "light_css_variables": {
        "color-brand-primary": "#8a3ffc",
        "color-brand-content": "#6929c4",
    },
    "dark_css_variables": {
        "color-brand-primary": "#be95ff",
        "color-brand-content": "#be95ff",
    },
}
html_math_renderer = "mathml"
html_copy_source = False
smartquotes = False  # an option is --data, with two hyphens

# Notebooks are executed by their test.
nb_execution_mode = "off"
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 4

# Docstrings are Google's; a name in single backticks is code. What `Attributes` lists
# are arguments of a constructor, or fields.
default_role = "literal"
napoleon_use_rtype = False
napoleon_custom_sections = [("Attributes", "params_style")]
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"

# Names of other packages, and type variables: no inventory of them is at hand offline.
# A name of ours that is on no page is a broken link.
nitpick_ignore_regex = [
    ("py:.*", r"(?!stellar_|lightly_ext)\w+\..*"),
    ("py:class", r"(.*\.)?(Item|P|T|Path|Tensor)"),
]


def without_aliases(
    app: object, what: str, name: str, obj: object, skip: bool, options: object
) -> bool | None:
    """Leaves out fields of a NamedTuple, which its docstring lists."""
    return True if type(obj).__name__ == "_tuplegetter" else None


def with_defaults(
    app: object,
    what: str,
    name: str,
    obj: object,
    options: object,
    signature: str | None,
    returns: str | None,
) -> tuple[str, str | None] | None:
    """Writes ... for defaults that no text stands for, such as "<factory>"."""
    return signature and (re.sub(r"<[^<>]*>", "...", signature), returns)


def setup(app: Sphinx) -> None:
    """Registers what is left out."""
    app.connect("autodoc-process-signature", with_defaults)
    app.connect("autodoc-skip-member", without_aliases)
