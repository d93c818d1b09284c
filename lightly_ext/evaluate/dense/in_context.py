"""Segmentation by the nearest patches of labelled images: nothing is trained."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from lightly_ext.durable import replacing
from lightly_ext.evaluate.dense.bank import (
    Bank,
    Neighbours,
    build_bank,
    patch_features,
)
from lightly_ext.evaluate.dense.label_maps import LabelledImages, SegmentationSet
from lightly_ext.evaluate.dense.labels import find_segmentation_set
from lightly_ext.evaluate.dense.matching import match_scores
from lightly_ext.evaluate.devices import Devices
from lightly_ext.evaluate.frozen_model import FrozenModel
from lightly_ext.evaluate.options import check_positive
from lightly_ext.evaluate.pictures.gallery import draw_rows
from lightly_ext.evaluate.reduction import count_unreadable, reduce_sum
from lightly_ext.evaluate.result import Result
from lightly_ext.evaluate.results import Results, evaluation
from lightly_ext.metrics import check_knn_options
from stellar_plugin.protocols import IN_CONTEXT, InContextProtocol
from stellar_plugin.visualize import to_pictures, token_palette

# Features that each patch has.
FEATURES = ("dense", "lowrank")
PATCHES = "patches in the bank"
NUM_PICTURES = 6


def check_in_context(
    results: Results,
    data: str,
    features: str,
    bank: int,
    neighbours: int,
    temperature: float,
) -> SegmentationSet:
    """Finds the data set; see `Results.required`."""
    if features not in FEATURES:
        raise ValueError(f"features must be dense or lowrank, got '{features}'.")
    check_positive(bank=bank)
    check_knn_options(neighbours, temperature, bank, PATCHES)
    return find_segmentation_set(data).limited(results.limit)


@evaluation
def run_in_context(
    model: FrozenModel,
    devices: Devices,
    results: Results,
    data: str,
    features: str = IN_CONTEXT.features,
    bank: int = IN_CONTEXT.bank,
    neighbours: int = IN_CONTEXT.neighbours,
    temperature: float = IN_CONTEXT.temperature,
) -> Result:
    """Segments images by the labels of the nearest patches of training images.

    Args:
        model:
            What is evaluated.
        devices:
            Where it runs.
        results:
            Where results, and the bank of patches, are kept.
        data:
            Folder with `images/train`, `images/val`, `masks/train` and `masks/val`: one
            integer per px is the class, 255 is ignored. Or the NAME of a known set
            where mmsegmentation has it below data/, or NAME:FOLDER: voc, voc-aug,
            ade20k, cityscapes, cityscapes27, cocostuff27.
        features:
            Features of the patches: dense, or lowrank (the product of localization and
            tokens).
        bank:
            Most patches of training images that are kept; fewer where there are fewer.
        neighbours:
            Number of kept patches that tell the classes of a patch.
        temperature:
            Temperature of their weights.

    Returns:
        The result, which is stored too; see `stellar_plugin.protocols.IN_CONTEXT`.

    Raises:
        ValueError: If an option is impossible, there are fewer patches than neighbours,
            or images and label maps do not fit.
        RuntimeError: If too many images are unreadable, no px has a class, or features
            are not finite.
    """
    found = results.required(check_in_context)
    train, test, classes = found.train, found.test, found.classes
    model.resolve_feature(features)
    protocol = results.protocol(
        model,
        IN_CONTEXT,
        data=found.name,
        features=features,
        classes=str(found.values),
        num_classes=len(classes),
        bank=bank,
        neighbours=neighbours,
        temperature=temperature,
    )
    devices.say(
        f"{found.name}: {len(train)} training images, {len(test)} test images, "
        f"{len(classes)} classes."
    )
    results.announce(model, protocol)
    built = build_bank(model, devices, results, train, protocol)
    if not len(built):
        raise RuntimeError(
            "No px of the training images has a class: all are ignored, so the bank "
            "has no patch."
        )
    check_knn_options(neighbours, temperature, len(built), PATCHES)
    unseen = [name for name, has in zip(classes, built.classes, strict=True) if not has]
    if unseen:
        devices.say(f"No patch has a px of: {', '.join(unseen)}.")
    segmenter = Segmenter(
        model, devices, built, protocol, model.map_size(protocol.crop)
    )
    counts, num_unreadable = _count(segmenter, test)
    scores = match_scores(counts, torch.arange(len(classes)))
    chance = match_scores(counts.sum(dim=0)[None], built.px.argmax()[None])
    result = results.result(
        model,
        "in-context",
        found.name,
        protocol,
        {
            "mIoU": scores.miou,
            "aAcc": scores.accuracy,
            "num_test": len(test) - num_unreadable,
            "num_patches": len(built),
        },
        {"data": results.fingerprint(train.files, train.maps, test.files, test.maps)},
        {"mIoU": chance.miou, "aAcc": chance.accuracy},
        class_iou=dict(zip(classes, scores.ious.tolist(), strict=True)),
        not_in_bank=unseen,
        num_train=len(train) - built.num_unreadable,
        num_reused=built.num_reused,
        unreadable={"train": built.num_unreadable, "test": num_unreadable},
    )
    folder = results.save(result)
    if devices.rank == 0:
        _save_picture(folder / "in_context.png", segmenter, test)
    return result


def confusion(predicted: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Px of each predicted class with each label.

    Args:
        predicted:
            Classes, int64 of any shape.
        labels:
            Classes of the same px; px of negative ones count nowhere.
        num_classes:
            Number of classes.

    Returns:
        Counts, int64 with shape (num_classes, num_classes): predictions by labels.
    """
    valid = labels >= 0
    pairs = num_classes * predicted[valid] + labels[valid]
    counts = torch.bincount(pairs, minlength=num_classes**2)
    return counts.view(num_classes, num_classes)


@dataclass(frozen=True)
class Segmenter:
    """Tells the class at each px of images by the bank.

    Attributes:
        model:
            What computes features.
        devices:
            Where it runs.
        bank:
            The bank.
        protocol:
            Says which features, how many neighbours and at which temperature.
        grid:
            Rows and columns of patches.
    """

    model: FrozenModel
    devices: Devices
    bank: Bank
    protocol: InContextProtocol
    grid: tuple[int, int]

    def cut(self, images: LabelledImages) -> Any:
        """Images and label maps as the model gets them."""
        return images.cut(self.protocol, self.model.origin.interpolation)

    def __call__(self, images: Tensor) -> Tensor:
        """Classes at px.

        Args:
            images:
                uint8 tensor with shape (batch_size, 3, crop, crop).

        Returns:
            Classes, int64 on the CPU with shape (batch_size, crop, crop); of equal
            shares the first class.
        """
        feature = self.protocol.features
        patches = patch_features(self.model, self.devices, images, feature)
        found = self.bank.nearest(patches, self.protocol.neighbours)
        return torch.stack([self._classes(neighbours) for neighbours in found])

    def _classes(self, found: Neighbours) -> Tensor:
        """Classes at the px of an image, by the neighbours of its patches."""
        weights = found.similarities.double() / self.protocol.temperature
        of_each = self.bank.shares(found.rows)
        shares = torch.einsum("pk,pkc->pc", weights.softmax(dim=1), of_each).float()
        maps = shares.to(self.devices.device).T.unflatten(1, self.grid)[None]
        size = (self.protocol.crop, self.protocol.crop)
        maps = F.interpolate(maps, size, mode="bilinear", align_corners=False)
        return maps[0].argmax(dim=0).cpu()


def _count(segmenter: Segmenter, images: LabelledImages) -> tuple[Tensor, int]:
    """Confusion over all test images; unreadable images of all processes."""
    num_classes, devices = len(images.values), segmenter.devices
    loader: Any = devices.loader(segmenter.cut(images))
    counts = torch.zeros(num_classes, num_classes, dtype=torch.int64)
    unreadable: list[int] = []
    for batch in devices.progress(loader, "in-context", len(loader)):
        unreadable += batch.number[~batch.readable].tolist()
        labels = images.classes(batch)
        counts += confusion(segmenter(batch.image), labels, num_classes)
    num_unreadable = count_unreadable(devices, images.files, unreadable)
    counts = reduce_sum(devices, counts)
    if not counts.any():
        raise RuntimeError("No px of the test images has a class: all are ignored.")
    return counts, num_unreadable


def _save_picture(path: Path, segmenter: Segmenter, images: LabelledImages) -> None:
    """Rows: images, their labels, the classes that neighbours tell."""
    count, cut = min(NUM_PICTURES, len(images)), segmenter.cut(images)
    samples = [cut[i * len(images) // count] for i in range(count)]
    samples = [sample for sample in samples if sample.readable]
    if not samples:
        return
    pixels = torch.stack([sample.image for sample in samples])
    labels = images.values(torch.stack([sample.mask for sample in samples]))
    pictures = to_pictures(pixels / 255)
    rows = {
        "images": pictures,
        "labels": _coloured(labels, len(images.values)),
        "nearest patches": _coloured(segmenter(pixels), len(images.values)),
    }
    names = [images.files.names[sample.number] for sample in samples]
    legend = "A colour is a class, the same in both rows; ignored px are black."
    with replacing(path) as new:
        draw_rows(names, rows, legend).save(new, "png", optimize=True)


def _coloured(classes: Tensor, num_classes: int) -> NDArray[np.uint8]:
    """Classes with shape (..., height, width) as colours, ignored px black."""
    black = np.zeros((1, 3), dtype=np.uint8)
    palette = np.concatenate([black, token_palette(num_classes)])
    return palette[classes.numpy() + 1]
