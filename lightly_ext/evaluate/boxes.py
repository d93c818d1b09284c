"""Boxes: where a crop lies in its image, where a map is strong, how much two share.

A box is (x0, y0, x1, y1) in px from the upper left corner of an image as it is seen
(after its EXIF orientation): its edges, so that x1 - x0 is its width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stellar_plugin.image_conversion import LONGEST
from stellar_plugin.protocols import CropProtocol
from stellar_plugin.visualize import threshold_maps

# Of its maximum: from there on a map counts as being somewhere.
MAP_THRESHOLD = 0.5


@dataclass(frozen=True)
class CropPlace:
    """Where the crop of `images.centre_crop` lies in its image.

    Attributes:
        box:
            The crop in the image, float64 with shape (4,).
        crop:
            Side of the crop in px.
    """

    box: Tensor
    crop: int

    @classmethod
    def of(cls, height: int, width: int, protocol: CropProtocol) -> CropPlace:
        """The place in an image of such a size, cut as a protocol says."""
        # As `cut_ends`, torchvision's Resize and its CenterCrop compute it.
        kept = min(height, LONGEST * width), min(width, LONGEST * height)
        start = (height - kept[0]) // 2, (width - kept[1]) // 2
        shorter = min(kept)
        resized = [int(protocol.resize * side / shorter) for side in kept]
        before = [round((side - protocol.crop) / 2) for side in resized]
        (top, bottom), (left, right) = (
            (s + b * k / r, s + (b + protocol.crop) * k / r)
            for s, b, k, r in zip(start, before, kept, resized, strict=True)
        )
        box = torch.tensor([left, top, right, bottom], dtype=torch.float64)
        return cls(box, protocol.crop)

    def to_image(self, boxes: Tensor) -> Tensor:
        """Boxes (..., 4) in px of the crop, in px of the image, float64."""
        corner, size = self._corner_and_size()
        return boxes.double() / self.crop * size + corner

    def to_crop(self, boxes: Tensor) -> Tensor:
        """Boxes (..., 4) in px of the image, in px of the crop, float64; not cut."""
        corner, size = self._corner_and_size()
        return (boxes.double() - corner) / size * self.crop

    def _corner_and_size(self) -> tuple[Tensor, Tensor]:
        corner, end = self.box[:2], self.box[2:]
        return corner.repeat(2), (end - corner).repeat(2)


def map_boxes(maps: Tensor, crop: int, threshold: float = MAP_THRESHOLD) -> Tensor:
    """Boxes around all patches where maps are strong, each by its own measure.

    Args:
        maps:
            Maps with shape (..., rows, columns), in [0, 1].
        crop:
            Side of the crop in px.
        threshold:
            Fraction of the maximum of a map, see `visualize.threshold_maps`.

    Returns:
        Boxes in px of the crop, float64 with shape (..., 4); of a map of zeros (0, 0,
        0, 0).
    """
    strong = threshold_maps(maps, threshold) > 0
    rows, columns = maps.shape[-2:]
    y0, y1 = _ends(strong.any(dim=-1))
    x0, x1 = _ends(strong.any(dim=-2))
    boxes = torch.stack([x0 / columns, y0 / rows, x1 / columns, y1 / rows], dim=-1)
    return boxes * crop


def box_shares(box: Tensor, grid_size: tuple[int, int], crop: int) -> Tensor:
    """Share of each patch that lies in a box, float64 (num_patches,) in [0, 1].

    Args:
        box:
            Box with shape (4,), in px of the crop.
        grid_size:
            Height and width of the patch grid.
        crop:
            Side of the crop in px.
    """
    x0, y0, x1, y1 = (box.double() / crop).unbind()
    rows, columns = grid_size
    return torch.outer(_overlaps(y0, y1, rows), _overlaps(x0, x1, columns)).flatten()


def box_areas(boxes: Tensor) -> Tensor:
    """Areas of boxes (..., 4) in px, float64; 0 where they have no inside."""
    return (boxes[..., 2:] - boxes[..., :2]).double().clamp(min=0).prod(dim=-1)


def box_ious(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of every box with every other, 0 where both are empty.

    torchvision's gives NaN there.

    Args:
        a:
            Boxes with shape (n, 4).
        b:
            Boxes with shape (m, 4).

    Returns:
        float64 tensor with shape (n, m).
    """
    a, b = a[:, None].double(), b[None].double()
    start = torch.maximum(a[..., :2], b[..., :2])
    end = torch.minimum(a[..., 2:], b[..., 2:])
    both = box_areas(torch.cat([start, end], dim=-1))
    either = box_areas(a) + box_areas(b) - both
    return both / either.clamp(min=torch.finfo(torch.float64).tiny)


def _ends(strong: Tensor) -> tuple[Tensor, Tensor]:
    """First number that is true, and the one behind the last; 0 and 0 if none is."""
    count = strong.shape[-1]
    numbers = torch.arange(count, device=strong.device, dtype=torch.float64)
    last = torch.where(strong, numbers + 1, 0).amax(dim=-1)
    first = torch.where(strong, numbers, count).amin(dim=-1)
    return torch.minimum(first, last), last


def _overlaps(start: Tensor, end: Tensor, count: int) -> Tensor:
    """Share of each of `count` equal cells of [0, 1] that lies in [start, end]."""
    edges = torch.arange(count + 1, dtype=torch.float64)
    low = torch.maximum(edges[:-1], start * count)
    high = torch.minimum(edges[1:], end * count)
    return (high - low).clamp(min=0)
