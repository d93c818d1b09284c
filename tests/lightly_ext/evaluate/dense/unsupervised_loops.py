"""Clusters as classes, by loops over px and over all ways to match them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tests.lightly_ext.evaluate.dense.in_context_loops import Labels, bilinear

Numbers = NDArray[np.float64]


def clusters_at_px(
    scores: Numbers, clusters: Sequence[int], grid: tuple[int, int], side: int
) -> Labels:
    """Cluster of the part whose score is the largest at each px.

    Args:
        scores: Of parts in patches, with shape (num_patches, num_parts).
        clusters: Cluster of each part.
        grid: Height and width of the patch grid.
        side: Height and width of the image in px.
    """
    maps, size = list(scores), (side, side)
    found = np.zeros(size, dtype=np.int64)
    for y, x in np.ndindex(size):
        found[y, x] = clusters[int(bilinear(maps, grid, size, y, x).argmax())]
    return found


def brute_force(
    clusters: Sequence[Labels], labels: Sequence[Labels], num_clusters: int, num: int
) -> dict[str, float]:
    """Scores of clusters at px and labels of `num` classes; -1 is ignored."""
    table = np.zeros((num_clusters, num))
    for found, true in zip(clusters, labels, strict=True):
        for c, label in zip(found.flat, true.flat, strict=True):
            if label >= 0:
                table[c, label] += 1
    # Cluster of each class; of more clusters than classes, some have none.
    matches = itertools.permutations(range(num_clusters), num)
    best = max(matches, key=lambda m: sum(table[c, k] for k, c in enumerate(m)))
    one_to_one = [[c] for c in best]
    used = [c for c in range(num_clusters) if table[c].any()]
    joined = [[c for c in used if table[c].argmax() == k] for k in range(num)]
    return {
        **_scores(table, one_to_one, ""),
        **_scores(table, joined, "_many_to_one"),
        "num_images": len(labels),
    }


def _scores(table: Numbers, of_class: list[list[int]], end: str) -> dict[str, float]:
    hits = [sum(table[c, k] for c in cs) for k, cs in enumerate(of_class)]
    ious = []
    for k, clusters in enumerate(of_class):
        union = sum(table[c].sum() for c in clusters) + table[:, k].sum() - hits[k]
        ious += [hits[k] / union] if union else []
    return {
        f"mIoU{end}": sum(ious) / len(ious),
        f"accuracy{end}": sum(hits) / table.sum(),
    }
