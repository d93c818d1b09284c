"""Rankings of images by their likeness to a query, and how good they are."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from lightly_ext.evaluate.retrieval.forms import Form
from lightly_ext.metrics.late_interaction import best_matches

# Numbers in memory at once: vectors of queries and their scores, and cosines.
MOST_NUMBERS = 2**22
MOST_COSINES = 2**23


# A block of this many multiplications tells how long all of them take.
TRIAL = 2**31


def expected_seconds(
    shape: tuple[int, int], num_queries: int, num_images: int, device: torch.device
) -> float:
    """About how long `likeness` of all queries takes on this machine.

    Args:
        shape:
            Number of vectors of an image, and their dimension.
        num_queries:
            Number of queries.
        num_images:
            Number of images.
        device:
            Where it is computed.
    """
    num, dim = shape
    some = max(1, min(num_images, TRIAL // (num * num * dim)))
    query = torch.rand(num, dim, device=device)
    images = torch.rand(some, num, dim, device=device)
    best_matches(query, images[:1])
    start = time.perf_counter()
    float(best_matches(query, images)[0].sum())  # waits for the device
    seconds = time.perf_counter() - start
    return seconds / some * num_queries * num_images


def queries_at_once(form: Form) -> int:
    """How many queries are scored together."""
    num, dim = form.shape
    return max(1, MOST_NUMBERS // max(num * dim, 2 * len(form)))


def likeness(form: Form, query: Tensor, weights: Tensor) -> Tensor:
    """How like each query all images are: sum over i of m_i max over j of <s_i, t_j>.

    Args:
        form:
            The images.
        query:
            Vectors of the queries, with shape (num_queries, num_vectors, dim).
        weights:
            The m_i, several sets of them: (num_sets, num_queries, num_vectors).

    Returns:
        float32 tensor with shape (num_sets, num_queries, num_images).
    """
    flat, weights = query.flatten(0, 1), weights.to(query)
    block = max(1, MOST_COSINES // (form.shape[0] * len(flat)))
    found = []
    for start in range(0, len(form), block):
        best, _ = best_matches(flat, form.vectors(slice(start, start + block)))
        best = best.unflatten(1, query.shape[:2])
        found.append(torch.einsum("nqi,sqi->sqn", best, weights))
    return torch.cat(found, dim=2).float().cpu()


def ranked(scores: Tensor, order: Tensor) -> Tensor:
    """Numbers of images, the highest score first.

    Args:
        scores:
            Scores with shape (num_queries, num_images).
        order:
            All numbers, in the order that decides between equal scores.

    Returns:
        int64 tensor with the same shape.
    """
    return order[scores[:, order].argsort(dim=1, descending=True, stable=True)]


def average_precision(relevant: Tensor) -> Tensor:
    """Mean over the relevant images of the precision at their ranks.

    Args:
        relevant:
            Whether the image at each rank is relevant, bool with shape (num_queries,
            num_images), at least one of each query.

    Returns:
        float64 tensor with shape (num_queries,).
    """
    ranks = torch.arange(1, relevant.shape[1] + 1)
    precision = relevant.cumsum(dim=1).double() / ranks
    return (precision * relevant).sum(dim=1) / relevant.sum(dim=1)


def random_precision(num_relevant: Tensor, num_images: int) -> Tensor:
    """The mean of `average_precision` over all orders of the images.

    An image stands at rank k with probability 1 / n, and before it (k - 1) (r - 1) /
    (n - 1) relevant ones on average.

    Args:
        num_relevant:
            Number of relevant images r of each query, with shape (num_queries,).
        num_images:
            Number of ranked images n.

    Returns:
        float64 tensor with shape (num_queries,).
    """
    n = num_images
    harmonic = (1 / torch.arange(1, n + 1, dtype=torch.float64)).sum()
    before = (num_relevant.double() - 1) / max(n - 1, 1)
    return (harmonic + before * (n - harmonic)) / n
