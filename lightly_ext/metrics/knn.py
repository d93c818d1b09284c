"""Accuracy of k nearest neighbours, a pure function of features and labels."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from stellar_plugin.protocols import KNN

QUERIES_AT_ONCE = 1024
# 512 MiB in float64: all queries of ImageNet against its training set are 512 GB.
NUMBERS_AT_ONCE = 2**26


def knn_accuracy(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    num_neighbours: int = KNN.neighbours,
    temperature: float = KNN.temperature,
) -> float:
    """Accuracy of cosine-weighted voting among the nearest training features.

    A neighbour with cosine similarity c votes for its class with weight
    exp(c / temperature), as in [0]. Of equally similar ones the first vote, of classes
    with equal votes the first one wins: sums are computed in float64 and compared in
    float32, so that no order of summation decides, and copies of an image are equal.

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
        ValueError: If there are fewer training samples than neighbours, or the
            temperature is not positive.
    """
    check_knn_options(num_neighbours, temperature, len(train_features))
    voters = Voters(train_features, train_labels, num_neighbours, temperature)
    blocks = test_features.split(voters.rows_at_once)
    classes = torch.cat([voters.classes(block) for block in blocks])
    return int((classes == test_labels.to(classes.device)).sum()) / len(test_labels)


class Voters:
    """Training samples that vote on the class of others.

    Args:
        features:
            Tensor with shape (num_train, dim).
        labels:
            Class indices with shape (num_train,), int64.
        num_neighbours:
            Number of voting neighbours, at most `num_train`.
        temperature:
            Temperature of the votes.
    """

    def __init__(
        self, features: Tensor, labels: Tensor, num_neighbours: int, temperature: float
    ) -> None:
        self.bank = F.normalize(features.double(), dim=1).T
        self.labels = labels
        self.num_classes = int(labels.max()) + 1
        self.num_neighbours = num_neighbours
        self.temperature = temperature

    @property
    def rows_at_once(self) -> int:
        """Number of queries whose similarities and votes fit into memory."""
        numbers = max(len(self.labels), self.num_classes)
        return max(1, min(QUERIES_AT_ONCE, NUMBERS_AT_ONCE // numbers))

    def classes(self, features: Tensor) -> Tensor:
        """Classes of queries (num_queries, dim), int64 with shape (num_queries,)."""
        with torch.autocast(self.bank.device.type, enabled=False):
            queries = F.normalize(features.to(self.bank.device).double(), dim=1)
            similarities = (queries @ self.bank).float()
        nearest = _nearest(similarities, self.num_neighbours)
        weights = similarities.gather(1, nearest).double() / self.temperature
        weights = (weights - weights.amax(dim=1, keepdim=True)).exp()
        votes = weights.new_zeros(len(features), self.num_classes)
        votes = votes.scatter_add(1, self.labels[nearest], weights).float()
        return votes.argmax(dim=1)


def _nearest(similarities: Tensor, num: int) -> Tensor:
    """Columns of the largest values of each row, of equal ones the first."""
    values, columns = similarities.topk(min(num + 1, similarities.shape[1]), dim=1)
    # Where the next one is equal too, `topk` leaves open which it takes.
    tied = (values[:, num - 1 : num] == values[:, num:]).any(dim=1)
    order = similarities[tied].argsort(dim=1, descending=True, stable=True)
    columns[tied] = order[:, : columns.shape[1]]
    return columns[:, :num]


def check_knn_options(
    num_neighbours: int,
    temperature: float,
    num_train: int,
    samples: str = "training samples",
) -> None:
    """Raises a ValueError if the options of :func:`knn_accuracy` are impossible."""
    if not 1 <= num_neighbours <= num_train:
        raise ValueError(
            f"The number of neighbours must be in 1 to {num_train}, the number of "
            f"{samples}, got {num_neighbours}."
        )
    if not 0 < temperature < math.inf:
        raise ValueError(f"The temperature must be positive, got {temperature}.")
