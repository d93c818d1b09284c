"""Tokens with their place, as the input of a language model's connector."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from stellar_plugin.encoder import Factorization


class VisualTokens(NamedTuple):
    """What and where, in numbers that a connector can project.

    Attributes:
        tokens:
            Sparse tokens S with shape (batch_size, num_queries, embed_dim).
        geometry:
            Mass and box (mass, x0, y0, x1, y1) of each token, in [0, 1], in the dtype
            of the tokens, with shape (batch_size, num_queries, 5). The mass is the
            token's share of the patches; the masses of an image sum to one. The box is
            in fractions of the image's width and height.
    """

    tokens: Tensor
    geometry: Tensor


def visual_tokens(result: Factorization) -> VisualTokens:
    """Tokens, their masses and their boxes, all with gradient.

    The box has the centre and the spread of the token's map: that of a map that fills a
    rectangle of patches evenly is this rectangle. Where a map has strong places far
    apart the box is wide and ends at the image's edges; a token without mass has a box
    of zeros.

    Args:
        result:
            What the encoder made of images.

    Raises:
        ValueError: If the encoder has no localization.
    """
    maps = result.localization.float().mT.unflatten(2, result.grid_size)
    ends = [_ends(maps.sum(dim=dim)) for dim in (-2, -1)]
    box = torch.stack([ends[axis][side] for side in (0, 1) for axis in (0, 1)], dim=-1)
    mass = maps.mean(dim=(-2, -1)).unsqueeze(-1)
    box = torch.where(mass > 0, box, 0)
    geometry = torch.cat([mass, box], dim=-1).to(result.sparse.dtype)
    return VisualTokens(result.sparse, geometry)


def _ends(profile: Tensor) -> tuple[Tensor, Tensor]:
    """Start and end of an interval with the mean and variance of weights of cells."""
    count = profile.shape[-1]
    total = profile.sum(dim=-1).clamp(min=torch.finfo(profile.dtype).tiny)
    share = profile / total[..., None]
    centres = (torch.arange(count, device=profile.device) + 0.5) / count
    mean = (share * centres).sum(dim=-1)
    # Inside of a cell, too, the weight is spread: 1 / 12 of its squared width.
    variance = (share * (centres - mean[..., None]).square()).sum(dim=-1)
    half = (3 * (variance + 1 / (12 * count**2))).sqrt()
    return (mean - half).clamp(0, 1), (mean + half).clamp(0, 1)
