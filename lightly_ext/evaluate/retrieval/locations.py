"""Whether the region of an answer is where its object is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightly_ext.evaluate.boxes import CropPlace, box_areas, box_ious, box_shares
from lightly_ext.evaluate.images import ImageFiles, seen_size
from lightly_ext.evaluate.retrieval.forms import Form
from stellar_plugin.protocols import CropProtocol

# Of an answer's region with a box of its objects.
LEAST_IOU = 0.5


@dataclass(frozen=True)
class Locations:
    """Where the objects of images are.

    Attributes:
        boxes:
            Boxes of each image in px of its file, float64 (num_boxes, 4); num_boxes
            may be 0.
        places:
            Where the crop of each lies in it, None without boxes.
    """

    boxes: Sequence[Tensor]
    places: Sequence[CropPlace | None]

    @classmethod
    def of(
        cls, files: ImageFiles, boxes: Sequence[Tensor], protocol: CropProtocol
    ) -> Locations:
        """Those of readable images, cut as a protocol says."""
        places = []
        for name, of_image in zip(files.names, boxes, strict=True):
            size = seen_size(files.root / name) if len(of_image) else None
            places.append(CropPlace.of(*size, protocol) if size else None)
        return cls(boxes, places)

    @property
    def known(self) -> Tensor:
        """Which images have boxes, bool (num_images,)."""
        return torch.tensor([place is not None for place in self.places])

    def asked(self, number: int, grid_size: tuple[int, int]) -> Tensor | None:
        """What lies in the largest box of an image.

        Args:
            number:
                Number of the image.
            grid_size:
                Height and width of the patch grid.

        Returns:
            Share of each patch in what of the box the crop has, float64 (num_patches,);
            sums to one. None without a box, or where the crop has nothing of it.
        """
        place = self.places[number]
        if place is None:
            return None
        boxes = place.to_crop(self.boxes[number]).clamp(0, place.crop)
        largest = boxes[box_areas(boxes).argmax()]
        shares = box_shares(largest, grid_size, place.crop)
        return shares / shares.sum() if shares.sum() > 0 else None

    def hits(self, number: int, regions: Tensor) -> Tensor:
        """Which regions of an image overlap one of its boxes, bool (num_regions,).

        Args:
            number:
                Number of the image, which has boxes.
            regions:
                Boxes in px of the crop, with shape (num_regions, 4).
        """
        place = self.places[number]
        assert place is not None
        ious = box_ious(place.to_image(regions), self.boxes[number])
        return ious.amax(dim=1) >= LEAST_IOU


def whole_crops(locations: Locations, crop: int) -> Tensor:
    """Which images have a box that the whole crop overlaps, bool (num_images,)."""
    whole = torch.tensor([[0, 0, crop, crop]])
    return torch.tensor(
        [
            place is not None and bool(locations.hits(i, whole)[0])
            for i, place in enumerate(locations.places)
        ]
    )


def any_parts(locations: Locations, form: Form) -> Tensor | None:
    """Which images have a part that overlaps a box, bool (num_images,).

    None for a form without parts.
    """
    if form.all_regions([0]) is None:
        return None
    found = torch.zeros(len(form), dtype=torch.bool)
    for i in locations.known.nonzero().flatten().tolist():
        regions = form.all_regions([i])
        assert regions is not None
        found[i] = locations.hits(i, regions[0]).any()
    return found
