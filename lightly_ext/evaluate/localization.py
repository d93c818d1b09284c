"""Foreground segmentation by localization maps, without a trained probe."""

from __future__ import annotations

import torch
from torch import Tensor


def query_roles(localization: Tensor, foreground: Tensor) -> Tensor:
    """Decides for each query whether it stands for foreground, by majority.

    Args:
        localization:
            Localization matrices with shape (num_images, num_patches, num_queries).
        foreground:
            Whether a patch is foreground, bool with shape (num_images, num_patches).

    Returns:
        Bool tensor with shape (num_queries,): True where more than half of the patches
        that the query wins are foreground. A query that wins no patch is background.
    """
    winners = localization.argmax(dim=-1).flatten()
    num_queries = localization.shape[-1]
    total = torch.bincount(winners, minlength=num_queries)
    hits = torch.bincount(winners[foreground.flatten()], minlength=num_queries)
    return 2 * hits > total


def foreground_iou(localization: Tensor, foreground: Tensor, roles: Tensor) -> float:
    """Intersection over union of the patches won by foreground queries.

    Args:
        localization:
            Localization matrices with shape (num_images, num_patches, num_queries).
        foreground:
            Whether a patch is foreground, bool with shape (num_images, num_patches).
        roles:
            Bool tensor with shape (num_queries,), from `query_roles` on other images.

    Returns:
        Intersection over union in 0 to 1, counted over all patches at once; 0 if no
        patch is foreground, neither here nor there.
    """
    predicted = roles[localization.argmax(dim=-1)]
    union = int((predicted | foreground).sum())
    return int((predicted & foreground).sum()) / max(union, 1)
