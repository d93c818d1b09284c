"""Checks that model and data set mean the same classes, before long work."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from mmengine.dataset import BaseDataset
from mmengine.logging import print_log
from mmseg.structures import SegDataSample

from stellar_plugin.mmseg.annotations import IGNORED, LoadConvertedAnnotations
from stellar_plugin.mmseg.datasets import loader, parts_of
from stellar_plugin.mmseg.files import called, check_files, left_out, shared
from stellar_plugin.mmseg.label_files import (
    HINT,
    UnreadableError,
    check_labels,
    check_size,
    keeps_values,
    own_steps,
    read_labels,
    same_random,
)
from stellar_plugin.state_dict import shown

# Label files of a split that are read, evenly spread: a wrong numbering shows in most.
NUM_READ = 50
# Files that are read where fewer than two classes occur in those.
MOST_READ = 1000
# Classes that the table lists one by one.
MOST_LISTED = 40


@dataclass
class LabelCounts:
    """What occurs in the label files of one split that were read.

    Attributes:
        name:
            The split, such as "train".
        num_images:
            Images of the split.
        pixels:
            Pixels of every class, and of no class at the end, int64 with shape
            (num_classes + 1,).
        files:
            Label files in which they occur, of the same form.
        num_read:
            Label files that were read.
        num_jpeg:
            Those of them that are JPEG files.
        unread:
            What could not be read, and why.
    """

    name: str
    num_images: int
    pixels: np.ndarray
    files: np.ndarray
    num_read: int = 0
    num_jpeg: int = 0
    unread: list[str] = field(default_factory=list)

    def add(self, labels: np.ndarray, is_jpeg: bool) -> None:
        """Counts one label map.

        Args:
            labels:
                Classes, integers with shape (height, width); other values are no class.
            is_jpeg:
                Whether its file is a JPEG file.
        """
        num_classes = len(self.pixels) - 1
        is_class = (labels >= 0) & (labels < num_classes)
        classes = np.where(is_class, labels, num_classes)
        pixels = np.bincount(classes.ravel(), minlength=num_classes + 1)
        self.pixels += pixels
        self.files += pixels > 0
        self.num_read += 1
        self.num_jpeg += is_jpeg

    @property
    def read(self) -> str:
        """How many files were read, in words."""
        return f"{self.num_read} of {self.num_images} label files ({self.name})"

    @property
    def few_classes(self) -> bool:
        """Whether fewer than two classes occur, where there are two."""
        classes = self.pixels[:-1]
        return bool(np.count_nonzero(classes) < min(2, len(classes)))


def check_datasets(
    datasets: Mapping[str, BaseDataset],
    num_classes: int,
    ignored: int = 255,
    unscored: Collection[str] = (),
) -> None:
    """Checks classes, files and values of labels; logs how often each class occurs.

    The files of every image have to exist. Of every split `NUM_READ` label files are
    read, as the pipeline reads them; one that cannot be read stops no other's check.

    Args:
        datasets:
            Segmentation sets of mmsegmentation by the name of the split.
        num_classes:
            Classes that the labels of the decode head have.
        ignored:
            Value that is no class.
        unscored:
            Splits of which predictions are written and no label is read.

    Raises:
        ValueError: If the labels cannot be right: another number of classes, other
            values, no class at all, another size than the image, colours.
        FileNotFoundError: If there are no images, or a file does not exist.
    """
    counts = []
    for name, dataset in datasets.items():
        parts = parts_of(dataset)
        for part in parts:
            _check_classes(part, num_classes)
            check_files(part, labelled=name not in unscored)
        labelled = [part for part in parts if loader(part) and name not in unscored]
        if labelled:
            for part in labelled:
                _check_conversion(part, num_classes)
            counts.append(_count(name, labelled, num_classes, ignored))
            if ignored == IGNORED and any(map(keeps_values, labelled)):
                _check_masks(counts[-1])
    warnings = [*_file_warnings(datasets)]
    if counts:
        classes = parts_of(next(iter(datasets.values())))[0].metainfo["classes"]
        print_log(table(counts, classes), "current")
        warnings += _warnings(counts, classes)
    for warning in warnings:
        print_log(warning, "current", logging.WARNING)


def check_heads(others: Sequence[int], num_classes: int) -> None:
    """Checks that every head that is trained knows the classes of the labels.

    Args:
        others:
            Classes of auxiliary heads, and of a cascade's heads before the last.
        num_classes:
            Classes of the labels.

    Raises:
        ValueError: If one has fewer.
    """
    if min(others, default=num_classes) < num_classes:
        raise ValueError(
            f"The labels have {num_classes} classes, but num_classes of "
            f"auxiliary_head, or of a decode_head before the last, is {min(others)}; "
            "set it to the number of classes."
        )


def check_first(
    dataset: BaseDataset, num_classes: int, ignored: int, original: bool
) -> None:
    """Checks the first sample of a set, as the whole pipeline gives it.

    Args:
        dataset:
            Segmentation set of a validation or test.
        num_classes:
            As of `check_batch`.
        ignored:
            As of `check_batch`.
        original:
            As of `check_batch`.

    Raises:
        ValueError: As by `check_batch`.
    """
    try:
        with same_random():
            sample = dataset[0]
        batch = {name: [sample[name]] for name in ("inputs", "data_samples")}
    except Exception:  # told where the file is read
        return
    check_batch(batch, num_classes, ignored, original)


def check_batch(
    batch: Mapping[str, Any], num_classes: int, ignored: int, original: bool = False
) -> None:
    """Checks the label maps of a batch, as the loader gives it.

    Args:
        batch:
            Images by "inputs" and their samples by "data_samples"; samples without
            labels, and those of test-time augmentation, are passed over.
        num_classes:
            Number of classes.
        ignored:
            Value that is no class.
        original:
            Whether predictions are as large as the original image.

    Raises:
        ValueError: If values cannot be right, or labels are not as large as the
            original image; else neither that nor what the model sees.
    """
    for image, sample in zip(batch["inputs"], batch["data_samples"], strict=False):
        if not isinstance(sample, SegDataSample) or "gt_sem_seg" not in sample:
            continue
        labels = sample.gt_sem_seg.data
        where = f"The label map of '{sample.metainfo.get('img_path')}'"
        check_labels(labels, num_classes, ignored, where)
        size, seen = tuple(labels.shape[-2:]), tuple(image.shape[-2:])
        if size != seen or original:
            whole = tuple(sample.metainfo.get("ori_shape") or seen)[:2]
            resized = size == seen and size != whole
            check_size(size, whole, where, "its image", resized)


def table(counts: Sequence[LabelCounts], classes: Sequence[str]) -> str:
    """How often each class occurs, as text.

    Args:
        counts:
            What was counted, by split.
        classes:
            Names of the classes; of many, the most frequent ones are listed.
    """
    pixels = np.stack([count.pixels for count in counts])
    shares = 100 * pixels / pixels.sum(1, keepdims=True).clip(1)
    order = np.argsort(-shares[:, :-1].sum(0), kind="stable")
    listed = sorted(order[:MOST_LISTED])
    names = [*(str(name) for name in classes), "(ignored)"]
    width = max(len(names[index]) for index in [*listed, -1]) + 2
    lines = [
        f"Labels in {', '.join(count.read for count in counts)}: share of the pixels, "
        "files",
        f"  {'':{width}}" + "".join(f"{count.name:>18}" for count in counts),
    ]
    for index in [*listed, len(classes)]:
        cells = [
            f"{share[index]:10.2f} % {count.files[index]:5d}"
            for share, count in zip(shares, counts, strict=True)
        ]
        lines.append(f"  {names[index]:{width}}" + "".join(cells))
    if len(classes) > len(listed):
        lines.append(f"  and {len(classes) - len(listed)} classes that are rarer")
    return "\n".join(lines)


def _check_classes(dataset: BaseDataset, num_classes: int) -> None:
    classes = dataset.metainfo.get("classes") or ()
    if len(classes) != num_classes:
        raise ValueError(
            f"{called(dataset)} has {len(classes)} classes, model.decode_head."
            f"num_classes is {num_classes}; set it to the number of classes. (With "
            "out_channels=1 it is 2: below and above the threshold.)"
        )
    if not len(dataset):
        prefix, suffix = (
            getattr(dataset, name, None) for name in ("data_prefix", "img_suffix")
        )
        raise FileNotFoundError(
            f"{called(dataset)} has no images: there is none that ends on '{suffix}' "
            f"in {prefix}. Check data_root, data_prefix, img_suffix and ann_file."
        )


def _chosen(parts: Sequence[BaseDataset], most: int) -> list[tuple[int, int]]:
    """Images to read, evenly spread over every part: numbers of part and image."""
    total = sum(map(len, parts))
    return [
        (number, int(index))
        for number, part in enumerate(parts)
        for index in np.linspace(
            0,
            len(part) - 1,
            min(len(part), math.ceil(most * len(part) / total)),
            dtype=int,
        )
    ]


def _check_conversion(dataset: BaseDataset, num_classes: int) -> None:
    """Checks that each class can come of the values that the set declares."""
    load = loader(dataset)
    if isinstance(load, LoadConvertedAnnotations) and not own_steps(dataset):
        num_values = int((load.classes != IGNORED).sum())
        if num_values < num_classes:
            raise ValueError(
                f"The values of LoadConvertedAnnotations are {num_values}, the classes "
                f"of {called(dataset)} are {num_classes}: class {num_classes - 1} can "
                "never occur. values has one value per class, in their order; ignored "
                "has those that are no class."
            )


def _count(
    name: str, parts: Sequence[BaseDataset], num_classes: int, ignored: int
) -> LabelCounts:
    empty = np.zeros(num_classes + 1, np.int64)
    counts = LabelCounts(name, sum(map(len, parts)), empty, empty.copy())

    def add(number: int, index: int) -> None:
        part = parts[number]
        try:
            counts.add(*read_labels(part, index, num_classes, ignored))
        except ValueError as error:
            # A set with a way of its own to prepare data may skip such files.
            own = type(part).prepare_data is not BaseDataset.prepare_data
            if not (own and isinstance(error, UnreadableError)):
                raise
            counts.unread.append(str(error))
        except Exception as error:  # of readers of images and steps of others
            path = part.get_data_info(index).get("img_path")
            counts.unread.append(f"'{path}' or its labels: {error!r}")

    first = _chosen(parts, NUM_READ)
    for place in first:
        add(*place)
    for place in sorted({*_chosen(parts, MOST_READ)} - {*first}):
        if not counts.few_classes:
            break
        add(*place)
    if counts.num_read and not counts.pixels[:-1].any():
        reduced = getattr(parts[0], "reduce_zero_label", False)
        raise ValueError(
            f"Every pixel is 'ignored' in {counts.read} of {called(parts[0])}, with "
            f"reduce_zero_label={reduced}. reduce_zero_label=True ignores 0 and 255 "
            f"and moves the others down by one. {HINT}"
        )
    return counts


def _check_masks(counts: LabelCounts) -> None:
    """Refuses masks of 0 and 255 where there are two classes."""
    pixels = counts.pixels
    if len(pixels) == 3 and pixels[0] and pixels[2] and not pixels[1]:
        raise ValueError(
            f"There are two classes, but the only values in {counts.read} are 0 and "
            "255, and 255 means 'ignored': class 1 never occurs. Masks of 0 and 255 "
            'are read as classes 0 and 1 by dict(type="LoadConvertedAnnotations", '
            'values=[0, 255]) in place of dict(type="LoadAnnotations") in the '
            "pipelines; where 255 is no class, by values=[0, 1], ignored=[255]: "
            "docs/segmentation.md."
        )


def _file_warnings(datasets: Mapping[str, BaseDataset]) -> Iterator[str]:
    for name, dataset in datasets.items():
        unused = left_out(dataset)
        if unused:
            yield (
                f"{len(unused)} images in the folder of {name} are not used, such as "
                f"'{unused[0]}': their names do not end on img_suffix."
            )
        trained = datasets.get("train")
        common = shared(dataset, trained) if trained and name != "train" else []
        if common:
            yield (
                f"{len(common)} of {len(dataset)} images ({name}) are trained on too, "
                f"such as '{common[0]}': the score is not one of new images. Check "
                "ann_file and data_prefix."
            )


def _warnings(counts: Sequence[LabelCounts], classes: Sequence[str]) -> Iterator[str]:
    for count in counts:
        if count.unread:
            yield (
                f"{len(count.unread)} files of {count.name} could not be checked and "
                f"may stop the run: {shown(count.unread, 3)}."
            )
        absent = [
            name for name, files in zip(classes, count.files, strict=False) if not files
        ]
        if absent:
            yield (
                f"{len(absent)} of {len(classes)} classes do not occur in {count.read}:"
                f" {shown(absent)}."
            )
        if count.num_jpeg:
            yield (
                f"JPEG files among {count.read}: {count.num_jpeg}; their values blur "
                "where classes meet, save label maps as PNG."
            )
