"""Conversion of images to the one form that views are cut from."""

from __future__ import annotations

import numpy as np
import torch
from PIL.Image import Image, fromarray
from torch import Tensor
from torchvision.transforms.v2 import functional as F

# A side of an image is cut to so many times the other.
LONGEST = 32


def to_uint8_rgb(image: Tensor | Image) -> Tensor:
    """Converts an image to an RGB tensor that resizes fast.

    Args:
        image:
            PIL image, or uint8 tensor with shape (3, H, W) or (1, H, W). 16-bit gray
            images lose their lower eight bits, transparency is dropped.

    Returns:
        uint8 tensor with shape (3, H, W); colours lie beside each other in memory.

    Raises:
        ValueError: If the image is a tensor of another type or shape, or a PIL image
            with 32 bits per pixel and channel, whose range of values is unknown.

    """
    if isinstance(image, Image):
        image = _to_eight_bit(image)
        return F.pil_to_tensor(image if image.mode == "RGB" else image.convert("RGB"))
    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] not in (1, 3):
        raise ValueError(
            "An image tensor must be uint8 with shape (3, height, width) or "
            f"(1, height, width), got {image.dtype} with shape {tuple(image.shape)}."
        )
    return image.expand(3, -1, -1).permute(1, 2, 0).contiguous().permute(2, 0, 1)


def cut_ends(image: Tensor) -> Tensor:
    """Cuts the ends off an image that is much longer than wide.

    For centre crops, which do not see them: with a shorter side of 224 pixels, an image
    of 1 x 20000 would take gigabytes.

    Args:
        image:
            Tensor with shape (..., H, W).

    Returns:
        Its middle, at most `LONGEST` times as long as wide; most often all of it.

    """
    for axis, other in ((-2, -1), (-1, -2)):
        length, longest = image.shape[axis], LONGEST * image.shape[other]
        if length > longest:
            return image.narrow(axis, (length - longest) // 2, longest)
    return image


def _to_eight_bit(image: Image) -> Image:
    if image.mode.startswith("I;16"):
        # Pillow's own conversion would clip at 255 instead of scaling.
        values = np.asarray(image).astype(np.uint16) >> 8
        return fromarray(values.astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(
            f"A PIL image of mode {image.mode!r} has no known range of values; convert "
            "it to 8 or 16 bits."
        )
    return image
