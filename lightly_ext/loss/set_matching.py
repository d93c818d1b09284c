from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class TokenMatching(NamedTuple):
    """Which target token each predicted token is matched with.

    Attributes:
        indices:
            Matched target of each prediction, int64 with shape (..., num_predictions).
            Not a permutation: several predictions may share a target.
        plan:
            Transport plan with shape (..., num_predictions, num_targets).
    """

    indices: Tensor
    plan: Tensor


@torch.no_grad()
def match_tokens(
    predictions: Tensor, targets: Tensor, epsilon: float = 0.1, iterations: int = 5
) -> TokenMatching:
    """Matches unordered tokens by entropy-regularised optimal transport [0].

    The cost is the Euclidean distance between raw encoder tokens; marginals are ones;
    the iterations run on log-domain duals that start at zero, predictions first.

    - [0]: STELLAR, 2026, https://arxiv.org/abs/2602.01905 (eq. 7-9)

    Args:
        predictions:
            Tensor with shape (..., num_predictions, embed_dim).
        targets:
            Tensor with shape (..., num_targets, embed_dim); leading dimensions
            broadcast against those of the predictions.
        epsilon:
            Weight of the entropy, in units of the distance.
        iterations:
            Number of iterations.

    Returns:
        The matching, without gradient.

    Raises:
        ValueError: If there is no target, or `epsilon` is not positive.
    """
    if targets.shape[-2] == 0:
        raise ValueError("match_tokens needs at least one target token, got none.")
    if epsilon <= 0:
        raise ValueError(f"epsilon must be positive, got {epsilon}.")
    dtype = torch.promote_types(predictions.dtype, torch.float32)
    with torch.autocast(predictions.device.type, enabled=False):
        # Exact differences: the expansion into inner products loses the small distances
        # that decide.
        cost = torch.cdist(
            predictions.to(dtype),
            targets.to(dtype),
            compute_mode="donot_use_mm_for_euclid_dist",
        )
        score = -cost / epsilon  # (..., p, t)
        v = score.new_zeros(*score.shape[:-2], 1, score.shape[-1])
        for _ in range(iterations):
            u = -(score + v).logsumexp(dim=-1, keepdim=True)
            v = -(score + u).logsumexp(dim=-2, keepdim=True)
        plan = (score + u + v).exp()
    return TokenMatching(indices=plan.argmax(dim=-1), plan=plan)


def match_by_number(tokens: Tensor) -> TokenMatching:
    """Matches each token with the target of its number (an ablation).

    Args:
        tokens:
            Tensor with shape (..., num_tokens, embed_dim).
    """
    count = tokens.shape[-2]
    plan = torch.eye(count, device=tokens.device).expand(*tokens.shape[:-1], count)
    return TokenMatching(indices=plan.argmax(dim=-1), plan=plan)


def matching_statistics(matching: TokenMatching) -> dict[str, Tensor]:
    """The figures of a matching among `STELLARLossTerms`, by name."""
    indices, plan = matching
    identity = torch.arange(indices.shape[-1], device=indices.device)
    matches = torch.zeros(*plan.shape[:-2], plan.shape[-1], device=plan.device)
    matches.scatter_add_(-1, indices, torch.ones_like(indices, dtype=matches.dtype))
    # A row underflows where a token is far from every target.
    mass = plan.sum(dim=-1, keepdim=True)
    rows = plan / mass.clamp(min=torch.finfo(plan.dtype).tiny)
    return {
        "non_identity_matches": (indices != identity).float().mean(),
        "matching_collisions": (matches != 1).float().mean(),
        "matching_entropy": torch.special.entr(rows).sum(dim=-1).mean(),
    }
