from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightly_ext.loss import masked_patch_loss, normalized_patches


def reference_loss(images: Tensor, predictions: Tensor, keep: Tensor, p: int) -> float:
    """Patch by patch, channel by channel, in float64."""
    total, count = 0.0, 0
    columns = images.shape[-1] // p
    for image, predicted, kept in zip(images, predictions, keep, strict=True):
        for number in range(columns**2):
            if number in kept.tolist():
                continue
            top, left = number // columns * p, number % columns * p
            pixels = image[:, top : top + p, left : left + p].double()
            values = pixels.permute(1, 2, 0).flatten()  # rows, columns, channels
            variance = (values - values.mean()).square().sum() / (len(values) - 1)
            target = (values - values.mean()) / (variance + 1e-6).sqrt()
            total += (predicted[number].double() - target).square().mean().item()
            count += 1
    return total / count


class TestMaskedPatchLoss:
    def test_masked_patch_loss__reference(self) -> None:
        torch.manual_seed(0)
        images = torch.randn(3, 3, 12, 12)
        predictions = torch.randn(3, 9, 48)
        keep = torch.stack([torch.randperm(9)[:2] for _ in range(3)])
        loss = masked_patch_loss(predictions, normalized_patches(images, 4), keep)
        expected = reference_loss(images, predictions, keep, 4)
        assert loss.item() == pytest.approx(expected, rel=1e-5)

    def test_masked_patch_loss__gradient_of_hidden_patches_alone(self) -> None:
        predictions = torch.randn(2, 4, 12, requires_grad=True)
        keep = torch.tensor([[1], [3]])
        masked_patch_loss(predictions, torch.randn(2, 4, 12), keep).backward()
        moved = predictions.grad.abs().sum(dim=2) > 0
        assert moved.tolist() == [[True, False, True, True], [True, True, True, False]]

    def test_normalized_patches__patch_without_content(self) -> None:
        assert normalized_patches(torch.full((1, 3, 8, 8), 0.3), 4).abs().max() < 1e-3
