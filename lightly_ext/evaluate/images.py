"""Images to evaluate on: files with labels, read once, never replaced by others."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import InterpolationMode, v2

from lightly_ext.data import list_images, printable, read_image
from lightly_ext.data.streams import ImageTable
from stellar_plugin.image_conversion import cut_ends
from stellar_plugin.protocols import CropProtocol, RandomCropProtocol

_EXIF_ORIENTATION = 274
_EXIF_TURNED = (5, 6, 7, 8)


class Rows(NamedTuple):
    """Some images of a table, in an order.

    Attributes:
        table: The table.
        numbers: Numbers of the images in it.
    """

    table: ImageTable
    numbers: Sequence[int]


@dataclass(frozen=True)
class ImageFiles:
    """Image files, or images of a table, with a class for each or without.

    Attributes:
        root:
            Folder of the images. Of a table its name, for messages alone.
        names:
            Paths relative to the folder, or names in the table.
        labels:
            Class of each image, None without labels.
        classes:
            Names of the classes, empty without labels.
        rows:
            Where the images are in a table, None for files.
    """

    root: Path
    names: Sequence[str]
    labels: Sequence[int] | None = None
    classes: Sequence[str] = ()
    rows: Rows | None = None

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, chosen: Sequence[int]) -> ImageFiles:
        """Some of the images, by their numbers."""
        labels, rows = self.labels, self.rows
        return replace(
            self,
            names=[self.names[i] for i in chosen],
            labels=None if labels is None else [labels[i] for i in chosen],
            rows=rows and Rows(rows.table, [rows.numbers[i] for i in chosen]),
        )

    def source(self, index: int) -> Path | bytes:
        """An image as `read_image` takes it.

        Raises:
            OSError: If it is gone from its table.
        """
        if self.rows is None:
            return self.root / self.names[index]
        return self.rows.table.read(self.rows.numbers[index])

    def shown(self, index: int) -> str:
        """Where an image is, in one line."""
        if self.rows is None:
            return printable(self.root / self.names[index])
        return printable(self.rows.table.shown(self.rows.numbers[index]))

    def require_files(self, why: str) -> None:
        """Checks that the images are files in a folder.

        Raises:
            ValueError: If they are not.
        """
        if self.rows is not None:
            raise ValueError(
                f"{why}, but those of '{self.root}' are none: unpack them into a "
                "folder (tar xf) and name that."
            )

    def limited(self, limit: int | None) -> ImageFiles:
        """At most `limit` images, spread evenly over the list and so over classes."""
        if limit is None or limit >= len(self):
            return self
        return self[[i * len(self) // limit for i in range(limit)]]

    @property
    def label_tensor(self) -> Tensor:
        """Labels, int64 with shape (len(self),).

        Raises:
            ValueError: If there are none.
        """
        if self.labels is None:
            raise ValueError(f"The images in '{self.root}' have no labels.")
        return torch.tensor(self.labels, dtype=torch.int64)


class Sample(NamedTuple):
    """One image, or what stands for an unreadable one.

    Attributes:
        image: uint8 tensor with shape (3, crop, crop), black if unreadable.
        number: Number of the image in the list.
        readable: Whether the file could be read.
        size: Height and width of the whole image in px, int64, zeros if unreadable.
    """

    image: Tensor
    number: int
    readable: bool
    size: Tensor


class EvaluationImages(Dataset[Sample]):
    """Image files, cut by a transform. An unreadable one is marked, not replaced.

    Attributes:
        files: The files.
        transform: Maps a uint8 RGB tensor (3, H, W) to one of a fixed size.
    """

    def __init__(
        self, files: ImageFiles, transform: Callable[[Tensor], Tensor]
    ) -> None:
        self.files = files
        self.transform = transform

    def __len__(self) -> int:
        """Returns the number of files, unreadable ones included."""
        return len(self.files)

    def __getitem__(self, index: int) -> Sample:
        """Reads an image.

        Raises:
            IndexError: If there is no such image.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"There is no image {index} among {len(self)}.")
        try:
            image = read_image(self.files.source(index))
            size = torch.tensor(image.shape[1:])
            return Sample(self.transform(image), index, True, size)
        except Exception:  # decoders raise anything; a wrong transform raises again
            blank = torch.zeros(3, 8, 8, dtype=torch.uint8)
            return Sample(self.transform(blank), index, False, torch.zeros(2).long())


def seen_size(source: Path | bytes) -> tuple[int, int] | None:
    """Height and width of an image as it is seen, by the head of its file.

    Args:
        source:
            The file, or what is in one.

    Returns:
        The size in px after the EXIF orientation; None if the file is no image.
    """
    try:
        file = io.BytesIO(source) if isinstance(source, bytes) else source
        with Image.open(file) as image:
            width, height = image.size
            turned = image.getexif().get(_EXIF_ORIENTATION) in _EXIF_TURNED
    except Exception:  # decoders raise anything on broken files
        return None
    return (width, height) if turned else (height, width)


def folder_images(folder: Path | str) -> ImageFiles:
    """All images below a folder, without labels.

    Raises:
        ValueError: If there is no such folder, or no image in it.
    """
    return ImageFiles(Path(folder), list_images(Path(folder)))


def centre_crop(protocol: CropProtocol, interpolation: str) -> v2.Transform:
    """Resizes the shorter side and cuts out the centre, as a protocol says.

    Args:
        protocol:
            Says `resize` and `crop`.
        interpolation:
            "bicubic" or "bilinear", of the model.
    """
    mode = InterpolationMode(interpolation)
    resize = v2.Resize(protocol.resize, mode, antialias=True)
    return v2.Compose([cut_ends, resize, v2.CenterCrop(protocol.crop)])


def train_crop(protocol: RandomCropProtocol, interpolation: str) -> v2.Transform:
    """Cuts randomly and flips half of the images, as a protocol says.

    Args:
        protocol:
            Says `crop` and `train_scale`.
        interpolation:
            "bicubic" or "bilinear", of the model.
    """
    mode = InterpolationMode(interpolation)
    crop = v2.RandomResizedCrop(
        protocol.crop, protocol.train_scale, interpolation=mode, antialias=True
    )
    return v2.Compose([crop, v2.RandomHorizontalFlip()])
