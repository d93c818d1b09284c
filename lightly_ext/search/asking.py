"""What a photo asks an index: all of it, one of its tokens, or what lies in a box."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lightly_ext.data import read_image
from lightly_ext.evaluate.boxes import CropPlace, box_areas, box_shares
from lightly_ext.search.encoding import Encoded
from lightly_ext.search.index_card import IndexCard
from lightly_ext.search.query import By
from lightly_ext.search.regions import crop_place

Weights = Literal["mass", "uniform"]


@dataclass(frozen=True)
class Photo:
    """An image that asks.

    Attributes:
        name:
            What the user named.
        image:
            The image, uint8 RGB with shape (3, height, width).
        place:
            The part of it that the model sees.
    """

    name: str
    image: Tensor
    place: CropPlace

    @classmethod
    def read(cls, name: str, card: IndexCard) -> Photo:
        """Reads the image of a query, which is cut as those of an index.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it cannot be read.
        """
        if not Path(name).is_file():
            raise FileNotFoundError(f"There is no image '{name}' to search with.")
        try:
            image = read_image(Path(name))
        except Exception as error:  # decoders raise anything
            raise ValueError(
                f"The image '{name}' cannot be read ({error}): search with another."
            ) from error
        return cls(name, image, crop_place(card, torch.tensor(image.shape[1:])))

    @property
    def size(self) -> Tensor:
        """Width and height in px, twice: the largest that edges of boxes can be."""
        height, width = self.image.shape[1:]
        return torch.tensor([width, height] * 2, dtype=torch.float64)


class Asked(NamedTuple):
    """What an image asks.

    Attributes:
        tokens:
            Its tokens that count, of any length, float64 with shape (num_query_tokens,
            dim).
        numbers:
            Their numbers in the image, counted from 0.
        shares:
            Share of the patches in question that each has, float64 with shape
            (num_query_tokens,); of a single token 1.
        weights:
            What each counts in the score, float64 with the same shape; sums to one.
        pooled:
            What stands for all of it, None by "maxsim".
        map:
            Where the heaviest token is, float32 in [0, 1] with the shape of the grid.
    """

    tokens: Tensor
    numbers: list[int]
    shares: Tensor
    weights: Tensor
    pooled: Tensor | None
    map: Tensor

    @property
    def heaviest(self) -> int:
        """Which of the tokens has the largest share; of equals the first."""
        return int(self.shares.argmax())


def parse_box(text: str) -> Tensor:
    """Reads "x0,y0,x1,y1": edges in px of the image, float64 with shape (4,).

    Raises:
        ValueError: If these are not four numbers, or the box has no inside.
    """
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) != 4 or not all(map(math.isfinite, numbers)):
        raise ValueError(
            "box must be four numbers x0,y0,x1,y1 in px of the image, for example "
            f"40,10,200,180, got '{text}'."
        )
    x0, y0, x1, y1 = numbers
    if x1 <= x0 or y1 <= y0:
        raise ValueError(
            f"box {text} has no inside: x0,y0 is its upper left corner and x1,y1 its "
            "lower right one, so x1 must be more than x0, and y1 more than y0."
        )
    return torch.tensor(numbers, dtype=torch.float64)


def check_box(box: Tensor, photo: Photo) -> float:
    """Checks that a model sees something of a box.

    Returns:
        The share of the box that it sees.

    Raises:
        ValueError: If it ends outside of the image by more than a rounded px, or the
            model sees nothing of it.
    """
    width, height = photo.size[:2].int().tolist()
    if max(-box.min(), (box - photo.size).max()) > 1:
        raise ValueError(
            f"box {shown_box(box)} lies or ends outside of '{photo.name}', which is "
            f"{width} x {height} px."
        )
    corner, end = photo.place.box[:2].repeat(2), photo.place.box[2:].repeat(2)
    seen = box.clamp(min=corner, max=end)
    if not box_areas(seen):
        raise ValueError(
            f"box {shown_box(box)} lies outside of what the model sees of "
            f"'{photo.name}': its middle, {shown_box(photo.place.box)}."
        )
    return float(box_areas(seen) / box_areas(box))


def shown_box(box: Tensor) -> str:
    """A box as it is typed: 40,10,200,180."""
    return ",".join(f"{round(value, 1):g}" for value in box.tolist())


def ask(
    photo: Photo,
    encoded: Encoded,
    token: int | None,
    box: Tensor | None,
    by: By,
    weights: Weights,
) -> Asked:
    """What an image asks of an index.

    Args:
        photo:
            The image.
        encoded:
            What the model made of it, a batch of one.
        token:
            Number of the only token that counts, None for all.
        box:
            Edges in px of the image; tokens count by their share of the patches in it,
            and patches by their share that lies in it. None for the whole image.
        by:
            As for `TokenIndex.search`.
        weights:
            "mass" weighs by these shares; "uniform" weighs all alike that have one.

    Raises:
        ValueError: If the token is nowhere in the image.
    """
    parts = encoded.parts
    vectors, maps = parts.vectors[0].double().cpu(), parts.maps[0].double().cpu()
    if token is not None:
        _check_mass(photo, token, maps)
        shares = torch.zeros(len(maps), dtype=torch.float64)
        shares[token] = 1
    else:
        patches = torch.ones(maps.shape[1], dtype=torch.float64)
        if box is not None:
            crop = photo.place.crop
            inside = photo.place.to_crop(box)
            patches = box_shares(inside, parts.grid_size, crop)
        shares = maps @ patches
        shares = shares / shares.sum()
    counting = shares > 0
    decide = shares if weights == "mass" else counting.double() / counting.sum()
    whole = token is None and box is None
    pooled = {
        "maxsim": None,
        "mean": vectors.mean(dim=0) if whole else decide @ vectors,
        "cls": encoded.cls[0].double().cpu(),
    }[by]
    return Asked(
        vectors[counting],
        counting.nonzero().flatten().tolist(),
        shares[counting],
        decide[counting],
        pooled,
        maps[shares.argmax()].float().unflatten(0, parts.grid_size),
    )


def _check_mass(photo: Photo, token: int, maps: Tensor) -> None:
    masses = maps.mean(dim=1)
    if not masses[token]:
        there = ", ".join(str(i) for i in masses.nonzero().flatten().tolist())
        raise ValueError(
            f"Token {token} is nowhere in '{photo.name}', it has no patch: name one "
            f"of {there}."
        )
