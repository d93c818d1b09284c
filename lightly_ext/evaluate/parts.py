"""What an image is cut into: a vector of each part, where it is, and its share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lightly_ext.evaluate.clusters import check_clusters, cluster_patches
from lightly_ext.evaluate.frozen_model import FrozenModel
from stellar_plugin.encoder import Factorization
from stellar_plugin.protocols import CLUSTERS
from stellar_plugin.visualize import token_masses


class Parts(NamedTuple):
    """Parts of a batch of images.

    Attributes:
        vectors:
            What each part is, float32 with shape (batch_size, num_parts, dim).
        maps:
            Where it is: its share of each patch, float32 in [0, 1] with shape
            (batch_size, num_parts, num_patches), row-major over the grid; of a patch
            they sum to one over the parts.
        masses:
            Its share of the image, the mean of its map, float32 with shape (batch_size,
            num_parts); sums to one. A part with none is nowhere in its image.
        grid_size:
            Height and width of the patch grid, in patches.
    """

    vectors: Tensor
    maps: Tensor
    masses: Tensor
    grid_size: tuple[int, int]


def token_parts(result: Factorization) -> Parts:
    """The tokens of STELLAR and the columns of its localization."""
    localization = result.localization.float()
    return Parts(
        result.sparse.float(),
        localization.mT.contiguous(),
        token_masses(localization),
        result.grid_size,
    )


def patch_parts(result: Factorization) -> Parts:
    """The patches themselves."""
    vectors = result.dense.float()
    count = vectors.shape[1]
    maps = torch.eye(count, device=vectors.device).expand(len(vectors), -1, -1)
    return Parts(vectors, maps, maps.mean(dim=2), result.grid_size)


def cluster_parts(result: Factorization, num_clusters: int, seed: int) -> Parts:
    """Clusters of similar patches, see `clusters.cluster_patches`, and their means.

    Where an image has fewer clusters, the last ones are zero and have no mass.

    Args:
        result:
            Factorization of a batch.
        num_clusters:
            Number of clusters.
        seed:
            Decides on their start, of each image alike.
    """
    clusters = cluster_patches(result.dense, num_clusters, seed)
    maps = F.one_hot(clusters.to(result.dense.device), num_clusters).mT.float()
    counts = maps.sum(dim=2, keepdim=True).clamp(min=1)
    vectors = maps @ result.dense.float() / counts
    return Parts(vectors, maps, maps.mean(dim=2), result.grid_size)


@dataclass(frozen=True)
class Cut:
    """How images are cut into parts.

    Attributes:
        num_parts:
            Number of parts of an image.
        clusters:
            Whether they are clusters of patches, and not the tokens of STELLAR.
        seed:
            Decides on the start of the clusters.
    """

    num_parts: int
    clusters: bool
    seed: int

    def __call__(self, result: Factorization) -> Parts:
        """Cuts a batch of images."""
        if self.clusters:
            return cluster_parts(result, self.num_parts, self.seed)
        return token_parts(result)

    @property
    def kind(self) -> str:
        """What the parts are, in words: other words, other vectors."""
        if self.clusters:
            return f"{self.num_parts} k-means clusters of patches, seed {self.seed}"
        return f"{self.num_parts} tokens"


def choose_cut(model: FrozenModel, crop: int, clusters: int | None, seed: int) -> Cut:
    """Chooses how the images of a model are cut.

    Args:
        model:
            The model.
        crop:
            Side of its images in px.
        clusters:
            Number of clusters of patches. None takes the tokens of a model that has
            them and their localization, else 16 clusters.
        seed:
            Decides on the start of the clusters.

    Raises:
        ValueError: If there are fewer patches than clusters.
    """
    if clusters is None and model.num_queries and model.has_localization:
        return Cut(model.num_queries, False, seed)
    number = clusters or CLUSTERS
    check_clusters(model, crop, number)
    return Cut(number, True, seed)
