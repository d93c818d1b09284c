"""Position tables: which rows are of patches, and of which grid."""

from __future__ import annotations

from math import isqrt

import torch
from torch import Tensor

from stellar_plugin.checkpoints.names import State

Grid = tuple[int, int]
# Tokens before the patches, in their order.
PREFIX_TOKENS = ("cls_token", "reg_token")


def folded(
    vit: State,
    prefixes: tuple[int, ...],
    told: Grid | None,
    wanted: Grid | None = None,
) -> tuple[State, Grid | None]:
    """Moves the positions of class token and registers into the tokens themselves.

    Args:
        vit:
            Tensors of a ViT by timm's names.
        prefixes:
            How many rows of the table may come before those of the patches, beside
            none; the likely number first.
        told:
            Patch grid of the table, None if nothing tells.
        wanted:
            Patch grid of the encoder that gets the tensors. Where nothing tells and as
            many rows are there, it is taken.

    Returns:
        The tensors, and the grid of their table: the one that was told or wanted, else
        the square. None without table.

    Raises:
        ValueError: If the table has not the rows of the grid that was told, or nothing
            tells its grid.
    """
    table = vit.get("pos_embed")
    if table is None or table.ndim != 3:
        return vit, None
    prefix, grid = _split(table.shape[1], prefixes, told, wanted)
    # Sums of half precision would be rounded once more than those of the network.
    table = table.to(torch.promote_types(table.dtype, torch.float32))
    result = {**vit, "pos_embed": table[:, prefix:].contiguous()}
    start = 0
    for name in PREFIX_TOKENS:
        count = vit[name].shape[1] if name in vit else 0
        if count and start + count <= prefix:
            if vit[name].shape[2] != table.shape[2]:
                raise ValueError(
                    f"{name} is {tuple(vit[name].shape)}, pos_embed "
                    f"{tuple(table.shape)}: of different widths"
                )
            result[name] = vit[name] + table[:, start : start + count]
        start += count
    return result, grid


def _split(
    rows: int, prefixes: tuple[int, ...], told: Grid | None, wanted: Grid | None
) -> tuple[int, Grid]:
    """Number of rows before those of the patches, and the grid of the patches."""
    grid = told or wanted
    for prefix in (*prefixes, 0):
        if grid is not None and rows - prefix == grid[0] * grid[1]:
            return prefix, grid
    if told is not None:
        raise ValueError(
            f"its position table has {rows} rows, its config tells a grid of "
            f"{told[0]} x {told[1]} patches"
        )
    # That a class token has no row is the exception: not guessed.
    for prefix in prefixes:
        side = isqrt(max(0, rows - prefix))
        if side and side * side == rows - prefix:
            return prefix, (side, side)
    raise ValueError(
        f"nothing tells the patch grid of its position table of {rows} rows, which is "
        f"no square behind {prefixes[0]} of other tokens: name the img_size that "
        "it was trained with (of the encoder; for an evaluation --model_kwargs "
        "'{\"img_size\": [HEIGHT, WIDTH]}' or --model timm:NAME --weights FILE)"
    )


def are_sines(table: Tensor | None) -> bool:
    """Whether positions are the fixed sines and cosines of row and column.

    One half of the channels then depends on the row alone, the other on the column, to
    the last bit, as training leaves no table.
    """
    if table is None or table.ndim != 3:
        return False
    side = isqrt(table.shape[1])
    if side < 2:
        return False
    grid = table[0, -side * side :].unflatten(0, (side, side))
    first, second = grid.chunk(2, dim=-1)
    if torch.equal(grid, grid[:1, :1].expand_as(grid)):
        return False  # constant
    return any(
        torch.equal(rows, rows[:, :1].expand_as(rows))
        and torch.equal(columns, columns[:1].expand_as(columns))
        for rows, columns in ((first, second), (second, first))
    )
