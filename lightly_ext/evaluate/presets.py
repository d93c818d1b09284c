"""Data sets by name, in the folder layouts in which they are given out.

The lists of images are read here, not by torchvision's data sets: those want their own
folder above the archive's, and say only that something was not found.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

from lightly_ext.data import list_images
from lightly_ext.evaluate.images import ImageFiles
from stellar_plugin.protocols import IMAGENET_TRAIN_SCALE, LINEAR_PAPER

Parts = tuple[ImageFiles, ImageFiles]
# Path of an image below its folder, and its class.
Row = tuple[str, str]
SHOWN = 3

KAGGLE_IMAGES = "ILSVRC/Data/CLS-LOC"
KAGGLE_LABELS = "LOC_val_solution.csv"
SMALL, LARGE = "256", "large"
GLAS_GRADES = ("benign", "malignant")

TRAIN_SCALE = LINEAR_PAPER.train_scale


@dataclass(frozen=True)
class Preset:
    """A data set that is known by name.

    Attributes:
        name:
            Name in tables.
        num_classes:
            Number of classes.
        read:
            Reads training and test part from a folder.
        tree:
            How the folder looks, for errors.
        marks:
            Paths below the folder, any of which tells that it is this set.
        unpacked:
            Folder that the archive, or torchvision, makes around it.
        train_scale:
            Range of the area of random crops in training, as fractions of the image.
    """

    name: str
    num_classes: int
    read: Callable[[Path], Parts]
    tree: str
    marks: tuple[str, ...]
    unpacked: str = "."
    train_scale: tuple[float, float] = TRAIN_SCALE

    def is_in(self, folder: Path) -> bool:
        """Whether the files of a folder tell that it is this set."""
        return any((folder / mark).exists() for mark in self.marks)


def image_folders(root: Path) -> Parts:
    """Parts `train` and `val` or `test`, each with a folder of images per class.

    Raises:
        FileNotFoundError: If a part is not there.
        ValueError: If a class has no image, or an image no class.
    """
    tests = [root / name for name in ("val", "test") if (root / name).is_dir()]
    if not (root / "train").is_dir() or not tests:
        raise FileNotFoundError(f"There are no folders 'train' and 'val' in '{root}'.")
    return class_folders(root / "train"), class_folders(tests[0])


def class_folders(folder: Path) -> ImageFiles:
    """Images in a folder per class, in the order of the classes.

    Raises:
        ValueError: If there is no image, a class has none, or an image no class.
    """
    names = list_images(folder)
    outside = next((name for name in names if "/" not in name), None)
    if outside is not None:
        raise ValueError(
            f"'{folder / outside}' has no class: every image lies in the folder of its "
            f"class, '{folder}/CLASS/{outside}'."
        )
    classes = [p.name for p in folder.iterdir() if p.is_dir() and p.name[0] != "."]
    return _labelled(folder, [(n, n.split("/", 1)[0]) for n in names], sorted(classes))


def _imagenet(root: Path) -> Parts:
    images = root / KAGGLE_IMAGES
    if not images.is_dir():
        return image_folders(root)
    train = class_folders(_existing(images / "train"))
    rows = [
        (f"{row['ImageId']}.JPEG", row["PredictionString"].split(" ", 1)[0])
        for row in _csv(root / KAGGLE_LABELS, ("ImageId", "PredictionString"))
    ]
    return train, _listed(images / "val", rows, train.classes, root / KAGGLE_LABELS)


def _pets(root: Path) -> Parts:
    lists = [root / "annotations" / name for name in ("trainval.txt", "test.txt")]
    # "Abyssinian_100 1 1 1": image, number of its breed, species, breed of the species.
    entries = [[(row[0], row[1]) for row in _columns(path, 4)] for path in lists]
    breeds = {number: image.rsplit("_", 1)[0] for image, number in chain(*entries)}
    train, test = (
        _listed(
            root / "images",
            [(f"{image}.jpg", breeds[number]) for image, number in part],
            sorted(set(breeds.values())),
            path,
        )
        for part, path in zip(entries, lists, strict=True)
    )
    return train, test


def _food(root: Path) -> Parts:
    return _food_part(root, "train"), _food_part(root, "test")


def _food_part(root: Path, part: str) -> ImageFiles:
    path = root / "meta" / f"{part}.txt"
    if not path.is_file() and path.with_suffix(".json").is_file():
        path = path.with_suffix(".json")
        images = list(chain(*json.loads(path.read_text()).values()))
    else:
        images = [image for (image,) in _columns(path, 1)]
    rows = [(f"{image}.jpg", image.split("/", 1)[0]) for image in images]
    return _listed(root / "images", rows, sorted({name for _, name in rows}), path)


def _glas(root: Path) -> Parts:
    path = root / "Grade.csv"
    train: list[Row] = []
    test: list[Row] = []
    for row in _csv(path, ("name", "grade (GlaS)")):
        name, grade = row["name"], row["grade (GlaS)"].lower()
        if grade not in GLAS_GRADES:
            raise ValueError(
                f"'{path}' gives '{name}' the grade '{grade}', which is none of "
                f"{', '.join(GLAS_GRADES)}."
            )
        if not name.startswith(("train_", "testA_", "testB_")):
            raise ValueError(
                f"'{path}' lists '{name}', which is none of train_*, testA_*, testB_*."
            )
        part = train if name.startswith("train_") else test
        part.append((f"{name}.bmp", grade))
    return (
        _listed(root, train, GLAS_GRADES, path),
        _listed(root, test, GLAS_GRADES, path),
    )


def _places(root: Path, size: str) -> Parts:
    # torchvision renames the first to the second.
    folders = [root / f"data_{size}", root / f"data_{size}_standard"]
    train = next((folder for folder in folders if folder.is_dir()), None)
    if train is None and size == SMALL:
        return image_folders(root)
    classes = {
        number: name.removeprefix("/")
        for name, number in _columns(root / "categories_places365.txt", 2)
    }
    return (
        _places_part(
            train or folders[0], root / "places365_train_standard.txt", classes
        ),
        _places_part(root / f"val_{size}", root / "places365_val.txt", classes),
    )


def _places_part(folder: Path, path: Path, classes: dict[str, str]) -> ImageFiles:
    rows = [
        (image.removeprefix("/"), classes.get(number, number))
        for image, number in _columns(path, 2)
    ]
    return _listed(folder, rows, sorted(classes.values()), path)


def _listed(
    folder: Path, rows: Sequence[Row], classes: Sequence[str], source: Path
) -> ImageFiles:
    """Images of a list, all of which must be there."""
    # One walk: asking for each of a million files takes minutes on a network disk.
    there = set(list_images(_existing(folder)))
    missing = [name for name, _ in rows if name not in there]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of {len(rows)} images that '{source}' lists are not in "
            f"'{folder}': {some_of(missing)}."
        )
    known = set(classes)
    unknown = next((row for row in rows if row[1] not in known), None)
    if unknown is not None:
        raise ValueError(
            f"'{source}' gives '{unknown[0]}' the class '{unknown[1]}', which is not "
            f"among the {len(classes)} classes."
        )
    return _labelled(folder, rows, classes)


def _labelled(folder: Path, rows: Iterable[Row], classes: Sequence[str]) -> ImageFiles:
    """Images in the order of classes: `ImageFiles.limited` takes of each its share."""
    numbers = {name: number for number, name in enumerate(classes)}
    labelled = sorted((numbers[class_name], name) for name, class_name in rows)
    labels = [label for label, _ in labelled]
    used = set(labels)
    empty = [name for name, number in numbers.items() if number not in used]
    if empty:
        raise ValueError(
            f"{len(empty)} of {len(classes)} classes have no image in '{folder}': "
            f"{some_of(empty)}."
        )
    return ImageFiles(folder, [name for _, name in labelled], labels, tuple(classes))


def some_of(names: Sequence[str]) -> str:
    """The first names of a list, for errors."""
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")


def _existing(folder: Path) -> Path:
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder '{folder}'.")
    return folder


def _columns(path: Path, num: int) -> Iterator[list[str]]:
    """Rows of a list whose columns are separated by spaces."""
    for line in _text(path).splitlines():
        columns = line.split()
        if not columns or line.startswith("#"):
            continue
        if len(columns) != num:
            raise ValueError(f"'{path}' should have {num} columns, got '{line}'.")
        yield columns


def _csv(path: Path, wanted: Sequence[str]) -> list[dict[str, str]]:
    """Rows of a table, without the spaces around names and values."""
    lines = csv.reader(_text(path).splitlines(), skipinitialspace=True)
    rows = [[value.strip() for value in line] for line in lines if line]
    header = rows[0] if rows else []
    if not set(wanted) <= set(header):
        raise ValueError(
            f"'{path}' should have the columns {', '.join(wanted)}; it has "
            f"{', '.join(header) or 'none'}."
        )
    return [dict(zip(header, row, strict=False)) for row in rows[1:]]


def _text(path: Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"There is no file '{path}'.")
    return path.read_text(encoding="utf-8-sig")


PLACES_LISTS = """\
data_{size}/a/airfield/*.jpg
val_{size}/*.jpg
categories_places365.txt
places365_train_standard.txt
places365_val.txt"""
PRESETS = {
    "imagenet": Preset(
        "ImageNet-1K",
        1000,
        _imagenet,
        tree="""\
train/n01440764/*.JPEG  (1000 folders)
val/n01440764/*.JPEG
or, as Kaggle gives it out:
ILSVRC/Data/CLS-LOC/train/n01440764/*.JPEG
ILSVRC/Data/CLS-LOC/val/*.JPEG
LOC_val_solution.csv""",
        marks=(KAGGLE_IMAGES,),
        train_scale=IMAGENET_TRAIN_SCALE,
    ),
    "pets": Preset(
        "Oxford-IIIT Pet",
        37,
        _pets,
        tree="""\
images/*.jpg
annotations/trainval.txt
annotations/test.txt""",
        marks=("annotations/trainval.txt",),
        unpacked="oxford-iiit-pet",
    ),
    "food101": Preset(
        "Food-101",
        101,
        _food,
        tree="""\
images/apple_pie/*.jpg  (101 folders)
meta/train.txt  (or train.json)
meta/test.txt  (or test.json)""",
        marks=("meta/train.txt", "meta/train.json"),
        unpacked="food-101",
    ),
    "glas": Preset(
        "GlaS",
        2,
        _glas,
        tree="""\
Grade.csv
train_*.bmp
testA_*.bmp
testB_*.bmp""",
        marks=("Grade.csv",),
        unpacked="Warwick QU Dataset (Released 2016_07_08)",
    ),
    "places365": Preset(
        "Places365",
        365,
        partial(_places, size=SMALL),
        tree=f"""\
train/airfield/*.jpg  (365 folders)
val/airfield/*.jpg
or, as lists:
{PLACES_LISTS.format(size=SMALL)}""",
        marks=(f"data_{SMALL}", f"data_{SMALL}_standard"),
    ),
    # Larger images of other proportions: another data set, as scores go.
    "places365-large": Preset(
        "Places365 (large)",
        365,
        partial(_places, size=LARGE),
        tree=PLACES_LISTS.format(size=LARGE),
        marks=(f"data_{LARGE}", f"data_{LARGE}_standard"),
    ),
}
