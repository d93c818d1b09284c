"""What results have to look at: plots, sheets of pictures, pages."""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from PIL import Image

from lightly_ext.evaluate.pictures.gallery import shown_name
from lightly_ext.evaluate.result import Result
from lightly_ext.pages.page import data_uri

# Size in px that a picture of the report is shrunk to; the link has it as it is.
LARGEST = (1200, 2400)
# One per image, so too many to show; pages and the folder have them.
LEFT_OUT = "tokens_"


class Picture(NamedTuple):
    """A picture of a result.

    Attributes:
        source: The picture as the address of itself.
        address: Where the file is, from the report.
        name: Name of the file.
    """

    source: str
    address: str
    name: str


class Exhibit(NamedTuple):
    """What one result has to look at.

    Attributes:
        title: Task, model and data.
        address: Where the folder is, from the report.
        pictures: Its plots and sheets.
        pages: Addresses of its pages, by their names.
    """

    title: str
    address: str
    pictures: list[Picture]
    pages: dict[str, str]


def find_exhibits(results: Mapping[Path, Result], report: Path) -> list[Exhibit]:
    """What there is beside the results, in their order.

    Args:
        results:
            Results by their files.
        report:
            Folder of the report: addresses begin there.
    """
    found = [_exhibit(path.parent, result, report) for path, result in results.items()]
    return [exhibit for exhibit in found if exhibit.pictures or exhibit.pages]


def _exhibit(folder: Path, result: Result, report: Path) -> Exhibit:
    files = sorted(folder.glob("*.png"))
    pictures = [
        Picture(source, _address(file, report), shown_name(file.name))
        for file in files
        if not file.name.startswith(LEFT_OUT) and (source := _embedded(file))
    ]
    pages = sorted((*folder.glob("*.html"), *folder.glob("*/index.html")))
    return Exhibit(
        f"{result.task}: {result.model} on {result.data}",
        _address(folder, report),
        pictures,
        {page.relative_to(folder).as_posix(): _address(page, report) for page in pages},
    )


def _address(file: Path, report: Path) -> str:
    path = Path(os.path.relpath(file.resolve(), report.resolve()))
    return quote(path.as_posix())


def _embedded(file: Path) -> str | None:
    """The picture, smaller if it is large; None for a file that is no picture."""
    try:
        with Image.open(file) as image:
            if image.mode == "P":  # a plot, which has few bytes
                text = base64.b64encode(file.read_bytes()).decode()
                return f"data:image/png;base64,{text}"
            shown = image.convert("RGB")
    except OSError:
        return None
    shown.thumbnail(LARGEST)
    return data_uri(shown, "jpeg", quality=85, optimize=True)
