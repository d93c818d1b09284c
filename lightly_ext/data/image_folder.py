"""A folder of images as a dataset that survives broken files."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from lightly_ext.transforms.image_conversion import to_uint8_rgb

EXTENSIONS = (
    *(".jpg", ".jpeg", ".png", ".bmp", ".webp"),
    *(".tif", ".tiff", ".gif", ".ppm"),
)

_JPEG_START = b"\xff\xd8\xff"


class ImageFolderDataset(Dataset[tuple[Any, int]]):
    """All images below a folder.

    The folder may be nested to any depth; symbolic links are followed; names that
    start with a dot are left out. The order is that of the sorted names, the same on
    every machine.

    An image that cannot be read does not end the training: the next readable one takes
    its place, a warning names the file, and it is not tried again, by no worker of the
    process. When more than 5 % of the images are unreadable (and more than 100), or all
    of them, reading raises an error: then something else is wrong.

    Attributes:
        path:
            The folder.
        transform:
            Called with every image, a uint8 RGB tensor with shape (3, H, W). None
            returns the image.
        labelled:
            Whether the first-level subfolders are classes, as in torchvision's
            ImageFolder. Samples then hold the class instead of the index.
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
    ) -> None:
        self.path = Path(path)
        self.transform = transform
        names = list_images(self.path)
        self.classes: list[str] = []
        self.labels: Tensor | None = None
        if labelled:
            self.classes, self.labels = _labels(self.path, names)
        # One array: a list of a million strings would be copied into every worker as
        # soon as their reference counts change.
        self._names = np.array([os.fsencode(name) for name in names])
        self._unreadable = torch.zeros(len(names), dtype=torch.uint8).share_memory_()

    def __len__(self) -> int:
        """Returns the number of images, unreadable ones included."""
        return len(self._names)

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
        label = index if self.labels is None else int(self.labels[index])
        return (image if self.transform is None else self.transform(image)), label

    @property
    def num_unreadable(self) -> int:
        """Number of files found unreadable so far, by all workers of this process."""
        return int(self._unreadable.sum())

    def unreadable_files(self) -> list[Path]:
        """Returns the files found unreadable so far, by all workers of this process."""
        return [self.file(int(index)) for index in self._unreadable.nonzero()]

    def file(self, index: int) -> Path:
        """Returns the path of an image."""
        return self.path / os.fsdecode(self._names[index])

    def _read_next(self, index: int) -> tuple[Tensor, int]:
        for offset in range(len(self)):
            candidate = (index + offset) % len(self)
            if self._unreadable[candidate]:
                continue
            try:
                return read_image(self.file(candidate)), candidate
            except Exception as error:  # decoders raise anything on broken files
                self._note_unreadable(candidate, error)
        raise RuntimeError(
            f"None of the {len(self)} images below {self.path} is readable."
        )

    def _note_unreadable(self, index: int, error: Exception) -> None:
        self._unreadable[index] = 1
        text = f"{self.file(index)} ({type(error).__name__}: {error})"
        count, size = self.num_unreadable, len(self)
        if count > min(size - 1, max(100, size // 20)):
            raise RuntimeError(
                f"{count} of {size} images below {self.path} are unreadable, too "
                f"many to go on. The last one is {text}. Is the folder complete and "
                "reachable? Remove or repair the files that the warnings name."
            ) from error
        warnings.warn(f"Skipping unreadable image {text}.", stacklevel=4)


def list_images(folder: Path) -> list[str]:
    """Lists the images below a folder.

    Args:
        folder:
            The folder, searched to any depth. Names that start with a dot are left out.

    Returns:
        Paths relative to the folder, each folder's entries in sorted order.

    Raises:
        ValueError: If the folder does not exist or holds no image.

    """
    if not folder.is_dir():
        raise ValueError(f"There is no folder {folder}.")
    names = list(_walk(str(folder), "", frozenset()))
    if not names:
        raise ValueError(
            f"There is no image below {folder}: no file name ends in "
            f"{', '.join(EXTENSIONS)}."
        )
    return names


def read_image(path: Path) -> Tensor:
    """Reads an image file of any format that torchvision or Pillow know.

    The EXIF orientation is applied, transparency is dropped, 16 bits become 8, of an
    animation the first frame is taken.

    Args:
        path:
            The file.

    Returns:
        uint8 RGB tensor with shape (3, H, W).

    Raises:
        Exception: Whatever the decoders raise when the file is broken.

    """
    with open(path, "rb") as file:
        is_jpeg = file.read(len(_JPEG_START)) == _JPEG_START
    if is_jpeg:
        data = torch.from_numpy(np.fromfile(path, dtype=np.uint8))
        # On large photos three times as fast as Pillow, which reads more kinds of
        # files; and torchvision announces the removal of its decoders.
        with contextlib.suppress(RuntimeError, AttributeError):
            return torchvision.io.decode_jpeg(
                data, mode="RGB", apply_exif_orientation=True
            )
    with Image.open(path) as image:
        return to_uint8_rgb(ImageOps.exif_transpose(image))


def _walk(
    folder: str, prefix: str, ancestors: frozenset[tuple[int, int]]
) -> Iterator[str]:
    status = os.stat(folder)
    identity = (status.st_dev, status.st_ino)
    if identity in ancestors:  # a link to a folder above itself
        return
    with os.scandir(folder) as iterator:
        entries = sorted(iterator, key=lambda entry: entry.name)
    for entry in entries:
        if entry.name.startswith("."):
            continue
        name = prefix + entry.name
        if entry.is_dir():
            yield from _walk(entry.path, name + "/", ancestors | {identity})
        elif entry.name.lower().endswith(EXTENSIONS):
            yield name


def _labels(folder: Path, names: list[str]) -> tuple[list[str], Tensor]:
    outside = next((name for name in names if "/" not in name), None)
    if outside is not None:
        raise ValueError(
            f"With labels every image lies in the subfolder of its class, but "
            f"{folder / outside} does not."
        )
    folders = [name.split("/", 1)[0] for name in names]
    classes = sorted(set(folders))
    numbers = {name: number for number, name in enumerate(classes)}
    return classes, torch.tensor([numbers[name] for name in folders])
