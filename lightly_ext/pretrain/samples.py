"""Fixed images through the eyes of a model, while it learns."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from lightly_ext.data import ImageDataset, SingleViewTransform
from lightly_ext.data.listing import printable
from lightly_ext.durable import replacing
from stellar_plugin.visualize import Uint8Array, tile_pictures

NUM_IMAGES = 8
# Side of a picture in px, at most.
SIDE = 112
QUALITY = 85
# Parts of a run after which to look: most is learned early.
MOMENTS = (0.0, 1 / 32, 1 / 8, 1 / 2, 1.0)
# Shows on light and dark pages.
GREY = 128


def moments(total: int) -> list[int]:
    """Numbers of steps, of so many, after which to look at the samples."""
    return sorted({round(total * part) for part in MOMENTS})


def sample_images(images: ImageDataset, size: int) -> tuple[Tensor, list[str]]:
    """Images spread evenly over a data set, the next readable one of each.

    Args:
        images:
            The data set.
        size:
            Side of their plain views in pixels.

    Returns:
        uint8 tensor with shape (num_images, 3, size, size), and their paths below
        that of the data set.
    """
    plain = copy.copy(images)
    plain.transform = SingleViewTransform(size)
    count = min(NUM_IMAGES, len(images))
    found = [plain[i * len(images) // count] for i in range(count)]
    files = [images.file(index).relative_to(images.path) for _, index in found]
    return torch.stack([view for view, _ in found]), list(map(printable, files))


@torch.no_grad()
def draw_samples(module: Any, images: Tensor) -> tuple[Uint8Array, Uint8Array]:
    """Draws images, and what a model makes of them.

    Args:
        module:
            The `Pretraining`; it stays in training mode.
        images:
            uint8 tensor with shape (num_images, 3, size, size).

    Returns:
        A row with the images, and the rows that belong below it.
    """
    training = [part for part in module.modules() if part.training]
    module.eval()
    plugin = module.trainer.precision_plugin
    inputs = module.normalize(images.to(module.device).float() / 255)
    try:
        # Their number is no size that blocks are compiled for; colours are mixed, too,
        # which is nothing for the 8 bits of bf16.
        with (
            torch.compiler.set_stance("force_eager"),
            torch.autocast(module.device.type, enabled=False),
        ):
            rows = module.sample_rows(plugin.convert_input(inputs))
    finally:
        for part in training:
            part.training = True
    first, *others = [_small(row) for row in rows]
    return tile_pictures([first], background=GREY), tile_pictures(
        others, background=GREY
    )


def save_picture(picture: Uint8Array, path: Path) -> None:
    """Writes a JPEG as a whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as new:
        Image.fromarray(picture).save(new, format="jpeg", quality=QUALITY)


def _small(row: Uint8Array) -> Uint8Array:
    if row.shape[1] <= SIDE:
        return row
    pixels = torch.from_numpy(row).permute(0, 3, 1, 2).float()
    small = F.interpolate(pixels, size=(SIDE, SIDE), mode="area")
    return np.asarray(small.permute(0, 2, 3, 1).round().byte())
