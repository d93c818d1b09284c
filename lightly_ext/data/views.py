"""Views of images, alone, in batches and by epochs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler, default_collate
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from lightly_ext.transforms.image_conversion import to_uint8_rgb

T = TypeVar("T")


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


class SeededViews(Dataset[T]):
    """Random views that depend on nothing but the seed, the epoch and the image.

    However many processes and workers make them, and wherever a run is continued, the
    views of an epoch are the same.

    Attributes:
        images:
            Dataset with a random transform that draws from torch's default generator.
        seed:
            Decides on the views of all epochs.
        epoch:
            Decides on the views of this one; set it before a loader starts.

    """

    def __init__(self, images: Dataset[T], seed: int) -> None:
        self.images = images
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        """Returns the number of images."""
        return len(self.images)  # type: ignore[arg-type] # a dataset with a length

    def __getitem__(self, index: int) -> T:
        """Returns a view of an image."""
        with torch.random.fork_rng(devices=[]):
            torch.random.default_generator.manual_seed(
                _mixed(self.seed, self.epoch, index)
            )
            return self.images[index]


class EpochSampler(Sampler[int]):
    """Deals the images of an epoch, in random order and equal shares, to processes.

    Attributes:
        views:
            The images; their epoch is set together with the sampler's.
        rank:
            Number of this process.
        world_size:
            Number of processes.
        batch_size:
            Images of all processes in an optimiser step, a multiple of `world_size`:
            what remains behind the last full batch of an epoch is not used. None uses
            every image, and some twice where shares would differ.

    """

    def __init__(
        self,
        views: SeededViews[T],
        rank: int,
        world_size: int,
        batch_size: int | None = None,
    ) -> None:
        self.views = views
        self.rank = rank
        self.world_size = world_size
        self.batch_size = batch_size

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order and the views; Lightning calls it."""
        self.views.epoch = epoch

    def __len__(self) -> int:
        """Number of images of this process in an epoch."""
        if self.batch_size is None:
            return -(-len(self.views) // self.world_size)
        num_batches = len(self.views) // self.batch_size
        return num_batches * self.batch_size // self.world_size

    def __iter__(self) -> Iterator[int]:
        """Numbers of the images of this process."""
        views = self.views
        order = epoch_order(len(views), views.seed, views.epoch)
        dealt = order[torch.arange(len(self) * self.world_size) % len(views)]
        return iter(dealt[self.rank :: self.world_size].tolist())


def epoch_order(num_images: int, seed: int, epoch: int) -> Tensor:
    """Random order of the images in an epoch, int64 with shape (num_images,)."""
    generator = torch.Generator().manual_seed(_mixed(seed, epoch))
    return torch.randperm(num_images, generator=generator)


def _mixed(*numbers: int) -> int:
    """One seed of several numbers, of which any may be large or close to another."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])
