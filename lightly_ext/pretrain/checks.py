"""What a run can know before its first step."""

from __future__ import annotations

from typing import Any

import torch

from lightly_ext.modules import random_focal_mask
from lightly_ext.transforms import STELLARTransform


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
    patch = module.model.encoder.patch_size
    for name, size in sizes.items():
        if size % patch:
            raise ValueError(
                f"{name} {size} is no multiple of the model's patch_size {patch}."
            )
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
    side = transform.global_crop_size // patch
    mask = module.hparams["mask_ratio"], module.hparams["focal_prob"]
    random_focal_mask(1, (side, side), *mask, generator=torch.Generator())
