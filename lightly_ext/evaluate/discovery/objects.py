"""The objects of images: instances and classes of their px, and boxes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightly_ext.evaluate.boxes import CropPlace, box_areas
from lightly_ext.evaluate.images import EvaluationImages, ImageFiles, centre_crop
from lightly_ext.evaluate.masks import LabelValues, label_crop, read_mask
from stellar_plugin.protocols import CropProtocol

# Of all labels here: those of objects are above.
BACKGROUND, IGNORED = 0, -1

# Instances and classes of the px of an image, int32 with shape (0 to 2, height, width),
# of its number and its height and width.
Labels = Callable[[int, tuple[int, int]], Tensor]


class ObjectSample(NamedTuple):
    """One image with its objects, or what stands for an unreadable one.

    Attributes:
        image: uint8 tensor with shape (3, crop, crop).
        labels: Instances and, where they are told, classes, int32 with shape (0 to 2,
            crop, crop): `BACKGROUND`, `IGNORED`, or more.
        number: Number of the image in the list.
        readable: Whether all of its files could be read.
        size: Height and width of the whole image in px, int64.
    """

    image: Tensor
    labels: Tensor
    number: int
    readable: bool
    size: Tensor


class ObjectImages(Dataset[ObjectSample]):
    """Image files and the labels of their px, resized and cut in the same way.

    Args:
        files:
            The images.
        labels:
            Reads the labels of an image; None if there are none.
        num_labels:
            Number of label maps of an image, 0 to 2.
        protocol:
            Says `resize` and `crop`.
        interpolation:
            How images are resized, "bicubic" or "bilinear"; labels are always nearest.
    """

    def __init__(
        self,
        files: ImageFiles,
        labels: Labels | None,
        num_labels: int,
        protocol: CropProtocol,
        interpolation: str,
    ) -> None:
        self.files = files
        self.labels = labels
        self.num_labels = num_labels
        self.images = EvaluationImages(files, centre_crop(protocol, interpolation))
        self.cut = label_crop(protocol)

    def __len__(self) -> int:
        """Returns the number of images, unreadable ones included."""
        return len(self.files)

    def __getitem__(self, index: int) -> ObjectSample:
        """Reads an image and its labels."""
        image, number, readable, size = self.images[index]
        labels = torch.zeros(self.num_labels, *image.shape[1:], dtype=torch.int32)
        if readable and self.labels is not None:
            try:
                height, width = size.tolist()
                labels = self.cut(self.labels(index, (height, width)))
            except OSError:  # a broken file; what is wrong with labels is raised
                readable = False
        return ObjectSample(image, labels, number, readable, size)


@dataclass(frozen=True)
class LabelImages:
    """Labels from label images.

    Attributes:
        instances: The file of each image.
        classes: The same, None where classes are not told.
        values: Which values are no objects.
    """

    instances: Sequence[Path]
    classes: Sequence[Path] | None
    values: LabelValues

    def __call__(self, number: int, size: tuple[int, int]) -> Tensor:
        """Reads the labels of an image."""
        paths = [self.instances[number]]
        paths += [] if self.classes is None else [self.classes[number]]
        try:
            masks = [read_mask(path) for path in paths]
        except Exception as error:  # decoders raise anything on broken files
            raise OSError(f"{paths} cannot be read: {error}") from error
        return torch.stack([self._known(mask) for mask in masks])

    def _known(self, mask: Tensor) -> Tensor:
        labels = mask + 1
        for values, known in (
            (self.values.background, BACKGROUND),
            (self.values.ignore, IGNORED),
        ):
            labels[torch.isin(mask, torch.tensor(values, dtype=mask.dtype))] = known
        return labels


@dataclass(frozen=True)
class CocoLabels:
    """Labels from COCO's annotations; px of crowds and of two objects are ignored.

    Attributes:
        annotations: Those of each image, see `check_object`.
        source: Where they were read, for errors.
    """

    annotations: Sequence[Sequence[Mapping[str, Any]]]
    source: str

    def __call__(self, number: int, size: tuple[int, int]) -> Tensor:
        """Draws the labels of an image."""
        labels = torch.full((2, *size), BACKGROUND, dtype=torch.int32)
        covered = torch.zeros(size, dtype=torch.int32)
        for instance, annotation in enumerate(self.annotations[number], start=1):
            mask = torch.from_numpy(decode_mask(annotation, size, self.source))
            crowd = bool(annotation.get("iscrowd"))
            covered += 2 * mask if crowd else mask
            labels[0][mask] = instance
            labels[1][mask] = annotation["category_id"] + 1
        labels[:, covered > 1] = IGNORED
        return labels


def check_object(annotation: Mapping[str, Any], source: str) -> None:
    """Checks that an annotation of COCO has a class and a mask, without drawing it.

    Args:
        annotation:
            What is checked.
        source:
            Where it was read, for errors.

    Raises:
        ValueError: If it has not both.
    """
    name = f"Annotation {annotation.get('id')} of '{source}'"
    category = annotation.get("category_id")
    if type(category) is not int or category < 0:
        raise ValueError(
            f"{name} has the `category_id` {category!r}: classes are integers, 0 or "
            "more."
        )
    if not annotation.get("segmentation"):
        raise ValueError(
            f"{name} has no `segmentation`, so no mask. Files of boxes alone are named "
            "with --boxes, without --masks."
        )


def decode_mask(
    annotation: Mapping[str, Any], size: tuple[int, int], source: str
) -> np.ndarray:
    """Px of an object of COCO: polygons, or runs, as pycocotools draws them.

    Args:
        annotation:
            Has `segmentation`.
        size:
            Height and width of the image.
        source:
            Where it was read, for errors.

    Returns:
        bool array with shape `size`.

    Raises:
        ValueError: If it has no mask of that size.
    """
    coco = pycocotools_mask()
    mask: Any = annotation.get("segmentation")
    try:
        if isinstance(mask, list):
            runs = coco.merge(coco.frPyObjects(mask, *size))
        elif isinstance(mask["counts"], list):
            runs = coco.frPyObjects(mask, *size)
        else:
            runs = mask
        drawn = coco.decode(runs).astype(bool)
    except Exception as error:  # pycocotools raises anything on what it cannot read
        raise ValueError(
            f"Annotation {annotation.get('id')} of '{source}' has no `segmentation` of "
            f"polygons or runs: {type(error).__name__}, {error}."
        ) from error
    if drawn.shape != size:
        raise ValueError(
            f"The mask of annotation {annotation.get('id')} of '{source}' is "
            f"{drawn.shape[1]} x {drawn.shape[0]} px, its image {size[1]} x {size[0]}."
        )
    return drawn


def boxes_in_crop(boxes: Tensor, size: Tensor, protocol: CropProtocol) -> Tensor:
    """What a crop shows of boxes of its image; those beside it are left out.

    Args:
        boxes:
            Edges in px of the image with shape (n, 4).
        size:
            Height and width of the image in px, with shape (2,).
        protocol:
            Says `resize` and `crop`.

    Returns:
        Edges in px of the crop, float64 with shape (n or fewer, 4).
    """
    height, width = size.tolist()
    cut = CropPlace.of(height, width, protocol).to_crop(boxes).clamp(0, protocol.crop)
    return cut[box_areas(cut) > 0]


def pycocotools_mask() -> Any:
    """The module that draws COCO's masks, which only some runs need."""
    try:
        from pycocotools import mask
    except ModuleNotFoundError as error:
        raise RuntimeError(
            "Masks of COCO's JSON are drawn by the package 'pycocotools': pip install "
            "'stellar-plugin[eval]'"
        ) from error
    return mask
