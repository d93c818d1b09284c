"""Rows of pictures with titles, as one picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from stellar_plugin.visualize import Uint8Array, is_absent, token_palette

# Sides of pictures in px: small ones are enlarged so that their pixels can be seen.
PANEL_SIDE = 200
# Columns are as wide as their pictures, and wide enough for a title.
MIN_WIDTH = 120
GAP = 6
LINE = 20
FONT_SIZE = 13
# Width in px of the text before a bar.
SHARE_TEXT = 76
# Where lines of a title are broken, if they can be.
BREAKS = " /_-"
TOKEN_COLOURS = (
    "Tokens are counted from 0; each has the colour of its number, the same on every "
    "page."
)
CLUSTER_TITLE = "clusters of patches"
CLUSTER_COLOURS = (
    "Clusters: k-means of the patches of each image alone; equal colours in two images "
    "have nothing in common."
)
INK, SOFT, PAPER = (70, 74, 82), (150, 154, 162), (255, 255, 255)


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
        The sheet. The picture in column j begins at x = GAP + j * (max(width,
        MIN_WIDTH) + GAP); above it is its title, as a whole, with LINE px for each
        line of the longest title of the row; below the row are GAP px.
    """
    height, width = rows[0][0][1].shape[:2]
    column = max(width, MIN_WIDTH)
    total = GAP + max(len(row) for row in rows) * (column + GAP)
    titles = [[_lines(title, column) for title, _ in row] for row in rows]
    tops = [LINE * max(1, *map(len, [[], *lines])) for lines in titles]
    below = _lines(legend, total - 2 * GAP)
    end = sum(top + height + GAP for top in tops)
    sheet = Image.new("RGB", (total, end + len(below) * LINE), PAPER)
    draw = ImageDraw.Draw(sheet)
    upper = 0
    for row, lines, top in zip(rows, titles, tops, strict=True):
        for j, (_, picture) in enumerate(row):
            left, bottom = GAP + j * (column + GAP), upper + top
            _write(draw, (left, bottom - LINE * len(lines[j])), lines[j])
            sheet.paste(Image.fromarray(picture), (left, bottom))
        upper += top + height + GAP
    _write(draw, (GAP, end), below)
    return sheet


def draw_strips(strips: Mapping[str, Uint8Array]) -> Image.Image:
    """Rows of pictures of one size, each below its title.

    Args:
        strips:
            Pictures with shape (num_columns, height, width, 3) by the title of the row,
            which may be as long as the row.

    Returns:
        The strips, GAP px around and between all pictures, LINE px for each title.
    """
    count, height, width, _ = next(iter(strips.values())).shape
    step = LINE + height + GAP
    size = GAP + count * (width + GAP), len(strips) * step
    sheet = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)
    for i, (title, pictures) in enumerate(strips.items()):
        _write(draw, (GAP, i * step), [shown_name(title)])
        for j, picture in enumerate(pictures):
            corner = GAP + j * (width + GAP), i * step + LINE
            sheet.paste(Image.fromarray(picture), corner)
    return sheet


def draw_shares(
    masses: Sequence[float], num_patches: int, size: tuple[int, int]
) -> Uint8Array:
    """Bars of the shares that tokens have of an image, the largest first.

    Args:
        masses:
            Share of each token, from `token_masses`.
        num_patches:
            Number of patches of the image; it says which tokens are absent.
        size:
            Height and width in px. What does not fit is summed up in the last line.

    Returns:
        Picture with shape (height, width, 3).
    """
    picture = Image.new("RGB", size[::-1], PAPER)
    draw = ImageDraw.Draw(picture)
    ranks = sorted(range(len(masses)), key=lambda token: -masses[token])
    present = [token for token in ranks if not is_absent(masses[token], num_patches)]
    rest = ranks[len(present) :]
    lines = max(1, size[0] // LINE - bool(rest))
    if len(present) > lines:
        present, rest = present[: lines - 1], ranks[lines - 1 :]
    palette = token_palette(len(masses))
    start = min(SHARE_TEXT, size[1] // 2)
    for i, token in enumerate(present):
        _write(draw, (0, i * LINE), [f"{token}: {masses[token]:.1%}"])
        length = (size[1] - 1 - start) * masses[token] / masses[ranks[0]]
        box = (start, i * LINE + 4, start + length, (i + 1) * LINE - 4)
        draw.rectangle(box, tuple(palette[token].tolist()))
    if rest:
        absent = sum(is_absent(masses[token], num_patches) for token in rest)
        told = f"{len(rest)} more: {sum(masses[token] for token in rest):.1%}"
        told = f"absent: {absent}" if absent == len(rest) else told
        _write(draw, (0, len(present) * LINE), [told], SOFT)
    return np.asarray(picture)


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
        # A space at the end of a line takes no place in it.
        breaks = [rest.rfind(c, 0, end + (c == " ")) + (c != " ") for c in BREAKS]
        if end < len(rest) and max(breaks) > 0:
            end = max(breaks)
        lines.append(rest[:end])
        rest = rest[end:].lstrip()
    return lines


def _write(
    draw: ImageDraw.ImageDraw,
    corner: tuple[int, int],
    lines: Sequence[str],
    ink: tuple[int, int, int] = INK,
) -> None:
    font = ImageFont.load_default(FONT_SIZE)
    for i, line in enumerate(lines):
        draw.text((corner[0], corner[1] + 2 + i * LINE), line, ink, font)
