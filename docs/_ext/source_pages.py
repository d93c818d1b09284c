"""Files outside docs/ that its pages link to: shown on pages of the guide.

On GitHub `[slurm.sbatch](../lightly_ext/recipes/slurm.sbatch)` opens the file. Here it
opens a page with its highlighted text; a folder, a page that lists its files.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from docutils import nodes
from pygments.lexers import get_lexer_for_filename
from pygments.util import ClassNotFound
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform

ROOT = Path(__file__).resolve().parents[2]
# Files that are pages of the guide, whose text is taken from outside docs/.
INCLUDED = {"changelog": "CHANGELOG.md", "readme": "README.md"}
# Where links to them lead.
PAGES = {"CHANGELOG.md": "changelog", "README.md": "index"}
NOTEBOOKS = "lightly_ext/examples/notebooks/"
RELATIVE_LINK = re.compile(r"\]\((?!\w+:|#)(docs/)?")
# Pictures of its <picture>, which the first page shows as well.
PICTURE = re.compile(r'(?<=src="|set=")docs/')


class LinksToSource(SphinxTransform):
    """Makes references of links to files and folders outside docs/."""

    default_priority = 200

    def apply(self, **kwargs: Any) -> None:
        """Replaces what MyST takes for downloads and unknown targets."""
        kinds = (addnodes.download_reference, addnodes.pending_xref)
        for kind in kinds:
            for node in list(self.document.findall(kind)):
                path = self._outside(node)
                if path is not None:
                    self._refer(node, path)

    def _outside(self, node: nodes.Element) -> str | None:
        """Path from the root of the repository, if it lies there but not in docs/."""
        if node.get("reftype") != "myst":
            return None
        target = node["reftarget"].partition("#")[0]
        folder = Path(self.env.srcdir, self.env.docname).parent
        if node.get("refdomain") == "doc":  # MyST has cut the suffix
            notebook = (folder / f"{target}.ipynb").exists()
            target += ".ipynb" if notebook else ".md"
        path, root = (folder / target).resolve(), Path(self.env.srcdir).parent
        inside = path.is_relative_to(root) and not path.is_relative_to(self.env.srcdir)
        return path.relative_to(root).as_posix() if inside and path.exists() else None

    def _refer(self, node: nodes.Element, path: str) -> None:
        page = PAGES.get(path)
        if path.startswith(NOTEBOOKS):  # which docs/notebooks links to
            page = f"notebooks/{Path(path).stem}"
        if page is None:
            page = f"source/{path}"
            self.env.metadata[self.env.docname].setdefault("sources", []).append(path)
        uri = f"{'../' * self.env.docname.count('/')}{page}.html"
        node.replace_self(
            nodes.reference("", "", *node.children, internal=True, refuri=uri)
        )


def take_included(app: Sphinx, docname: str, source: list[str]) -> None:
    """Appends the text of README.md or CHANGELOG.md, with links as seen from docs/."""
    if docname in INCLUDED:
        text = Path(app.srcdir).parent.joinpath(INCLUDED[docname]).read_text("utf-8")
        text = PICTURE.sub("_images/", text)
        source[0] += RELATIVE_LINK.sub(lambda m: "](" + ("" if m[1] else "../"), text)


def source_pages(app: Sphinx) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Pages of all files and folders that are linked, for Sphinx to write."""
    builder: Any = app.builder
    root = Path(app.srcdir).parent
    linked = {
        path for page in app.env.metadata.values() for path in page.get("sources", [])
    }
    folders = {path: _files(root, path) for path in linked if (root / path).is_dir()}
    for path in sorted((linked - folders.keys()).union(*folders.values())):
        body = _highlighted(builder, root / path)
        yield f"source/{path}", _page(path, body), "page.html"
    for path, files in folders.items():
        links = "".join(
            f'<li><a href="{name.removeprefix(Path(path).parent.as_posix() + "/")}'
            f'.html"><code>{name}</code></a></li>'
            for name in files
        )
        yield f"source/{path}", _page(path, f"<ul>{links}</ul>"), "page.html"


def _files(root: Path, folder: str) -> list[str]:
    return sorted(
        path.relative_to(root).as_posix()
        for path in (root / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    )


def _page(path: str, body: str) -> dict[str, Any]:
    return {"title": path, "body": f"<h1><code>{html.escape(path)}</code></h1>{body}"}


def _highlighted(builder: Any, path: Path) -> str:
    try:
        language = get_lexer_for_filename(path.name).aliases[0]
    except ClassNotFound:
        language = "bash" if path.suffix == ".sbatch" else "text"
    return builder.highlighter.highlight_block(path.read_text("utf-8"), language)


def setup(app: Sphinx) -> dict[str, Any]:
    """Registers what makes the pages."""
    app.add_transform(LinksToSource)
    app.connect("source-read", take_included)
    app.connect("html-collect-pages", source_pages)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
