"""k-nearest-neighbour classification of frozen features."""

from __future__ import annotations

import torch
from lightly.utils.benchmarking import knn_predict
from torch import Tensor
from torch.nn import functional as F

NUM_NEIGHBOURS = 20
TEMPERATURE = 0.07
# 256 MiB in float32: all queries of ImageNet against its training set are 256 GB.
SIMILARITIES_AT_ONCE = 2**26


def knn_accuracy(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    num_neighbours: int = NUM_NEIGHBOURS,
    temperature: float = TEMPERATURE,
) -> float:
    """Accuracy of cosine-weighted voting among the nearest training features.

    A neighbour with cosine similarity c votes for its class with weight
    exp(c / temperature), as in [0].

    - [0]: Unsupervised Feature Learning via Non-Parametric Instance-level
      Discrimination, 2018, https://arxiv.org/abs/1805.01978

    Args:
        train_features:
            Tensor with shape (num_train, dim).
        train_labels:
            Class indices with shape (num_train,), int64.
        test_features:
            Tensor with shape (num_test, dim).
        test_labels:
            Class indices with shape (num_test,), int64.
        num_neighbours:
            Number of voting neighbours, at most `num_train`.
        temperature:
            Temperature of the votes.

    Returns:
        Fraction of test samples that are classified correctly, in 0 to 1.

    Raises:
        ValueError: If there are fewer training samples than neighbours.
    """
    if not 1 <= num_neighbours <= len(train_features):
        raise ValueError(
            f"num_neighbours must be in 1 to {len(train_features)}, the number of "
            f"training samples, got {num_neighbours}."
        )
    bank = F.normalize(train_features, dim=1).T
    rows = max(1, SIMILARITIES_AT_ONCE // len(train_features))
    ranking = [
        knn_predict(
            feature=F.normalize(queries, dim=1),
            feature_bank=bank,
            feature_labels=train_labels,
            num_classes=int(train_labels.max()) + 1,
            knn_k=num_neighbours,
            knn_t=temperature,
        )[:, 0]
        for queries in test_features.split(rows)
    ]
    return float((torch.cat(ranking) == test_labels).float().mean())
