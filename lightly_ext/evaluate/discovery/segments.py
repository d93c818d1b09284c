"""Parts of an image, and which of them are the object, told without labels."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from scipy.ndimage import label
from torch import Tensor

from lightly_ext.evaluate.clusters import cluster_patches
from lightly_ext.evaluate.discovery.normalized_cut import cut_object
from lightly_ext.evaluate.probing.localization import uniform_parts
from lightly_ext.evaluate.probing.where import parts_at_px
from stellar_plugin.encoder import Factorization


class Segments(NamedTuple):
    """Parts of one image.

    Attributes:
        parts: Part of each px, int64 with shape (height, width).
        object: Which px are the object, bool with shape (height, width); at least one.
        num_parts: Number of parts, of which some may have no px.
    """

    parts: Tensor
    object: Tensor
    num_parts: int


def token_segments(result: Factorization, size: tuple[int, int]) -> list[Segments]:
    """The strongest token of each patch, and the tokens that lie inside.

    Args:
        result:
            Factorization of a batch.
        size:
            Height and width of the images in px.
    """
    winners = result.localization.float().cpu().argmax(dim=2)
    return _inner(winners, result.grid_size, size, result.sparse.shape[1])


def cluster_segments(
    result: Factorization, size: tuple[int, int], num_clusters: int, seed: int
) -> list[Segments]:
    """Clusters of patches, see `clusters.cluster_patches`, and those that lie inside.

    Args:
        result:
            Factorization of a batch.
        size:
            Height and width of the images in px.
        num_clusters:
            Number of clusters.
        seed:
            Decides on their start, of each image alike.
    """
    clusters = cluster_patches(result.dense, num_clusters, seed)
    return _inner(clusters, result.grid_size, size, num_clusters)


def ncut_segments(result: Factorization, size: tuple[int, int]) -> list[Segments]:
    """TokenCut's object and the rest, see `normalized_cut.cut_object`.

    Args:
        result:
            Factorization of a batch.
        size:
            Height and width of the images in px.
    """
    objects = torch.stack([cut_object(d, result.grid_size) for d in result.dense])
    return [
        Segments(parts, parts == 1, 2)
        for parts in parts_at_px(objects.long(), result.grid_size, size)
    ]


def grid_segments(num_parts: int, size: tuple[int, int]) -> Segments:
    """A uniform grid, and its cells that lie inside; knows nothing of the image."""
    parts = uniform_parts(num_parts, size)
    return Segments(parts, inner_object(parts, num_parts), num_parts)


def centre_segments(size: tuple[int, int]) -> Segments:
    """A box of half the area in the centre, and the rest; knows nothing either."""
    box = torch.zeros(size, dtype=torch.bool)
    (top, bottom), (left, right) = (
        (round(side * (1 - 0.5**0.5) / 2), round(side * (1 + 0.5**0.5) / 2))
        for side in size
    )
    box[top:bottom, left:right] = True
    return Segments(box.long(), box, 2)


def inner_object(parts: Tensor, num_parts: int) -> Tensor:
    """What lies inside of the image: objects do, backgrounds reach to its border.

    Of all parts that have less than their share of the px at the border, the largest
    area that hangs together.

    Args:
        parts:
            Part of each px, int64 with shape (height, width).
        num_parts:
            Number of parts.

    Returns:
        bool tensor with the same shape; all of the image where no part is inside.
    """
    border = torch.ones_like(parts, dtype=torch.bool)
    border[1:-1, 1:-1] = False
    px = torch.bincount(parts.flatten(), minlength=num_parts)
    at_border = torch.bincount(parts[border], minlength=num_parts)
    inside = (at_border * parts.numel() < px * border.sum())[parts]
    if not inside.any():
        return torch.ones_like(inside)
    areas = label(inside.numpy())[0]
    largest = np.bincount(areas[areas > 0]).argmax()
    return torch.from_numpy(areas == largest)


def _inner(
    parts: Tensor, grid_size: tuple[int, int], size: tuple[int, int], num_parts: int
) -> list[Segments]:
    return [
        Segments(p, inner_object(p, num_parts), num_parts)
        for p in parts_at_px(parts, grid_size, size)
    ]
