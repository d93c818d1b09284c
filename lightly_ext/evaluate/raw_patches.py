"""Behind the interface of an encoder: raw patches."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stellar_plugin.encoder import Factorization
from stellar_plugin.networks.network import Network, unlocalized


class RawPatches(Network):
    """No model: dense is the pixels of each patch, CLS their mean and their spread.

    What any encoder must beat for a claim that it has learned something.
    """

    def __init__(self, patch_size: int) -> None:
        super().__init__()
        self.stride = patch_size
        self.embed_dim = 3 * patch_size**2

    def forward(self, images: Tensor) -> Factorization:
        """Cuts normalised images into patches.

        Raises:
            ValueError: If the image is no multiple of the patch size.
        """
        p, (height, width) = self.stride, images.shape[-2:]
        if height % p or width % p:
            raise ValueError(
                f"Image size {height} x {width} is no multiple of the patch size {p}: "
                "name 'patches:SIZE' or another crop."
            )
        dense = nn.functional.unfold(images, p, stride=p).mT
        spread = dense.std(dim=1, correction=0)
        pooled = torch.cat([dense.mean(dim=1), spread], dim=1)
        return unlocalized(pooled, dense, (height // p, width // p))
