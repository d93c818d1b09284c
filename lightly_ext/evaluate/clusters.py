"""Parts of an image by its patch features alone: for models without localization."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from scipy.cluster.vq import kmeans2
from torch import Tensor
from torch.nn import functional as F

from lightly_ext.evaluate.frozen_model import FrozenModel
from stellar_plugin.protocols import CLUSTER_ITERATIONS


def cluster_patches(dense: Tensor, num_clusters: int, seed: int) -> Tensor:
    """Cuts each image into clusters of similar patches: k-means of its own patches.

    A k-means++ start, then Lloyd's iterations, on features of unit length, in float64
    on the CPU. Neither other images nor the process decide on the clusters of one.

    Args:
        dense:
            Patch features with shape (batch_size, num_patches, dim).
        num_clusters:
            Most clusters of an image; where fewer patches differ, there are fewer.
        seed:
            Decides on the start, of each image alike.

    Returns:
        Cluster of each patch, int64 in 0 to num_clusters - 1 with shape (batch_size,
        num_patches). Equal numbers in two images have nothing in common.
    """
    unit = F.normalize(dense.detach().cpu().double(), dim=2)
    parts = [_k_means(patches.numpy(), num_clusters, seed) for patches in unit]
    return torch.stack(parts)


def _k_means(points: np.ndarray, num_clusters: int, seed: int) -> Tensor:
    distinct = len(np.unique(points, axis=0))  # k-means++ needs as many to draw from
    generator = np.random.default_rng(seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "One of the clusters is empty")
        _, labels = kmeans2(
            points,
            min(num_clusters, distinct),
            iter=CLUSTER_ITERATIONS,
            minit="++",
            seed=generator,
        )
    return torch.from_numpy(labels).long()


def check_clusters(model: FrozenModel, crop: int, num_clusters: int) -> None:
    """Checks that images of a model can be cut into clusters of patches.

    Args:
        model:
            The model.
        crop:
            Side of the images in px.
        num_clusters:
            Number of clusters.

    Raises:
        ValueError: If there are fewer patches than clusters.
    """
    rows, columns = model.map_size(crop)
    if rows * columns < num_clusters:
        raise ValueError(
            f"'{model.origin.label}' has {rows} x {columns} patches at {crop} px, too "
            f"few for {num_clusters} clusters: name fewer with --clusters, or a larger "
            "--crop."
        )
