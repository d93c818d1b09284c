"""Images with captions, in the layouts that people have."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from lightly_ext.evaluate.images import ImageFiles, folder_images

# An image and one of its captions.
Caption = tuple[str, str]


@dataclass(frozen=True)
class Pairs:
    """Images, each with one caption or more.

    Attributes:
        name:
            Name of the set in tables.
        files:
            The images.
        captions:
            For each image its captions.
    """

    name: str
    files: ImageFiles
    captions: Sequence[Sequence[str]]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, chosen: Sequence[int]) -> Pairs:
        """Some of the images, by their numbers."""
        captions = [self.captions[i] for i in chosen]
        return replace(self, files=self.files[chosen], captions=captions)

    def limited(self, limit: int | None) -> Pairs:
        """At most `limit` images, spread evenly over the list."""
        if limit is None or limit >= len(self):
            return self
        return self[[i * len(self) // limit for i in range(limit)]]

    def first_captions(self, most: int) -> Pairs:
        """The same images with at most `most` captions each."""
        return replace(self, captions=[texts[:most] for texts in self.captions])

    @property
    def texts(self) -> list[str]:
        """All captions, image by image."""
        return list(chain.from_iterable(self.captions))

    @property
    def counts(self) -> Tensor:
        """Number of captions of each image, int64 with shape (len(self),)."""
        return torch.tensor([len(texts) for texts in self.captions])

    @property
    def owners(self) -> Tensor:
        """Number of the image of each caption, int64 with shape (len(texts),)."""
        return torch.repeat_interleave(torch.arange(len(self)), self.counts)


def find_pairs(data: str, images: str | None = None) -> Pairs:
    """Finds images with captions.

    Args:
        data:
            One of: a .csv or .tsv file with the columns "image" and "caption", one row
            per caption; a .json file, COCO's captions or a list of records with
            "image" and "caption" (a text or a list of texts); a folder with x.txt
            beside each x.jpg, one caption per line.
        images:
            Folder that the names of images in a file are relative to. None takes the
            folder of the file.

    Raises:
        FileNotFoundError: If there is no such file or folder, or none of the images.
        ValueError: If it is of another layout or holds no caption.
    """
    path = Path(data)
    if path.is_dir():
        return _of_folder(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file or folder '{data}' with captions.")
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise ValueError(
            f"'{data}' is none of {', '.join(READERS)}, nor a folder of images with "
            "text files."
        )
    root = path.parent if images is None else Path(images)
    if not root.is_dir():
        raise FileNotFoundError(f"There is no folder of images '{root}'.")
    pairs = _grouped(path, root, reader(path))
    first = pairs.files.names[:100]
    if not any((root / name).is_file() for name in first):
        raise FileNotFoundError(
            f"None of the first images of '{data}' is there, as '{root / first[0]}': "
            "give the folder that their names are relative to as images."
        )
    return pairs


def _of_folder(folder: Path) -> Pairs:
    """Images that have a text file beside them."""
    files = folder_images(folder)
    texts = [
        path.read_text(encoding="utf-8") if path.is_file() else ""
        for path in ((folder / name).with_suffix(".txt") for name in files.names)
    ]
    captions = [[c for c in map(str.strip, t.splitlines()) if c] for t in texts]
    chosen = [i for i, texts_of_image in enumerate(captions) if texts_of_image]
    if not chosen:
        raise ValueError(
            f"No image in '{folder}' has a caption: a text file of the same name "
            f"('{Path(files.names[0]).with_suffix('.txt')}') is needed beside it."
        )
    return Pairs(folder.resolve().name, files, captions)[chosen]


def _grouped(path: Path, root: Path, rows: Iterable[Caption]) -> Pairs:
    """All captions of an image together, in the order of the first ones."""
    captions: dict[str, list[str]] = {}
    for name, caption in rows:
        if caption.strip():
            captions.setdefault(name, []).append(caption.strip())
    if not captions:
        raise ValueError(f"There is no caption in '{path}'.")
    return Pairs(path.stem, ImageFiles(root, list(captions)), list(captions.values()))


def _table_rows(path: Path) -> Iterable[Caption]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        delimiter = "," if path.suffix.lower() == ".csv" else "\t"
        reader = csv.DictReader(file, delimiter=delimiter)
        missing = {"image", "caption"} - set(reader.fieldnames or ())
        if missing:
            raise ValueError(
                f"'{path}' has the columns {reader.fieldnames}; the first line must "
                "name the columns 'image' and 'caption'."
            )
        for row in reader:
            if row["image"] and row["caption"]:
                yield row["image"], row["caption"]


def _json_rows(path: Path) -> Iterable[Caption]:
    content = json.loads(path.read_text(encoding="utf-8"))
    try:
        if isinstance(content, dict):
            names = {image["id"]: image["file_name"] for image in content["images"]}
            for entry in content["annotations"]:
                yield names[entry["image_id"]], entry["caption"]
            return
        for entry in content:
            texts = entry["caption"]
            for text in [texts] if isinstance(texts, str) else texts:
                yield entry["image"], text
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"'{path}' is neither COCO's captions ('images' with 'id' and 'file_name', "
            "'annotations' with 'image_id' and 'caption') nor a list of records with "
            f"'image' and 'caption': {error!r}."
        ) from error


READERS: dict[str, Callable[[Path], Iterable[Caption]]] = {
    ".csv": _table_rows,
    ".tsv": _table_rows,
    ".json": _json_rows,
}
