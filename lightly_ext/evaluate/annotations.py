"""Annotations of images in one file: boxes as CSV, boxes and objects as COCO's JSON."""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightly_ext.evaluate.images import ImageFiles, seen_size

COLUMNS = ("file", "x0", "y0", "x1", "y1")
# In px: COCO's boxes are rounded, a CSV may count to the width where it should count to
# the last px; both end a little outside of their image, and are cut.
ROUNDING = 1.0
ANNOTATED = "Annotations name the files of images"


def find_boxes(files: ImageFiles, path: str) -> list[Tensor]:
    """Finds the boxes of every image.

    Images that the file names beside these are left out, and so are COCO's boxes of
    crowds and those without an inside.

    Args:
        files:
            The images.
        path:
            JSON of COCO (`images` and `annotations` with `bbox`), or CSV with the
            columns file, x0, y0, x1, y1 in px of the image as it is seen, the last one
            inclusive, and any number of lines per image. Names are relative to the
            folder of the images, or to that of the file.

    Returns:
        Edges of the boxes in px of the image as it is seen, float64 with shape
        (num_boxes, 4), in the order of the images; num_boxes may be 0.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it cannot be read as said, has a box that is reversed or outside
            of its image, or none for any of the images.
    """
    files.require_files(ANNOTATED)
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no file '{path}' with boxes.")
    is_json = path.lower().endswith(".json")
    boxes = _coco_boxes(files, path) if is_json else _csv_boxes(files, path)
    if not any(map(len, boxes)):
        raise ValueError(f"'{path}' has no box of the images in '{files.root}'.")
    return boxes


def read_coco(files: ImageFiles, path: str) -> list[list[dict[str, Any]]]:
    """Reads the annotations of every image of a JSON file in COCO's form.

    Args:
        files:
            The images; others of the file are left out.
        path:
            The file.

    Returns:
        Annotations as the file has them, in the order of the images.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no JSON of that form, says another size of an image than it
            has, or names none of the images.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no file '{path}' with annotations.")
    try:
        content = json.loads(Path(path).read_bytes())
        images, annotations = content["images"], content["annotations"]
        names = {image["id"]: image["file_name"] for image in images}
        found = [(a["image_id"], a) for a in annotations]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"'{path}' is no JSON in COCO's form, with `images` (id, file_name) and "
            f"`annotations` (image_id, bbox): {type(error).__name__}, {error}."
        ) from error
    numbers = _numbers(files, path, names.values())
    for image in images:
        _check_size(files, path, numbers.get(image["file_name"]), image)
    of_images: list[list[dict[str, Any]]] = [[] for _ in files.names]
    for key, annotation in found:
        if key not in names:
            raise ValueError(f"'{path}' annotates image {key}, which it does not list.")
        if (number := numbers.get(names[key])) is not None:
            of_images[number].append(annotation)
    return of_images


def _coco_boxes(files: ImageFiles, path: str) -> list[Tensor]:
    boxes = []
    for name, of_image in zip(files.names, read_coco(files, path), strict=True):
        numbers = [
            (f"annotation {a.get('id')} of '{path}'", _bbox(path, a))
            for a in of_image
            if not a.get("iscrowd")
        ]
        edges = [(where, [x, y, x + w, y + h]) for where, (x, y, w, h) in numbers]
        found = _edges(files.root / name, edges)
        boxes.append(found[(found[:, 2:] > found[:, :2]).all(dim=1)])
    return boxes


def _bbox(path: str, annotation: Mapping[str, Any]) -> list[float]:
    try:
        x, y, width, height = map(float, annotation["bbox"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"Annotation {annotation.get('id')} of '{path}' has no `bbox` of four "
            "numbers, [x, y, width, height]."
        ) from error
    return [x, y, width, height]


def _csv_boxes(files: ImageFiles, path: str) -> list[Tensor]:
    lines = list(_csv_lines(path))
    numbers = _numbers(files, path, [name for _, name, _ in lines])
    of_images: list[list[tuple[str, list[float]]]] = [[] for _ in files.names]
    for line, name, (x0, y0, x1, y1) in lines:
        if name in numbers:
            where = f"line {line} of '{path}'"
            of_images[numbers[name]].append((where, [x0, y0, x1 + 1, y1 + 1]))
    return [
        _edges(files.root / name, boxes)
        for name, boxes in zip(files.names, of_images, strict=True)
    ]


def _csv_lines(path: str) -> Iterator[tuple[int, str, list[float]]]:
    """Number of the line, name of the image, and the numbers as they stand there."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, skipinitialspace=True)
            missing = [c for c in COLUMNS if c not in (reader.fieldnames or ())]
            if missing:
                raise ValueError(
                    f"'{path}' has no column {', '.join(missing)}: its first line is "
                    f"{','.join(COLUMNS)}. COCO's JSON is read from a file .json."
                )
            for row in reader:
                name, *values = (row[column] for column in COLUMNS)
                try:
                    numbers = [float(value) for value in values]
                except (TypeError, ValueError) as error:
                    raise ValueError(
                        f"Line {reader.line_num} of '{path}' has no four numbers "
                        f"{', '.join(COLUMNS[1:])}: {values}."
                    ) from error
                yield reader.line_num, name, numbers
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"'{path}' cannot be read as CSV: {error}.") from error


def _edges(image: Path, boxes: Sequence[tuple[str, list[float]]]) -> Tensor:
    """Boxes of an image, checked and cut at its border: float64 (num_boxes, 4)."""
    if not boxes:
        return torch.zeros(0, 4, dtype=torch.float64)
    size = seen_size(image)
    for where, box in boxes:
        _check_box(where, box)
        if size is not None:
            _check_inside(where, box, image, size)
    edges = torch.tensor([box for _, box in boxes], dtype=torch.float64)
    if size is None:  # unreadable: counted later
        return edges
    height, width = size
    return edges.clamp(min=0).minimum(edges.new_tensor([width, height] * 2))


def _check_box(where: str, box: list[float]) -> None:
    x0, y0, x1, y1 = box
    if not all(map(math.isfinite, box)):
        raise ValueError(f"The box on {where} has no finite numbers: {box}.")
    if x1 < x0 or y1 < y0:
        raise ValueError(
            f"The box on {where} is reversed, it ends before it begins: {box} (edges "
            "x0, y0, x1, y1)."
        )


def _check_inside(
    where: str, box: list[float], image: Path, size: tuple[int, int]
) -> None:
    height, width = size
    x0, y0, x1, y1 = box
    over = max(-x0, -y0, x1 - width, y1 - height)
    if over > ROUNDING:
        raise ValueError(
            f"The box on {where} ends {over:g} px outside of '{image}', which is "
            f"{width} x {height} px: {box} (edges x0, y0, x1, y1; in a CSV the last px "
            "are inclusive)."
        )


def _check_size(
    files: ImageFiles, path: str, number: int | None, image: Mapping[str, Any]
) -> None:
    """Whether an image has the size that COCO's file says, if it says one."""
    if number is None or "width" not in image or "height" not in image:
        return
    size = seen_size(files.root / files.names[number])
    said = image["height"], image["width"]
    if size is not None and said != size:
        raise ValueError(
            f"'{path}' says that '{files.names[number]}' is {said[1]} x {said[0]} px, "
            f"but it is {size[1]} x {size[0]} px."
        )


def _numbers(
    files: ImageFiles, path: str, names: Sequence[str] | Any
) -> dict[str, int]:
    """Numbers of the images by the names that a file gives them; others are left out.

    Raises:
        ValueError: If it names none of the images.
    """
    folders = [os.path.realpath(folder) for folder in (files.root, Path(path).parent)]
    places = {_place(folders[0], name): i for i, name in enumerate(files.names)}
    numbers = {}
    for name in names:
        found = (places.get(_place(folder, name)) for folder in folders)
        number = next((i for i in found if i is not None), None)
        if number is not None:
            numbers[name] = number
    if not numbers:
        example = next((f", for example '{name}'" for name in names), "")
        raise ValueError(
            f"'{path}' names no image of '{files.root}'{example}: names are relative to"
            " the folder of the images, or to that of the file."
        )
    return numbers


def _place(folder: str, name: str) -> str:
    return os.path.normpath(os.path.join(folder, name))
