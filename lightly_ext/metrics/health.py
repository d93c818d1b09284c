"""Figures of health, to be watched during training: pure functions without gradient."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class PrototypeUsage(NamedTuple):
    """Which prototypes the embeddings of a batch are nearest to.

    Attributes:
        entropy:
            Entropy of the share of embeddings that each prototype is nearest to, in
            [0, 1]: 0 if one prototype takes all; 1 if all are used alike or, with fewer
            embeddings than prototypes, if no two embeddings share one.
        number:
            Number of prototypes that are nearest to an embedding.
    """

    entropy: Tensor
    number: Tensor


class LocalizationEntropy(NamedTuple):
    """How patches are spread over tokens, in [0, 1].

    Attributes:
        patch:
            Mean entropy of a patch's distribution over the tokens: 0 if every patch
            belongs to one token, 1 if it belongs to all tokens alike.
        image:
            Mean entropy of what the tokens take of an image: 0 if one token takes every
            patch, 1 if all tokens take the same.
    """

    patch: Tensor
    image: Tensor


def health_figures(
    tokens: Tensor,
    embeddings: Tensor | None = None,
    prototypes: Tensor | None = None,
    localization: Tensor | None = None,
) -> dict[str, Tensor]:
    """All figures of this file that a model has, by name.

    Args:
        tokens:
            Sparse tokens with shape (batch_size, num_tokens, embed_dim).
        embeddings:
            Their embeddings with shape (batch_size, num_tokens, dim), or None.
        prototypes:
            Tensor with shape (num_prototypes, dim), or None.
        localization:
            Tensor with shape (batch_size, num_patches, num_tokens), or None.

    Returns:
        `token_rank`; unless there is one token, `token_cosine`, `token_distance` and,
        with a localization, `localization_entropy` and `localization_usage`; if there
        are prototypes, `prototype_usage` and `prototypes_used`. Scalars.
    """
    figures = {"token_rank": effective_rank(tokens)}
    if tokens.shape[1] > 1:
        figures["token_cosine"] = mean_token_cosine(tokens)
        figures["token_distance"] = nearest_token_distance(tokens)
        if localization is not None:
            entropy = localization_entropy(localization)
            figures["localization_entropy"] = entropy.patch
            figures["localization_usage"] = entropy.image
    if embeddings is not None and prototypes is not None:
        usage = prototype_usage(embeddings, prototypes)
        figures["prototype_usage"] = usage.entropy
        figures["prototypes_used"] = usage.number
    return figures


@torch.no_grad()
def prototype_usage(embeddings: Tensor, prototypes: Tensor) -> PrototypeUsage:
    """Which prototypes are used, and how evenly.

    Args:
        embeddings:
            Unit vectors with shape (..., dim).
        prototypes:
            Tensor with shape (num_prototypes, dim).
    """
    x = embeddings.flatten(0, -2).float()
    nearest = (x @ prototypes.float().mT).argmax(dim=1)
    share = torch.bincount(nearest, minlength=len(prototypes)) / len(x)
    largest = math.log(min(len(x), len(prototypes)))
    entropy = torch.special.entr(share).sum() / max(largest, 1e-12)
    return PrototypeUsage(entropy, (share > 0).float().sum())


@torch.no_grad()
def effective_rank(tokens: Tensor) -> Tensor:
    """RankMe [0]: exp of the entropy of the singular values, which are not centred.

    Tokens that are one vector and some noise have rank 1; centred, the noise alone
    would count.

    - [0]: RankMe, 2022, https://arxiv.org/abs/2210.02885

    Args:
        tokens:
            Tensor with shape (..., dim).

    Returns:
        Scalar between 1 (all on a line through zero) and min(num_tokens, dim).
    """
    # float64: square roots of eigenvalues turn rounding of 1e-7 into 3e-4.
    x = tokens.flatten(0, -2).double()
    # The smaller of two matrices with the same eigenvalues other than zero.
    products = x @ x.mT if len(x) < x.shape[1] else x.mT @ x
    # The decomposition raises an error at numbers that are not finite.
    finite = products.isfinite().all()
    eigenvalues = torch.linalg.eigvalsh(torch.where(finite, products, 0.0))
    singular = eigenvalues.clamp(min=0).sqrt()
    share = singular / singular.sum().clamp(min=1e-12)
    rank = torch.special.entr(share).sum().exp().float()
    return torch.where(finite, rank, torch.nan)


@torch.no_grad()
def mean_token_cosine(tokens: Tensor) -> Tensor:
    """Mean cosine between different tokens of an image.

    Args:
        tokens:
            Tensor with shape (batch_size, num_tokens, embed_dim), two tokens or more.

    Returns:
        Scalar in [-1, 1]; 1 if all tokens of an image are the same.
    """
    x = F.normalize(tokens.float(), dim=-1)
    count = x.shape[-2]
    # sum over pairs = |sum of vectors|^2 - number of vectors
    pairs = x.sum(dim=-2).square().sum(dim=-1) - count
    return (pairs / (count * (count - 1))).mean()


@torch.no_grad()
def nearest_token_distance(tokens: Tensor) -> Tensor:
    """Mean distance of a token to the nearest other one of its image, as in KoLeo.

    Args:
        tokens:
            Tensor with shape (batch_size, num_tokens, embed_dim), two tokens or more.

    Returns:
        Scalar in [0, 2], between tokens of length one; 0 if every token has a twin.
    """
    x = F.normalize(tokens.float(), dim=-1)
    # Exact differences: of near twins the expansion into inner products leaves nothing.
    distance = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    distance.diagonal(dim1=-2, dim2=-1).fill_(torch.inf)
    return distance.amin(dim=-1).mean()


@torch.no_grad()
def localization_entropy(localization: Tensor) -> LocalizationEntropy:
    """How sharp patches are, and how evenly tokens share an image.

    Args:
        localization:
            Tensor with shape (batch_size, num_patches, num_tokens), two tokens or more,
            whose rows are distributions.
    """
    rows = localization.float()
    largest = math.log(rows.shape[-1])
    patch, image = (
        torch.special.entr(x).sum(dim=-1).mean() / largest
        for x in (rows, rows.mean(dim=-2))
    )
    return LocalizationEntropy(patch, image)
