"""Behind the interface of a ViT: the other models of timm, and raw patches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from stellar_plugin.encoder import Factorization


class TimmBackbone(nn.Module):
    """A timm model that is no plain ViT: CLS is what it pools, dense its last map."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Factorization:
        """Computes pooled features and the feature map of normalised images."""
        model: Any = self.model
        features = model.forward_features(images)
        pooled = model.forward_head(features, pre_logits=True).flatten(1)
        if features.ndim == 4:
            if getattr(model, "output_fmt", "NCHW") == "NCHW":
                features = features.permute(0, 2, 3, 1)
            grid_size = (features.shape[1], features.shape[2])
            dense = features.flatten(1, 2)
        else:
            dense = features[:, getattr(model, "num_prefix_tokens", 0) :]
            grid_size = _grid_size(dense.shape[1], images)
        return Factorization(pooled, dense[:, :0], dense, grid_size, _no_localization)


class RawPatches(nn.Module):
    """No model: dense is the pixels of each patch, CLS their mean and their spread.

    What any encoder must beat for a claim that it has learned something.
    """

    def __init__(self, patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size

    def forward(self, images: Tensor) -> Factorization:
        """Cuts normalised images into patches.

        Raises:
            ValueError: If the image is no multiple of the patch size.
        """
        p, (height, width) = self.patch_size, images.shape[-2:]
        if height % p or width % p:
            raise ValueError(
                f"Image size {height} x {width} is no multiple of the patch size {p}: "
                "name 'patches:SIZE' or another crop."
            )
        dense = nn.functional.unfold(images, p, stride=p).mT
        spread = dense.std(dim=1, correction=0)
        pooled = torch.cat([dense.mean(dim=1), spread], dim=1)
        grid_size = (height // p, width // p)
        return Factorization(pooled, dense[:, :0], dense, grid_size, _no_localization)


def _grid_size(num_patches: int, images: Tensor) -> tuple[int, int]:
    """Grid of patches in the shape of the image."""
    height, width = images.shape[-2:]
    rows = max(1, round((num_patches * height / width) ** 0.5))
    return rows, num_patches // rows


def _no_localization(dense: Tensor, sparse: Tensor) -> Tensor:
    return dense.new_zeros(*dense.shape[:2], 0)
