"""Rows of pictures with titles, as one picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont

from stellar_plugin.visualize import Uint8Array

# Sides of pictures in px: small ones are enlarged so that their pixels can be seen.
PANEL_SIDE = 180
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
