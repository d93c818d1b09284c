"""Sets of label maps by name, in the layouts that mmsegmentation reads too."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from lightly_ext.data import list_images
from lightly_ext.evaluate.dense.coarse_classes import CITYSCAPES_27, COCO_STUFF_27
from lightly_ext.evaluate.dense.label_maps import (
    IGNORED,
    ClassValues,
    LabelledImages,
)
from lightly_ext.evaluate.images import ImageFiles

Parts = tuple[LabelledImages, LabelledImages]
VOID = 255


@dataclass(frozen=True)
class Preset:
    """A set of label maps that is known by name.

    Attributes:
        name:
            Name in tables.
        read:
            Reads training and test part from a folder.
        place:
            Its folder below `data`, as mmsegmentation has it.
        tree:
            How the folder looks, for errors.
    """

    name: str
    read: Callable[[Path], Parts]
    place: str
    tree: str


def _in_order(classes: Sequence[str], first: int = 0) -> dict[int, int]:
    """Values that follow each other are the classes."""
    return {first + i: i for i in range(len(classes))}


VOC = ClassValues(
    (
        *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus"),
        *("car", "cat", "chair", "cow", "dining table", "dog", "horse", "motorbike"),
        *("person", "potted plant", "sheep", "sofa", "train", "tv monitor"),
    ),
    {**{i: i for i in range(21)}, VOID: IGNORED},
)
# Name, train id and label id of Cityscapes' classes; all other labels are ignored.
CITYSCAPES_CLASSES = {
    **{"road": 7, "sidewalk": 8, "building": 11, "wall": 12, "fence": 13, "pole": 17},
    **{"traffic light": 19, "traffic sign": 20, "vegetation": 21, "terrain": 22},
    **{"sky": 23, "person": 24, "rider": 25, "car": 26, "truck": 27, "bus": 28},
    **{"train": 31, "motorcycle": 32, "bicycle": 33},
}
CITYSCAPES_IDS = range(34)  # "license plate", -1, is stored as none of them
CITYSCAPES_TRAIN_IDS = ClassValues(
    tuple(CITYSCAPES_CLASSES),
    {**_in_order(tuple(CITYSCAPES_CLASSES)), VOID: IGNORED},
)
COCO_IDS = range(182)


def joined(
    classes: Mapping[str, Sequence[int]], all_values: Sequence[int]
) -> ClassValues:
    """Classes of several values each; other known values and 255 are ignored."""
    class_of = dict.fromkeys((*all_values, VOID), IGNORED)
    for i, values in enumerate(classes.values()):
        class_of |= dict.fromkeys(values, i)
    return ClassValues(tuple(classes), class_of)


def _voc(root: Path, augmented: bool = False) -> Parts:
    train = [("train", "SegmentationClass")]
    train += [("aug", "SegmentationClassAug")] if augmented else []
    return _voc_part(root, train), _voc_part(root, [("val", "SegmentationClass")])


def _voc_part(root: Path, lists: Sequence[tuple[str, str]]) -> LabelledImages:
    images, maps = [], []
    for part, folder in lists:
        path = root / "ImageSets" / "Segmentation" / f"{part}.txt"
        names = [line.strip() for line in _text(path).splitlines() if line.strip()]
        images += [f"JPEGImages/{name}.jpg" for name in names]
        maps += [f"{folder}/{name}.png" for name in names]
    return _part(root, images, maps, VOC)


def _ade20k(root: Path) -> Parts:
    path = root / "objectInfo150.txt"  # its columns end with the names of a class
    rows = path.read_text().splitlines()[1:] if path.is_file() else []
    names = [row.split("\t")[-1].split(",")[0].strip() for row in rows if row.strip()]
    classes = tuple(names if len(names) == 150 else map(str, range(1, 151)))
    values = ClassValues(classes, {0: IGNORED, **_in_order(classes, first=1)})
    train, test = (
        _of_folders(root, f"images/{part}", f"annotations/{part}", values)
        for part in ("training", "validation")
    )
    return train, test


def _cityscapes(root: Path) -> Parts:
    ids = joined(
        {name: (value,) for name, value in CITYSCAPES_CLASSES.items()}, CITYSCAPES_IDS
    )
    train_ids = next((root / "gtFine").rglob("*_gtFine_labelTrainIds.png"), None)
    if train_ids is None:
        return _cityscapes_parts(root, "labelIds", ids)
    return _cityscapes_parts(root, "labelTrainIds", CITYSCAPES_TRAIN_IDS)


def _cityscapes_27(root: Path) -> Parts:
    return _cityscapes_parts(root, "labelIds", joined(CITYSCAPES_27, CITYSCAPES_IDS))


def _cityscapes_parts(root: Path, kind: str, values: ClassValues) -> Parts:
    train, test = (
        _of_folders(
            root,
            f"leftImg8bit/{part}",
            f"gtFine/{part}",
            values,
            ("_leftImg8bit", f"_gtFine_{kind}"),
        )
        for part in ("train", "val")
    )
    return train, test


def _coco_stuff_27(root: Path) -> Parts:
    # A label image stores the id less one.
    stored = {name: [i - 1 for i in ids] for name, ids in COCO_STUFF_27.items()}
    values = joined(stored, COCO_IDS)
    train, test = (
        _of_folders(root, f"images/{part}", f"annotations/{part}", values)
        for part in ("train2017", "val2017")
    )
    return train, test


def _of_folders(
    root: Path,
    images: str,
    maps: str,
    values: ClassValues,
    ends: tuple[str, str] = ("", ""),
) -> LabelledImages:
    """All images of a folder; a map has its image's name, with another end."""
    if not (root / images).is_dir():
        raise FileNotFoundError(f"There is no folder '{root / images}'.")
    names = list_images(root / images)
    stems = [name[: -len(Path(name).suffix)].removesuffix(ends[0]) for name in names]
    of_maps = [f"{maps}/{stem}{ends[1]}.png" for stem in stems]
    return _part(root, [f"{images}/{name}" for name in names], of_maps, values)


def _part(
    root: Path, images: Sequence[str], maps: Sequence[str], values: ClassValues
) -> LabelledImages:
    files = (ImageFiles(root, images), ImageFiles(root, maps))
    for part, what in zip(files, ("images", "label maps"), strict=True):
        missing = [name for name in part.names if not (root / name).is_file()]
        if missing:
            raise FileNotFoundError(
                f"{len(missing)} of {len(part)} {what} are not in '{root}', for "
                f"example '{missing[0]}'."
            )
    return LabelledImages(*files, values)


def _text(path: Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"There is no file '{path}'.")
    return path.read_text()


VOC_TREE = """\
JPEGImages/2007_000032.jpg
SegmentationClass/2007_000032.png
ImageSets/Segmentation/train.txt
ImageSets/Segmentation/val.txt"""
CITYSCAPES_TREE = """\
leftImg8bit/train/aachen/aachen_000000_000019_leftImg8bit.png
leftImg8bit/val/
gtFine/train/aachen/aachen_000000_000019_gtFine_{kind}.png
gtFine/val/"""
PRESETS = {
    "voc": Preset("Pascal VOC 2012", _voc, "VOCdevkit/VOC2012", VOC_TREE),
    # More training images: another bank, and so other scores.
    "voc-aug": Preset(
        "Pascal VOC 2012 (augmented)",
        partial(_voc, augmented=True),
        "VOCdevkit/VOC2012",
        f"""\
{VOC_TREE}
ImageSets/Segmentation/aug.txt
SegmentationClassAug/2008_000002.png""",
    ),
    "ade20k": Preset(
        "ADE20K",
        _ade20k,
        "ade/ADEChallengeData2016",
        """\
images/training/ADE_train_00000001.jpg
images/validation/
annotations/training/ADE_train_00000001.png
annotations/validation/""",
    ),
    "cityscapes": Preset(
        "Cityscapes",
        _cityscapes,
        "cityscapes",
        CITYSCAPES_TREE.format(kind="labelIds") + "  (or labelTrainIds)",
    ),
    "cityscapes27": Preset(
        "Cityscapes (27 classes)",
        _cityscapes_27,
        "cityscapes",
        CITYSCAPES_TREE.format(kind="labelIds"),
    ),
    "cocostuff27": Preset(
        "COCO-Stuff (27 classes)",
        _coco_stuff_27,
        "coco_stuff164k",
        """\
images/train2017/000000000009.jpg
images/val2017/
annotations/train2017/000000000009.png  (of stuffthingmaps_trainval2017.zip)
annotations/val2017/""",
    ),
}
