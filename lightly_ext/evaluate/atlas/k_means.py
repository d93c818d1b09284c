"""k-means of directions: what the tokens of many images have in common."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

ITERATIONS = 25
# Of a cosine: closer vectors count as equal, which rounding may tell apart.
EQUAL = 1e-6


def k_means(
    points: Tensor, number: int, seed: int, steps: Iterable[int] = range(ITERATIONS)
) -> Tensor:
    """Clusters unit vectors by their cosines: a k-means++ start, then Lloyd's steps.

    Args:
        points:
            Unit vectors, float32 with shape (num_points, dim).
        number:
            Number of clusters; fewer where fewer points differ.
        seed:
            Decides on the start.
        steps:
            Steps to take; nothing happens in them once no point changes its cluster.

    Returns:
        Centres of unit length, float32 with shape (num_clusters, dim).
    """
    centres = points[_start(points, number, seed)]
    before: Tensor | None = None
    settled = False
    for _ in steps:  # to their end, which may be shown
        if settled:
            continue
        nearest = (points @ centres.mT).argmax(dim=1)
        settled = before is not None and torch.equal(nearest, before)
        sums = torch.zeros_like(centres).index_add(0, nearest, points)
        # Without points, or between opposite ones, a centre stays where it is.
        moved = sums.norm(dim=1, keepdim=True) > EQUAL
        centres = torch.where(moved, F.normalize(sums, dim=1), centres)
        before = nearest
    return centres


def _start(points: Tensor, number: int, seed: int) -> list[int]:
    """Points drawn by their squared distance to the nearest one before."""
    generator = np.random.default_rng(seed)
    chosen = [int(generator.integers(len(points)))]
    distances = torch.full((len(points),), torch.inf)
    while len(chosen) < number:
        # Half the squared distance of unit vectors.
        new = 1 - points @ points[chosen[-1]]
        distances = torch.minimum(distances, torch.where(new > EQUAL, new, 0))
        sums = distances.double().cumsum(dim=0)
        if sums[-1] == 0:
            break
        drawn = generator.random() * sums[-1]
        chosen.append(int(torch.searchsorted(sums, drawn, right=True)))
    return chosen
