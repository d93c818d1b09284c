"""What a run can know before its first step."""

from __future__ import annotations

import math
from typing import Any

import torch
from pytorch_lightning.utilities.rank_zero import rank_zero_warn

from lightly_ext.modules import random_focal_mask
from lightly_ext.pretrain.sharding import ShardedStrategy, check_strategy
from lightly_ext.transforms import STELLARTransform
from stellar_plugin import StellarEncoder


def check_optimization(
    lr: float,
    min_lr: float,
    warmup_fraction: float,
    weight_decay: float,
    betas: tuple[float, float],
) -> None:
    """Checks what AdamW and its schedule are made with.

    Args:
        lr:
            Learning rate, above 0.
        min_lr:
            Learning rate at the end, from 0 to `lr`.
        warmup_fraction:
            Share of the steps, in [0, 1].
        weight_decay:
            Weight decay, 0 or more.
        betas:
            Coefficients of AdamW, in [0, 1).

    Raises:
        ValueError: If one is out of range, with its name and value.
    """
    for name, value, right, what in (
        ("lr", lr, 0 < lr < math.inf, "above 0"),
        ("min_lr", min_lr, 0 <= min_lr <= lr, f"from 0 to lr ({lr})"),
        (
            "warmup_fraction",
            warmup_fraction,
            0 <= warmup_fraction <= 1,
            "from 0 to 1",
        ),
        (
            "weight_decay",
            weight_decay,
            0 <= weight_decay < math.inf,
            "0 or more",
        ),
        ("betas", betas, all(0 <= beta < 1 for beta in betas), "in [0, 1)"),
    ):
        if not right:
            raise ValueError(f"{name} must be {what}, got {value}.")


def check_trainer(trainer: Any) -> None:
    """Checks that a trainer trains, by a strategy and in a precision that we know.

    Args:
        trainer:
            A Lightning trainer.

    Raises:
        ValueError: If it makes no step, or an option is unknown or out of range.
    """
    check_strategy(trainer.strategy)
    sharded = isinstance(trainer.strategy, ShardedStrategy)
    if sharded and trainer.precision == "16-mixed":
        raise ValueError(
            "--trainer.precision 16-mixed does not go with --trainer.strategy fsdp2, "
            "whose shards its scaler does not know. Use bf16-mixed."
        )
    if trainer.precision == "16-true":
        raise ValueError(
            "--trainer.precision 16-true overflows: the squares of AdamW do not "
            "fit into float16. Use 16-mixed, bf16-mixed or bf16-true."
        )
    names = "max_epochs", "max_steps", "limit_train_batches"
    for name in names:
        if getattr(trainer, name) == 0:
            raise ValueError(f"--trainer.{name} 0 leaves nothing to train: raise it.")
    accumulated, clip = trainer.accumulate_grad_batches, trainer.gradient_clip_val
    if accumulated < 1:
        raise ValueError(
            f"--trainer.accumulate_grad_batches must be 1 or more, got {accumulated}."
        )
    if clip is not None and not clip >= 0:
        raise ValueError(f"--trainer.gradient_clip_val must be 0 or more, got {clip}.")


def check_crop(encoder: StellarEncoder, name: str, size: int) -> None:
    """Checks that crops are whole patches.

    Args:
        encoder:
            Of the model that learns from them.
        name:
            Name of the option.
        size:
            Side of the crops in px.

    Raises:
        ValueError: If they are not.
    """
    if size % encoder.patch_size:
        raise ValueError(
            f"{name} {size} is no multiple of the model's patch_size "
            f"{encoder.patch_size}."
        )


def check_views(module: Any, transform: STELLARTransform) -> None:
    """Checks that a model can learn from the views that a transform makes.

    Args:
        module:
            A `StellarPretraining`.
        transform:
            Of the images.

    Raises:
        ValueError: If the patches do not fit into the views, none of them would be
            kept, the blur does not fit, or there is no view for the teacher.
    """
    sizes = {"global_crop_size": transform.global_crop_size}
    if transform.num_local_views > 0:
        sizes["local_crop_size"] = transform.local_crop_size
    vit = module.model.encoder.vit
    made_for = max(vit.patch_embed.img_size)
    if transform.global_crop_size != made_for:
        table = vit.pos_embed is not None
        rank_zero_warn(
            f"global_crop_size is {transform.global_crop_size}, the model's img_size "
            f"{made_for}: {'positions are resampled in every step, ' if table else ''}"
            f"online kNN sees {transform.global_crop_size} px, and evaluation will see "
            f"{made_for} px. Set both to the same."
        )
    for name, size in sizes.items():
        check_crop(module.model.encoder, name, size)
        if module.augment.kernel_size // 2 >= size:
            raise ValueError(
                f"{name} {size} is too small for a blur of kernel_size "
                f"{module.augment.kernel_size}: set --model.augment.kernel_size to "
                f"{2 * size - 1} or less."
            )
    if module.teacher is not None and transform.num_global_views < 2:
        raise ValueError(
            "The momentum teacher reads global view 1: set num_global_views to 2 or "
            "more."
        )
    side = transform.global_crop_size // module.model.encoder.patch_size
    mask = module.hparams["mask_ratio"], module.hparams["focal_prob"]
    random_focal_mask(1, (side, side), *mask, generator=torch.Generator())
