"""Checks that model and data set mean the same classes, before long work."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from mmengine.dataset import BaseDataset
from mmseg.datasets.transforms import LoadAnnotations
from torch import Tensor

# Label files that are read, evenly spread: a wrong numbering shows in most of them.
NUM_READ = 50


def check_dataset(dataset: BaseDataset, num_classes: int) -> None:
    """Checks the number of classes and, in some files, the label values.

    Args:
        dataset:
            Segmentation set of mmsegmentation.
        num_classes:
            Classes of the decode head.

    Raises:
        ValueError: If the set has other classes than the head.
        FileNotFoundError: If a label file does not exist.
    """
    if parts := _wrapped(dataset):
        for part in parts:
            check_dataset(part, num_classes)
        return
    name = f"{type(dataset).__name__} in '{getattr(dataset, 'data_root', None)}'"
    classes = dataset.metainfo.get("classes", ())
    if len(classes) != num_classes:
        raise ValueError(
            f"{name} has {len(classes)} classes, model.decode_head.num_classes is "
            f"{num_classes}; set it to the number of classes."
        )
    for step in dataset.pipeline.transforms:
        if isinstance(step, LoadAnnotations):
            _check_files(dataset, step, num_classes, name)
            return


def check_labels(labels: Tensor, num_classes: int, ignored: int, where: str) -> None:
    """Checks the values of one label map.

    Args:
        labels:
            Label map of any shape, as the loss sees it.
        num_classes:
            Number of classes.
        ignored:
            Value that is no class.
        where:
            What the error calls the map.

    Raises:
        ValueError: If there are other values.
    """
    wrong = labels[(labels >= num_classes) & (labels != ignored)]
    if wrong.numel():
        values = shown(wrong.unique().tolist())
        raise ValueError(
            f"{where} has the label values {values} after loading, but there are "
            f"{num_classes} classes (0 to {num_classes - 1}) and {ignored} for "
            "'ignored'. Check reduce_zero_label, the suffix of the label files and "
            "model.decode_head.num_classes."
        )


def shown(values: Sequence[int], most: int = 8) -> str:
    """Numbers as text, the first few of many."""
    text = ", ".join(map(str, values[:most]))
    return f"{text}, ..." if len(values) > most else text


def _wrapped(dataset: BaseDataset) -> list[BaseDataset]:
    """The sets inside ConcatDataset, RepeatDataset and the like."""
    inner = [dataset.dataset] if hasattr(dataset, "dataset") else []
    return list(getattr(dataset, "datasets", inner))


def _check_files(
    dataset: BaseDataset, load: LoadAnnotations, num_classes: int, name: str
) -> None:
    chosen = np.linspace(0, len(dataset) - 1, min(len(dataset), NUM_READ), dtype=int)
    for index in chosen:
        info = dataset.get_data_info(int(index))
        labels = torch.from_numpy(load(info)["gt_seg_map"])
        where = f"'{info['seg_map_path']}' of {name}"
        check_labels(labels, num_classes, dataset.ignore_index, where)
