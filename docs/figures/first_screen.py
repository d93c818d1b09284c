"""What STELLAR makes of photos, in one labelled figure: the first screen of the README.

    python -m docs.figures.first_screen --model MODEL --photos '[A.jpg, B.jpg]'

writes docs/first_screen.jpg, with a row per photo, and docs/first_screen_narrow.jpg, of
the first photo alone, for phones. docs/pictures.md says which model
they are of.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jsonargparse import auto_cli
from PIL import Image

from docs.figures.card import INK, SCALE, SOFT, Box, Card, shades
from stellar_plugin import Stellar
from stellar_plugin.visualize import (
    Uint8Array,
    denormalize,
    scale_maps,
    to_pictures,
    token_maps,
    token_masses,
    token_palette,
    without_absent,
)

WIDTH, NARROW_WIDTH = 1280, 390
MAX_TOKENS = 8  # that are shown one by one
MAX_NUMBERS = 24  # of a token
SIDE, GAP = 176, 22


class Seen(NamedTuple):
    """A photo and what a model makes of it, as pictures.

    Attributes:
        photo: The part of the photo that the model gets, with all its pixels.
        tokens: Numbers of the tokens that are shown, those with the largest shares.
        shares: Share of the photo that each of them has, as text.
        numbers: The first numbers of each, in [0, 1]: 0 for the least of the photo.
        maps: Where each is, from 0 to 1, its maximum: (tokens, height, width). 0 for a
            token that is absent.
        mixed: Every patch in the colours of all tokens, by its row of L.
        reconstruction: What the decoder makes of L S.
        num_tokens: Number of all tokens.
        dim: Numbers of a token.
        grid_size: Height and width of the patch grid.
    """

    photo: Uint8Array
    tokens: list[int]
    shares: list[str]
    numbers: np.ndarray
    maps: np.ndarray
    mixed: Uint8Array
    reconstruction: Uint8Array
    num_tokens: int
    dim: int
    grid_size: tuple[int, int]


@torch.no_grad()
def look(model: Stellar, photo: Image.Image) -> Seen:
    """Runs a model on a photo."""
    images = model.transform()(photo).unsqueeze(0)
    result = model(images)
    grid = result.grid_size
    maps = token_maps(result.localization, grid, grid)
    present = token_maps(without_absent(result.localization), grid, grid)
    masses = token_masses(result.localization)[0]
    tokens = sorted(masses.topk(min(MAX_TOKENS, len(masses))).indices.tolist())
    numbers = result.sparse[0, tokens, :MAX_NUMBERS]
    colours = torch.from_numpy(token_palette(len(masses))).float()
    mixed = torch.einsum("rhw,rc->hwc", maps[0], colours)
    # The photo itself is shown with more pixels than the model gets.
    factor = max(1, round(SCALE * SIDE / images.shape[-1]))
    large = model.transform((factor * images.shape[-2], factor * images.shape[-1]))
    return Seen(
        photo=denormalize(large(photo).unsqueeze(0), model.mean, model.std)[0],
        tokens=tokens,
        shares=[f"{float(masses[t]):.1%}" for t in tokens],
        numbers=((numbers - numbers.min()) / (numbers.max() - numbers.min())).numpy(),
        maps=scale_maps(present[0, tokens]).numpy(),
        mixed=mixed.round().to(torch.uint8).numpy(),
        reconstruction=to_pictures(model.reconstruct(images))[0],
        num_tokens=len(masses),
        dim=result.sparse.shape[-1],
        grid_size=grid,
    )


def draw_wide(rows: list[Seen]) -> Card:
    """A figure with a row per photo.

    Returns:
        The card; its parts are "photo 0", "chip 0 of token 3", "map 0 of token 3",
        "mixed 0", "reconstruction 0" and so on.
    """
    head, foot = 92, 46
    card = Card(WIDTH, head + len(rows) * (SIDE + GAP) + foot)
    # Left ends of the columns.
    photo, what, where, mixed, rebuilt = 28, 250, 450, 850, 1072
    first = rows[0]
    for x, title, line in (
        (photo, "photo", "input of the model"),
        (what, "what", _tokens_text(first)),
        (where, "where", "one map per token; they sum to one"),
        (mixed, "where x what", "patches, mixed"),
        (rebuilt, "reconstruction", "decoded from that"),
    ):
        card.text(x, 32, title, 25)
        card.text(x, 65, line, 19, SOFT)
    for i, seen in enumerate(rows):
        y = head + i * (SIDE + GAP)
        card.picture(Box(photo, y, SIDE, SIDE), seen.photo, f"photo {i}")
        _draw_what(card, Box(what, y, 172, SIDE), seen, i)
        _draw_where(card, Box(where, y, 2 * SIDE, SIDE), seen, i)
        _draw_rebuilt(card, mixed, rebuilt, y, SIDE, seen, i)
        for x in (photo, where + SIDE, mixed):
            card.arrow(x + SIDE + 8, y + SIDE / 2, 28)
    y = head + len(rows) * (SIDE + GAP) + 10
    card.text(WIDTH / 2, y, _footnote(first), 19, SOFT, "mm")
    return card


def draw_narrow(seen: Seen) -> Card:
    """A figure for phones, of one photo.

    Returns:
        The card, with parts as those of `draw_wide`.
    """
    side = 164
    card = Card(NARROW_WIDTH, 680)
    left, right, row = 18, NARROW_WIDTH - 18 - side, 62
    card.text(left, 24, "photo", 18)
    card.text(left, 46, "what the model gets", 13, SOFT)
    card.picture(Box(left, row, side, side), seen.photo, "photo 0")
    card.arrow(left + side + 4, row + side / 2, 18)
    card.text(right, 24, "what", 18)
    card.text(right, 46, _tokens_text(seen), 13, SOFT)
    _draw_what(card, Box(right, row, side, side), seen, 0)
    card.text(left, 254, "where", 18)
    card.text(left + 62, 255, "a map for each token, they sum to one", 13, SOFT)
    width = NARROW_WIDTH - 2 * left
    _draw_where(card, Box(left, 272, width, width / 2), seen, 0)
    row = 496
    for x, title in ((left, "where x what"), (right, "reconstruction")):
        card.text(x, row - 20, title, 18)
    _draw_rebuilt(card, left, right, row, side, seen, 0)
    card.arrow(left + side + 4, row + side / 2, 18)
    return card


def _tokens_text(seen: Seen) -> str:
    shown = len(seen.tokens)
    of = "" if shown == seen.num_tokens else f"{shown} of "
    return f"{of}{seen.num_tokens} tokens, shares"


def _footnote(seen: Seen) -> str:
    height, width = seen.grid_size
    return (
        f"{height * width} patches, each a mixture of {seen.num_tokens} vectors of "
        f"{seen.dim} numbers. Maps: bright where a token is strongest."
    )


def _draw_what(card: Card, box: Box, seen: Seen, row: int) -> None:
    """Tokens one below the other: number, the numbers of the vector, share."""
    palette = token_palette(seen.num_tokens)
    size = min(19, 0.8 * box.height / len(seen.tokens))
    for i, token in enumerate(seen.tokens):
        line = box.cell(i, 0, (len(seen.tokens), 1))
        middle = line.y + line.height / 2
        card.text(line.x, middle, str(token), size)
        strip = Box(line.x + 1.3 * size, line.y + 2, 0, line.height - 4)
        strip = strip._replace(width=line.width - 4.6 * size)
        values = shades(seen.numbers[i : i + 1], palette[token])
        card.picture(strip, values, f"chip {row} of token {token}")
        card.text(line.x + line.width, middle, seen.shares[i], size, INK, "rm")


def _draw_where(card: Card, box: Box, seen: Seen, row: int) -> None:
    """Maps in two rows, each in the colour of its token."""
    palette = token_palette(seen.num_tokens)
    columns = max(2, -(-len(seen.tokens) // 2))
    side = min(box.width / columns, box.height / 2)
    for i, token in enumerate(seen.tokens):
        place = Box(box.x, box.y, columns * side, 2 * side)
        cell = place.cell(i // columns, i % columns, (2, columns)).inset(1.5)
        card.picture(
            cell, shades(seen.maps[i], palette[token]), f"map {row} of token {token}"
        )
        card.text(cell.x + 4, cell.y + 11, str(token), 15)


def _draw_rebuilt(
    card: Card, mixed: float, rebuilt: float, y: float, side: float, seen: Seen, i: int
) -> None:
    """The mixture and, beside it, what is decoded."""
    card.picture(Box(mixed, y, side, side), seen.mixed, f"mixed {i}")
    picture = seen.reconstruction
    card.picture(Box(rebuilt, y, side, side), picture, f"reconstruction {i}")


def main(
    model: str, photos: list[str], output: str = "docs", tokenizer: str | None = None
) -> None:
    """Draws first_screen.jpg and first_screen_narrow.jpg.

    Args:
        model: What Stellar.from_pretrained takes: a folder, or stellar-b16.
        photos: Files, one per row.
        output: Folder that the pictures are written to.
        tokenizer: File of the frozen tokenizer, for a model that predicts its codes.
    """
    loaded = Stellar.from_pretrained(model)
    if tokenizer is not None:
        loaded.load_tokenizer(tokenizer)
    rows = []
    for photo in photos:
        with Image.open(photo) as opened:
            rows.append(look(loaded, opened))
    for card, name in (
        (draw_wide(rows), "first_screen.jpg"),
        (draw_narrow(rows[0]), "first_screen_narrow.jpg"),
    ):
        card.save(Path(output, name))


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
