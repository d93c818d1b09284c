"""Arrays on disk that processes fill together, and go on with after an interruption."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightly_ext.evaluate.devices import Devices

TODO, DONE = 0, 1
SECONDS_BETWEEN_WRITES = 10


class Filled(NamedTuple):
    """What a step computed.

    Attributes:
        parts: Numbers of the parts.
        state: State of each, or of all of them, uint8.
        rows: Rows of the arrays that belong to them.
        values: These rows by the name of the array.
    """

    parts: NDArray[np.int64]
    state: Any
    rows: Any
    values: Mapping[str, NDArray[np.generic]]


class ResumableArrays:
    """Memory-mapped arrays in a folder, and a file with the state of their parts.

    Args:
        devices:
            The processes, each of which fills a share.
        folder:
            Folder that all processes share.
        arrays:
            dtype and shape of each array, by the name of its file.
        num_parts:
            Number of parts that are filled one by one.
        state:
            Name of the file with the state of each part, `TODO` at first.
    """

    def __init__(
        self,
        devices: Devices,
        folder: Path,
        arrays: Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]],
        num_parts: int,
        state: str,
    ) -> None:
        path = folder / f"{state}.npy"
        if devices.rank == 0 and not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            for name, (dtype, shape) in arrays.items():
                _create(folder / f"{name}.npy", dtype, shape)
            _create(path, np.dtype(np.uint8), (num_parts,))  # tells that all are there
        devices.fabric.barrier()
        self.state = np.load(path, mmap_mode="r+")
        self.arrays = {n: np.load(folder / f"{n}.npy", mmap_mode="r+") for n in arrays}
        self.todo = np.flatnonzero(self.state == TODO)
        self.share: list[int] = self.todo[devices.rank :: devices.world_size].tolist()
        devices.fabric.barrier()  # nobody fills in before everybody has looked

    def fill(self, steps: Iterable[Filled]) -> None:
        """Stores steps; what is done is on disk within seconds, also after an error."""
        reached = np.array(self.state)
        written = time.monotonic()
        try:
            for parts, state, rows, values in steps:
                for name, value in values.items():
                    self.arrays[name][rows] = value
                reached[parts] = state
                if time.monotonic() > written + SECONDS_BETWEEN_WRITES:
                    self._write(reached)
                    written = time.monotonic()
        finally:
            self._write(reached)

    def _write(self, reached: NDArray[np.uint8]) -> None:
        """Puts values on disk, and only then that they are there."""
        for array in self.arrays.values():
            array.flush()
        # Other processes write the state of other parts.
        np.copyto(self.state, reached, where=reached != TODO)
        self.state.flush()


def _create(path: Path, dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
    np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape).flush()
