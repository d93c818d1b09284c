"""Short codes of parts, with which a page without a server finds similar ones."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
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

    def cosines(
        self, images: Tensor, parts: Tensor, others: NDArray[np.int64]
    ) -> Tensor:
        """Of some parts with those of others, about.

        Args:
            images:
                Numbers of the images of the parts, int64 with shape (num_queries,).
            parts:
                Their numbers there, int64 with the same shape.
            others:
                Numbers of the other images.

        Returns:
            float32 tensor with shape (num_queries, len(others), num_parts).
        """
        queries = self.values[images, parts].float() * self.weights
        return torch.einsum("qd,ird->qir", queries, self.values[others].float())


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
    most = min(NUM_SIMILAR, len(table.rows) - 1)
    if most == 0:
        return 1.0
    queries = torch.stack(
        [
            table.units_of(np.array([image]))[0, part]
            for image, part in zip(images.tolist(), parts.tolist(), strict=True)
        ]
    )
    nearest = []
    for of_block in (
        lambda block: torch.einsum("qd,ird->qir", queries, table.units_of(block)),
        lambda block: codes.cosines(images, parts, block),
    ):
        best = [
            of_block(block).masked_fill(~table.present[block], -torch.inf).amax(dim=2)
            for block in table.blocks(max(table.units.shape[2], count))
        ]
        cosines = torch.cat(best, dim=1)
        cosines[torch.arange(count), images] = -torch.inf
        nearest.append(cosines.topk(most, dim=1).indices)
    both = nearest[0][:, :, None] == nearest[1][:, None]
    return both.sum().item() / (count * most)
