"""Rows of pictures with titles: one PNG, or one HTML file that needs nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from lightly_ext.evaluate.result import shown_value
from lightly_ext.pages.page import data_uri, render_page
from stellar_plugin.visualize import Uint8Array, highlight

# Sides of pictures in px: small ones are enlarged so that their pixels can be seen.
PANEL_SIDE = 180
THUMBNAIL_SIDE, QUERY_SIDE = 160, 320
GAP = 6
LINE = 20
FONT_SIZE = 13
TOKEN_COLOURS = "Tokens: colours of their numbers, the same on every page."
CLUSTER_TITLE = "clusters of patches"
CLUSTER_COLOURS = (
    "Clusters: k-means of the patches of each image alone; equal colours in two images "
    "have nothing in common."
)
INK, PAPER = (70, 74, 82), (255, 255, 255)


@dataclass(frozen=True)
class Tile:
    """A picture of the gallery, and the part of it that a token stands for.

    Attributes:
        picture:
            Picture with shape (side, side, 3).
        area:
            Patches of the token, bool with the shape of the patch grid.
        name:
            Path of the image file in its folder: two folders may have equal names.
        note:
            What else to say below the picture.
        colour:
            RGB colour of the token.
    """

    picture: Uint8Array
    area: NDArray[np.bool_]
    name: str
    note: str
    colour: Uint8Array


@dataclass(frozen=True)
class Row:
    """A concept: what was asked for, and its neighbours.

    Attributes:
        title:
            What was asked for.
        note:
            What else to say in the heading.
        query:
            The picture that was asked with, None for a prototype.
        neighbours:
            The neighbours, the nearest first.
    """

    title: str
    note: str
    query: Tile | None
    neighbours: Sequence[Tile]

    @property
    def colour(self) -> Uint8Array:
        """RGB colour of the token that was asked for, grey for a prototype."""
        return self.query.colour if self.query else np.array(INK, dtype=np.uint8)


def shown_name(name: str) -> str:
    """Text that can be written in UTF-8, whatever bytes its file names are made of."""
    return name.encode("utf-8", errors="replace").decode()


def enlarged(pictures: Uint8Array, side: int = PANEL_SIDE) -> Uint8Array:
    """Repeats pixels of small pictures (..., height, width, 3), up to a side in px."""
    factor = max(1, side // pictures.shape[-3])
    return pictures.repeat(factor, axis=-3).repeat(factor, axis=-2)


def draw_sheet(
    rows: Sequence[Sequence[tuple[str, Uint8Array]]], legend: str = ""
) -> Image.Image:
    """Puts rows of titled pictures of one size below one another.

    Args:
        rows:
            Title and picture, (height, width, 3), of each place; rows may differ in
            length.
        legend:
            What the colours mean, below the last row.

    Returns:
        The sheet. The picture in row i and column j begins at x = GAP + j * (width +
        GAP) and y = top + i * (top + height + GAP), where top is LINE for each line of
        the longest title; its title is above, as a whole.
    """
    height, width = rows[0][0][1].shape[:2]
    columns = max(len(row) for row in rows)
    total = GAP + columns * (width + GAP)
    titles = [[_lines(title, width) for title, _ in row] for row in rows]
    below = _lines(legend, total - 2 * GAP)
    top = LINE * max(1, *(len(lines) for row in titles for lines in row))
    step = width + GAP, top + height + GAP
    size = total, len(rows) * step[1] + len(below) * LINE
    sheet = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)
    for i, row in enumerate(rows):
        for j, (_, picture) in enumerate(row):
            left, upper = GAP + j * step[0], i * step[1]
            _write(draw, (left, upper), titles[i][j])
            sheet.paste(Image.fromarray(picture), (left, upper + top))
    _write(draw, (GAP, len(rows) * step[1]), below)
    return sheet


def draw_rows(
    names: Sequence[str], rows: Mapping[str, Uint8Array], legend: str
) -> Image.Image:
    """Rows of pictures of the same images, one image per column.

    Args:
        names:
            Names of the images, above the first row.
        rows:
            Pictures with shape (num_images, height, width, 3) by the title that stands
            above each of them; the first are the images themselves.
        legend:
            As for `draw_sheet`.
    """
    titles = [names, *([title] * len(names) for title in list(rows)[1:])]
    pairs = zip(titles, rows.values(), strict=True)
    sheet = [list(zip(t, enlarged(row), strict=True)) for t, row in pairs]
    return draw_sheet(sheet, f"Images as the model gets them. {legend}")


def draw_gallery(
    rows: Sequence[Row], num_neighbours: int, legend: str = ""
) -> Image.Image:
    """The gallery as one picture, areas in colour.

    Args:
        rows:
            The concepts, at least one of them with a picture.
        num_neighbours:
            At most so many neighbours are shown.
        legend:
            As for `draw_sheet`.
    """
    drawn = []
    for row in rows:
        query = [] if row.query is None else [row.query]
        tiles = [*query, *row.neighbours[:num_neighbours]]
        titled = [(f"{t.name}: {t.note}", enlarged(_highlighted(t))) for t in tiles]
        drawn.append(titled)
    return draw_sheet(drawn, legend)


def render_gallery(
    title: str, lead: str, rows: Sequence[Row], facts: Mapping[str, object]
) -> str:
    """Fills the page.

    Args:
        title:
            Title of the page.
        lead:
            What is seen, in a sentence or two.
        rows:
            The concepts.
        facts:
            Names and values for the table at the end.

    Returns:
        HTML with all pictures embedded: no script, nothing from elsewhere.
    """
    page = render_page(
        "evaluate/pictures/gallery.html",
        title=title,
        lead=lead,
        rows=rows,
        facts=facts,
        photo=_photo,
        layer=_layer,
        shown_value=shown_value,
        query_side=QUERY_SIDE,
        thumbnail_side=THUMBNAIL_SIDE,
    )
    return shown_name(page)


def _photo(picture: Uint8Array, side: int) -> str:
    image = Image.fromarray(enlarged(picture, side))
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    return data_uri(image, "jpeg", quality=82, optimize=True)


def _layer(area: NDArray[np.bool_], colour: Uint8Array) -> str:
    """What `highlight` does, as a transparent picture with one pixel per patch."""
    pixels = np.full((*area.shape, 4), 128, dtype=np.uint8)
    pixels[..., :3] = area[..., None] * colour
    return data_uri(Image.fromarray(pixels), "png", optimize=True)


def _highlighted(tile: Tile) -> Uint8Array:
    height, width = tile.picture.shape[:2]
    area = torch.from_numpy(tile.area).float()[None, None]
    weights = torch.nn.functional.interpolate(area, size=(height, width))
    return highlight(tile.picture[None], weights[0], tile.colour)[0]


def _lines(text: str, width: int) -> list[str]:
    """Breaks a text into lines: what would be cut off may tell two names apart."""
    font = ImageFont.load_default(FONT_SIZE)
    lines = []
    rest = shown_name(text)
    while rest:
        fitting = range(len(rest), 1, -1)
        end = next((n for n in fitting if font.getlength(rest[:n]) <= width), 1)
        if end < len(rest) and (space := rest.rfind(" ", 0, end + 1)) > 0:
            end = space
        lines.append(rest[:end])
        rest = rest[end:].lstrip()
    return lines


def _write(
    draw: ImageDraw.ImageDraw, corner: tuple[int, int], lines: Sequence[str]
) -> None:
    font = ImageFont.load_default(FONT_SIZE)
    for i, line in enumerate(lines):
        draw.text((corner[0], corner[1] + 2 + i * LINE), line, INK, font)
