"""How well parts of an image fit its objects: mBO, foreground ARI, CorLoc.

The two first follow from how many px of each object lie in each part, see
`localization.overlap_counts`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightly_ext.evaluate.boxes import box_ious

# Of a box with one of an object: from there on the object is found.
FOUND = 0.5


def adjusted_rand_index(counts: Tensor) -> float:
    """Adjusted Rand index of two partitions of the same px.

    Of all pairs of px, those that lie together in both partitions, beside what chance
    gives and what is possible. 1 where each partition has a single part, or no part
    with two px: there is nothing to tell apart, and nothing is wrong.

    Args:
        counts:
            Px in each part (row) of each object (column), int64.

    Returns:
        At most 1, about 0 by chance.
    """
    together, rows, columns, all_pairs = (
        float(_pairs(n).sum())
        for n in (counts, counts.sum(dim=1), counts.sum(dim=0), counts.sum())
    )
    expected = rows * columns / max(all_pairs, 1.0)
    possible = (rows + columns) / 2
    if possible == expected:
        return 1.0
    return (together - expected) / (possible - expected)


def is_found(boxes: Tensor, of_objects: Tensor) -> float:
    """1 if one of the boxes overlaps one of an object by half, else 0.

    Args:
        boxes:
            Edges with shape (n, 4).
        of_objects:
            Edges with shape (m, 4).
    """
    return float((box_ious(boxes, of_objects) >= FOUND).any())


def part_boxes(parts: Tensor, num_parts: int) -> Tensor:
    """Boxes around all px of each part.

    Args:
        parts:
            Part of each px, int64 in 0 to num_parts - 1 with shape (height, width);
            other values are none.
        num_parts:
            Number of parts.

    Returns:
        Edges in px, float64 with shape (num_parts, 4); zeros for a part without px.
    """
    boxes = torch.zeros(num_parts, 4, dtype=torch.float64)
    for part in parts.unique().tolist():
        if 0 <= part < num_parts:
            rows, columns = (parts == part).nonzero().unbind(dim=1)
            first = torch.stack([columns.min(), rows.min()])
            last = torch.stack([columns.max(), rows.max()])
            boxes[part] = torch.cat([first, last + 1])
    return boxes


def _pairs(counts: Tensor) -> Tensor:
    """Ordered pairs of so many px, float64: they may exceed what int64 holds."""
    counts = counts.double()
    return counts * (counts - 1)
