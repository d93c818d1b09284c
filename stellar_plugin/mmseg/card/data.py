"""Which images a run reads, and how their labels become classes."""

from __future__ import annotations

import os
from typing import Any

from torch.utils.data import Subset

from stellar_plugin.mmseg.card.built import num_classes, only
from stellar_plugin.mmseg.card.described import described, settings
from stellar_plugin.mmseg.datasets import inner_sets, loader, parts_of
from stellar_plugin.protocols import SEGMENTATION_PAPER, SegmentationProtocol

# Parts of the sets that the protocols call by their own names.
PARTS = {
    "images/training": "training",
    "images/validation": "validation",
    "leftImg8bit/train": "train",
    "leftImg8bit/val": "val, fine annotations",
    "ImageSets/Segmentation/train.txt": "train (1464 images)",
    "ImageSets/Segmentation/val.txt": "val",
}
PLAIN_WRAPPERS = ("ConcatDataset", "Subset", "MultiImageMixDataset")


def smallest(*limits: int | None) -> int | None:
    """The smallest number of images, None where none is limited."""
    return min((limit for limit in limits if limit is not None), default=None)


def limit_of(dataset: Any) -> int | None:
    """Images of a set of which only some are used."""
    # A subset of mmengine, of torch, and of Runner's num_batch_per_epoch.
    cut = [getattr(dataset, name, None) for name in ("_indices", "_length")]
    if isinstance(dataset, Subset) or any(value is not None for value in cut):
        return len(dataset)
    parts = inner_sets(dataset)
    if all(limit_of(part) is None for part in parts):
        return None
    return sum(len(part) for part in parts)


def part_of(dataset: Any) -> str:
    """Which images: a list or a folder, below the root of the data."""
    if parts := inner_sets(dataset):
        text = " + ".join(dict.fromkeys(part_of(part) for part in parts))
        wrapper = described(dataset, _state(dataset))
        return text if wrapper in PLAIN_WRAPPERS else f"{text} in {wrapper}"
    path = dataset.ann_file or dataset.data_prefix["img_path"]
    root = getattr(dataset, "data_root", None)
    relative = os.path.relpath(path, root) if root else os.path.basename(path)
    return PARTS.get(relative, relative)


def classes_of(model: Any, dataset: Any, named: SegmentationProtocol | None) -> str:
    """The named protocol's words where they are true, else what is known."""
    found, ignores_zero = num_classes(model), _ignores_zero(dataset)
    mapped = parts_of(dataset)[0].metainfo.get("label_map")
    if named and named.classes and not mapped and named.num_classes == found:
        paper = named.label_resolution == SEGMENTATION_PAPER.label_resolution
        if ignores_zero == (paper or "label 0" in named.classes):
            return named.classes
    text = f"{found}, label 0 is ignored" if ignores_zero else str(found)
    return f"{text}, label map {dict(mapped)}" if mapped else text


def _state(wrapper: Any) -> set[str]:
    """Attributes of a wrapper of data sets that are no settings of it."""
    counted = {"dataset", "datasets", "indices", "repeat_indices", "num_samples"}
    counted |= {"cumulative_sizes", "ignore_keys", "pipeline", "pipeline_types"}
    return counted | {name for name in settings(wrapper) if name.startswith("_")}


def _ignores_zero(dataset: Any) -> bool:
    zero = []
    for part in parts_of(dataset):
        load = loader(part)
        own = getattr(load, "reduce_zero_label", None)
        own = getattr(part, "reduce_zero_label", False) if own is None else own
        zero.append(load is not None and bool(own))
    return bool(only(zero))
