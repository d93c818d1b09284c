"""A Vision Transformer from its formulas, to compare with: no class of timm or ours."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

State = dict[str, Tensor]
# Positions of a grid, (num_patches, width), row-major.
Positions = Callable[[int, int], Tensor]


def patch_tokens(
    state: State,
    images: Tensor,
    num_heads: int,
    positions: Positions,
    eps: float = 1e-6,
) -> tuple[Tensor | None, Tensor]:
    """Class token and patches behind the last block and its norm.

    Args:
        state:
            Tensors by timm's names; parts that are not there are left out.
        images:
            Normalised, (batch_size, 3, height, width).
        num_heads:
            Attention heads.
        positions:
            Those of the patches; the class token has its own in `cls_token`.
        eps:
            Epsilon of every norm.
    """
    kernel = state["patch_embed.proj.weight"]
    size = kernel.shape[-1]
    cells = images.unfold(2, size, size).unfold(3, size, size)
    height, width = cells.shape[2:4]  # (B, 3, h, w, p, p)
    cells = cells.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    x = cells @ kernel.flatten(1).T + state["patch_embed.proj.bias"]
    x = _norm(x, state, "patch_embed.norm.", eps) + positions(height, width)
    cls = state.get("cls_token")
    if cls is not None:
        x = torch.cat([cls.expand(len(x), -1, -1), x], dim=1)
    block = 0
    while f"blocks.{block}.norm1.weight" in state:
        x = _block(x, state, f"blocks.{block}.", num_heads, eps)
        block += 1
    x = _norm(x, state, "norm.", eps)
    return (None, x) if cls is None else (x[:, 0], x[:, 1:])


def resampled(table: Tensor, side: int) -> Positions:
    """Bicubic positions of other grids than the square one of a table, (1, n, d)."""

    def positions(height: int, width: int) -> Tensor:
        grid = table[0].T.unflatten(1, (side, side))[None]
        if (height, width) != (side, side):
            grid = F.interpolate(grid, (height, width), mode="bicubic")
        return grid[0].flatten(1).T

    return positions


def sines(width: int) -> Positions:
    """Sines and cosines of the column, then of the row, one position after another."""

    def positions(height: int, columns: int) -> Tensor:
        rows = []
        for y in range(height):
            for x in range(columns):
                angles = [
                    [n / 10000 ** (i / (width // 4)) for i in range(width // 4)]
                    for n in (x, y)
                ]
                rows.append(
                    [
                        f(a)
                        for half in angles
                        for f in (math.sin, math.cos)
                        for a in half
                    ]
                )
        return torch.tensor(rows)

    return positions


def _block(x: Tensor, state: State, prefix: str, num_heads: int, eps: float) -> Tensor:
    def linear(x: Tensor, name: str) -> Tensor:
        bias = state.get(f"{prefix}{name}.bias", torch.zeros(()))
        return x @ state[f"{prefix}{name}.weight"].T + bias

    normed = _norm(x, state, f"{prefix}norm1.", eps)
    query, key, value = (
        part.unflatten(2, (num_heads, -1)).transpose(1, 2)
        for part in linear(normed, "attn.qkv").chunk(3, dim=2)
    )
    scores = query @ key.mT / query.shape[-1] ** 0.5
    weights = scores.exp() / scores.exp().sum(dim=-1, keepdim=True)
    x = x + linear((weights @ value).transpose(1, 2).flatten(2), "attn.proj")
    hidden = linear(_norm(x, state, f"{prefix}norm2.", eps), "mlp.fc1")
    return x + linear(hidden * (1 + (hidden / 2**0.5).erf()) / 2, "mlp.fc2")


def _norm(x: Tensor, state: State, prefix: str, eps: float) -> Tensor:
    if f"{prefix}weight" not in state:
        return x
    centred = x - x.mean(dim=-1, keepdim=True)
    deviation = (centred.square().mean(dim=-1, keepdim=True) + eps).sqrt()
    return centred / deviation * state[f"{prefix}weight"] + state[f"{prefix}bias"]
