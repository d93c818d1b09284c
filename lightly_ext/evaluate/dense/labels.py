"""Finds data sets with label maps: those that are known by name, and any folder."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from lightly_ext.evaluate.dense.label_maps import (
    IGNORED,
    ClassValues,
    LabelledImages,
    SegmentationSet,
)
from lightly_ext.evaluate.dense.presets import PRESETS, VOID, Parts, Preset
from lightly_ext.evaluate.images import ImageFiles, folder_images
from lightly_ext.evaluate.masks import check_pair, find_masks, read_mask

SETS_FOLDER = Path("data")
TRAIN, TEST = ("train", "training"), ("val", "validation", "test")
MAPS = ("masks", "annotations", "labels")
CLASSES = "classes.txt"
FOLDER_TREE = """\
images/train/*.jpg
images/val/*.jpg
masks/train/*.png  (the names of the images; or annotations, or labels)
masks/val/*.png
classes.txt  (names of the classes 0, 1, ..., one a line; may be missing)"""


def find_segmentation_set(data: str) -> SegmentationSet:
    """Finds a data set with label maps: one integer per px is the class.

    Args:
        data:
            FOLDER with `images/train`, `images/val`, `masks/train` and `masks/val`: the
            value of a px is the number of its class, 255 is ignored. Or NAME of a known
            set in the folder below `data` where mmsegmentation has it, or NAME:FOLDER
            for one elsewhere. Names are those of `presets.PRESETS`.

    Raises:
        FileNotFoundError: If there is no such folder, or something in it is missing.
        ValueError: If a map is no label image, or has another size than its image.
    """
    name, _, folder = data.partition(":")
    preset = PRESETS.get(name)
    path = Path(data)
    if preset is not None:
        path = Path(folder).expanduser() if folder else SETS_FOLDER / preset.place
    tree = FOLDER_TREE if preset is None else preset.tree
    if not path.is_dir():
        raise FileNotFoundError(
            f"There is no folder '{path}', which is:\n{_indented(tree)}\nGive such a "
            "folder, or NAME or NAME:FOLDER of a known set. Names: "
            f"{', '.join(PRESETS)}. Images and maps in tars or parquet have to be "
            "unpacked."
        )
    try:
        parts = _read(preset, path)
    except FileNotFoundError as error:
        what = preset.name if preset else "A folder of label maps"
        raise FileNotFoundError(
            f"{error} {what} is expected as\n{_indented(tree)}"
        ) from error
    return SegmentationSet(preset.name if preset else path.resolve().name, *parts)


def _read(preset: Preset | None, folder: Path) -> Parts:
    if preset is None:
        return _folders(folder)
    parts = preset.read(folder)
    for part in parts:
        for image, labels in zip(part.files.names, part.maps.names, strict=True):
            check_pair(folder / image, folder / labels)
    return parts


def _folders(root: Path) -> Parts:
    maps = _existing(root, MAPS)
    pairs = []
    for names in (TRAIN, TEST):
        files = folder_images(_existing(root / "images", names))
        folder = _existing(maps, names)
        found = find_masks(files, str(folder))
        paths = [path.relative_to(folder).as_posix() for path in found]
        pairs.append((files, ImageFiles(folder, paths)))
    values = _values(root, [labels for _, labels in pairs])
    train, test = (LabelledImages(*pair, values) for pair in pairs)
    return train, test


def _values(root: Path, maps: list[ImageFiles]) -> ClassValues:
    """Classes of a folder: as they are listed, else the values that occur."""
    path = root / CLASSES
    if path.is_file():
        names = [line.strip() for line in path.read_text().splitlines()]
        classes = tuple(name for name in names if name)
        stored: Iterable[int] = range(len(classes))
    else:
        stored = sorted(set().union(*map(_occurring, maps)) - {VOID})
        classes = tuple(map(str, stored))
    if not 2 <= len(classes) <= VOID:
        raise ValueError(
            f"The label maps of '{root}' have {len(classes)} classes: 2 to {VOID} can "
            f"be told apart. '{CLASSES}' in it lists their names, one a line."
        )
    class_of = {value: i for i, value in enumerate(stored)}
    return ClassValues(classes, {**class_of, VOID: IGNORED})


def _occurring(maps: ImageFiles) -> set[int]:
    """The values of some label maps."""
    values: set[int] = set()
    for name in maps.names:
        try:
            values.update(read_mask(maps.root / name).unique().tolist())
        except Exception:  # an unreadable one is counted later
            continue
    return values


def _existing(root: Path, names: tuple[str, ...]) -> Path:
    found = next((root / name for name in names if (root / name).is_dir()), None)
    if found is None:
        raise FileNotFoundError(f"There is no folder '{root / names[0]}'.")
    return found


def _indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())
