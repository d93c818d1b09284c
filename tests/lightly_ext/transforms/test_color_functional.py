from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from lightly_ext.transforms.color_functional import (
    adjust_brightness,
    adjust_contrast,
    adjust_hue,
    adjust_saturation,
    gaussian_blur,
    rgb_to_grayscale,
)

FACTORS = torch.tensor([0.0, 0.6, 0.93, 1.0, 1.4, 2.5])
SHIFTS = torch.tensor([-0.5, -0.1, -0.037, 0.0, 0.08, 0.5])
SIGMAS = torch.tensor([0.1, 0.3, 0.77, 1.0, 1.6, 2.0])


def _images(height: int = 20, width: int = 31) -> Tensor:
    """Random colours, with gray, black, white, primary and mixed patches."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(6, 3, height, width, generator=generator)
    images[:, :, :4, :4] = 0.3
    images[:, :, :4, 4:8] = 0.0
    images[:, :, :4, 8:12] = 1.0
    images[:, :, 4:8, :4] = torch.tensor([1.0, 0.0, 0.0]).view(3, 1, 1)
    images[:, :, 4:8, 4:8] = torch.tensor([1.0, 1.0, 0.0]).view(3, 1, 1)
    images[:, :, 4:8, 8:12] = torch.tensor([0.2, 0.2, 0.7]).view(3, 1, 1)
    images[:, :, 8:12, :4] = torch.tensor([0.6, 0.1, 0.6]).view(3, 1, 1)
    return images


class TestColorFunctional:
    @pytest.mark.parametrize(
        ("batched", "single", "strengths"),
        [
            (adjust_brightness, F.adjust_brightness, FACTORS),
            (adjust_contrast, F.adjust_contrast, FACTORS),
            (adjust_saturation, F.adjust_saturation, FACTORS),
            (adjust_hue, F.adjust_hue, SHIFTS),
        ],
    )
    def test_adjust__equals_torchvision(
        self,
        batched: Callable[[Tensor, Tensor], Tensor],
        single: Callable[[Tensor, float], Tensor],
        strengths: Tensor,
    ) -> None:
        images = _images()
        before = images.clone()
        expected = [
            single(image, float(strength))
            for image, strength in zip(images, strengths, strict=True)
        ]
        actual = batched(images, strengths)
        torch.testing.assert_close(actual, torch.stack(expected), atol=2e-6, rtol=0)
        assert torch.equal(images, before)

    def test_adjust_hue__third_of_circle_rotates_channels(self) -> None:
        images = _images()
        turned = adjust_hue(images, torch.full((6,), 1 / 3))
        torch.testing.assert_close(turned, images[:, [2, 0, 1]], atol=2e-6, rtol=0)

    def test_adjust_hue__nearly_gray(self) -> None:
        # Chroma far below one 8-bit step must neither divide by zero nor glow.
        images = torch.full((1, 3, 2, 2), 0.5)
        images[:, 0] += torch.tensor([0.0, 1e-7, 6e-8, 1e-6]).view(2, 2)
        turned = adjust_hue(images, torch.tensor([0.25]))
        torch.testing.assert_close(turned, images, atol=2e-6, rtol=0)

    def test_rgb_to_grayscale__equals_torchvision(self) -> None:
        images = _images()
        expected = F.rgb_to_grayscale(images)
        torch.testing.assert_close(
            rgb_to_grayscale(images), expected, atol=1e-6, rtol=0
        )

    @pytest.mark.parametrize("kernel_size", [1, 3, 9])
    def test_gaussian_blur__equals_torchvision(self, kernel_size: int) -> None:
        images = _images()
        sizes = [kernel_size, kernel_size]
        expected = [
            F.gaussian_blur(image, sizes, [float(sigma)] * 2)
            for image, sigma in zip(images, SIGMAS, strict=True)
        ]
        actual = gaussian_blur(images, SIGMAS, kernel_size)
        torch.testing.assert_close(actual, torch.stack(expected), atol=2e-6, rtol=0)

    def test_gaussian_blur__reflects_at_border(self) -> None:
        image = torch.zeros(1, 3, 5, 7)
        image[..., 0, 0] = 1.0
        weights = torch.exp(-0.5 * torch.arange(-1, 2) ** 2.0)
        weights = weights / weights.sum()
        blurred = gaussian_blur(image, torch.tensor([1.0]), 3)
        # The pixel outside the border repeats the second pixel, not the first.
        assert blurred[0, 0, 0, 0] == pytest.approx(float(weights[1] ** 2))
        assert blurred[0, 0, 1, 0] == pytest.approx(float(weights[0] * weights[1]))
