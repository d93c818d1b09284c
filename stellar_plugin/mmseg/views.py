"""Transforms of torchvision in mmsegmentation's pipelines."""

from __future__ import annotations

from typing import Any

import torch
from mmcv.transforms import BaseTransform
from mmseg.registry import TRANSFORMS
from torchvision import tv_tensors
from torchvision.transforms import v2


@TRANSFORMS.register_module()
class TorchvisionTransform(BaseTransform):
    """Applies a transform of `torchvision.transforms.v2` to image and labels alike.

    For what mmsegmentation does not have, such as random crops of a fraction of the
    area. Labels are resized by nearest neighbour.

    Args:
        name:
            Name of the transform, for example "RandomResizedCrop".
        interpolation:
            How the image is resized, for example "bicubic"; None for transforms that
            do not resize.
        kwargs:
            Passed on to the transform.

    Raises:
        ValueError: If torchvision has no such transform.
    """

    def __init__(
        self, name: str, interpolation: str | None = None, **kwargs: Any
    ) -> None:
        if not hasattr(v2, name):
            raise ValueError(f"torchvision.transforms.v2 has no '{name}'.")
        if interpolation is not None:
            kwargs["interpolation"] = v2.InterpolationMode(interpolation)
        self.apply = getattr(v2, name)(**kwargs)

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        """Transforms what an mmsegmentation pipeline holds.

        Args:
            results:
                "img", uint8 with shape (height, width, channels), and, where labels are
                loaded, "gt_seg_map" with shape (height, width).
        """
        image = torch.from_numpy(results["img"].copy()).permute(2, 0, 1)
        parts: dict[str, torch.Tensor] = {"img": tv_tensors.Image(image)}
        for field in results.get("seg_fields", []):
            parts[field] = tv_tensors.Mask(torch.from_numpy(results[field]))
        parts = self.apply(parts)
        results["img"] = parts.pop("img").permute(1, 2, 0).contiguous().numpy()
        results |= {name: labels.numpy() for name, labels in parts.items()}
        results["img_shape"] = results["img"].shape[:2]
        return results

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.apply})"
