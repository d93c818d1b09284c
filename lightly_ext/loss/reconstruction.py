"""Reconstruction terms: pixels, or the codes of a frozen tokenizer."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def squared_error(reconstruction: Tensor | None, images: Tensor | None) -> Tensor:
    """Mean squared error of pixels, computed in float32.

    Args:
        reconstruction:
            Decoded images with shape (batch_size, 3, height, width).
        images:
            Images in [0, 1] with the same shape.

    Returns:
        Scalar, in squared intensities.

    Raises:
        ValueError: If one of them is missing, or they differ in shape.
    """
    if reconstruction is None or images is None:
        raise ValueError(
            "The reconstruction term needs `reconstruction` and `images`; set "
            "reconstruction_weight=0 to train without."
        )
    if reconstruction.shape != images.shape:
        raise ValueError(
            f"reconstruction {tuple(reconstruction.shape)} and images "
            f"{tuple(images.shape)} differ in shape."
        )
    return F.mse_loss(reconstruction.float(), images.float())


def code_cross_entropy(logits: Tensor | None, codes: Tensor | None) -> Tensor:
    """Mean cross-entropy of codes, computed in float32.

    Args:
        logits:
            Tensor with shape (batch_size, num_patches, num_codes).
        codes:
            Codes of the images, int64 with shape (batch_size, num_patches).

    Returns:
        Scalar, in nats.

    Raises:
        ValueError: If one of them is missing, or their shapes do not fit.
    """
    if logits is None or codes is None:
        raise ValueError(
            "The reconstruction term of the target 'tokens' needs logits as "
            "`reconstruction`, and `codes`; set reconstruction_weight=0 to train "
            "without."
        )
    if logits.shape[:-1] != codes.shape:
        raise ValueError(
            f"logits {tuple(logits.shape)} and codes {tuple(codes.shape)} must have "
            "shapes (batch_size, num_patches, num_codes) and (batch_size, num_patches)."
        )
    return F.cross_entropy(logits.float().flatten(0, -2), codes.flatten())
