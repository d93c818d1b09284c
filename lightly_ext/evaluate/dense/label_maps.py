"""Images with a class at each px, and which value of a label map is which class."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from lightly_ext.data import printable
from lightly_ext.evaluate.images import ImageFiles
from lightly_ext.evaluate.masks import MaskedImages, MaskedSample
from stellar_plugin.protocols import CropProtocol

# Class of px that count nowhere.
IGNORED = -1
_UNKNOWN = -2


@dataclass(frozen=True)
class ClassValues:
    """Which value of a label map is which class.

    Attributes:
        classes: Names of the classes, at least one.
        class_of: Class of each value, `IGNORED` for one that counts nowhere. Other
            values are errors.
    """

    classes: tuple[str, ...]
    class_of: Mapping[int, int]

    def __str__(self) -> str:
        """For the card of a protocol."""
        ignored = [str(v) for v, c in sorted(self.class_of.items()) if c == IGNORED]
        shown = ", ".join(ignored[:3]) + (", ..." if len(ignored) > 3 else "")
        names = ", ".join(self.classes[:3]) + (", ..." if len(self) > 3 else "")
        return f"{len(self)} ({names}); ignored values: {shown or 'none'}"

    def __len__(self) -> int:
        """Number of classes."""
        return len(self.classes)

    @cached_property
    def _table(self) -> Tensor:
        table = torch.full((max(self.class_of) + 2,), _UNKNOWN)
        table[list(self.class_of)] = torch.tensor(list(self.class_of.values()))
        return table

    def unknown(self, mask: Tensor) -> list[int]:
        """Values of label maps that are neither a class nor ignored, ascending."""
        values = mask.unique()
        return values[self._lookup(values) == _UNKNOWN].tolist()

    def __call__(self, mask: Tensor) -> Tensor:
        """Classes at the px of label maps without unknown values.

        Args:
            mask:
                Values, integers of any shape.

        Returns:
            Classes or `IGNORED`, int64 of the same shape.
        """
        return self._lookup(mask)

    def _lookup(self, mask: Tensor) -> Tensor:
        last = len(self._table) - 1  # no value: the table ends with an unknown one
        inside = (mask >= 0) & (mask < last)
        return self._table[torch.where(inside, mask, last).long()]


@dataclass(frozen=True)
class LabelledImages:
    """A part of a data set: images, and the label map of each.

    Attributes:
        files:
            The images.
        maps:
            Their label maps, in the same order.
        values:
            Which value is which class.
    """

    files: ImageFiles
    maps: ImageFiles
    values: ClassValues

    def __len__(self) -> int:
        return len(self.files)

    def limited(self, limit: int | None) -> LabelledImages:
        """At most `limit` images, see `ImageFiles.limited`."""
        files, maps = self.files.limited(limit), self.maps.limited(limit)
        return replace(self, files=files, maps=maps)

    def cut(self, protocol: CropProtocol, interpolation: str) -> MaskedImages:
        """The images and label maps, resized and cut alike; see `MaskedImages`."""
        paths = [self.maps.root / name for name in self.maps.names]
        return MaskedImages(self.files, paths, protocol, interpolation)

    def classes(self, batch: MaskedSample) -> Tensor:
        """Classes at the px of a batch that was loaded from `cut`.

        Args:
            batch:
                Tensors: masks with shape (batch_size, crop, crop), numbers and readable
                with shape (batch_size,).

        Returns:
            Classes, int64 with the shape of the masks; `IGNORED` in unreadable images.

        Raises:
            ValueError: If a label map has a value that is neither class nor ignored.
        """
        masks, readable = batch.mask, torch.as_tensor(batch.readable)
        unknown = self.values.unknown(masks[readable])
        if unknown:
            has = torch.isin(masks, torch.tensor(unknown)).flatten(1).any(dim=1)
            first = int(torch.as_tensor(batch.number)[has & readable][0])
            path = printable(self.maps.root / self.maps.names[first])
            raise ValueError(
                f"'{path}' has the value {unknown[0]}, which is no class: there are "
                f"{self.values}."
            )
        return torch.where(readable[:, None, None], self.values(masks), IGNORED)


@dataclass(frozen=True)
class SegmentationSet:
    """A training and a test part with the same classes.

    Attributes:
        name:
            Name of the set in tables.
        train:
            Images to learn from.
        test:
            Images to score on.
    """

    name: str
    train: LabelledImages
    test: LabelledImages

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes."""
        return self.train.values.classes

    @property
    def values(self) -> ClassValues:
        """Which value is which class."""
        return self.train.values

    def limited(self, limit: int | None) -> SegmentationSet:
        """At most `limit` images of each part, see `ImageFiles.limited`."""
        train, test = self.train.limited(limit), self.test.limited(limit)
        return replace(self, train=train, test=test)
