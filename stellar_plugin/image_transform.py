"""From a photo to the input of a model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import ImageOps
from PIL.Image import Image
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from stellar_plugin.image_conversion import cut_ends, to_uint8_rgb


class ImageTransform(nn.Module):
    """Makes an input of a model from a photo of any size and mode.

    The photo is turned as its EXIF data says, resized (bicubic, antialiased) until it
    just covers the size, cut to it around the centre, and normalised.

    Attributes:
        size:
            Height and width of the result in px.
        mean:
            Per-channel mean that is subtracted, of [0, 1] intensities.
        std:
            Per-channel standard deviation that is divided by.
    """

    def __init__(
        self, size: tuple[int, int], mean: Sequence[float], std: Sequence[float]
    ) -> None:
        super().__init__()
        self.size, self.mean, self.std = size, list(mean), list(std)

    def forward(self, photo: Image | Tensor) -> Tensor:
        """Transforms one photo.

        Args:
            photo:
                PIL image, or uint8 tensor with shape (3, H, W) or (1, H, W).

        Returns:
            Normalised float32 tensor with shape (3, height, width).

        Raises:
            ValueError: If the photo is a tensor of another type or shape, or a PIL
                image with 32 bits per pixel and channel.
        """
        if isinstance(photo, Image):
            photo = ImageOps.exif_transpose(photo)
        pixels = cut_ends(to_uint8_rgb(photo))
        scale = max(
            new / old for new, old in zip(self.size, pixels.shape[-2:], strict=True)
        )
        covering = [
            max(new, round(old * scale))
            for new, old in zip(self.size, pixels.shape[-2:], strict=True)
        ]
        resized = F.resize(pixels, covering, InterpolationMode.BICUBIC, antialias=True)
        cropped = F.center_crop(resized, list(self.size))
        return F.normalize(
            F.to_dtype(cropped, torch.float32, scale=True), self.mean, self.std
        )

    def extra_repr(self) -> str:
        """Size, mean and std, as they are printed."""
        return f"size={self.size}, mean={self.mean}, std={self.std}"
