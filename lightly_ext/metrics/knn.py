"""Accuracy of k nearest neighbours, a pure function of features and labels."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional as F

from stellar_plugin.protocols import KNN

QUERIES_AT_ONCE = 1024
# All queries of ImageNet against its training set are 256 GB.
BYTES_AT_ONCE = 2**29
# Candidates beside the neighbours: so many products may be in doubt.
SPARE = 32


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
    with equal votes the first one wins: sums are those of float64, compared in float32,
    so that no order of summation decides, and copies of an image are equal.

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

    Which samples are near is found by products in float32, many times as fast as
    float64 on most GPUs. Their rounding has a proven bound: what it leaves in doubt is
    computed in float64, and neighbours are those of products in float64 alone.

    Args:
        features:
            Tensor with shape (num_train, dim), on the device that computes. It is kept,
            beside a float32 tensor of the same shape.
        labels:
            Class indices with shape (num_train,), int64.
        num_neighbours:
            Number of voting neighbours, at most `num_train`.
        temperature:
            Temperature of the votes.
    """

    @torch.no_grad()
    def __init__(
        self, features: Tensor, labels: Tensor, num_neighbours: int, temperature: float
    ) -> None:
        self.features = features
        self.labels = labels
        self.num_classes = int(labels.max()) + 1
        self.num_neighbours = num_neighbours
        self.temperature = temperature
        size, dim = features.shape
        self.num_candidates = min(num_neighbours + SPARE, size)
        # Bytes of similarities; votes and their rounding; candidates in two precisions.
        most = max(4 * size, 12 * self.num_classes, 20 * self.num_candidates * dim)
        self.rows_at_once = max(1, min(QUERIES_AT_ONCE, BYTES_AT_ONCE // most))
        # What all have in common adds the same to every product, and only rounding.
        parts = features.split(_part(dim))
        centre = torch.stack([_unit(part).sum(dim=0) for part in parts]).sum(dim=0)
        self.offsets = torch.empty_like(features, dtype=torch.float32)
        longest = centre.new_zeros(())
        for part, offsets in zip(parts, self.offsets.split(_part(dim)), strict=True):
            exact = _unit(part) - centre / size
            offsets.copy_(exact)
            longest = longest.maximum(exact.norm(dim=1).max())
        # Two products that are further apart are so in float64, and there in float32.
        self.doubt = 2 * rounding(dim) * longest + 2**-23

    @torch.no_grad()
    def classes(self, features: Tensor) -> Tensor:
        """Classes of queries (num_queries, dim), int64 with shape (num_queries,)."""
        with torch.autocast(self.features.device.type, enabled=False):
            queries = _unit(features.to(self.features.device))
            similarities, nearest = self._neighbours(queries)
        weights = similarities.double() / self.temperature
        weights = (weights - weights.amax(dim=1, keepdim=True)).exp()
        votes = weights.new_zeros(len(features), self.num_classes)
        votes = votes.scatter_add(1, self.labels[nearest], weights).float()
        return votes.argmax(dim=1)

    def _neighbours(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Similarities to the neighbours, float32, and the numbers of these."""
        with _full_float32():
            products = queries.float() @ self.offsets.T
        values, candidates = products.topk(self.num_candidates, dim=1)
        del products
        candidates = candidates.sort(dim=1).values  # of equal ones the first is taken
        vectors = _unit(self.features[candidates])
        exact = (vectors @ queries[:, :, None]).squeeze(2).float()
        columns = _nearest(exact, self.num_neighbours)
        similarities = exact.gather(1, columns)
        nearest = candidates.gather(1, columns)
        if self.num_candidates < len(self.features):
            values = values.double()
            apart = values[:, self.num_neighbours - 1] - values[:, -1] > self.doubt
            doubtful = (~apart).nonzero().flatten()
            # Sorting takes 32 bytes for each similarity.
            at_once = max(1, BYTES_AT_ONCE // (32 * len(self.features)))
            for i in range(0, len(doubtful), at_once):
                rows = doubtful[i : i + at_once]
                similarities[rows], nearest[rows] = self._among_all(queries[rows])
        return similarities, nearest

    def _among_all(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """The same by all products in float64."""
        parts = self.features.split(_part(queries.shape[1]))
        exact = torch.cat([(queries @ _unit(part).T).float() for part in parts], dim=1)
        nearest = _nearest(exact, self.num_neighbours)
        return exact.gather(1, nearest), nearest


def _unit(features: Tensor) -> Tensor:
    """Vectors of length 1 in float64, zeros of zeros."""
    return F.normalize(features.double(), dim=-1)


def _part(dim: int) -> int:
    """Number of vectors that take an eighth of the memory in float64."""
    return max(1, BYTES_AT_ONCE // (64 * dim))


def rounding(dim: int) -> float:
    """Bound on the error of a product in float32 of two vectors of length 1.

    The product of vectors that are rounded to float32 has relative errors of at most
    (1 + u)^(dim + 2) in each of its terms, u = 2^-24, in whatever order they are added;
    see Higham, Accuracy and Stability of Numerical Algorithms, 2002, section 3.1.

    Args:
        dim:
            Number of their components.
    """
    units = (dim + 3) * 2**-24
    return units / (1 - units)


@contextmanager
def _full_float32() -> Iterator[None]:
    """Products of float32 without TF32 or bfloat16, whatever the process allows."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


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
