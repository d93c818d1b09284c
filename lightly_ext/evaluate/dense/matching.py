"""Clusters matched to classes, and scores of the match; all from one table of px."""

from __future__ import annotations

from typing import NamedTuple

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

NO_CLASS = -1


class MatchScores(NamedTuple):
    """Scores of clusters as classes.

    Attributes:
        miou: Mean of `ious` over the classes that have any px, fraction.
        accuracy: Share of px whose cluster has their class, fraction.
        ious: IoU of each class over all px, float64 with shape (num_classes,); NaN for
            a class that neither labels nor clusters have.
    """

    miou: float
    accuracy: float
    ious: Tensor


def one_to_one(counts: Tensor) -> Tensor:
    """Matches clusters to classes so that most px have their class (Hungarian).

    Args:
        counts:
            Px of each cluster with each label, int64 with shape (num_clusters,
            num_classes).

    Returns:
        Class of each cluster, int64 with shape (num_clusters,): no class twice, and
        `NO_CLASS` for those left over.
    """
    clusters, classes = linear_sum_assignment(counts.numpy(), maximize=True)
    found = torch.full((len(counts),), NO_CLASS)
    found[torch.from_numpy(clusters)] = torch.from_numpy(classes)
    return found


def many_to_one(counts: Tensor) -> Tensor:
    """The class that most px of each cluster have; arguments as for `one_to_one`."""
    return counts.argmax(dim=1).where(counts.any(dim=1), NO_CLASS)


def match_scores(counts: Tensor, classes: Tensor) -> MatchScores:
    """Scores of clusters that stand for classes.

    Px of clusters without a class are misses of their label.

    Args:
        counts:
            As for `one_to_one`.
        classes:
            Class of each cluster, as `one_to_one` returns it.
    """
    matched = classes != NO_CLASS
    predicted = torch.zeros(counts.shape[1], counts.shape[1], dtype=torch.int64)
    predicted.index_add_(0, classes[matched], counts[matched])
    hits = predicted.diag().double()
    unions = predicted.sum(dim=1) + counts.sum(dim=0) - hits
    ious = hits / unions  # 0 / 0 is NaN
    return MatchScores(float(ious.nanmean()), float(hits.sum() / counts.sum()), ious)


def one_class_scores(labels: Tensor) -> MatchScores:
    """Scores of the commonest class everywhere.

    Args:
        labels:
            Px of each class, int64 with shape (num_classes,).
    """
    return match_scores(labels[None], many_to_one(labels[None]))


def uniform_scores(labels: Tensor, num_clusters: int) -> MatchScores:
    """Expected scores of random clusters of equal size, matched one to one.

    Args:
        labels:
            As for `one_class_scores`.
        num_clusters:
            Number of clusters, at least as many as classes.
    """
    px = labels.double()
    hits = px / num_clusters
    ious = hits / (px + px.sum() / num_clusters - hits)
    return MatchScores(float(ious.mean()), 1 / num_clusters, ious)
