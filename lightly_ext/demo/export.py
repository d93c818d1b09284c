"""Boards as files: an image folder, and a segmentation set in ADE20K's layout."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image

from lightly_ext.demo.boards import Boards, BoardSets, Uint8Array

NUM_SEGMENTATION_BOARDS = 2000

# Value of a label image that stands for background. 0 means "ignored" in ADE20K's
# layout (mmseg's `reduce_zero_label`), so everything moves up by one.
BACKGROUND_VALUE = 1


def export_image_folders(sets: BoardSets, root: Path) -> None:
    """Writes boards as PNG files, replacing the folder.

    `root/train` has the pretraining boards, without labels; `root/single/train` and
    `root/single/test` have the boards with a single class, one folder per digit.

    Args:
        sets:
            The boards.
        root:
            Folder to write to.
    """
    _start_folder(root)
    files = list(_numbered(root / "train", sets.train.images))
    for name, boards in (("train", sets.train_single), ("test", sets.test_single)):
        digits = boards.classes.argmax(axis=1)
        files += [
            (path.parent / str(digit) / path.name, image)
            for digit, (path, image) in zip(
                digits, _numbered(root / "single" / name, boards.images), strict=True
            )
        ]
    _write(files)


def export_segmentation_set(sets: BoardSets, root: Path) -> None:
    """Writes boards and their masks in ADE20K's folder layout, replacing the folder.

    `root/images/{training,validation}` and `root/annotations/{training,validation}`
    have files of the same names. Label values: 1 is background, 2 + d is digit d.

    Args:
        sets:
            The boards; the first 2000 training boards and all test boards are written.
        root:
            Folder to write to.
    """
    _start_folder(root)
    parts = {"training": sets.train[:NUM_SEGMENTATION_BOARDS], "validation": sets.test}
    for name, boards in parts.items():
        _write(_numbered(root / "images" / name, boards.images))
        _write(_numbered(root / "annotations" / name, label_values(boards)))


def label_values(boards: Boards) -> Uint8Array:
    """Label images as they are written, (num_boards, 60, 60), values 1 to 11."""
    return boards.masks + BACKGROUND_VALUE


def _start_folder(root: Path) -> None:
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)


def _numbered(folder: Path, images: Uint8Array) -> Iterator[tuple[Path, Uint8Array]]:
    return ((folder / f"{i:05d}.png", image) for i, image in enumerate(images))


def _write(files: Iterable[tuple[Path, Uint8Array]]) -> None:
    files = list(files)
    for folder in {path.parent for path, _ in files}:
        folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor() as pool:
        list(pool.map(_write_png, files))


def _write_png(file: tuple[Path, Uint8Array]) -> None:
    path, image = file
    Image.fromarray(image).save(path, compress_level=1)
