"""Views of images, alone and in batches."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from torch.utils.data import default_collate
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from lightly_ext.transforms.image_conversion import to_uint8_rgb


class ViewBatch(NamedTuple):
    """Uncoloured views of a batch of images.

    Attributes:
        global_views:
            uint8 tensor with shape (B, V, 3, S, S); view 0 is the target view.
        local_views:
            uint8 tensor with shape (B, U, 3, s, s), or None.

    """

    global_views: Tensor
    local_views: Tensor | None


class SingleViewTransform:
    """Makes the plain view of an image that features are evaluated on.

    Resizes the shorter side, bicubic with antialiasing, and cuts out the centre.

    Attributes:
        size:
            Side of the view in pixels.

    """

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, image: Tensor) -> Tensor:
        """Returns the view, uint8 (3, size, size), of an image, uint8 (3, H, W)."""
        resized = F.resize_image(
            to_uint8_rgb(image),
            size=[self.size],
            interpolation=InterpolationMode.BICUBIC,
            antialias=True,
        )
        return F.center_crop_image(resized, [self.size, self.size])


def collate_views(
    samples: list[tuple[list[Tensor], int]], num_global_views: int
) -> ViewBatch:
    """Stacks the views of a batch of images.

    Args:
        samples:
            B tuples of the uint8 views of an image, global views first, and its index.
        num_global_views:
            Number V of global views.

    Returns:
        The global and the local views.

    """
    global_views = _stack([views[:num_global_views] for views, _ in samples])
    local_views = [views[num_global_views:] for views, _ in samples]
    return ViewBatch(global_views, _stack(local_views) if local_views[0] else None)


def _stack(groups: list[list[Tensor]]) -> Tensor:
    views = [view for group in groups for view in group]
    # In a worker, unlike torch.stack, this writes straight into shared memory.
    stacked: Tensor = default_collate(views)
    return stacked.unflatten(0, (len(groups), -1))
