"""What weight decay spares, and the learning rate of a batch size."""

from __future__ import annotations

from typing import Any, Literal

from timm.optim import param_groups_weight_decay
from torch import nn

# Learning rates are given for this global batch size (section 10 of the method).
REFERENCE_BATCH_SIZE = 2048
# Queries and positions are matrices that carry no weight decay; biases, norms and
# the CLS token are excluded by their shape or name.
NO_WEIGHT_DECAY = ("*cls_token", "*reg_token", "*pos_embed", "*rope.freqs")

LRScaling = Literal["none", "sqrt", "linear"]


def scaled_lr(lr: float, scaling: LRScaling, batch_size: int) -> float:
    """Learning rate for a global batch size.

    Args:
        lr:
            Learning rate for 2048 images.
        scaling:
            Whether it stays, or follows the square root of the batch size, or the size.
        batch_size:
            Images of all processes in an optimiser step.
    """
    ratio = batch_size / REFERENCE_BATCH_SIZE
    return lr * {"none": 1.0, "sqrt": ratio**0.5, "linear": ratio}[scaling]


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters, with and without weight decay, for an optimiser."""
    groups: list[dict[str, Any]] = param_groups_weight_decay(
        module, weight_decay, no_weight_decay_list=NO_WEIGHT_DECAY
    )
    return groups
