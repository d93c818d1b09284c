"""Data sets in tars, parquet and arrow files, and on the hub, for evaluation."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lightly_ext.data.streams import ImageTable, Source, find_source, find_splits
from lightly_ext.data.streams.sources import HUB
from lightly_ext.evaluate.images import ImageFiles, Rows

# What splits are called, the first ones first: those to test on as for folders.
SPLITS = {
    "train": ("train", "training"),
    "test": (
        *("validation", "val", "valid", "dev"),
        *("test", "testing", "eval", "evaluation"),
    ),
}


@dataclass(frozen=True)
class TableSplits:
    """A data set that is no folder of images.

    Attributes:
        place:
            What names it.
        splits:
            Its splits; the one called "" is all there is.
    """

    place: str
    splits: Mapping[str, Source]

    @classmethod
    def find(cls, place: str) -> TableSplits | None:
        """Finds the data set that a text names; None for a folder of images.

        Raises: As `find_splits`.
        """
        splits = find_splits(place)
        return None if splits is None else cls(place, splits)

    @property
    def name(self) -> str:
        """Name in tables: of the folder, the files in it, or the data set."""
        if os.path.isdir(self.place):
            return Path(self.place).resolve().name
        if self.place.startswith(HUB):
            place, *rest = self.place.removeprefix(HUB).split(":")
            name = Path(place).resolve().name
            return f"{name} ({', '.join(rest)})" if rest else name
        path = Path(self.place).absolute()
        return f"{path.parent.name}/{path.name}"

    def split(self, part: Literal["train", "test"]) -> str | None:
        """Name of the split to train with, or to test on; None if there is none."""
        return next((name for name in SPLITS[part] if name in self.splits), None)

    def all_images(self, part: Literal["train", "test"]) -> tuple[str, Source]:
        """The images where one part is wanted, and their name in tables.

        Of a folder or a data set of the hub with several splits one is taken, of files
        all.

        Raises:
            ValueError: If none of several splits is for that.
        """
        if len(self.splits) == 1:
            return self.name, next(iter(self.splits.values()))
        if not (os.path.isdir(self.place) or self.place.startswith(HUB)):
            source = find_source(self.place)
            assert source is not None
            return self.name, source
        split = self.split(part)
        if split is None:
            raise ValueError(
                f"'{self.place}' has the splits {', '.join(sorted(self.splits))}, none "
                f"of which is {' or '.join(SPLITS[part][:2])}: name the files of one."
            )
        return f"{self.name} ({split})", self.splits[split]

    def parts(self) -> tuple[ImageFiles, ImageFiles]:
        """Images with classes to train with and to test on.

        Raises:
            FileNotFoundError: If there are no two splits for that.
            ValueError: If an image has no class.
        """
        train, test = self.split("train"), self.split("test")
        if train is None or test is None:
            there = ", ".join(sorted(filter(None, self.splits))) or "no split by name"
            raise FileNotFoundError(
                f"'{self.place}' has {there}. Expected is a split train, and one of "
                "validation, val or test: files such as train-0000.tar and "
                "val-0000.tar (or .parquet), folders train/ and val/ of them, or a "
                "data set of the hub with these splits."
            )
        return class_images(self.splits[train]), class_images(self.splits[test])


def table_images(source: Source) -> ImageFiles:
    """All images of a source, without labels, in the order of a folder."""
    table = ImageTable(source)
    order = table.order()
    names = [table.names[i] for i in order]
    return ImageFiles(Path(source.name), names, rows=Rows(table, order))


def class_images(source: Source) -> ImageFiles:
    """All images of a source with their classes, in the order of these.

    Raises:
        ValueError: If an image has no class.
    """
    table = ImageTable(source)
    labels, classes = table.labels()
    order = table.order(labels)
    return ImageFiles(
        Path(source.name),
        [table.names[i] for i in order],
        [labels[i] for i in order],
        classes,
        Rows(table, order),
    )
