"""Sphinx builds the guide from these Markdown files: `make docs`.

Sphinx, as lightly's and mmsegmentation's documentation is: it takes the API from
docstrings, and a link to a page, heading or name that does not exist ends the build.
"""

import sys
from importlib.metadata import version as installed_version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

project = "STELLAR plugin"
author = "The STELLAR plugin authors"
release = version = installed_version("stellar-plugin")

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
    "docs._ext.source_pages",
]
exclude_patterns = ["_build", "_ext", "figures"]
html_theme = "furo"
html_title = project
html_copy_source = False
html_static_path = ["_static"]
html_css_files = ["pictures.css"]

# Notebooks are executed by their test.
nb_execution_mode = "off"
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 4
