"""Labelled images in shards as a dataset, for online kNN."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightly_ext.data.images import ImageDataset
from lightly_ext.data.reading import MAX_PIXELS
from lightly_ext.data.streams.sources import Source
from lightly_ext.data.streams.table import ImageTable


class LabelledStreamDataset(ImageDataset):
    """All images of shards with their classes, in the order of a folder of them.

    Samples are tuples of the transformed image and its class, as those of
    `ImageFolderDataset` with labels. Broken images are passed over, see
    `ImageDataset`.

    Attributes:
        path:
            The source, as it was given.
        transform:
            Called with every image, a uint8 RGB tensor with shape (3, H, W). None
            returns the image.
        max_pixels:
            Images with more pixels are unreadable.
        classes:
            Sorted names of the classes.
        labels:
            int64 tensor with shape (len(self),), the class of every image.

    Raises:
        ValueError: If there is no image, or one without a class.
        OSError: If a shard is broken or cannot be read.

    """

    labels: Tensor

    def __init__(
        self,
        source: Source,
        transform: Callable[[Tensor], Any] | None = None,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self.path = Path(source.name)
        self._table = ImageTable(source)
        super().__init__(len(self._table), transform, max_pixels)
        labels, classes = self._table.labels()
        self._order = self._table.order(labels)
        self.classes = list(classes)
        self.labels = torch.tensor(labels)[self._order]

    @cached_property
    def fingerprint(self) -> str:
        """Tells other sets of images from this one, by their names."""
        names = "\0".join(self._table.names[i] for i in self._order)
        return f"{len(self)} images ({zlib.crc32(os.fsencode(names)):08x})"

    def file(self, index: int) -> Path:
        """Returns the path of an image, behind that of its shard."""
        return Path(self._table.shown(self._order[index]))

    def files(self) -> Iterator[tuple[bytes, int]]:
        """Yields the paths of the shards and their sizes."""
        for path in self._table.files:
            yield os.fsencode(path), path.stat().st_size

    def encoded(self, index: int) -> bytes | Path:
        """Reads an encoded image."""
        return self._table.read(self._order[index])
