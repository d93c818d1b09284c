"""`make docs` ends at a link that leads nowhere."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import NamedTuple

import pytest
from sphinx.application import Sphinx

DOCS = Path(__file__).parents[2] / "docs"
# In a small guide: what a page says, and what the build says of it.
BROKEN = {
    "[a](nothing.md)": "cross-reference target not found: 'nothing.md'",
    "[a](other.md#nowhere)": "local id not found in doc 'other': 'nowhere'",
    "[a](#nowhere)": "cross-reference target not found: 'nowhere'",
    "![a](nothing.png)": "image file not readable: nothing.png",
    "[a](../code/nothing.py)": "target not found: '../code/nothing.py'",
}


GOOD = (
    "[a](page.md) [b](#where-it-is) [c](../code/part.py) [d](../code) [e](../README.md)"
    " [f](../code/read.md)"
)
README = "# Read me\n\n[a](docs/other.md#where-it-is) [b](code/part.py)\n"
BROKEN_IN_README = {
    "[c](docs/other.md#gone)": "local id not found in doc 'other': 'gone'",
    "[d](code/gone.py)": "target not found: '../code/gone.py'",
}


class Guide(NamedTuple):
    """A small guide.

    Attributes:
        html: Folder of its pages.
        warnings: What the build said.
    """

    html: Path
    warnings: list[str]

    def article(self, name: str) -> str:
        """What stands on a page."""
        text = (self.html / name).read_text()
        return text.partition("<article")[2].partition("</article")[0]


@pytest.fixture(scope="module")
def guide(tmp_path_factory: pytest.TempPathFactory) -> Guide:
    """A guide with good and broken links, built as `make docs` does."""
    root = tmp_path_factory.mktemp("guide")
    docs, code = root / "docs", root / "code"
    docs.mkdir()
    code.mkdir()
    (code / "part.py").write_text("WHAT = 'sparse < tokens'\n")
    (code / "read.md").write_text("# Of the code\n")
    (root / "README.md").write_text(f"{README}{' '.join(BROKEN_IN_README)}\n")
    (docs / "index.md").write_text("# A\n\n```{toctree}\npage\nother\n```\n")
    (docs / "page.md").write_text("\n\n".join(["# Page", *BROKEN]))
    (docs / "other.md").write_text(f"# Other\n\n## Where it is\n\n{GOOD}\n")
    (docs / "readme.md").write_text("---\norphan: true\n---\n")
    warnings = io.StringIO()
    # Without the pages of the reference.
    extensions = ["myst_nb", "sphinx.ext.autodoc", "_ext.mathml", "_ext.source_pages"]
    Sphinx(
        docs,
        DOCS,
        root / "html",
        root / "doctrees",
        "html",
        confoverrides={"extensions": extensions, "nitpicky": True},
        status=None,
        warning=warnings,
    ).build()
    # Sphinx itself warns of being started twice in a process.
    told = [line for line in warnings.getvalue().splitlines() if str(docs) in line]
    return Guide(root / "html", told)


@pytest.mark.slow
class TestLinks:
    def test_build__every_broken_link_is_told(self, guide: Guide) -> None:
        texts = [*BROKEN.values(), *BROKEN_IN_README.values()]

        missed = [t for t in texts if not any(t in w for w in guide.warnings)]

        assert (missed, len(guide.warnings)) == ([], len(texts)), guide.warnings

    def test_build__other_links_lead_on(self, guide: Guide) -> None:
        links = re.findall(
            r'class="reference [^"]*" href="([^"]+)"', guide.article("other.html")
        )

        assert links == [
            "page.html",
            "#where-it-is",
            "source/code/part.py.html",
            "source/code.html",
            "index.html",
            "source/code/read.md.html",
        ]

    def test_build__readme_leads_into_the_guide(self, guide: Guide) -> None:
        text = guide.article("readme.html")

        assert 'href="other.html#where-it-is"' in text
        assert 'href="source/code/part.py.html"' in text

    def test_build__shows_source(self, guide: Guide) -> None:
        assert "sparse &lt; tokens" in guide.article("source/code/part.py.html")
        assert 'href="code/part.py.html"' in guide.article("source/code.html")
