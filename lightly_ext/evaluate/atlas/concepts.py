"""Concepts: which parts of all images go together, and what is known of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightly_ext.evaluate.atlas.k_means import ITERATIONS, k_means
from lightly_ext.evaluate.atlas.part_table import PartTable
from lightly_ext.evaluate.devices import Devices
from lightly_ext.modules import STELLARProjectionHead

# Parts that clusters are fitted to: so many per cluster, and in all.
PARTS_PER_CONCEPT, MOST_PARTS = 256, 2**16
NO_CONCEPT = -1
NUM_EXAMPLES, NUM_NEIGHBOURS = 12, 6


@dataclass(frozen=True)
class Concepts:
    """Concepts, those that cover most of the images first.

    Attributes:
        of_part:
            Concept of each part, int64 with shape (num_images, num_parts), `NO_CONCEPT`
            where it is none of those that are shown.
        similarity:
            How similar it is to the centre of its concept, float32 of the same shape.
        centres:
            Centres of unit length, float32 with shape (num_concepts, dim).
        coverage:
            Share of all images that each has, float64 with shape (num_concepts,).
        numbers:
            Numbers of the prototypes, None for clusters.
    """

    of_part: Tensor
    similarity: Tensor
    centres: Tensor
    coverage: Tensor
    numbers: list[int] | None = None

    def __len__(self) -> int:
        return len(self.centres)

    def neighbours(self) -> list[list[tuple[int, float]]]:
        """The nearest other concepts of each and their cosines, the nearest first."""
        cosines = self.centres @ self.centres.mT
        cosines.fill_diagonal_(-torch.inf)
        count = min(NUM_NEIGHBOURS, len(self) - 1)
        values, order = cosines.sort(dim=1, descending=True, stable=True)
        return [
            list(zip(o.tolist(), v.tolist(), strict=True))
            for o, v in zip(order[:, :count], values[:, :count], strict=True)
        ]

    def examples(self, present: Tensor) -> list[list[tuple[int, int]]]:
        """Image and number of the most typical parts, at most one of an image.

        Args:
            present:
                Whether a part is somewhere, see `PartTable.present`.
        """
        found = []
        for concept in range(len(self)):
            chosen = (self.of_part == concept) & present
            values, parts = self.similarity.masked_fill(~chosen, -torch.inf).max(dim=1)
            order = values.argsort(descending=True, stable=True)[:NUM_EXAMPLES]
            order = order[values[order].isfinite()]
            found.append(list(zip(order.tolist(), parts[order].tolist(), strict=True)))
        return found

    def occurrences(self, present: Tensor) -> tuple[list[int], list[int]]:
        """How many images each is in, and how many parts it has.

        Args:
            present:
                As for `examples`.
        """
        here = self.of_part.masked_fill(~present, NO_CONCEPT)
        chosen = here != NO_CONCEPT
        images = torch.arange(len(here))[:, None].expand_as(here)
        pairs = images[chosen] * len(self) + here[chosen]
        parts = here[chosen].bincount(minlength=len(self))
        of_image = (pairs.unique() % len(self)).bincount(minlength=len(self))
        return of_image.tolist(), parts.tolist()

    def mean_maps(self, table: PartTable) -> Tensor:
        """Where in an image each is, the mean over all images.

        Args:
            table:
                The parts.

        Returns:
            float64 tensor with shape (num_concepts, num_patches), in [0, 1]; its mean
            is the coverage.
        """
        sums = torch.zeros(len(self), table.maps.shape[2], dtype=torch.float64)
        for images in table.blocks(table.maps.shape[2]):
            concepts = self.of_part[images].flatten()
            maps = table.maps_of(images).flatten(0, 1)
            shown = concepts != NO_CONCEPT
            sums.index_add_(0, concepts[shown], maps[shown].double())
        return sums / len(table.rows)

    def folder_shares(
        self, masses: Tensor, labels: Tensor, num_folders: int
    ) -> tuple[Tensor, Tensor]:
        """Which folders the area of each concept lies in.

        Args:
            masses:
                Share of its image that each part has, (num_images, num_parts).
            labels:
                Folder of each image, int64.
            num_folders:
                Number of folders.

        Returns:
            Share of the area of each concept, which sums to one over the folders, and
            that share by the folder's share of the images; float64 with shape
            (num_concepts, num_folders).
        """
        places = self.of_part * num_folders + labels[:, None]
        chosen = self.of_part != NO_CONCEPT
        areas = torch.zeros(len(self) * num_folders, dtype=torch.float64)
        areas.index_add_(0, places[chosen], masses[chosen].double())
        areas = areas.view(len(self), num_folders)
        shares = areas / areas.sum(dim=1, keepdim=True)
        counts = labels.bincount(minlength=num_folders).double()
        return shares, shares * len(labels) / counts


def cluster_concepts(table: PartTable, number: int, devices: Devices) -> Concepts:
    """Clusters of parts: k-means of some of them, then all go to the nearest centre.

    Args:
        table:
            The parts; those that are nowhere decide on no centre.
        number:
            Number of clusters.
        devices:
            Has the seed, and shows progress.

    Raises:
        ValueError: If no part is anywhere.
    """
    places = table.present.flatten().nonzero().flatten().numpy()
    if not len(places):
        raise ValueError(
            f"No part of an image of '{table.files.root}' is half a patch in all: "
            "there are too few patches for so many parts. Name a larger --crop, or "
            "fewer --clusters."
        )
    most = min(len(places), PARTS_PER_CONCEPT * number, MOST_PARTS)
    rng = np.random.default_rng(devices.seed)
    places = np.sort(rng.choice(places, most, replace=False))
    points = torch.empty(len(places), table.units.shape[2])
    for images in table.blocks(table.units.shape[2]):
        first, end = images[0] * table.num_parts, (images[-1] + 1) * table.num_parts
        drawn = slice(*np.searchsorted(places, (first, end)))
        points[drawn] = table.units_of(images).flatten(0, 1)[places[drawn] - first]
    steps = devices.progress(range(ITERATIONS), "k-means of parts", ITERATIONS)
    centres = k_means(points, number, devices.seed, steps)
    width, found = centres.shape[1], len(centres)
    concepts = _assigned(table, centres, lambda u, _: u, width, found, devices)
    return replace(concepts, numbers=None)


def prototype_concepts(
    table: PartTable, head: STELLARProjectionHead, number: int, devices: Devices
) -> Concepts:
    """Prototypes that the model was trained with: each token has the largest logit's.

    Args:
        table:
            The tokens.
        head:
            Projects them, and has the prototypes.
        number:
            Number of prototypes, those that cover most.
        devices:
            Shows progress.
    """
    weight = head.prototypes.weight
    widths = [m.in_features for m in head.modules() if isinstance(m, nn.Linear)]

    def embed(units: Tensor, norms: Tensor) -> Tensor:
        return head((units * norms[..., None]).to(weight.device))

    found = _assigned(table, weight, embed, max(widths), number, devices)
    return replace(found, centres=F.normalize(found.centres.cpu(), dim=1))


def _assigned(
    table: PartTable,
    centres: Tensor,
    embed: Callable[[Tensor, Tensor], Tensor],
    width: int,
    number: int,
    devices: Devices,
) -> Concepts:
    """Gives each part to the centre whose product with its embedding is largest."""
    winners = torch.empty(table.masses.shape, dtype=torch.int64)
    values = torch.empty(table.masses.shape)
    blocks = table.blocks(max(width, len(centres)))
    for images in devices.progress(blocks, "parts to concepts", len(blocks)):
        embedded = embed(table.units_of(images), table.norms[images])
        best, where = (embedded @ centres.mT).max(dim=-1)
        values[images], winners[images] = best.cpu(), where.cpu()
    areas = torch.zeros(len(centres), dtype=torch.float64)
    areas.index_add_(0, winners.flatten(), table.masses.flatten().double())
    used = winners[table.present].bincount(minlength=len(centres)) > 0
    order = areas.argsort(descending=True, stable=True)
    order = order[used[order]][:number]
    new = torch.full((len(centres),), NO_CONCEPT)
    new[order] = torch.arange(len(order))
    coverage = areas[order] / len(table.rows)
    return Concepts(
        new[winners],
        values,
        centres[order.to(centres.device)],
        coverage,
        order.tolist(),
    )
