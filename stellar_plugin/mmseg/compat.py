"""Small repairs of OpenMMLab packages; where nothing is missing, nothing is touched.

Stock: mmsegmentation 1.x imports `mmcv.ops`, which mmcv-lite does not have, and
mmengine up to 0.10.7 cannot read its own checkpoints where `torch.load` reads weights
only (since torch 2.6). Maintained fork: mmengine looks for configs named "mmseg::..."
in a package mmsegmentation, which is called onedl-mmsegmentation there, and both mmseg
and mmcv say at every import what they can do without.
"""

from __future__ import annotations

import importlib
import io
import pickle
import sys
import warnings
from contextlib import redirect_stdout
from types import ModuleType
from typing import Any

import mmcv
import mmengine.runner.checkpoint
import numpy as np
import torch
import torch.nn.functional as F
import torchvision.ops
from mmengine.config.utils import MODULE2PACKAGE
from mmengine.logging import HistoryBuffer
from mmengine.utils import is_installed
from torch import Tensor

# Methods that mmengine saves with every logged value.
STATISTICS = ("min", "max", "current", "mean")
# What mmseg prints, twice, and what mmcv warns of.
NOT_NEEDED = "Could not import OneDL"
NOT_NEEDED_EITHER = "Fail to import ``MultiScaleDeformableAttention``"


def apply() -> None:
    """Repairs what is missing. Safe to call again."""
    warnings.filterwarnings("ignore", NOT_NEEDED_EITHER)
    _provide_mmcv_ops()
    _allow_mmengine_checkpoints()
    _find_mmseg_configs()
    _import_datasets()


def point_sample(
    input: Tensor, points: Tensor, align_corners: bool = False, **kwargs: Any
) -> Tensor:
    """Samples a feature map at points, as `mmcv.ops.point_sample` does.

    Args:
        input:
            Feature map with shape (batch_size, channels, height, width).
        points:
            Points (x, y) in [0, 1] with shape (batch_size, num_points, 2) or
            (batch_size, rows, columns, 2).
        align_corners:
            As for `torch.nn.functional.grid_sample`.
        kwargs:
            mode and padding_mode of `torch.nn.functional.grid_sample`.

    Returns:
        Tensor with shape (batch_size, channels, num_points) or
        (batch_size, channels, rows, columns).
    """
    grid = 2 * points - 1
    if points.ndim == 4:
        return F.grid_sample(input, grid, align_corners=align_corners, **kwargs)
    sampled = F.grid_sample(
        input, grid.unsqueeze(2), align_corners=align_corners, **kwargs
    )
    return sampled.squeeze(3)


def sigmoid_focal_loss(
    input: Tensor,
    target: Tensor,
    gamma: float = 2.0,
    alpha: float = 0.25,
    weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Sigmoid focal loss on class indices, as `mmcv.ops.sigmoid_focal_loss` does.

    Args:
        input:
            Logits with shape (num_samples, num_classes).
        target:
            Class indices, int64 with shape (num_samples,); num_classes is background.
        gamma:
            Exponent that plays down easy samples.
        alpha:
            Weight of the positive class; the others weigh 1 - alpha.
        weight:
            Weight of each target class, with shape (num_classes,).
        reduction:
            "none", "sum", or "mean" over samples (not over classes).

    Returns:
        Tensor with shape (num_samples, num_classes) for "none", else a scalar.
    """
    num_classes = input.shape[1]
    one_hot = F.one_hot(target, num_classes + 1)[:, :num_classes].to(input.dtype)
    loss: Tensor = torchvision.ops.sigmoid_focal_loss(
        input, one_hot, alpha=alpha, gamma=gamma, reduction="none"
    )
    if weight is not None:
        loss = loss * weight[target].unsqueeze(1)
    if reduction == "none":
        return loss
    return loss.sum() / len(input) if reduction == "mean" else loss.sum()


def _provide_mmcv_ops() -> None:
    """Puts a stand-in for `mmcv.ops` in place where the real one cannot be imported."""
    try:
        importlib.import_module("mmcv.ops")
    except ImportError:
        stand_in = ModuleType("mmcv.ops", "Stand-in for the ops that mmseg imports.")
        # mmseg takes None for "not installed" and says so when such a head is built.
        vars(stand_in).update(
            point_sample=point_sample,
            sigmoid_focal_loss=sigmoid_focal_loss,
            CrissCrossAttention=None,
            PSAMask=None,
        )
        sys.modules["mmcv.ops"] = stand_in
        mmcv.ops = stand_in


def _allow_mmengine_checkpoints() -> None:
    """Lets weights-only `torch.load` read what mmengine writes beside the weights."""
    if hasattr(mmengine.runner.checkpoint, "get_torch_safe_globals"):
        return  # this mmengine sees to it itself
    core = getattr(np, "_core", None) or np.core
    torch.serialization.add_safe_globals(
        [
            HistoryBuffer,
            (_statistic, "builtins.getattr"),
            core.multiarray._reconstruct,
            core.multiarray.scalar,
            np.ndarray,
            np.dtype,
            # The classes of float64 and int64; what they are called depends on numpy.
            type(np.dtype(np.float64)),
            type(np.dtype(np.int64)),
        ]
    )


def _statistic(owner: object, name: str) -> object:
    """All that a checkpoint may ask of `getattr`: a statistic of `HistoryBuffer`."""
    if owner is not HistoryBuffer or name not in STATISTICS:
        raise pickle.UnpicklingError(
            f"getattr({owner!r}, {name!r}) is nothing that mmengine writes."
        )
    return getattr(HistoryBuffer, name)


def _find_mmseg_configs() -> None:
    """Tells mmengine the name under which the fork installs mmsegmentation."""
    fork = "onedl-mmsegmentation"
    if not is_installed(MODULE2PACKAGE["mmseg"]) and is_installed(fork):
        MODULE2PACKAGE["mmseg"] = fork


def _import_datasets() -> None:
    """Imports `mmseg.datasets` without the message on what it can do without."""
    with redirect_stdout(io.StringIO()) as said:
        importlib.import_module("mmseg.datasets")
    for line in said.getvalue().splitlines():
        if line != NOT_NEEDED:
            print(line)
