"""Features of boards: of a model, and of raw patches without any model."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2.functional import normalize

from lightly_ext.demo.boards import CELL_SIZE, GRID_SIZE, FloatArray, Uint8Array
from stellar_plugin.model import Stellar

BATCH_SIZE = 250


@dataclass(frozen=True)
class BoardFeatures:
    """What a model makes of boards; all tensors are float32.

    Attributes:
        sparse:
            Sparse tokens with shape (num_boards, num_queries, dim).
        dense:
            Patch features with shape (num_boards, num_patches, dim).
        lowrank:
            Low-rank features L S with shape (num_boards, num_patches, dim).
        localization:
            Localization matrices with shape (num_boards, num_patches, num_queries).
    """

    sparse: Tensor
    dense: Tensor
    lowrank: Tensor
    localization: Tensor


@torch.no_grad()
def model_features(model: Stellar, images: Uint8Array) -> BoardFeatures:
    """Runs the encoder over boards.

    Args:
        model:
            The model, in evaluation mode.
        images:
            Boards with shape (num_boards, height, width, 3).

    Returns:
        The features of all boards.
    """
    batches = [model(batch) for batch in _batches(model, images)]
    return BoardFeatures(
        sparse=torch.cat([batch.sparse for batch in batches]),
        dense=torch.cat([batch.dense for batch in batches]),
        lowrank=torch.cat([batch.lowrank for batch in batches]),
        localization=torch.cat([batch.localization for batch in batches]),
    )


@torch.no_grad()
def reconstructions(model: Stellar, images: Uint8Array) -> Tensor:
    """Reconstructs boards from their sparse tokens.

    Args:
        model:
            The model, in evaluation mode.
        images:
            Boards with shape (num_boards, height, width, 3).

    Returns:
        Images in 0 to 1 with shape (num_boards, 3, height, width).
    """
    return torch.cat([model.reconstruct(batch) for batch in _batches(model, images)])


def to_unit_range(images: Uint8Array) -> Tensor:
    """(num_boards, height, width, 3) uint8 -> (num_boards, 3, height, width) 0 to 1."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255


def normalized(model: Stellar, images: Uint8Array) -> Tensor:
    """Boards as a model takes them, (num_boards, 3, height, width)."""
    return normalize(to_unit_range(images), list(model.mean), list(model.std))


def raw_patches(images: Uint8Array) -> FloatArray:
    """Cuts boards into the cells of their grid.

    Args:
        images:
            Boards with shape (num_boards, 60, 60, 3).

    Returns:
        Intensities in 0 to 1 with shape (num_boards, 25, 432).
    """
    grid = images.reshape(len(images), GRID_SIZE, CELL_SIZE, GRID_SIZE, CELL_SIZE, 3)
    patches = grid.swapaxes(2, 3).reshape(len(images), GRID_SIZE**2, -1)
    return patches.astype(np.float32) / 255


def pooled_patches(images: Uint8Array) -> FloatArray:
    """Mean and standard deviation over a board's patches, (num_boards, 864)."""
    patches = raw_patches(images)
    return np.concatenate([patches.mean(axis=1), patches.std(axis=1)], axis=1)


def _batches(model: Stellar, images: Uint8Array) -> list[Tensor]:
    parts = np.array_split(images, range(BATCH_SIZE, len(images), BATCH_SIZE))
    return [normalized(model, part) for part in parts]
