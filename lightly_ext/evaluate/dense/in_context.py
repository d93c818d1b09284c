"""Segmentation by the nearest patches of labelled images: nothing is trained."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

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
from lightly_ext.evaluate.reduction import count_unreadable, reduce_sum
from lightly_ext.evaluate.result import Result
from lightly_ext.evaluate.results import Results, evaluation
from lightly_ext.metrics import check_knn_options
from stellar_plugin.protocols import IN_CONTEXT, InContextProtocol


def check_in_context(
    results: Results, data: str, bank: int, neighbours: int, temperature: float
) -> SegmentationSet:
    """Finds the data set; see `Results.required`."""
    check_positive(bank=bank)
    check_knn_options(neighbours, temperature, bank)
    return find_segmentation_set(data).limited(results.limit)


@evaluation
def run_in_context(
    model: FrozenModel,
    devices: Devices,
    results: Results,
    data: str,
    features: Literal["dense", "lowrank"] = "dense",
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
        RuntimeError: If too many images are unreadable, or features are not finite.
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
    check_knn_options(neighbours, temperature, len(built))
    unseen = [name for name, has in zip(classes, built.classes, strict=True) if not has]
    if unseen:
        devices.say(f"No patch has a px of: {', '.join(unseen)}.")
    counts, num_unreadable = _count(model, devices, built, test, protocol)
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
    results.save(result)
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


def label_map(
    bank: Bank,
    found: Neighbours,
    grid: tuple[int, int],
    size: tuple[int, int],
    temperature: float,
) -> Tensor:
    """Classes at the px of an image, by the neighbours of its patches.

    Args:
        bank:
            The bank.
        found:
            Neighbours in it.
        grid:
            Rows and columns of patches.
        size:
            Height and width of the image in px.
        temperature:
            Temperature of the weights of neighbours.

    Returns:
        Classes, int64 with shape (height, width); of equal shares the first class.
    """
    weights = (found.similarities.double() / temperature).softmax(dim=1)
    shares = torch.einsum("pk,pkc->pc", weights, bank.shares(found.rows))
    maps = shares.T.unflatten(1, grid)[None].float()
    return F.interpolate(maps, size=size, mode="bilinear")[0].argmax(dim=0)


def _count(
    model: FrozenModel,
    devices: Devices,
    bank: Bank,
    images: LabelledImages,
    protocol: InContextProtocol,
) -> tuple[Tensor, int]:
    """Confusion over all test images; unreadable images of all processes."""
    num_classes, grid = len(images.values), model.map_size(protocol.crop)
    cut: Any = images.cut(protocol, model.origin.interpolation)
    loader: Any = devices.loader(cut)
    counts = torch.zeros(num_classes, num_classes, dtype=torch.int64)
    unreadable: list[int] = []
    for batch in devices.progress(loader, "in-context", len(loader)):
        unreadable += batch.number[~batch.readable].tolist()
        labels = images.classes(batch)
        patches = patch_features(model, devices, batch.image, protocol.features)
        found = bank.nearest(patches, protocol.neighbours)
        for neighbours, truth in zip(found, labels, strict=True):
            size = (truth.shape[0], truth.shape[1])
            maps = label_map(bank, neighbours, grid, size, protocol.temperature)
            counts += confusion(maps, truth, num_classes)
    num_unreadable = count_unreadable(devices, images.files, unreadable)
    counts = reduce_sum(devices, counts)
    if not counts.any():
        raise RuntimeError("No px of the test images has a class: all are ignored.")
    return counts, num_unreadable
