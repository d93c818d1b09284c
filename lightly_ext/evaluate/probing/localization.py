"""Segmentation by localization maps, without a trained probe.

Images are partitions into tokens; all scores follow from how many px of each label lie
in each part.
"""

from __future__ import annotations

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor


def overlap_counts(
    parts: Tensor, labels: Tensor, num_parts: int
) -> tuple[Tensor, Tensor]:
    """Counts how parts of an image and labels overlap.

    Args:
        parts:
            Part that each px lies in, int64 in 0 to num_parts - 1, of any shape.
        labels:
            Label of each px, integers of the same shape.
        num_parts:
            Number of parts.

    Returns:
        - Px in each part (row) with each label (column), int64 with shape (num_parts,
          num_labels).
        - The labels that occur, ascending, with shape (num_labels,).
    """
    values, columns = labels.unique(return_inverse=True)
    cells = (parts * len(values) + columns).flatten()
    counts = torch.bincount(cells, minlength=num_parts * len(values))
    return counts.view(num_parts, len(values)), values


def overlap_ious(counts: Tensor) -> Tensor:
    """Intersection over union of every part with every label.

    Args:
        counts:
            Px in each part with each label, from `overlap_counts`.

    Returns:
        float64 tensor with the same shape, in 0 to 1.
    """
    union = counts.sum(dim=0) + counts.sum(dim=1, keepdim=True) - counts
    return counts.double() / union.clamp_min(1)


def best_overlap(ious: Tensor) -> float:
    """Mean over segments of the best IoU with a part; parts may serve twice.

    Args:
        ious:
            IoU with shape (num_parts, num_segments), at least one segment.
    """
    return float(ious.amax(dim=0).mean())


def one_to_one_overlap(ious: Tensor) -> float:
    """Mean over segments of the IoU under the best one-to-one assignment.

    A segment beyond the number of parts counts as 0.

    Args:
        ious:
            IoU with shape (num_parts, num_segments), at least one segment.
    """
    rows, columns = linear_sum_assignment(ious.numpy(), maximize=True)
    return float(ious[rows, columns].sum()) / ious.shape[1]


def parts_iou(hits: Tensor, misses: Tensor, chosen: Tensor) -> float:
    """Intersection over union of the union of some parts with the foreground.

    Args:
        hits:
            Foreground px in each part, with shape (num_parts,).
        misses:
            Background px in each part, with shape (num_parts,).
        chosen:
            Whether a part is taken as foreground, bool with shape (num_parts,).

    Returns:
        IoU in 0 to 1; 0 if there is no foreground, neither here nor there.
    """
    union = int(hits.sum()) + int(misses[chosen].sum())
    return int(hits[chosen].sum()) / max(union, 1)


def best_parts_iou(hits: Tensor, misses: Tensor) -> float:
    """The largest `parts_iou` that any choice of parts has.

    The best choice takes all parts above some share of foreground: a part raises the
    IoU exactly if its hits per miss are more than the IoU.

    Args:
        hits:
            Foreground px in each part, with shape (num_parts,).
        misses:
            Background px in each part, with shape (num_parts,).
    """
    share = hits.double() / (hits + misses).clamp_min(1)
    order = share.argsort(descending=True)
    union = hits.sum() + misses[order].cumsum(dim=0)
    return float((hits[order].cumsum(dim=0).double() / union.clamp_min(1)).max())


def uniform_parts(num_parts: int, size: tuple[int, int]) -> Tensor:
    """Partition of an image into equal rectangles, as square a grid as there is.

    Args:
        num_parts:
            Number of rectangles: 16 are 4 x 4, 24 are 4 x 6, 7 are 1 x 7.
        size:
            Height and width of the image in px.

    Returns:
        Rectangle of each px, row by row, int64 with shape (height, width).
    """
    rows = max(k for k in range(1, int(num_parts**0.5) + 1) if num_parts % k == 0)
    columns = num_parts // rows
    y, x = (
        torch.arange(side) * count // side
        for side, count in zip(size, (rows, columns), strict=True)
    )
    return y[:, None] * columns + x
