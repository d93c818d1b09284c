"""A folder of images as a dataset."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightly_ext.data.images import ImageDataset
from lightly_ext.data.listing import list_images, printable
from lightly_ext.data.reading import MAX_PIXELS


class ImageFolderDataset(ImageDataset):
    """All images below a folder.

    The folder may be nested to any depth, see :func:`list_images`. The order is that of
    the sorted names, the same on every machine.

    Broken images are passed over, see :class:`ImageDataset`.

    Attributes:
        path:
            The folder.
        transform:
            Called with every image, a uint8 RGB tensor with shape (3, H, W). None
            returns the image.
        labelled:
            Whether the first-level subfolders are classes, as in torchvision's
            ImageFolder. Samples then hold the class instead of the index.
        max_pixels:
            Images with more pixels are unreadable.
        classes:
            Sorted names of the classes; empty without labels.
        labels:
            int64 tensor with shape (len(self),), the class of every image, or None.

    Raises:
        ValueError: If the folder does not exist or holds no image, or, with labels, an
            image lies outside of the subfolders.

    Examples:
        >>> dataset = ImageFolderDataset("photos", transform=STELLARTransform())
        >>> views, index = dataset[0]

    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        transform: Callable[[Tensor], Any] | None = None,
        labelled: bool = False,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self.path = Path(path)
        names = list_images(self.path)
        super().__init__(len(names), transform, max_pixels)
        if labelled:
            self.classes, self.labels = _labels(self.path, names)
        # One piece: a list of a million strings would be copied into every worker as
        # soon as their reference counts change.
        self._names = os.fsencode("\0".join([*names, ""]))
        self._ends = np.flatnonzero(np.frombuffer(self._names, np.uint8) == 0)

    @cached_property
    def fingerprint(self) -> str:
        """Tells other sets of images from this one, by their names."""
        return f"{len(self)} images ({zlib.crc32(self._names):08x})"

    def file(self, index: int) -> Path:
        """Returns the path of an image."""
        start = self._ends[index - 1] + 1 if index else 0
        return self.path / os.fsdecode(self._names[start : self._ends[index]])

    def files(self) -> Iterator[tuple[bytes, int]]:
        """Yields the names of the images and the sizes of their files."""
        for index in range(len(self)):
            path = os.fsencode(self.file(index))
            try:
                size = os.stat(path).st_size
            except OSError:
                size = -1
            yield path[len(os.fsencode(self.path)) + 1 :], size

    def encoded(self, index: int) -> Path:
        """Returns the file of an image."""
        return self.file(index)


def _labels(folder: Path, names: list[str]) -> tuple[list[str], Tensor]:
    outside = next((name for name in names if "/" not in name), None)
    if outside is not None:
        raise ValueError(
            "With labels every image lies in the subfolder of its class, but "
            f"{printable(folder / outside)} does not."
        )
    folders = [name.split("/", 1)[0] for name in names]
    classes = sorted(set(folders))
    numbers = {name: number for number, name in enumerate(classes)}
    return classes, torch.tensor([numbers[name] for name in folders])
