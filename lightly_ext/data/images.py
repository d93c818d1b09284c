"""Images by their numbers, in a dataset that survives broken ones."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightly_ext.data.listing import printable
from lightly_ext.data.reading import read_image
from lightly_ext.randomness import mix_seeds
from stellar_plugin.wording import are, counted

# Where so many are tried and none is readable, something else is wrong.
_PATIENCE = 100
_READABLE, _UNREADABLE = 1, 2


class ImageDataset(Dataset[tuple[Any, int]]):
    """Images by their numbers, wherever they lie.

    An image that cannot be read, or that the transform fails on, does not end the
    training: the next readable one takes its place, a warning names it, and it is
    not tried again, by no worker of the process. When more than 5 % of the images are
    unreadable (and more than 100), or all of them, or the first 100, reading raises an
    error: then something else is wrong.

    Attributes:
        path:
            Folder that all of it lies below.
        transform:
            Called with every image, a uint8 RGB tensor with shape (3, H, W). None
            returns the image.
        max_pixels:
            Images with more pixels are unreadable.
        classes:
            Sorted names of the classes; empty without labels.
        labels:
            int64 tensor with shape (len(self),), the class of every image, or None.

    """

    path: Path

    def __init__(
        self,
        num_images: int,
        transform: Callable[[Tensor], Any] | None,
        max_pixels: int,
    ) -> None:
        self.transform = transform
        self.max_pixels = max_pixels
        self.classes: list[str] = []
        self.labels: Tensor | None = None
        self._states = torch.zeros(
            num_images, dtype=torch.uint8, device="cpu"
        ).share_memory_()

    @abstractmethod
    def file(self, index: int) -> Path:
        """Returns the path of an image; within a shard, behind that of the shard."""

    @abstractmethod
    def files(self) -> Iterator[tuple[bytes, int]]:
        """Yields the names below `path` and the sizes of what is on disk.

        A file that is gone has the size -1.
        """

    @property
    def location(self) -> str:
        """Where the images are, for the record of a run."""
        return str(self.path.resolve())

    def spread(self, count: int) -> Iterator[bytes | Path]:
        """Yields `encoded` of images spread evenly over all, at most so many."""
        return map(self.encoded, range(0, len(self), -(-len(self) // count)))

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Tells other sets of images from this one."""

    @abstractmethod
    def encoded(self, index: int) -> bytes | Path:
        """Returns what is in the file of an image, or the file.

        Raises:
            OSError: If more than this image cannot be read.
        """

    def order(self, seed: int, epoch: int) -> Tensor:
        """Order of the images in an epoch, int64 with shape (len(self),)."""
        return epoch_order(len(self), seed, epoch)

    def read_ahead(
        self, numbers: Sequence[int], seed: int, epoch: int
    ) -> Iterator[bytes | Path | Exception | None]:
        """Yields what the workers get of images of an epoch, in the order of `order`.

        None for images that the workers read themselves. What was raised comes last.
        """
        return repeat(None, len(numbers))

    def __len__(self) -> int:
        """Returns the number of images, unreadable ones included."""
        return len(self._states)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """Reads an image, or the next readable one; see `read`."""
        return self.read(index)

    def read(
        self, index: int, encoded: bytes | Path | Exception | None = None
    ) -> tuple[Any, int]:
        """Reads an image, or the next readable one.

        Args:
            index:
                Number of the image, 0 <= index < len(self).
            encoded:
                Its `encoded`, if that is known, or what was raised instead.

        Returns:
            Tuple of the transformed image, and its class or its index.

        Raises:
            IndexError: If there is no such image.
            RuntimeError: If too many images are unreadable.
            Exception: If it was raised instead.

        """
        if isinstance(encoded, Exception):
            raise encoded
        if not 0 <= index < len(self):
            raise IndexError(f"There is no image {index} among {len(self)}.")
        image, index = self._read_next(index, encoded)
        return image, index if self.labels is None else int(self.labels[index])

    @property
    def unreadable(self) -> Tensor:
        """Whether each image was found unreadable, by any worker of this process."""
        return self._states == _UNREADABLE

    @property
    def num_unreadable(self) -> int:
        """Number of files found unreadable so far, by all workers of this process."""
        return int(self.unreadable.sum())

    def unreadable_files(self) -> list[Path]:
        """Returns the files found unreadable so far, by all workers of this process."""
        return [self.file(int(index)) for index in self.unreadable.nonzero()]

    def _read_next(self, index: int, encoded: bytes | Path | None) -> tuple[Any, int]:
        draws = torch.get_rng_state()
        for offset in range(len(self)):
            candidate = (index + offset) % len(self)
            if self._states[candidate] == _UNREADABLE:
                continue
            if encoded is None or offset:
                encoded = self.encoded(candidate)
            try:
                image = self._decoded(encoded)
            except Exception as error:  # decoders raise anything on broken files
                self._note_unreadable(candidate, error)
                # As if it had been known: a transform may have drawn and failed then.
                torch.set_rng_state(draws)
            else:
                self._states[candidate] = _READABLE
                return image, candidate
        raise RuntimeError(
            f"None of the {counted(len(self), 'image')} below {printable(self.path)} "
            "is readable."
        )

    def _decoded(self, encoded: bytes | Path) -> Any:
        image = read_image(encoded, self.max_pixels)
        return image if self.transform is None else self.transform(image)

    def _note_unreadable(self, index: int, error: Exception) -> None:
        self._states[index] = _UNREADABLE
        text = printable(f"{self.file(index)} ({type(error).__name__}: {error})")
        count, size = self.num_unreadable, len(self)
        found = bool((self._states == _READABLE).any())
        tolerated = max(_PATIENCE, size // 20) if found else _PATIENCE
        if count > min(size - 1, tolerated):
            raise RuntimeError(
                f"{count} of {counted(size, 'image')} below {printable(self.path)} "
                f"{are(count)} unreadable{'' if found else ', and none was readable'}: "
                f"too many to go on. The last one is {text}. Is the folder complete "
                "and reachable? Remove or repair the files that the warnings name."
            ) from error
        warnings.warn(f"Skipping unreadable image {text}.", stacklevel=5)


def epoch_order(num_images: int, seed: int, epoch: int) -> Tensor:
    """Random order of the images in an epoch, int64 with shape (num_images,)."""
    generator = torch.Generator().manual_seed(mix_seeds(seed, epoch))
    return torch.randperm(num_images, generator=generator)
