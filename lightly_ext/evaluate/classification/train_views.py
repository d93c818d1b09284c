"""Augmented views that depend on seed, epoch and image only.

However many processes and workers make them, and wherever a run is continued, the
views of an epoch are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from lightly_ext.evaluate.images import EvaluationImages, ImageFiles, Sample


class TrainViews(EvaluationImages):
    """Image files, cut by a random transform, anew in every epoch.

    Attributes:
        seed:
            Decides on the views of all epochs.
        epoch:
            Decides on the views of this one; set it before a loader starts.
    """

    def __init__(
        self, files: ImageFiles, transform: Callable[[Tensor], Tensor], seed: int
    ) -> None:
        super().__init__(files, transform)
        self.seed = seed
        self.epoch = 0

    def __getitem__(self, index: int) -> Sample:
        """Reads an image and cuts it."""
        with torch.random.fork_rng(devices=[]):
            torch.random.default_generator.manual_seed(
                _mixed(self.seed, self.epoch, index)
            )
            return super().__getitem__(index)


class EpochSampler(Sampler[int]):
    """Deals the images of an epoch among processes, in whole batches only.

    Attributes:
        images:
            The images; their epoch is set together with the sampler's.
        batch_size:
            Images of all processes in an optimiser step. What remains behind the last
            full batch of an epoch is not used.
        rank:
            Number of this process.
        world_size:
            Number of processes; divides `batch_size`.
    """

    def __init__(
        self, images: TrainViews, batch_size: int, rank: int, world_size: int
    ) -> None:
        self.images = images
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order and the views; Lightning calls it."""
        self.images.epoch = epoch

    def __len__(self) -> int:
        """Number of images of this process in an epoch."""
        num_used = len(self.images) // self.batch_size * self.batch_size
        return num_used // self.world_size

    def __iter__(self) -> Iterator[int]:
        """Numbers of the images of this process."""
        images = self.images
        order = epoch_order(len(images), images.seed, images.epoch)
        share = order[self.rank :: self.world_size]
        return iter(share[: len(self)].tolist())


def epoch_order(num_images: int, seed: int, epoch: int) -> Tensor:
    """Random order of the images in an epoch, int64 with shape (num_images,)."""
    generator = torch.Generator().manual_seed(_mixed(seed, epoch))
    return torch.randperm(num_images, generator=generator)


def _mixed(*numbers: int) -> int:
    """One seed of several numbers, of which any may be large or close to another."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])
