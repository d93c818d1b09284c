"""Blocks of features for linear probes: from the cache, or of augmented views."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightly_ext.data import EpochSampler, SeededViews
from lightly_ext.evaluate.devices import Devices
from lightly_ext.evaluate.features import (
    POOLED,
    FeatureCache,
    check_unreadable,
    say_unreadable,
)
from lightly_ext.evaluate.frozen_model import FrozenModel
from lightly_ext.evaluate.images import EvaluationImages, ImageFiles, train_crop
from stellar_plugin.protocols import CropProtocol, RandomCropProtocol

BLOCK = 8192
# Features that fit into this share of the free memory of a GPU stay there.
DEVICE_SHARE = 0.5

Block = tuple[Tensor, Tensor]  # features (num_images, dim) and labels (num_images,)


@dataclass(frozen=True)
class FeatureRows:
    """Features of some images, on the disk or on the device, and their labels.

    Attributes:
        source:
            A row for every file of the cache, (num_files, dim).
        labels:
            Class of every file, int64 with shape (num_files,).
        rows:
            Numbers of the files that are meant, int64, ascending.
        device:
            Where blocks are wanted.
        num_reused:
            Number of files whose features an earlier run computed.
    """

    source: NDArray[np.generic] | Tensor
    labels: Tensor
    rows: Tensor
    device: torch.device
    num_reused: int = 0

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def dim(self) -> int:
        """Width of the features."""
        return int(self.source.shape[1])

    def among(self, numbers: Tensor) -> FeatureRows:
        """Those of the images whose numbers are given."""
        return replace(self, rows=self.rows[torch.isin(self.rows, numbers)])

    def blocks(self, size: int = BLOCK, order: Tensor | None = None) -> Iterator[Block]:
        """Cuts the images, in the given order, into blocks on the device."""
        rows = self.rows if order is None else self.rows[order]
        for chosen in rows.split(size):
            if isinstance(self.source, Tensor):
                features = self.source[chosen.to(self.source.device)]
            else:
                features = torch.from_numpy(self.source[chosen.numpy()])
            yield features.to(self.device), self.labels[chosen].to(self.device)


def cached_rows(
    cache: FeatureCache,
    files: ImageFiles,
    protocol: CropProtocol,
    feature: str,
) -> FeatureRows:
    """Features of centre crops, of the readable ones of some images.

    Only what is used at a time is read into memory, so that many processes share the
    pages of one file.

    Args:
        cache:
            Computes the features, or has them.
        files:
            Images with labels.
        protocol:
            Says how images are cut.
        feature:
            One of `FEATURES`.
    """
    cached = cache.pooled(files, protocol, feature)
    source: Any = cached.arrays[POOLED]
    device = cache.devices.device
    if device.type == "cuda" and (
        source.nbytes < DEVICE_SHARE * torch.cuda.mem_get_info(device)[0]
    ):
        source = torch.from_numpy(np.array(source)).to(device)
    labels, num_reused = files.label_tensor, cached.num_reused
    return FeatureRows(source, labels, cached.readable, device, num_reused)


class ViewFeatures:
    """Features of augmented views, encoded anew in every epoch by all processes.

    Attributes:
        files: Images with labels.
    """

    def __init__(
        self,
        model: FrozenModel,
        devices: Devices,
        files: ImageFiles,
        protocol: RandomCropProtocol,
        feature: str,
    ) -> None:
        self.files = files
        self._model = model
        self._devices = devices
        self._feature = feature
        crop = train_crop(protocol, model.origin.interpolation)
        self._said: set[int] = set()  # unreadable images that were named
        self._views = SeededViews(EvaluationImages(files, crop), devices.seed)

    def blocks(self, epoch: int, size: int) -> Iterator[Block]:
        """Blocks of an epoch, the same in every process; the last may be smaller.

        Raises:
            RuntimeError: If more than 5 % of the images are unreadable.
        """
        features, labels = torch.empty(0), torch.empty(0)
        for x, y in self._encoded(epoch):
            features = torch.cat([features, x]) if len(labels) else x
            labels = torch.cat([labels, y]) if len(labels) else y
            while len(labels) >= size:
                yield features[:size], labels[:size]
                features, labels = features[size:], labels[size:]
        if len(labels):
            yield features, labels

    def _encoded(self, epoch: int) -> Iterator[Block]:
        """Readable images of an epoch in its order, as they come."""
        devices, total = self._devices, len(self.files)
        # Equal shares: in a collective every process waits for every other one.
        sampler = EpochSampler(self._views, devices.rank, devices.world_size)
        sampler.set_epoch(epoch)
        labels, num_seen, unreadable = self.files.label_tensor, 0, list[int]()
        for batch in devices.loader(self._views, list(sampler)):
            features = self._encode(batch.image)
            numbers = torch.where(batch.readable, batch.number, -1 - batch.number)
            left = total - num_seen  # what lies behind is padding
            features = in_turn(devices, features)[:left]
            numbers = in_turn(devices, numbers.to(features.device))[:left]
            num_seen += len(numbers)
            readable = numbers >= 0
            unreadable += (-1 - numbers[~readable]).tolist()
            check_unreadable(len(unreadable), self.files)
            known = labels.to(numbers.device)[numbers[readable]]
            yield features[readable], known
        if set(unreadable) - self._said:
            say_unreadable(devices, self.files, sorted(unreadable))
            self._said |= set(unreadable)

    def _encode(self, images: Tensor) -> Tensor:
        devices = self._devices
        with torch.no_grad(), devices.fabric.autocast():
            images = devices.fabric.to_device(images)
            return self._model.pooled(images, self._feature)


def in_turn(devices: Devices, values: Tensor) -> Tensor:
    """Rows of all processes: the first of each, then the second of each, ..."""
    if devices.world_size == 1:
        return values
    gathered: Any = devices.fabric.all_gather(values)  # (processes, rows, ...)
    return gathered.transpose(0, 1).flatten(0, 1)
