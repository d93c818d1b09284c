"""A folder of labelled photos with a box each, decoded once into memory."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lightly_ext.data.reading import read_image
from lightly_ext.data.views import SingleViewTransform

TUNING_SHARE = 0.2


class Photos(NamedTuple):
    """Photos of one size.

    Attributes:
        images:
            uint8 tensor with shape (N, 3, S, S).
        labels:
            Class indices, int64 with shape (N,).
        boxes:
            Float tensor with shape (N, 4): left, top, right and bottom edge in px of
            `images`; NaN where there is no box.
    """

    images: Tensor
    labels: Tensor
    boxes: Tensor

    def select(self, index: Tensor) -> Photos:
        """Some of the photos, by their numbers or a mask."""
        return Photos(*(part[index] for part in self))

    def to(self, device: str) -> Photos:
        """The photos on a device."""
        return Photos(*(part.to(device) for part in self))


class PhotoSets(NamedTuple):
    """What is learned from, and what is scored."""

    train: Photos
    test: Photos

    @property
    def sha256(self) -> str:
        """Hash of the images and labels to learn from."""
        parts = (part.numpy().tobytes() for part in self.train[:2])
        return hashlib.sha256(b"".join(parts)).hexdigest()


def load_sets(folder: Path, size: int, tuning: bool) -> PhotoSets:
    """Reads `train/CLASS/*`, `val/CLASS/*` and `boxes.csv`.

    Args:
        folder:
            Folder with the three.
        size:
            Side in px that photos are resized (the shorter side) and cropped to.
        tuning:
            If True, `val` is not read, and the last fifth of each class of `train`
            takes its place.

    Raises:
        FileNotFoundError: If there is no photo of a set.
        ValueError: If the classes of the sets differ.
    """
    boxes = read_boxes(folder / "boxes.csv")
    names, train = _load(folder, "train", size, boxes)
    if tuning:
        return split_tuning(train)
    val_names, val = _load(folder, "val", size, boxes)
    if names != val_names:
        raise ValueError(
            f"The class folders of {folder}/train and {folder}/val differ: "
            f"{sorted(set(names) ^ set(val_names))}."
        )
    return PhotoSets(train, val)


def split_tuning(photos: Photos, share: float = TUNING_SHARE) -> PhotoSets:
    """Splits the last share of each class off, in the order of the photos."""
    held_out = torch.zeros(len(photos.labels), dtype=torch.bool)
    for label in photos.labels.unique():
        numbers = (photos.labels == label).nonzero()[:, 0]
        held_out[numbers[len(numbers) - round(share * len(numbers)) :]] = True
    return PhotoSets(photos.select(~held_out), photos.select(held_out))


def read_boxes(path: Path) -> dict[str, tuple[float, float, float, float]]:
    """Boxes by file; edges in px of the file, right and bottom behind the last px."""
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        return {
            row["file"]: (
                float(row["x0"]),
                float(row["y0"]),
                float(row["x1"]) + 1,
                float(row["y1"]) + 1,
            )
            for row in csv.DictReader(file)
        }


def _load(
    folder: Path,
    part: str,
    size: int,
    boxes: dict[str, tuple[float, float, float, float]],
) -> tuple[list[str], Photos]:
    classes = sorted(path for path in (folder / part).glob("*") if path.is_dir())
    files = [(path, i) for i, name in enumerate(classes) for path in _files(name)]
    if not files:
        raise FileNotFoundError(
            f"There are no photos in {folder / part}/CLASS/: name a folder with "
            "train/CLASS/*.jpg and val/CLASS/*.jpg."
        )
    resize = SingleViewTransform(size)
    images = torch.empty(len(files), 3, size, size, dtype=torch.uint8)
    edges = torch.full((len(files), 4), torch.nan)
    for number, (path, _) in enumerate(files):
        image = read_image(path)
        images[number] = resize(image)
        box = boxes.get(path.relative_to(folder).as_posix())
        if box is not None:
            height, width = image.shape[-2:]
            edges[number] = _moved(box, height, width, size)
    labels = torch.tensor([label for _, label in files])
    return [path.name for path in classes], Photos(images, labels, edges)


def _files(folder: Path) -> Iterable[Path]:
    return sorted(path for path in folder.iterdir() if path.is_file())


def _moved(
    box: tuple[float, float, float, float], height: int, width: int, size: int
) -> Tensor:
    """Box in the resized and cropped photo."""
    scale = size / min(height, width)
    left, top = (scale * width - size) / 2, (scale * height - size) / 2
    shift = torch.tensor([left, top, left, top])
    return (scale * torch.tensor(box) - shift).clamp(0, size)
