"""A dark card to draw a figure on, the same on light and on dark pages."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from stellar_plugin.visualize import Uint8Array

Colour = tuple[int, int, int]
# Pixels per unit: text stays sharp on screens of twice the density.
SCALE = 2
CARD: Colour = (16, 22, 34)
INK: Colour = (236, 240, 246)
SOFT: Colour = (166, 176, 192)
LINE: Colour = (92, 104, 124)
QUALITY = 85
HEAD = 5  # of an arrow


class Box(NamedTuple):
    """Where a part of a figure is, in units.

    Attributes:
        x: Left end.
        y: Upper end.
        width: Width.
        height: Height.
    """

    x: float
    y: float
    width: float
    height: float

    @property
    def pixels(self) -> tuple[int, int, int, int]:
        """Left, upper, right and lower end in pixels of the image."""
        ends = (self.x, self.y, self.x + self.width, self.y + self.height)
        left, upper, right, lower = (round(SCALE * end) for end in ends)
        return left, upper, right, lower

    def cell(self, row: float, column: float, shape: tuple[int, int]) -> Box:
        """One cell of a grid of so many rows and columns that fills the box."""
        height, width = self.height / shape[0], self.width / shape[1]
        return Box(self.x + column * width, self.y + row * height, width, height)

    def inset(self, margin: float) -> Box:
        """The box without a margin."""
        width, height = self.width - 2 * margin, self.height - 2 * margin
        return Box(self.x + margin, self.y + margin, width, height)


class Card:
    """A figure in the making.

    Attributes:
        image: What is drawn so far.
        parts: Where its named parts are.

    Args:
        width: Width in units: px of a page that shows the figure in full size.
        height: Height in units.
    """

    def __init__(self, width: int, height: int) -> None:
        self.image = Image.new("RGB", (SCALE * width, SCALE * height), CARD)
        self.parts: dict[str, Box] = {}
        self._draw = ImageDraw.Draw(self.image)

    def picture(self, box: Box, picture: Uint8Array, name: str = "") -> None:
        """Fills a box with a picture (height, width, 3), whose pixels stay sharp.

        Pictures that are larger than the box are averaged.
        """
        left, upper, right, lower = box.pixels
        size = right - left, lower - upper
        larger = picture.shape[1] > size[0]
        how = Image.Resampling.LANCZOS if larger else Image.Resampling.NEAREST
        self.image.paste(Image.fromarray(picture).resize(size, how), (left, upper))
        if name:
            self.parts[name] = box

    def text(
        self,
        x: float,
        y: float,
        text: str,
        size: float = 16,
        colour: Colour = INK,
        anchor: str = "lm",
    ) -> None:
        """Writes lines of text.

        Args:
            x: Where, in units, see `anchor`.
            y: Where, in units.
            text: One line, or more.
            size: Height of the font in units.
            colour: Of the text.
            anchor: Of Pillow: "lm" is left and middle, "mm" the centre.
        """
        font = ImageFont.load_default(SCALE * size)
        for i, line in enumerate(text.split("\n")):
            place = SCALE * x, SCALE * (y + 1.3 * size * i)
            # The outline is seen on pictures only.
            self._draw.text(
                place, line, colour, font, anchor, stroke_width=SCALE, stroke_fill=CARD
            )

    def fill(self, box: Box, colour: Colour, radius: float = 0) -> None:
        """Fills a box with a colour."""
        left, upper, right, lower = box.pixels
        if right > left and lower > upper:
            ends = left, upper, right - 1, lower - 1
            self._draw.rounded_rectangle(ends, SCALE * radius, fill=colour)

    def frame(self, box: Box, colour: Colour = LINE, radius: float = 0) -> None:
        """Draws the outline of a box."""
        left, upper, right, lower = box.pixels
        ends = left, upper, right - 1, lower - 1
        self._draw.rounded_rectangle(ends, SCALE * radius, outline=colour, width=SCALE)

    def line(
        self,
        start: tuple[float, float],
        end: tuple[float, float],
        colour: Colour,
        width: float = 1.5,
    ) -> None:
        """Draws a line, so many units wide."""
        ends = [(SCALE * x, SCALE * y) for x, y in (start, end)]
        self._draw.line(ends, colour, round(width * SCALE))

    def arrow(
        self,
        x: float,
        y: float,
        length: float,
        to: Literal["right", "down"] = "right",
        colour: Colour = SOFT,
    ) -> None:
        """Draws an arrow that begins at a place."""
        along, across = ((1, 0), (0, 1)) if to == "right" else ((0, 1), (1, 0))

        def at(far: float, aside: float) -> tuple[float, float]:
            return (
                SCALE * (x + far * along[0] + aside * across[0]),
                SCALE * (y + far * along[1] + aside * across[1]),
            )

        self._draw.line([at(0, 0), at(length - HEAD, 0)], colour, round(1.5 * SCALE))
        head = [
            at(length, 0),
            at(length - 2 * HEAD, HEAD),
            at(length - 2 * HEAD, -HEAD),
        ]
        self._draw.polygon(head, colour)

    def save(self, path: Path) -> None:
        """Writes the figure as a JPEG file, and prints its name and size."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.image.save(path, quality=QUALITY, optimize=True)
        print(f"{path}: {self.image.width} x {self.image.height} px")


def shades(values: np.ndarray, colour: Uint8Array | Colour) -> Uint8Array:
    """A colour from black, at 0, to full, at 1.

    Args:
        values: Array in [0, 1] with shape (height, width).
        colour: RGB, 0 to 255.

    Returns:
        Picture with shape (height, width, 3).
    """
    mixed = values[..., None] * np.asarray(colour, dtype=np.float64)
    return mixed.round().astype(np.uint8)
