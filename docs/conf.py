"""Sphinx builds the guide from these Markdown files: `make docs`."""

from importlib.metadata import version as installed_version

project = "STELLAR plugin"
author = "The STELLAR plugin authors"
release = version = installed_version("stellar-plugin")

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = project

# Notebooks are executed by their test.
nb_execution_mode = "off"
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 4
