"""Signs of collapse, to be watched during training."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def signs_of_collapse(
    tokens: Tensor, embeddings: Tensor | None, prototypes: Tensor | None
) -> dict[str, Tensor]:
    """All figures of this file that a model has, by name.

    Args:
        tokens:
            Sparse tokens with shape (batch_size, num_tokens, embed_dim).
        embeddings:
            Their embeddings with shape (batch_size, num_tokens, dim), or None.
        prototypes:
            Tensor with shape (num_prototypes, dim), or None.

    Returns:
        `token_rank`; `token_cosine`, unless there is one token; `prototype_usage`, if
        there are prototypes. Scalars without gradient.
    """
    signs = {"token_rank": effective_rank(tokens)}
    if tokens.shape[1] > 1:
        signs["token_cosine"] = mean_token_cosine(tokens)
    if embeddings is not None and prototypes is not None:
        signs["prototype_usage"] = prototype_usage(embeddings, prototypes)
    return signs


@torch.no_grad()
def prototype_usage(embeddings: Tensor, prototypes: Tensor) -> Tensor:
    """Entropy of the share of embeddings that each prototype is nearest to.

    Args:
        embeddings:
            Unit vectors with shape (..., dim).
        prototypes:
            Tensor with shape (num_prototypes, dim).

    Returns:
        Scalar in [0, 1]: 0 if one prototype takes all; 1 if all are used alike or, with
        fewer embeddings than prototypes, if no two embeddings share one.
    """
    x = embeddings.flatten(0, -2).float()
    nearest = (x @ prototypes.float().mT).argmax(dim=1)
    share = torch.bincount(nearest, minlength=len(prototypes)) / len(x)
    largest = math.log(min(len(x), len(prototypes)))
    return torch.special.entr(share).sum() / max(largest, 1e-12)


@torch.no_grad()
def effective_rank(tokens: Tensor) -> Tensor:
    """Effective rank of centred tokens: exp of the entropy of the singular values [0].

    - [0]: The effective rank, 2007, https://ieeexplore.ieee.org/document/7098875

    Args:
        tokens:
            Tensor with shape (..., dim).

    Returns:
        Scalar between 1 (all on a line) and min(num_tokens, dim).
    """
    # float64: square roots of eigenvalues turn rounding of 1e-7 into 3e-4.
    x = tokens.flatten(0, -2).double()
    singular = torch.linalg.eigvalsh(torch.cov(x.T)).clamp(min=0).sqrt()
    share = singular / singular.sum().clamp(min=1e-12)
    return torch.special.entr(share).sum().exp().float()


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
