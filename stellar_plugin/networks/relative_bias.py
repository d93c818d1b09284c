"""Tables of what attention adds by the distance of two tokens of a grid.

A row per distance, row-major over the vertical and the horizontal one, and behind these
perhaps rows of pairs with CLS, which are the same on every grid. A column per head.
"""

from __future__ import annotations

import functools
import warnings

import torch
from timm.layers import resize_rel_pos_bias_table
from torch import Tensor

Grid = tuple[int, int]

TABLE = "relative_position_bias_table"


def side_of(rows: int) -> int:
    """Side of the square grid of so many distances, 0 if there is none."""
    side = (round(max(rows, 0) ** 0.5) + 1) // 2
    return side if side and _distances((side, side)) == rows else 0


def resampled(table: Tensor, old: Grid, new: Grid) -> Tensor:
    """A table for another grid, as BEiT and Swin make it; gradients flow to the table.

    Args:
        table:
            Biases with shape (num_distances + rows of CLS, num_heads).
        old:
            Height and width of its grid in tokens.
        new:
            Height and width of the other grid.
    """
    cells, weights = (part.to(table.device) for part in _neighbours(old, new))
    # (new distances, 4, heads) -> (new distances, heads); no matrix product, which
    # autocast would round.
    biases = (table[cells] * weights[..., None]).sum(dim=1)
    return torch.cat([biases.to(table.dtype), table[_distances(old) :]])


@torch.compiler.disable
@functools.lru_cache(maxsize=64)
def _neighbours(old: Grid, new: Grid) -> tuple[Tensor, Tensor]:
    """The cells of an old table, and their weights, of which a new cell is made.

    What timm makes of tables with a single 1: it interpolates linearly between steps
    that grow with the distance, so that at most four cells have a weight.

    Returns:
        Cells, int64, and weights, float32, both (new distances, at most 4).
    """
    rows, new_rows = _distances(old), _distances(new)
    # Kept for calls of every kind, on every device.
    with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch about timm's indexing
            single = torch.eye(rows)
            table = resize_rel_pos_bias_table(single, new, (new_rows, rows), old)
        weights, cells = table.topk(min(4, rows), dim=1)
    return cells, weights


def _distances(grid: Grid) -> int:
    return (2 * grid[0] - 1) * (2 * grid[1] - 1)
