"""Accuracy of k nearest neighbours, a pure function of features and labels."""

from __future__ import annotations

import math

import torch
from lightly.utils.benchmarking import knn_predict
from torch import Tensor
from torch.nn import functional as F

from stellar_plugin.protocols import KNN

# exp(1 / temperature) must fit into float32, and a sum of them too.
MIN_TEMPERATURE = 0.0125
QUERIES_AT_ONCE = 1024
# 256 MiB in float32: all queries of ImageNet against its training set are 256 GB.
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
    exp(c / temperature), as in [0]. Computed in float32, whatever the features are.

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
            temperature is too low for float32.
    """
    check_knn_options(num_neighbours, temperature, len(train_features))
    voters = Voters(train_features, train_labels, num_neighbours, temperature)
    blocks = voters.blocks(test_features, test_labels)
    correct = sum(voters.num_correct(*block) for block in blocks)
    return int(correct) / len(test_labels)


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
        self.bank = F.normalize(features.float(), dim=1).T
        self.labels = labels
        self.num_classes = int(labels.max()) + 1
        self.num_neighbours = num_neighbours
        self.temperature = temperature

    def blocks(self, features: Tensor, labels: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Cuts queries, so that similarities and votes of a block fit into memory."""
        numbers = max(len(self.labels), self.num_neighbours * self.num_classes)
        rows = max(1, min(QUERIES_AT_ONCE, NUMBERS_AT_ONCE // numbers))
        return list(zip(features.split(rows), labels.split(rows), strict=True))

    def num_correct(self, features: Tensor, labels: Tensor) -> Tensor:
        """Number of queries that get their own class, int64 without a shape."""
        device = self.bank.device
        with torch.autocast(device.type, enabled=False):
            classes = knn_predict(
                feature=F.normalize(features.to(device).float(), dim=1),
                feature_bank=self.bank,
                feature_labels=self.labels,
                num_classes=self.num_classes,
                knn_k=self.num_neighbours,
                knn_t=self.temperature,
            )[:, 0]
        return (classes == labels.to(device)).sum()


def check_knn_options(num_neighbours: int, temperature: float, num_train: int) -> None:
    """Raises a ValueError if the options of :func:`knn_accuracy` are impossible."""
    if not 1 <= num_neighbours <= num_train:
        raise ValueError(
            f"The number of neighbours must be in 1 to {num_train}, the number of "
            f"training samples, got {num_neighbours}."
        )
    if not MIN_TEMPERATURE <= temperature < math.inf:
        raise ValueError(
            f"The temperature must be at least {MIN_TEMPERATURE}, got {temperature}: "
            "votes are exp(similarity / temperature) in float32."
        )
