"""Images in shards as a dataset."""

from __future__ import annotations

import itertools
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightly_ext.data.images import ImageDataset
from lightly_ext.data.reading import MAX_PIXELS
from lightly_ext.data.streams.order import num_lanes, plan_epoch
from lightly_ext.data.streams.read_ahead import BlockReader, in_thread
from lightly_ext.data.streams.shards import ParquetShard, open_shards
from lightly_ext.data.streams.sources import Source
from stellar_plugin.wording import counted

SHUFFLE_BUFFER = 4096
# Images that are read in a row where some of all are looked at.
_IN_A_ROW = 20


class StreamDataset(ImageDataset):
    """All images of tars, parquet or arrow files.

    Images are numbered in the order of the files. Broken images are passed over, see
    `ImageDataset`; a broken shard is an error.

    Attributes:
        source:
            The shards.
        path:
            Folder that all of them lie below.
        transform:
            Called with every image, a uint8 RGB tensor with shape (3, H, W). None
            returns the image.
        shuffle_buffer:
            Images that are shuffled with each other, of all processes: what training
            reads at a time, see `plan_epoch`. Of parquet, so many encoded images are in
            memory.
        max_pixels:
            Images with more pixels are unreadable.

    Raises:
        ValueError: If there is no image, or `shuffle_buffer` is not positive.
        OSError: If a shard is broken or cannot be read.

    Examples:
        >>> dataset = StreamDataset(find_source("shards/*.tar"), STELLARTransform())
        >>> views, index = dataset[0]

    """

    def __init__(
        self,
        source: Source,
        transform: Callable[[Tensor], Any] | None = None,
        shuffle_buffer: int = SHUFFLE_BUFFER,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        if shuffle_buffer < 1:
            raise ValueError(
                f"shuffle_buffer must be at least 1, got {shuffle_buffer}."
            )
        self.source = source
        self.shuffle_buffer = shuffle_buffer
        self.shards = open_shards(source)
        self.path = Path(os.path.commonpath([Path(s.path).parent for s in self.shards]))
        self._counts = tuple(map(len, self.shards))
        self._ends = np.cumsum(self._counts)
        super().__init__(sum(self._counts), transform, max_pixels)

    @property
    def location(self) -> str:
        """Where the shards are, for the record of a run."""
        afar = "://" in self.shards[0].path
        return self.source.name if afar else super().location

    @cached_property
    def fingerprint(self) -> str:
        """Tells other shards from these, by their names, sizes and numbers of images.

        A folder may be moved.
        """
        return f"{len(self)} images in {len(self.shards)} files ({self._digest:08x})"

    @property
    def _digest(self) -> int:
        told = [
            f"{name!r} {size} {count}"
            for (name, size), count in zip(self.files(), self._counts, strict=True)
        ]
        return zlib.crc32("\n".join(told).encode())

    def how_it_is_read(self) -> str:
        """Says in a line what the order is, and what it takes."""
        lanes, ahead = num_lanes(len(self.shards)), ""
        if self._is_read_ahead:
            size = sum(size for _, size in self.files()) / len(self)
            memory = min(self.shuffle_buffer, len(self)) * size / 1e6
            ahead = f"; up to {memory:.0f} MB of them in memory"
        return (
            f"Reads {counted(len(self), 'image')} in "
            f"{counted(len(self.shards), 'file')} ({self._digest:08x}), {lanes} at a "
            f"time, shuffled within {counted(self.shuffle_buffer, 'image')} "
            f"(--data.shuffle_buffer){ahead}."
        )

    def file(self, index: int) -> Path:
        """Returns the path of an image, behind that of its shard."""
        shard, number = self._place(index)
        name = self.shards[shard].name(number)
        return Path(f"{self.shards[shard].path}/{name}")

    def files(self) -> Iterator[tuple[bytes, int]]:
        """Yields the names of the shards and their sizes."""
        for shard in self.shards:
            name = os.path.relpath(Path(shard.path), self.path)
            yield os.fsencode(name), shard.num_bytes

    def encoded(self, index: int) -> bytes | Path:
        """Reads an encoded image."""
        shard, number = self._place(index)
        return self.shards[shard].read(number)

    def spread(self, count: int) -> Iterator[bytes | Path]:
        """Reads encoded images from places spread evenly, some in a row at each."""
        runs = -(-min(count, len(self)) // _IN_A_ROW)
        for run in range(runs):
            start = run * len(self) // runs
            stop = min(start + _IN_A_ROW, (run + 1) * len(self) // runs)
            while start < stop:
                shard, _ = self._place(start)
                end = min(stop, int(self._ends[shard]))
                yield from itertools.islice(self._read_from(start), end - start)
                start = end

    def order(self, seed: int, epoch: int) -> Tensor:
        """Order of the images in an epoch, see `plan_epoch`."""
        plan = plan_epoch(self._counts, seed, epoch, self.shuffle_buffer)
        return torch.from_numpy(plan.order)

    def read_ahead(
        self, numbers: Sequence[int], seed: int, epoch: int
    ) -> Iterator[bytes | Path | Exception | None]:
        """Yields encoded images where they can only be read forward, in parquet.

        From tars and arrow files workers read what they want.
        """
        if not self._is_read_ahead:
            return super().read_ahead(numbers, seed, epoch)
        plan = plan_epoch(self._counts, seed, epoch, self.shuffle_buffer)
        reader = BlockReader(plan, self._read_from, self._ends.tolist())
        return in_thread(reader.read(numbers))

    @property
    def _is_read_ahead(self) -> bool:
        return isinstance(self.shards[0], ParquetShard)

    def _read_from(self, index: int) -> Iterator[bytes | Path]:
        shard, number = self._place(index)
        return self.shards[shard].read_from(number)

    def _place(self, index: int) -> tuple[int, int]:
        """Shard of an image, and its number there."""
        shard = int(np.searchsorted(self._ends, index, "right"))
        return shard, index - int(self._ends[shard]) + self._counts[shard]
