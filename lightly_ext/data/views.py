"""Views of images, alone, in batches and by epochs."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler, default_collate
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from lightly_ext.data.images import ImageDataset, epoch_order
from lightly_ext.randomness import Stream, mix_seeds
from stellar_plugin.image_conversion import cut_ends, to_uint8_rgb

T = TypeVar("T")


class ViewBatch(NamedTuple):
    """Uncoloured views of a batch of images.

    Attributes:
        global_views:
            uint8 tensor with shape (B, V, 3, S, S); view 0 is the target view.
        local_views:
            uint8 tensor with shape (B, U, 3, s, s), or None.
        seeds:
            int64 tensor with shape (B,), what is drawn for a sample is drawn with its
            seed; None draws from torch's default generator.
        indices:
            int64 tensor with shape (B,), numbers of the images that were read, or None.

    """

    global_views: Tensor
    local_views: Tensor | None
    seeds: Tensor | None = None
    indices: Tensor | None = None


class SampleKey(NamedTuple):
    """Asks for the views of an image in an epoch.

    Attributes:
        epoch:
            Number of the epoch, >= 0.
        number:
            Number of the image.
        encoded:
            What is in its file, if the main process has read that ahead, or what was
            raised instead.

    """

    epoch: int
    number: int
    encoded: bytes | Path | Exception | None = None


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
            cut_ends(to_uint8_rgb(image)),
            size=[self.size],
            interpolation=InterpolationMode.BICUBIC,
            antialias=True,
        )
        return F.center_crop_image(resized, [self.size, self.size])


def collate_views(
    samples: list[tuple[list[Tensor], int]] | list[tuple[list[Tensor], int, int]],
    num_global_views: int,
) -> ViewBatch:
    """Stacks the views of a batch of images.

    Args:
        samples:
            B tuples of the uint8 views of an image, global views first, its index, and
            its seed if it has one.
        num_global_views:
            Number V of global views.

    Returns:
        The views, seeds and indices.

    """
    all_views = [sample[0] for sample in samples]
    numbers = torch.tensor([sample[1:] for sample in samples])  # (B, 1 or 2)
    local_views = [views[num_global_views:] for views in all_views]
    return ViewBatch(
        _stack([views[:num_global_views] for views in all_views]),
        _stack(local_views) if local_views[0] else None,
        seeds=numbers[:, 1] if numbers.shape[1] == 2 else None,
        indices=numbers[:, 0],
    )


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

    """

    def __init__(self, images: Dataset[T], seed: int) -> None:
        self.images = images
        self.seed = seed

    def __len__(self) -> int:
        """Returns the number of images."""
        return len(self.images)  # type: ignore[arg-type] # a dataset with a length

    def __getitem__(self, key: SampleKey) -> T:
        """Returns the views of an image in an epoch."""
        with torch.random.fork_rng(devices=[]):
            torch.random.default_generator.manual_seed(
                self.sample_seed(key) + Stream.VIEWS
            )
            return self._sample(key)

    def sample_seed(self, key: SampleKey) -> int:
        """Returns what everything random in a sample is drawn with, an int64."""
        return mix_seeds(self.seed, key.epoch, key.number)

    def order(self, epoch: int) -> Tensor:
        """Order of the images in an epoch, int64 with shape (len(self),)."""
        return epoch_order(len(self), self.seed, epoch)

    def keys(self, epoch: int, numbers: list[int]) -> Iterator[SampleKey]:
        """Yields what asks for the views of images of an epoch."""
        return map(partial(SampleKey, epoch), numbers)

    def _sample(self, key: SampleKey) -> T:
        return self.images[key.number]


class TrainingViews(SeededViews[Any]):
    """Samples of an `ImageDataset` with their seeds: (views, index, seed)."""

    images: ImageDataset

    def __getitem__(self, key: SampleKey) -> tuple[list[Tensor], int, int]:
        """Returns the views, the number of the image that was read, and the seed."""
        views, index = super().__getitem__(key)
        return views, index, self.sample_seed(key)

    def order(self, epoch: int) -> Tensor:
        """Order of the images in an epoch, int64 with shape (len(self),)."""
        return self.images.order(self.seed, epoch)

    def keys(self, epoch: int, numbers: list[int]) -> Iterator[SampleKey]:
        """Yields what asks for the views, with images that are read ahead."""
        ahead = self.images.read_ahead(numbers, self.seed, epoch)
        return map(partial(SampleKey, epoch), numbers, ahead)

    def _sample(self, key: SampleKey) -> tuple[Any, int]:
        return self.images.read(key.number, key.encoded)


class EpochSampler(DistributedSampler[SampleKey]):
    """Deals the images of an epoch, in random order and equal shares, to processes.

    As a `DistributedSampler` it is left alone by Lightning.

    Attributes:
        dataset:
            The views, whose seed decides on the order.
        rank:
            Number of this process.
        num_replicas:
            Number of processes.
        batch_size:
            Images of all processes in an optimiser step, a multiple of the number of
            processes: what remains behind the last full batch of an epoch is not used.
            None uses every image, and some twice where shares would differ.
        epoch:
            Number of the epoch.
        start:
            Images of all processes that are passed over in this epoch, a multiple of
            the number of processes: a continued run has seen them.

    """

    def __init__(
        self,
        views: SeededViews[T],
        rank: int,
        world_size: int,
        batch_size: int | None = None,
    ) -> None:
        super().__init__(views, world_size, rank, seed=views.seed)
        self.views = views
        self.batch_size = batch_size
        self.start = 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order and the views; Lightning calls it, also in mid-epoch."""
        if epoch != self.epoch:
            self.epoch, self.start = epoch, 0

    def __len__(self) -> int:
        """Number of images of this process in a whole epoch."""
        num_images = len(self.dataset)  # type: ignore[arg-type] # SeededViews
        if self.batch_size is None:
            return -(-num_images // self.num_replicas)
        return num_images // self.batch_size * self.batch_size // self.num_replicas

    def __iter__(self) -> Iterator[SampleKey]:
        """Keys of the images of this process."""
        num_images = len(self.dataset)  # type: ignore[arg-type] # SeededViews
        order = self.views.order(self.epoch)
        positions = torch.arange(self.start, len(self) * self.num_replicas)
        dealt = order[positions % num_images][self.rank :: self.num_replicas]
        return self.views.keys(self.epoch, dealt.tolist())
