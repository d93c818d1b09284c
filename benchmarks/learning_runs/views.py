"""Random views of a batch of uint8 images, the same code for every method.

Everything is drawn per view on the device of the images, and nothing waits for it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from lightly.transforms.utils import IMAGENET_NORMALIZE
from torch import Tensor

from lightly_ext.transforms.color_functional import (
    adjust_brightness,
    adjust_contrast,
    adjust_hue,
    adjust_saturation,
    rgb_to_grayscale,
)

# STELLAR's and DINO's. A strength of 1 keeps an image, one of 0 its hue.
BRIGHTNESS, CONTRAST, SATURATION, HUE = 0.4, 0.4, 0.2, 0.1
JITTER_PROB = 0.8


@dataclass(frozen=True)
class Views:
    """Makes crops and changes colours.

    Blur is left out: at 64 px the published one, 0.1 to 2 px of 224, is none.

    Attributes:
        jitter:
            Factor of the colour jitter's strengths.
        gray:
            Probability of gray.
    """

    jitter: float = 1.0
    gray: float = 0.2

    def crops(
        self, images: Tensor, number: int, size: int, scale: tuple[float, float]
    ) -> Tensor:
        """Random resized crops, flipped half of the time, bilinear.

        Args:
            images:
                uint8 tensor with shape (B, 3, S, S).
            number:
                Crops per image.
            size:
                Side of a crop in px.
            scale:
                Least and largest share of the area.

        Returns:
            Tensor in [0, 1] with shape (B, number, 3, size, size).
        """
        count = len(images) * number
        draws = torch.rand(5, count, device=images.device)
        area = scale[0] + (scale[1] - scale[0]) * draws[0]
        ratio = torch.exp((2 * draws[1] - 1) * math.log(4 / 3) / 2)
        width, height = (area.sqrt() * x for x in (ratio, 1 / ratio))
        width, height = width.clamp(max=1), height.clamp(max=1)
        flip = torch.where(draws[4] < 0.5, -1.0, 1.0)
        theta = torch.zeros(count, 2, 3, device=images.device)
        theta[:, 0, 0], theta[:, 0, 2] = flip * width, (2 * draws[2] - 1) * (1 - width)
        theta[:, 1, 1], theta[:, 1, 2] = height, (2 * draws[3] - 1) * (1 - height)
        grid = F.affine_grid(theta, [count, 3, size, size], align_corners=False)
        sources = (images.float() / 255).repeat_interleave(number, dim=0)
        crops = F.grid_sample(sources, grid, padding_mode="border", align_corners=False)
        return crops.unflatten(0, (len(images), number))

    def coloured(self, crops: Tensor) -> Tensor:
        """Jitters and grays crops (B, V, 3, s, s) in [0, 1], each by its own draws."""
        images = crops.flatten(0, 1)
        draws = torch.rand(6, len(images), device=images.device)
        jittered = (draws[0] < JITTER_PROB) * self.jitter
        brightness, contrast, saturation, hue = (
            limit * jittered * (2 * draw - 1)
            for limit, draw in zip(
                (BRIGHTNESS, CONTRAST, SATURATION, HUE), draws[1:5], strict=True
            )
        )
        images = adjust_brightness(images, (1 + brightness).clamp(min=0))
        images = adjust_contrast(images, (1 + contrast).clamp(min=0))
        images = adjust_saturation(images, (1 + saturation).clamp(min=0))
        images = adjust_hue(images, hue.clamp(-0.5, 0.5))
        gray = (draws[5] < self.gray).view(-1, 1, 1, 1)
        images = torch.where(gray, rgb_to_grayscale(images), images)
        return images.view_as(crops)


def normalized(images: Tensor) -> Tensor:
    """Images (..., 3, H, W) in [0, 1] by ImageNet's mean and standard deviation."""
    mean, std = _statistics(images.device)
    return (images - mean) / std


@cache
def _statistics(device: torch.device) -> list[Tensor]:
    """Made once: a GPU would wait for each copy."""
    return [
        torch.tensor(IMAGENET_NORMALIZE[name], device=device).view(3, 1, 1)
        for name in ("mean", "std")
    ]
