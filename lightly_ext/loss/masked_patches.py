from __future__ import annotations

import torch
from lightly.models import utils
from torch import Tensor


def normalized_patches(images: Tensor, patch_size: int) -> Tensor:
    """Patches of images, each with zero mean and unit variance: the targets of MAE [0].

    - [0]: Masked Autoencoders Are Scalable Vision Learners, 2021,
      https://arxiv.org/abs/2111.06377

    Args:
        images:
            Square images with shape (batch_size, 3, height, width).
        patch_size:
            Side of a patch in px.

    Returns:
        float32 tensor with shape (batch_size, num_patches, 3 * patch_size**2).
    """
    return utils.normalize_mean_var(utils.patchify(images.float(), patch_size))


def masked_patch_loss(predictions: Tensor, targets: Tensor, keep: Tensor) -> Tensor:
    """Mean squared error of the patches that were hidden.

    Args:
        predictions:
            Tensor with shape (batch_size, num_patches, dim).
        targets:
            Tensor with the same shape, see `normalized_patches`.
        keep:
            Indices of the patches that were seen, int64 with shape (batch_size, k).

    Returns:
        Scalar.
    """
    errors = (predictions.float() - targets).square().mean(dim=2)  # (B, n)
    hidden = torch.ones_like(errors).scatter(1, keep, 0.0)
    return (errors * hidden).sum() / hidden.sum()
