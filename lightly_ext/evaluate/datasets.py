"""Data sets for classification, in the folder layouts that people have."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal
from unicodedata import normalize

from lightly_ext.evaluate.images import ImageFiles, folder_images
from lightly_ext.evaluate.presets import (
    PRESETS,
    TRAIN_SCALE,
    Preset,
    class_folders,
    image_folders,
    some_of,
)
from lightly_ext.evaluate.tables import TableSplits, class_images, table_images

SETS_FOLDER = Path("data")
PARTS = ("train", "val", "test")
IMAGENET = PRESETS["imagenet"]
WORDNET_ID = re.compile(r"n\d{8}")


@dataclass(frozen=True)
class ClassificationSet:
    """A training and a test part with the same classes.

    Attributes:
        name:
            Name of the set in tables.
        train:
            Images to train on and to choose with.
        test:
            Images to score on.
        train_scale:
            Range of the area of random crops in training, as fractions of the image.
    """

    name: str
    train: ImageFiles
    test: ImageFiles
    train_scale: tuple[float, float]

    def limited(self, limit: int | None) -> ClassificationSet:
        """At most `limit` images of each part, see `ImageFiles.limited`."""
        train, test = self.train.limited(limit), self.test.limited(limit)
        return replace(self, train=train, test=test)


def find_classification_set(data: str) -> ClassificationSet:
    """Finds a data set for classification.

    Images are in the order of their classes.

    Args:
        data:
            FOLDER with the parts `train` and `val` (or `test`, if there is no `val`),
            each with a subfolder of images per class, or in the layout of a data set
            that is known by name; or SHARDS, what `find_splits` finds splits of such
            names in. NAME of a known set in the folder `data/NAME`, or NAME:FOLDER or
            NAME:SHARDS for one elsewhere. Names are those of `presets.PRESETS`.

    Raises:
        FileNotFoundError: If there is no such folder, or something in it is missing.
        ValueError: If a list cannot be read, a class has no image, an image of SHARDS
            no class, the parts have different classes, or they are not as many as the
            named set has.
    """
    preset, place, tables = _parse(data)
    if tables is not None:
        name, (train, test) = tables.name, tables.parts()
    else:
        folder = Path(place)
        preset = preset or next((p for p in PRESETS.values() if p.is_in(folder)), None)
        name, (train, test) = folder.resolve().name, _read(preset, folder)
    scale = TRAIN_SCALE
    if preset is None and _is_imagenet(train.classes):
        preset = IMAGENET
    _check_classes(f"'{place}'", train.classes, test.classes)
    if preset is not None:
        name, scale = preset.name, preset.train_scale
        if len(train.classes) != preset.num_classes:
            raise ValueError(
                f"{name} has {preset.num_classes} classes, '{place}' has "
                f"{len(train.classes)}: give a part of it as a folder, or "
                "as shards, without name."
            )
    return ClassificationSet(name, train, test, scale)


def find_images(
    data: str, part: Literal["train", "test"] = "test", limit: int | None = None
) -> tuple[str, ImageFiles]:
    """Finds images without labels.

    Args:
        data:
            FOLDER of images, nested to any depth, or SHARDS, what `find_splits` finds.
            Or NAME, NAME:FOLDER or NAME:SHARDS of a data set that is known by name, see
            `find_classification_set`.
        part:
            Part of the named data set, and of several splits of SHARDS.
        limit:
            Number of images, None for all.

    Returns:
        Name of the set in tables, and its images.

    Raises:
        FileNotFoundError: If there is no such folder, or something in it is missing.
        ValueError: If there is no image in it, or the named set is not as it should be.
    """
    preset, place, tables = _parse(data)
    if preset is None and tables is not None:
        name, source = tables.all_images(part)
        return name, table_images(source).limited(limit)
    if preset is None:
        return Path(place).resolve().name, folder_images(place).limited(limit)
    found = find_classification_set(data)
    files = found.train if part == "train" else found.test
    return found.name, replace(files, labels=None, classes=()).limited(limit)


def find_labelled_images(data: str, limit: int | None = None) -> tuple[str, ImageFiles]:
    """Finds images with labels, where nothing is trained.

    Args:
        data:
            FOLDER with a subfolder of images per class, or SHARDS with labels. Or what
            `find_classification_set` takes, then its test part.
        limit:
            Number of images, None for all.

    Returns:
        Name of the set in tables, and its images in the order of their classes.

    Raises:
        FileNotFoundError: If there is no such folder, or something in it is missing.
        ValueError: If an image has no class, or a class no image.
    """
    preset, place, tables = _parse(data)
    if preset is None and tables is not None:
        name, source = tables.all_images("test")
        return name, class_images(source).limited(limit)
    folder = Path(place)
    known = preset is not None or any(p.is_in(folder) for p in PRESETS.values())
    train, *tests = ((folder / part).is_dir() for part in PARTS)
    if known or (train and any(tests)):
        found = find_classification_set(data)
        part = "test" if known else found.test.root.name
        return f"{found.name} ({part})", found.test.limited(limit)
    name = folder.resolve().name
    if name in PARTS:
        name = f"{folder.resolve().parent.name} ({name})"
    return name, class_folders(folder).limited(limit)


def _parse(data: str) -> tuple[Preset | None, str, TableSplits | None]:
    """The named set or None, its place, and its splits if that is no folder."""
    name, _, place = data.partition(":")
    preset = PRESETS.get(name)
    place = data if preset is None else place or str(SETS_FOLDER / name)
    place = os.path.expanduser(place)
    tables = TableSplits.find(place)
    if tables is not None:
        return preset, place, tables
    path = Path(place)
    if not path.is_dir():
        where = "" if preset is None else f" for {preset.name}, which is:\n"
        raise FileNotFoundError(
            f"There is no folder '{path}'{where}"
            + (_indented(preset.tree) if preset else ".")
            + "\nGive a folder, or NAME for the folder data/NAME, or NAME:FOLDER. "
            f"Names: {', '.join(PRESETS)}. In place of a folder: tars, parquet, or "
            "hf:NAME of the Hugging Face hub."
        )
    if preset is not None and (path / preset.unpacked).is_dir():
        path = path / preset.unpacked
    return preset, str(path), None


def _read(preset: Preset | None, folder: Path) -> tuple[ImageFiles, ImageFiles]:
    try:
        return image_folders(folder) if preset is None else preset.read(folder)
    except FileNotFoundError as error:
        if preset is None:
            raise FileNotFoundError(
                f"{error} Training and test images lie in train/CLASS/*.jpg and "
                "val/CLASS/*.jpg (or test/CLASS/*.jpg); of other layouts these are "
                f"known: {', '.join(PRESETS)}."
            ) from error
        raise FileNotFoundError(
            f"{error} {preset.name} is expected as\n{_indented(preset.tree)}"
        ) from error


def _check_classes(where: str, train: Sequence[str], test: Sequence[str]) -> None:
    only = [sorted(set(a) - set(b)) for a, b in ((train, test), (test, train))]
    if any(only):
        texts = [
            f"{len(names)} only in {part} ({some_of(names)})"
            for part, names in zip(("training", "test"), only, strict=True)
            if names
        ]
        forms = [{normalize("NFC", name) for name in part} for part in (train, test)]
        hint = ""
        if forms[0] == forms[1]:
            hint = " They differ in Unicode normalisation (NFC, NFD) alone: rename."
        raise ValueError(
            f"The parts of {where} have different classes: {', '.join(texts)}.{hint}"
        )


def _is_imagenet(classes: Sequence[str]) -> bool:
    return len(classes) == IMAGENET.num_classes and all(
        map(WORDNET_ID.fullmatch, classes)
    )


def _indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())
