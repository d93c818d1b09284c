"""A folder of images as a dataset that survives broken files."""

from __future__ import annotations

import os
import warnings
import zlib
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightly_ext.data.listing import list_images, printable
from lightly_ext.data.reading import MAX_PIXELS, read_image

# Where so many are tried and none is readable, something else is wrong.
_PATIENCE = 100
_READABLE, _UNREADABLE = 1, 2


class ImageFolderDataset(Dataset[tuple[Any, int]]):
    """All images below a folder.

    The folder may be nested to any depth, see :func:`list_images`. The order is that of
    the sorted names, the same on every machine.

    An image that cannot be read, or that the transform fails on, does not end the
    training: the next readable one takes its place, a warning names the file, and it is
    not tried again, by no worker of the process. When more than 5 % of the images are
    unreadable (and more than 100), or all of them, or the first 100, reading raises an
    error: then something else is wrong.

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
        self.transform = transform
        self.max_pixels = max_pixels
        names = list_images(self.path)
        self.classes: list[str] = []
        self.labels: Tensor | None = None
        if labelled:
            self.classes, self.labels = _labels(self.path, names)
        # One piece: a list of a million strings would be copied into every worker as
        # soon as their reference counts change.
        self._names = os.fsencode("\0".join([*names, ""]))
        self._ends = np.flatnonzero(np.frombuffer(self._names, np.uint8) == 0)
        self._states = torch.zeros(len(names), dtype=torch.uint8).share_memory_()

    def __len__(self) -> int:
        """Returns the number of images, unreadable ones included."""
        return len(self._ends)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """Reads an image, or the next readable one.

        Args:
            index:
                Number of the image, 0 <= index < len(self).

        Returns:
            Tuple of the transformed image, and its class or its index.

        Raises:
            IndexError: If there is no such image.
            RuntimeError: If too many images are unreadable.

        """
        if not 0 <= index < len(self):
            raise IndexError(f"There is no image {index} among {len(self)}.")
        image, index = self._read_next(index)
        return image, index if self.labels is None else int(self.labels[index])

    @cached_property
    def fingerprint(self) -> str:
        """Tells other sets of images from this one, by their names."""
        return f"{len(self)} images ({zlib.crc32(self._names):08x})"

    @property
    def unreadable(self) -> Tensor:
        """Which images were found unreadable, by all workers of this process: bool."""
        return self._states == _UNREADABLE

    @property
    def num_unreadable(self) -> int:
        """Number of files found unreadable so far, by all workers of this process."""
        return int(self.unreadable.sum())

    def unreadable_files(self) -> list[Path]:
        """Returns the files found unreadable so far, by all workers of this process."""
        return [self.file(int(index)) for index in self.unreadable.nonzero()]

    def file(self, index: int) -> Path:
        """Returns the path of an image."""
        start = self._ends[index - 1] + 1 if index else 0
        return self.path / os.fsdecode(self._names[start : self._ends[index]])

    def _read_next(self, index: int) -> tuple[Any, int]:
        draws = torch.get_rng_state()
        for offset in range(len(self)):
            candidate = (index + offset) % len(self)
            if self._states[candidate] == _UNREADABLE:
                continue
            try:
                image = self._read(candidate)
            except Exception as error:  # decoders raise anything on broken files
                self._note_unreadable(candidate, error)
                # As if it had been known: a transform may have drawn and failed then.
                torch.set_rng_state(draws)
            else:
                self._states[candidate] = _READABLE
                return image, candidate
        raise RuntimeError(
            f"None of the {len(self)} images below {printable(self.path)} is readable."
        )

    def _read(self, index: int) -> Any:
        image = read_image(self.file(index), self.max_pixels)
        return image if self.transform is None else self.transform(image)

    def _note_unreadable(self, index: int, error: Exception) -> None:
        self._states[index] = _UNREADABLE
        text = printable(f"{self.file(index)} ({type(error).__name__}: {error})")
        count, size = self.num_unreadable, len(self)
        found = bool((self._states == _READABLE).any())
        tolerated = max(_PATIENCE, size // 20) if found else _PATIENCE
        if count > min(size - 1, tolerated):
            raise RuntimeError(
                f"{count} of {size} images below {printable(self.path)} are "
                f"unreadable{'' if found else ', and none was readable'}: too many to "
                f"go on. The last one is {text}. Is the folder complete and reachable? "
                "Remove or repair the files that the warnings name."
            ) from error
        warnings.warn(f"Skipping unreadable image {text}.", stacklevel=4)


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
