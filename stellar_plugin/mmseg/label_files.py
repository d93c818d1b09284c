"""Label files, read as by a pipeline of mmsegmentation, and what is wrong with them."""

from __future__ import annotations

import io
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mmcv
import numpy as np
import torch
from mmcv.transforms import LoadImageFromFile
from mmengine import fileio
from mmengine.dataset import BaseDataset
from mmseg.datasets.transforms import LoadAnnotations
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from stellar_plugin.mmseg.datasets import first_step, flattened, loader
from stellar_plugin.mmseg.files import called
from stellar_plugin.state_dict import shown

HINT = (
    "Values that stand for classes in another way (masks of 0 and 255, colours, "
    'one-based) are converted by dict(type="LoadConvertedAnnotations", '
    "values=[VALUE OF CLASS 0, ...]) in the pipelines: docs/segmentation.md."
)

# Where the steps of a pipeline are from that leave the values of labels as they are.
KNOWN = ("mmcv.", "mmengine.", "mmseg.", "stellar_plugin.")

# What readers raise; mmcv takes OpenCV's None for an array.
UNREADABLE = (OSError, AttributeError, Image.DecompressionBombError)


class UnreadableError(ValueError):
    """A label file is no image."""


def read_labels(
    dataset: BaseDataset, index: int, num_classes: int, ignored: int
) -> tuple[np.ndarray, bool]:
    """Reads and checks the label file of one image.

    Args:
        dataset:
            Segmentation set whose pipeline loads label files.
        index:
            Number of the image.
        num_classes:
            Number of classes.
        ignored:
            Value that is no class.

    Returns:
        Classes, int64 with shape (height, width), and whether the file is a JPEG file.

    Raises:
        ValueError: If the labels cannot be right.
        UnreadableError: If the file cannot be read.
    """
    info, load = dataset.get_data_info(index), loader(dataset)
    assert load is not None
    path = info["seg_map_path"]
    where = f"'{path}' of {called(dataset)}"
    own = own_steps(dataset)
    try:
        check_depth(path, load, where)
        content = fileio.get(path, backend_args=load.backend_args)
        labels = load(info)["gt_seg_map"]
    except UNREADABLE as error:
        raise UnreadableError(f"{where} is no image that can be read.") from error
    size = labels.shape[:2]
    if own:
        labels = _applied(own, dataset, info)
    labels = labels.astype(np.int64)
    check_labels(torch.from_numpy(labels), num_classes, ignored, where)
    _check_image_size(dataset, dataset.get_data_info(index), size, where)
    return labels, content.startswith(b"\xff\xd8\xff")


def check_labels(labels: Tensor, num_classes: int, ignored: int, where: str) -> None:
    """Checks the values of one label map.

    Args:
        labels:
            Label map with shape (height, width) or (1, height, width), as the loss
            sees it.
        num_classes:
            Number of classes.
        ignored:
            Value that is no class.
        where:
            What the error calls the map.

    Raises:
        ValueError: If there are other values, or several values per pixel.
    """
    if labels.ndim != 2 and not (labels.ndim == 3 and len(labels) == 1):
        raise ValueError(
            f"{where} has the shape {tuple(labels.shape)} after loading: colour or "
            f"alpha, where a label map has one value per pixel. {HINT}"
        )
    outside = (labels < 0) | (labels >= num_classes)
    wrong = labels[outside & (labels != ignored)]
    if wrong.numel():
        values = shown(wrong.unique().tolist())
        raise ValueError(
            f"{where} has the label values {values} after loading, but there are "
            f"{num_classes} classes (0 to {num_classes - 1}) and {ignored} for "
            "'ignored'. Check reduce_zero_label, the suffix of the label files and "
            f"model.decode_head.num_classes. {HINT}"
        )


def check_depth(path: str, load: LoadAnnotations, where: str) -> None:
    """Checks that a label file has no values that mmsegmentation cuts off.

    Args:
        path:
            The label file.
        load:
            What loads it; other loaders than mmsegmentation's cut nothing off.
        where:
            What the error calls the file.

    Raises:
        ValueError: If it has values beyond 8 bits.
        OSError: If it cannot be read.
    """
    if not _is_mmsegs(load) or _has_8_bits(path, load):
        return
    content = fileio.get(path, backend_args=load.backend_args)
    values = mmcv.imfrombytes(content, flag="unchanged", backend=load.imdecode_backend)
    if values is None:
        raise OSError("OpenCV reads nothing")
    if (values != values.astype(np.uint8)).any():
        raise ValueError(
            f"{where} has values up to {values.max()}, of which mmsegmentation keeps "
            f"8 bits (256 becomes 0). Save classes 0, 1, ... as 8-bit PNG. {HINT}"
        )


def _has_8_bits(path: str, load: LoadAnnotations) -> bool:
    """Whether the header of a file says that values have 8 bits."""
    try:
        with (
            fileio.get_local_path(path, backend_args=load.backend_args) as local,
            Image.open(local) as image,
        ):
            # Pillow's names of 16 and 32 bits: I;16, I, F.
            return not image.mode.startswith(("I", "F"))
    except Exception:  # what Pillow refuses another reader may take
        return False


def check_size(
    size: tuple[int, ...],
    expected: tuple[int, ...],
    where: str,
    image: str,
    resized: bool = False,
) -> None:
    """Checks the size of one label map.

    Args:
        size:
            Its height and width, in pixels.
        expected:
            Those of its image.
        where:
            What the error calls the map.
        image:
            What it calls the image.
        resized:
            Whether a step of the pipeline makes the difference.

    Raises:
        ValueError: If they differ.
    """
    if size != expected:
        way_out = (
            "Predictions are compared at the size of the image: load labels after the "
            "steps that resize or cut."
            if resized
            else "Resize the label map by nearest neighbour, or mend what pairs images "
            "with label files."
        )
        raise ValueError(
            f"{where} is {size[0]} x {size[1]} pixels (height x width), {image} is "
            f"{expected[0]} x {expected[1]}. {way_out}"
        )


def keeps_values(dataset: BaseDataset) -> bool:
    """Whether the classes of a set are the values of its label files."""
    info = dataset.metainfo
    converted = info.get("reduce_zero_label") or info.get("label_map")
    return _is_mmsegs(loader(dataset)) and not converted and not own_steps(dataset)


def own_steps(dataset: BaseDataset) -> list[Any]:
    """Steps after the labels' loader that may make classes of their values."""
    steps = [
        inner
        for step in getattr(dataset.pipeline, "transforms", ())
        # Of test-time augmentation, one view.
        for inner in flattened(getattr(step, "subroutines", [step])[:1])
    ]
    places = [i for i, step in enumerate(steps) if isinstance(step, LoadAnnotations)]
    later = steps[places[0] + 1 :] if places else []
    return [s for s in later if not type(s).__module__.startswith(KNOWN)]


@contextmanager
def same_random() -> Iterator[None]:
    """Leaves the states of random numbers on the CPU as they are."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


def _applied(
    steps: Sequence[Any], dataset: BaseDataset, info: dict[str, Any]
) -> np.ndarray:
    """Labels after some steps, which may look at the image and draw at random."""
    load = first_step(dataset, LoadImageFromFile)
    with same_random():
        info = info if load is None else load(info)
        for step in steps:
            info = step(info)
    return np.asarray(info["gt_seg_map"])


def _is_mmsegs(load: LoadAnnotations | None) -> bool:
    return getattr(type(load), "_load_seg_map", 0) is LoadAnnotations._load_seg_map


def _check_image_size(
    dataset: BaseDataset, info: dict[str, Any], size: tuple[int, ...], where: str
) -> None:
    """Checks that a label map is as large as its image file."""
    load = first_step(dataset, LoadImageFromFile)
    if load is None or _header_size(info["img_path"], load) == size:
        return
    image = load(info)  # by the pipeline, which may turn it as its EXIF data say
    if image is not None:
        named = f"its image '{info['img_path']}'"
        check_size(size, tuple(image["ori_shape"][:2]), where, named)


def _header_size(path: str, load: LoadImageFromFile) -> tuple[int, int] | None:
    """Height and width of an image by its header; None if only decoding tells."""
    content = fileio.get(path, backend_args=load.backend_args)
    try:
        with Image.open(io.BytesIO(content)) as image:
            return None if "exif" in image.info else image.size[::-1]
    except (UnidentifiedImageError, Image.DecompressionBombError):
        return None
