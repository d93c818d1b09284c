"""Dice loss of labelled cells."""

from __future__ import annotations

from typing import Any

import torch
from mmseg.models.losses import DiceLoss
from mmseg.registry import MODELS
from torch import Tensor


@MODELS.register_module()
class LabelledDiceLoss(DiceLoss):
    """Soft Dice loss that leaves out ignored cells [0].

    Per image `1 - 2 sum(p y) / (sum(p^2) + sum(y^2))` over labelled cells and all
    classes, with softmax probabilities `p` and one-hot labels `y`; the mean over
    images. mmsegmentation's `DiceLoss` counts the predictions of ignored cells in the
    denominator. Always float32: the sums do not fit half precision.

    - [0]: V-Net, 2016, https://arxiv.org/abs/1606.04797

    Args:
        loss_weight:
            Weight of the loss.
        eps:
            Added to both sums of the denominator.
        loss_name:
            Name in the log; `loss_` in front makes it a part of the total.
    """

    def __init__(
        self,
        loss_weight: float = 1.0,
        eps: float = 1e-3,
        loss_name: str = "loss_dice",
    ) -> None:
        super().__init__(
            use_sigmoid=False,
            activate=False,
            loss_weight=loss_weight,
            eps=eps,
            loss_name=loss_name,
        )

    def forward(
        self,
        pred: Tensor,
        target: Tensor,
        weight: Tensor | None = None,
        ignore_index: int = 255,
        **kwargs: Any,
    ) -> Tensor:
        """Computes the loss.

        Args:
            pred:
                Logits with shape (batch_size, num_classes, height, width).
            target:
                Class indices or `ignore_index`, int64 with shape (batch_size, height,
                width).
            weight:
                None: weights of single cells are not supported.
            ignore_index:
                Label of cells that are left out, not below the number of classes.
            kwargs:
                avg_factor and reduction_override of mmsegmentation.

        Raises:
            ValueError: If cells are weighted.
        """
        if weight is not None:
            raise ValueError(
                "LabelledDiceLoss has no weights of single cells; use no sampler."
            )
        labelled = (target != ignore_index).unsqueeze(1)
        with torch.autocast(pred.device.type, enabled=False):
            probabilities = pred.float().softmax(1) * labelled
            return super().forward(probabilities, target, **kwargs)
