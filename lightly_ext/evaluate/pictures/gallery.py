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
            Name of the image file.
        note:
            What else to say below the picture.
    """

    picture: Uint8Array
    area: NDArray[np.bool_]
    name: str
    note: str


@dataclass(frozen=True)
class Row:
    """A concept: what was asked for, and its neighbours.

    Attributes:
        title:
            What was asked for.
        note:
            What else to say in the heading.
        colour:
            RGB colour of the areas.
        query:
            The picture that was asked with, None for a prototype.
        neighbours:
            The neighbours, the nearest first.
    """

    title: str
    note: str
    colour: Uint8Array
    query: Tile | None
    neighbours: Sequence[Tile]


def shown_name(name: str) -> str:
    """Text that can be written in UTF-8, whatever bytes its file names are made of."""
    return name.encode("utf-8", errors="replace").decode()


def enlarged(pictures: Uint8Array, side: int = PANEL_SIDE) -> Uint8Array:
    """Repeats pixels of small pictures (..., height, width, 3), up to a side in px."""
    factor = max(1, side // pictures.shape[-3])
    return pictures.repeat(factor, axis=-3).repeat(factor, axis=-2)


def draw_sheet(rows: Sequence[Sequence[tuple[str, Uint8Array]]]) -> Image.Image:
    """Puts rows of titled pictures of one size below one another.

    Args:
        rows:
            Title and picture, (height, width, 3), of each place; rows may differ in
            length.

    Returns:
        The sheet. The picture in row i and column j begins at x = GAP + j * (width +
        GAP) and y = LINE + i * (LINE + height + GAP); its title is above.
    """
    height, width = rows[0][0][1].shape[:2]
    columns = max(len(row) for row in rows)
    step = width + GAP, LINE + height + GAP
    sheet = Image.new("RGB", (GAP + columns * step[0], len(rows) * step[1]), PAPER)
    draw = ImageDraw.Draw(sheet)
    for i, row in enumerate(rows):
        for j, (title, picture) in enumerate(row):
            corner = GAP + j * step[0], i * step[1]
            _write(draw, corner, title, width)
            sheet.paste(Image.fromarray(picture), (corner[0], corner[1] + LINE))
    return sheet


def draw_gallery(rows: Sequence[Row], num_neighbours: int) -> Image.Image:
    """The gallery as one picture, areas in colour.

    Args:
        rows:
            The concepts, at least one of them with a picture.
        num_neighbours:
            At most so many neighbours are shown.
    """
    drawn = []
    for row in rows:
        tiles = [(tile.note, tile) for tile in row.neighbours[:num_neighbours]]
        if row.query:
            tiles = [(row.title, row.query), *tiles]
        drawn.append(
            [(title, enlarged(_highlighted(t, row.colour))) for title, t in tiles]
        )
    return draw_sheet(drawn)


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


def _highlighted(tile: Tile, colour: Uint8Array) -> Uint8Array:
    height, width = tile.picture.shape[:2]
    area = torch.from_numpy(tile.area).float()[None, None]
    weights = torch.nn.functional.interpolate(area, size=(height, width))
    return highlight(tile.picture[None], weights[0], colour)[0]


def _write(
    draw: ImageDraw.ImageDraw, corner: tuple[int, int], text: str, width: int
) -> None:
    """Writes a line. Where it is too long its end stays: there, file names differ."""
    font = ImageFont.load_default(FONT_SIZE)
    text = shown_name(text)
    if draw.textlength(text, font) > width:
        while text and draw.textlength(f"...{text}", font) > width:
            text = text[1:]
        text = f"...{text}"
    draw.text((corner[0], corner[1] + 2), text, INK, font)
