"""Short codes of parts, with which a page without a server finds similar ones."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lightly_ext.evaluate.atlas.part_table import PartTable

# Bytes of a code: 10 000 images of 16 parts take 5 MB.
CODE_BYTES = 32
# Parts that the codes are checked with, and how many images are looked for.
NUM_CHECKED, NUM_SIMILAR = 64, 24


@dataclass(frozen=True)
class Codes:
    """Codes whose weighted products are nearly the cosines of the parts.

    Attributes:
        values:
            Codes, int8 with shape (num_images, num_parts, num_bytes).
        weights:
            Of each entry of a product, float32 with shape (num_bytes,).
    """

    values: Tensor
    weights: Tensor

    def cosines(self, images: Tensor, parts: Tensor) -> Tensor:
        """Of some parts with all, about, float32 (len(images), num_images, num_parts).

        Args:
            images:
                Numbers of their images.
            parts:
                Their numbers there.
        """
        queries = self.values[images, parts].float() * self.weights
        return torch.einsum("qd,ird->qir", queries, self.values.float())


def part_codes(table: PartTable) -> Codes:
    """Principal directions of all parts, 8 bits in each.

    Args:
        table:
            The parts.
    """
    dim = table.units.shape[2]
    moment = torch.zeros(dim, dim, dtype=torch.float64)
    blocks = table.blocks(dim)
    for images in blocks:
        units = table.units_of(images).flatten(0, 1)
        moment += (units.mT @ units).double()
    # Ascending; not centred, so that products are cosines and no covariances.
    axes = torch.linalg.eigh(moment).eigenvectors[:, -CODE_BYTES:].float()
    values = torch.cat([table.units_of(images) @ axes for images in blocks])
    steps = values.abs().amax(dim=(0, 1)).clamp(min=torch.finfo().tiny) / 127
    return Codes((values / steps).round().to(torch.int8), steps**2)


def found_share(table: PartTable, codes: Codes, seed: int) -> float:
    """Share of the images with the most similar parts that codes find, in [0, 1].

    Args:
        table:
            The parts.
        codes:
            Their codes.
        seed:
            Draws the parts whose similar ones are looked for.
    """
    places = table.present.nonzero()
    rng = np.random.default_rng(seed)
    count = min(NUM_CHECKED, len(places))
    chosen = torch.from_numpy(rng.choice(len(places), count, replace=False))
    images, parts = places[chosen].mT
    queries = torch.stack(
        [
            table.units_of(np.array([image]))[0, part]
            for image, part in zip(images.tolist(), parts.tolist(), strict=True)
        ]
    )
    exact = torch.cat(
        [
            torch.einsum("qd,ird->qir", queries, table.units_of(block))
            for block in table.blocks(table.units.shape[2])
        ],
        dim=1,
    )
    most = min(NUM_SIMILAR, len(table.rows) - 1)
    if most == 0:
        return 1.0
    found = [
        _best(cosines, images, table.present, most)
        for cosines in (exact, codes.cosines(images, parts))
    ]
    return (found[0][:, :, None] == found[1][:, None]).sum().item() / (count * most)


def _best(cosines: Tensor, own: Tensor, present: Tensor, most: int) -> Tensor:
    """Images with the most similar parts, without a part's own, (queries, most)."""
    best = cosines.masked_fill(~present, -torch.inf).amax(dim=2)
    best[torch.arange(len(own)), own] = -torch.inf
    return best.topk(most, dim=1).indices
