"""The answers of a search as one page, with the regions that matched lit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from lightly_ext.data import read_image
from lightly_ext.evaluate.pictures.gallery import enlarged, shown_name
from lightly_ext.pages.page import data_uri, render_page
from lightly_ext.search.answers import Answer
from lightly_ext.search.asking import Asked, Photo, shown_box
from stellar_plugin.visualize import Uint8Array, threshold_maps, token_palette

# Sides of pictures in px.
QUERY_SIDE, ANSWER_SIDE = 640, 400
LEGEND = (
    "Lit: patches where a token has at least half of its maximum in the image, in the "
    "colour of its number, counted from 0; the box is around them. Dark is the rest, "
    "and what the model does not see."
)


@dataclass(frozen=True)
class Picture:
    """A picture of the page and what lies over it.

    Attributes:
        photo:
            The picture as the address of itself, None if the file cannot be shown.
        layer:
            The lit patches likewise, None if there are none to show.
        seen:
            The part that the model sees: left, top, width, height in percent.
        box:
            The box likewise, None without.
        colour:
            Of the token, for CSS.
        alt:
            What is seen, in words.
        ratio:
            Width over height.
    """

    photo: str | None
    layer: str | None
    seen: list[float]
    box: list[float] | None
    colour: str
    alt: str
    ratio: float


def render_search(
    photo: Photo,
    asked: Asked,
    box: Tensor | None,
    answers: Sequence[Answer],
    root: Path,
    told: Sequence[str],
    notes: Sequence[str],
) -> str:
    """Fills the page.

    Args:
        photo:
            The image that was searched with.
        asked:
            What of it was searched with.
        box:
            The box that was, None without.
        answers:
            What was found, the best first.
        root:
            Folder of their files.
        told:
            How the query was read, sentences.
        notes:
            What else a reader should know, sentences.

    Returns:
        HTML with all pictures in it: no script, nothing from elsewhere.
    """
    tokens = [asked.numbers[asked.heaviest], *(answer.token for answer in answers)]
    palette = token_palette(max(tokens) + 1)
    tiles = [
        (a, _answer_picture(i, a, root, palette)) for i, a in enumerate(answers, 1)
    ]
    page = render_page(
        "search/search.html",
        title=f"Images like {Path(photo.name).name}",
        query=_query_picture(photo, asked, box, palette),
        tiles=tiles,
        told=told,
        notes=notes,
        legend=LEGEND,
    )
    return shown_name(page)


def _query_picture(
    photo: Photo, asked: Asked, box: Tensor | None, palette: Uint8Array
) -> Picture:
    token = asked.numbers[asked.heaviest]
    what = f"token {token} lit" if box is None else f"box {shown_box(box)} lit"
    height, width = photo.image.shape[1:]
    area, colour = _lit(asked.map), palette[token]
    return Picture(
        _photo_uri(_array(photo.image), QUERY_SIDE),
        _layer_uri(area, colour) if box is None else None,
        _percent(photo.place.box, width, height),
        None if box is None else _percent(box, width, height),
        _css(colour),
        f"The photo {photo.name}, {what}",
        width / height,
    )


def _answer_picture(
    rank: int, answer: Answer, root: Path, palette: Uint8Array
) -> Picture:
    image = _read(root / answer.file)
    x0, y0, x1, y1 = answer.box
    lit = f"token {answer.token} lit, x {x0} to {x1} px and y {y0} to {y1} px"
    height, width = (1, 1) if image is None else image.shape[1:]
    colour = palette[answer.token]
    shown = image is not None and not answer.state
    what = lit if shown else answer.state or "unreadable"
    return Picture(
        None if image is None else _photo_uri(_array(image), ANSWER_SIDE),
        _layer_uri(_lit(answer.map), colour) if shown else None,
        _percent(answer.place.box, width, height),
        _percent(torch.tensor(answer.box), width, height)
        if shown and any(answer.box)
        else None,
        _css(colour),
        f"Answer {rank}, {answer.file}: {what}",
        width / height,
    )


def _read(path: Path) -> Tensor | None:
    try:
        return read_image(path)
    except Exception:  # decoders raise anything; it is shown as missing
        return None


def _photo_uri(picture: Uint8Array, side: int) -> str:
    """A photo as the address of itself, its longer side at most so many px."""
    image = Image.fromarray(enlarged(picture, side))
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    return data_uri(image, "jpeg", quality=82, optimize=True)


def _layer_uri(area: NDArray[np.bool_], colour: Uint8Array) -> str:
    """What `highlight` does, as a transparent picture with one pixel per patch."""
    pixels = np.full((*area.shape, 4), 128, dtype=np.uint8)
    pixels[..., :3] = area[..., None] * colour
    return data_uri(Image.fromarray(pixels), "png", optimize=True)


def _lit(where: Tensor) -> NDArray[np.bool_]:
    return threshold_maps(where, 0.5).bool().numpy()


def _array(image: Tensor) -> Uint8Array:
    return image.permute(1, 2, 0).numpy()


def _percent(box: Tensor, width: int, height: int) -> list[float]:
    """Left, top, width and height of a box in percent of its image."""
    x0, y0, x1, y1 = (box.double() / torch.tensor([width, height] * 2) * 100).tolist()
    return [round(value, 3) for value in (x0, y0, x1 - x0, y1 - y0)]


def _css(colour: Uint8Array) -> str:
    return f"rgb({', '.join(map(str, colour.tolist()))})"
