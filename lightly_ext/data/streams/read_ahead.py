"""Reading of shards that lie ahead, while a step is computed."""

from __future__ import annotations

import bisect
import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np

from lightly_ext.data.streams.order import EpochPlan

T = TypeVar("T")
# Images that a thread takes at once, and how often: so many are read ahead.
_CHUNK, _CHUNKS = 32, 8


def in_thread(items: Iterator[T]) -> Iterator[T | Exception]:
    """Runs an iterator in a thread that is up to 256 items ahead.

    Args:
        items:
            What to iterate over, nowhere else.

    Yields:
        The items, and at the end what they raise.
    """
    pool = ThreadPoolExecutor(1, "read-ahead")
    safe = _with_error(items)

    def take() -> list[T | Exception]:
        return list(itertools.islice(safe, _CHUNK))

    try:
        pending = deque(pool.submit(take) for _ in range(_CHUNKS))
        while taken := pending.popleft().result():
            pending.append(pool.submit(take))
            yield from taken
    finally:  # also where the iteration is given up
        pool.shutdown(wait=False, cancel_futures=True)


def _with_error(items: Iterator[T]) -> Iterator[T | Exception]:
    try:
        yield from items
    # A loader whose sampler raises leaves workers behind, for which its process waits.
    except Exception as error:
        yield error


class BlockReader:
    """Reads the images of a plan forward, and keeps those that are wanted later.

    Attributes:
        held:
            Encoded images by their numbers; at most a block of each lane.
    """

    def __init__(
        self,
        plan: EpochPlan,
        read_from: Callable[[int], Iterator[bytes | Path]],
        ends: Sequence[int],
    ) -> None:
        """Reads nothing yet.

        Args:
            plan:
                Of the epoch.
            read_from:
                Reads the images of a shard forward from the one with this number.
            ends:
                Numbers behind the last image of every shard.
        """
        self.plan = plan
        self.held: dict[int, bytes | Path] = {}
        self._read_from = read_from
        self._ends = ends
        self._lanes: dict[int, tuple[int, Iterator[bytes | Path]]] = {}

    def read(self, numbers: Sequence[int]) -> Iterator[bytes | Path]:
        """Yields images of the epoch.

        Args:
            numbers:
                Of the images, each once, in the order of the plan.
        """
        wanted = np.zeros(len(self.plan.sequence), bool)
        wanted[numbers] = True
        places = np.empty_like(self.plan.sequence)
        places[self.plan.sequence] = np.arange(len(places))
        for number in numbers:
            if number not in self.held:
                self._read_block(int(places[number]), wanted)
            yield self.held.pop(number)

    def _read_block(self, place: int, wanted: np.ndarray) -> None:
        """Reads the block of an image, by the place of that in the sequence."""
        plan = self.plan
        block = int(np.searchsorted(plan.blocks, place, "right"))
        start, stop = plan.blocks[block - 1 : block + 1].tolist()
        lane = int(np.searchsorted(plan.lanes, place, "right"))
        at, images = self._lanes.get(lane, (-1, iter(())))
        if at != start:
            images = self._images(start)
        self._lanes[lane] = stop, images
        for number in plan.sequence[start:stop].tolist():
            data = next(images)
            if wanted[number]:
                self.held[number] = data

    def _images(self, start: int) -> Iterator[bytes | Path]:
        """All images of the sequence from a place on."""
        while start < len(self.plan.sequence):
            first = int(self.plan.sequence[start])
            end = self._ends[bisect.bisect_right(self._ends, first)]
            yield from self._read_from(first)
            start += end - first
