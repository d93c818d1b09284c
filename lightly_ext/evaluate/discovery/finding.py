"""Finds the objects of images in the files that a user names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from lightly_ext.evaluate.annotations import find_boxes, read_coco
from lightly_ext.evaluate.discovery.objects import (
    BACKGROUND,
    CocoLabels,
    LabelImages,
    Labels,
    ObjectSample,
    boxes_in_crop,
    check_object,
    pycocotools_mask,
)
from lightly_ext.evaluate.discovery.scores import part_boxes
from lightly_ext.evaluate.images import ImageFiles
from lightly_ext.evaluate.masks import LabelValues, check_values, find_masks
from stellar_plugin.protocols import CropProtocol

# Scores by what they need.
OF_INSTANCES, OF_CLASSES = ("mbo_i", "fg_ari"), ("mbo_c",)
OF_BOXES = ("corloc", "corloc_oracle")


class Objects(NamedTuple):
    """The objects of all images, as a user names them.

    Attributes:
        labels: Reads labels of px, None if there are boxes alone.
        num_labels: 2 with classes, 1 without, 0 for boxes alone.
        boxes: Edges of each image in px, None to take those around its instances.
        meaning: How they were read, for the card.
        files: Folder and names of all files that were read, by what they are.
    """

    labels: Labels | None
    num_labels: int
    boxes: Sequence[Tensor] | None
    meaning: str
    files: dict[str, ImageFiles]

    @property
    def scores(self) -> list[str]:
        """Names of the scores that they allow."""
        of_labels = [(), OF_INSTANCES, (*OF_INSTANCES, *OF_CLASSES)][self.num_labels]
        return [*of_labels, *OF_BOXES]


def find_objects(
    files: ImageFiles,
    masks: str | None,
    class_masks: str | None,
    boxes: str | None,
    values: LabelValues,
) -> Objects:
    """Finds the objects of images; which options say what, `run_discover` tells.

    Args:
        files:
            The images.
        masks:
            Folder of label images, or JSON file of COCO.
        class_masks:
            Folder of label images.
        boxes:
            JSON file of COCO, or CSV.
        values:
            Which values of label images are no objects.

    Raises:
        FileNotFoundError: If a file is not there.
        ValueError: If nothing is named, or files and images do not fit.
        RuntimeError: If the package is missing that draws COCO's masks.
    """
    objects = _masks(files, masks, class_masks, values)
    if masks is None and boxes is None:
        raise ValueError(
            "There is nothing to compare with: name masks with --masks, a folder of "
            "label images or a JSON file of COCO, or boxes with --boxes."
        )
    if boxes is None:
        return objects
    return objects._replace(
        boxes=find_boxes(files, boxes),
        meaning="; ".join(filter(None, [objects.meaning, "boxes of a file"])),
        files={**objects.files, "boxes": _one_file(boxes)},
    )


def true_boxes(
    sample: ObjectSample, objects: Objects, protocol: CropProtocol
) -> Tensor:
    """Boxes of the objects of an image, float64 (n, 4) in px of the crop."""
    if objects.boxes is not None:
        boxes = objects.boxes[int(sample.number)]
        return boxes_in_crop(boxes, sample.size, protocol)
    values, instances = sample.labels[0].unique(return_inverse=True)
    return part_boxes(instances, len(values))[values > BACKGROUND]


def _masks(
    files: ImageFiles, masks: str | None, class_masks: str | None, values: LabelValues
) -> Objects:
    if masks is None:
        if class_masks is not None:
            raise ValueError("--class_masks needs --masks, which tell the instances.")
        return Objects(None, 0, None, "", {})
    if masks.lower().endswith(".json"):
        return _coco_masks(files, masks, class_masks)
    found = find_masks(files, masks)
    check_values(found, values)
    inputs = {"masks": _below(masks, found)}
    of_classes = None
    if class_masks is not None:
        of_classes = find_masks(files, class_masks)
        check_values(of_classes, values)
        inputs["class_masks"] = _below(class_masks, of_classes)
    labels = LabelImages(found, of_classes, values)
    meaning = f"instances of label images: {values}"
    return Objects(labels, len(inputs), None, meaning, inputs)


def _coco_masks(files: ImageFiles, masks: str, class_masks: str | None) -> Objects:
    if class_masks is not None:
        raise ValueError(
            f"'{masks}' tells the classes itself: leave --class_masks out."
        )
    annotations = read_coco(files, masks)
    if all(a.get("iscrowd") for of_image in annotations for a in of_image):
        raise ValueError(
            f"'{masks}' has no object of the images in '{files.root}' that is no crowd."
        )
    for of_image in annotations:
        for annotation in of_image:
            check_object(annotation, masks)
    pycocotools_mask()
    labels = CocoLabels(annotations, masks)
    return Objects(labels, 2, None, "instances of COCO", {"masks": _one_file(masks)})


def _below(folder: str, paths: Sequence[Path]) -> ImageFiles:
    return ImageFiles(Path(folder), [str(path.relative_to(folder)) for path in paths])


def _one_file(path: str) -> ImageFiles:
    return ImageFiles(Path(path).parent, [Path(path).name])
