"""Where the tokens of an image are, in px of its file."""

from __future__ import annotations

import torch
from torch import Tensor

from lightly_ext.evaluate.boxes import CropPlace, map_boxes
from lightly_ext.search.encoding import IMAGES
from lightly_ext.search.index_card import IndexCard


def crop_place(card: IndexCard, size: Tensor) -> CropPlace:
    """The part of an image that the model of an index saw.

    Args:
        card:
            The card of the index.
        size:
            Height and width of the image in px, int64 with shape (2,).
    """
    height, width = size.tolist()
    protocol = IMAGES.replace(resize=card.resize, crop=card.crop)
    return CropPlace.of(height, width, protocol)


def pixel_boxes(maps: Tensor, place: CropPlace, size: Tensor) -> Tensor:
    """Boxes around the patches of maps that have at least half of their maximum.

    Args:
        maps:
            Maps with shape (num_tokens, rows, columns), in [0, 1].
        place:
            The part of the image that the model saw.
        size:
            Height and width of the image in px, int64 with shape (2,).

    Returns:
        Edges x0, y0, x1, y1 in px of the file as it is seen, int64 with shape
        (num_tokens, 4), at least one px wide and high; (0, 0, 0, 0) of a map of zeros.
    """
    limit = size.flip(0)  # width and height
    edges = place.to_image(map_boxes(maps, place.crop)).round().long()
    # Of an image that is smaller than the grid, a patch is less than a pixel.
    start = torch.minimum(edges[:, :2], limit - 1).clamp(min=0)
    end = torch.minimum(torch.maximum(edges[:, 2:], start + 1), limit)
    somewhere = maps.flatten(1).any(dim=1, keepdim=True)
    return torch.cat([start, end], dim=1) * somewhere
