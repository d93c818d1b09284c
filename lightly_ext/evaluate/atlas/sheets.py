"""Small pictures in sheets, which a page loads when they are seen."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import v2

from lightly_ext.evaluate.atlas.part_table import PartTable
from lightly_ext.evaluate.boxes import MAP_THRESHOLD, CropPlace, map_boxes
from lightly_ext.evaluate.devices import Devices
from lightly_ext.evaluate.images import EvaluationImages, Sample, centre_crop
from stellar_plugin.protocols import CropProtocol
from stellar_plugin.visualize import Uint8Array, threshold_maps, to_pictures

# Pictures in a row of a sheet, and rows.
SHEET = 10
# Side of a small picture in px, at most: a larger one is sharper than it is shown.
SIDE = 128
QUALITY = 85
# How bright a picture is where a part is not, and the side of a region: as many times
# that of the part, and at least this share of the crop.
DIMMED, MARGIN, SMALLEST = 0.2, 1.25, 0.3


def write_sheets(
    folder: Path,
    table: PartTable,
    protocol: CropProtocol,
    interpolation: str,
    devices: Devices,
) -> int:
    """Writes all images, small, as sheet-0000.jpg and so on.

    Args:
        folder:
            Where to.
        table:
            Has the images.
        protocol:
            Says how they are cut.
        interpolation:
            Of the model.
        devices:
            Loads them, and shows progress.

    Returns:
        Side of a picture in px. Picture i is on sheet i // 100, whose rows have 10; the
        last sheet has as many rows as it needs.
    """
    images = EvaluationImages(table.files, centre_crop(protocol, interpolation))
    loader = devices.loader(images, range(len(images)), SHEET**2)
    side = min(SIDE, protocol.crop)
    for number, batch in enumerate(devices.progress(loader, "sheets", len(loader))):
        _check_readable(batch, table)
        small = v2.functional.resize(batch.image, [side, side], antialias=True)
        pictures = small.permute(0, 2, 3, 1).numpy()
        sheet = np.zeros((-(-len(pictures) // SHEET), SHEET, side, side, 3), np.uint8)
        sheet.reshape(-1, side, side, 3)[: len(pictures)] = pictures
        _save(sheet, folder / f"sheet-{number:04d}.jpg")
    return side


def write_regions(
    folder: Path,
    table: PartTable,
    examples: Sequence[Sequence[tuple[int, int]]],
    protocol: CropProtocol,
    interpolation: str,
    devices: Devices,
) -> list[NDArray[np.float64]]:
    """Writes the examples of each concept, cut out and lit, as region-0000.jpg.

    Args:
        folder:
            Where to.
        table:
            Has the images.
        examples:
            Image and number of the parts, of each concept.
        protocol:
            As for `write_sheets`.
        interpolation:
            As for `write_sheets`.
        devices:
            As for `write_sheets`.

    Returns:
        Boxes of the examples in px of their files, float64 (num_examples, 4), by
        concept. Their pictures are in one row.
    """
    images = EvaluationImages(table.files, centre_crop(protocol, interpolation))
    chosen = [image for found in examples for image, _ in found]
    samples = (
        Sample(*(values[i] for values in batch))
        for batch in devices.loader(images, chosen)
        for i in range(len(batch.image))
    )
    boxes = []
    for number, found in enumerate(
        devices.progress(examples, "regions", len(examples))
    ):
        strip, places = [], []
        for (image, part), sample in zip(found, samples, strict=False):
            _check_readable(sample, table)
            part_map = table.maps_of(np.array([image]))[0, part].view(table.grid_size)
            box = map_boxes(part_map, protocol.crop)
            strip.append(lit_region(sample.image, part_map, box))
            height, width = sample.size.tolist()
            place = CropPlace.of(height, width, protocol)
            places.append(place.to_image(box).numpy())
        _save(np.stack(strip)[None], folder / f"region-{number:04d}.jpg")
        boxes.append(np.stack(places))
    return boxes


def lit_region(image: Tensor, part_map: Tensor, box: Tensor) -> Uint8Array:
    """The square around a box, bright in the patches that the box is around.

    Args:
        image:
            uint8 tensor with shape (3, crop, crop).
        part_map:
            Map of the part, (rows, columns).
        box:
            Its box in px of the crop.

    Returns:
        Picture with shape (side, side, 3), where side is `SIDE`, or the crop's.
    """
    crop = image.shape[-1]
    lit = threshold_maps(part_map, MAP_THRESHOLD)
    # With sharp edges: of a grid of few patches one alone would be a faint spot.
    light = F.interpolate(lit[None, None], size=(crop, crop))[0]
    light = DIMMED + (1 - DIMMED) * light
    (picture,) = to_pictures((image.float() / 255 * light)[None])
    x, y, size = square(box.tolist(), crop)
    side = min(SIDE, crop)
    region = Image.fromarray(picture).resize(
        (side, side), Image.Resampling.BICUBIC, (x, y, x + size, y + size)
    )
    return np.asarray(region)


def square(box: Sequence[float], crop: int) -> tuple[float, float, float]:
    """Left, top and side of a square in the crop that holds a box, with a margin."""
    x0, y0, x1, y1 = box
    side = min(crop, max(SMALLEST * crop, MARGIN * max(x1 - x0, y1 - y0)))
    left, top = (
        min(max((a + b - side) / 2, 0), crop - side) for a, b in ((x0, x1), (y0, y1))
    )
    return left, top, side


def _check_readable(sample: Sample, table: PartTable) -> None:
    """Raises a RuntimeError if files were readable before, and are not now."""
    readable = torch.as_tensor(sample.readable).reshape(-1)
    if not readable.all():
        number = torch.as_tensor(sample.number).reshape(-1)[~readable][0]
        raise RuntimeError(
            f"'{table.files.shown(int(number))}' cannot be read any more: images "
            "change while the atlas is made. Run it again."
        )


def _save(pictures: Uint8Array, path: Path) -> None:
    """Writes pictures with shape (rows, columns, side, side, 3) as one."""
    rows, columns, side = pictures.shape[:3]
    sheet = pictures.swapaxes(1, 2).reshape(rows * side, columns * side, 3)
    Image.fromarray(sheet).save(path, quality=QUALITY)
