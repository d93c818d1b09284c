"""Images of shards in random order: their names, and their classes."""

from __future__ import annotations

import bisect
import hashlib
import itertools
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path, PurePath
from typing import Any

from lightly_ext.data.listing import printable
from lightly_ext.data.streams.columns import check_class_names
from lightly_ext.data.streams.labels import Labels, read_labels
from lightly_ext.data.streams.shards import (
    ArrowShard,
    ParquetShard,
    TarShard,
    open_shards,
)
from lightly_ext.data.streams.sources import Source, import_datasets


class ImageTable:
    """Images inside of larger files, any of which can be read at any time.

    Tars and arrow files are read where they lie. Parquet is made arrow first, once, in
    the cache of `datasets`, and so are data sets of the hub; tars of the hub are
    downloaded.

    Attributes:
        name:
            As the source was given.
        names:
            A name of each image, no two the same: as in its tar or its table; below the
            name of the tar if several have it; a number if a table has no names.
        files:
            The files that are read: as long as none changes, no image does.

    Args:
        source:
            The shards.

    Raises:
        ValueError: If there is no image, or no column of images.
        OSError: If a shard is broken or cannot be read.
        ImportError: If the extra [stream] is needed and missing.
    """

    def __init__(self, source: Source) -> None:
        self.name = source.name
        is_parquet = source.builder == "parquet" and "://" not in source.files[0]
        self._parquet = source.files if is_parquet else ()
        self._shards = open_shards(_local(source), named=True)
        self._ends = list(itertools.accumulate(map(len, self._shards)))
        self.files = [Path(shard.path) for shard in self._shards]
        self.names = self._names()

    def __len__(self) -> int:
        """Returns the number of images, unreadable ones included."""
        return self._ends[-1]

    def read(self, index: int) -> bytes | Path:
        """An image as `read_image` takes it.

        Args:
            index:
                Number of the image, 0 <= index < len(self).

        Raises:
            OSError: If its shard cannot be read any more.
        """
        shard, number = self._place(index)
        return shard.read(number)

    def shown(self, index: int) -> str:
        """Where an image is, for messages: shard/name."""
        shard, _ = self._place(index)
        if isinstance(shard, TarShard):
            name = self.names[index].removeprefix(f"{self._tar(index)}/")
            return f"{shard.path}/{name}"
        return f"{self.name}/{self.names[index]}"

    def labels(self) -> Labels:
        """Classes of all images, see `read_labels`."""
        if self._parquet:  # made arrow, all files have the names of the first
            check_class_names((p, ParquetShard(p).schema) for p in self._parquet)
        return read_labels(self._shards, self.shown)

    def order(self, labels: Sequence[int] | None = None) -> list[int]:
        """Numbers of the images in the order of a folder: by class, if told, and name.

        Args:
            labels:
                Class of each image.
        """
        if labels is not None:
            return sorted(range(len(self)), key=lambda i: (labels[i], self.names[i]))
        # All of a folder before what only begins like it.
        return sorted(range(len(self)), key=lambda i: self.names[i].replace("/", "\0"))

    def _place(self, index: int) -> tuple[Any, int]:
        """Its shard, and the number in it."""
        number = bisect.bisect_right(self._ends, index)
        return self._shards[number], index - (self._ends[number - 1] if number else 0)

    def _names(self) -> list[str]:
        names: list[Any] = []
        for shard in self._shards:
            if isinstance(shard, ArrowShard):
                names += shard.paths()
            else:
                found = (shard.name(number) for number in range(len(shard)))
                names += [name.removeprefix("./") for name in found]
        if isinstance(self._shards[0], TarShard) and len(set(names)) < len(names):
            names = [f"{self._tar(i)}/{name}" for i, name in enumerate(names)]
        if not all(names) or len(set(names)) < len(names):
            width = len(str(len(names)))
            return [f"{number:0{width}}" for number in range(len(names))]
        if all(map(os.path.isabs, names)):
            folder = os.path.commonpath([PurePath(name).parent for name in names])
            return [os.path.relpath(name, folder) for name in names]
        return names

    def _tar(self, index: int) -> str:
        """Path of the tar of an image below the folder of all of them."""
        return self._tars[bisect.bisect_right(self._ends, index)]

    @cached_property
    def _tars(self) -> list[str]:
        folder = os.path.commonpath([path.absolute().parent for path in self.files])
        return [os.path.relpath(path.absolute(), folder) for path in self.files]


def _local(source: Source) -> Source:
    """The same images in local files that are read in any order.

    Raises:
        OSError: If the hub cannot be reached, or the cache cannot be written.
        ImportError: If the extra [stream] is needed and missing.
    """
    afar = any("://" in file for file in source.files)
    if source.builder in ("webdataset", "arrow") and not afar:
        return source
    datasets = import_datasets(source.name)
    if source.builder == "webdataset":
        found = datasets.DownloadManager().download(list(source.files))
        return replace(source, files=tuple(map(str, found)))
    try:
        if source.dataset is None:
            found = datasets.load_dataset(
                source.builder,
                _state(source.files),
                data_files=list(source.files),
                split="train",
            )
        else:
            found = datasets.load_dataset(
                source.dataset, source.config, split=source.split
            )
    except datasets.exceptions.DatasetGenerationError as error:
        raise OSError(
            f"{printable(source.name)} cannot be read: {error.__cause__ or error}"
        ) from error
    files = tuple(file["filename"] for file in found.cache_files)
    return replace(source, builder="arrow", files=files)


def _state(files: Sequence[str]) -> str:
    """Tells files from others of the same names, also of the same time of change."""
    stats = [os.stat(file) for file in files]
    stamps = [(s.st_size, s.st_mtime_ns, s.st_ctime_ns) for s in stats]
    return hashlib.sha256(repr(stamps).encode()).hexdigest()[:16]
