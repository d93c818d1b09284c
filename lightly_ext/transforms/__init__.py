"""Multi-view transform and colour augmentation of STELLAR."""

from lightly_ext.transforms.color_augment import STELLARColorAugment, STELLARViews
from lightly_ext.transforms.stellar_transform import (
    STELLARTransform,
    STELLARViewTransform,
)

__all__ = [
    "STELLARColorAugment",
    "STELLARTransform",
    "STELLARViewTransform",
    "STELLARViews",
]
