"""Arrays on disk that processes fill together, and go on with after an interruption."""

from __future__ import annotations

import os
import shutil
import time
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightly_ext.evaluate.devices import Devices

TODO, DONE = 0, 1
STATE = "state"
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

    The folder gets its name when all files are there. Several runs may fill the same
    arrays: what one puts into a part, the others put there too.

    Args:
        devices:
            The processes, each of which fills a share.
        folder:
            Folder that all processes share.
        arrays:
            dtype and shape of each array, by the name of its file.
        num_parts:
            Number of parts that are filled one by one.
    """

    def __init__(
        self,
        devices: Devices,
        folder: Path,
        arrays: Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]],
        num_parts: int,
    ) -> None:
        self.devices = devices
        if devices.rank == 0 and not folder.exists():
            state = {STATE: (np.dtype(np.uint8), (num_parts,))}
            _create(folder, {**arrays, **state})
        devices.fabric.barrier()
        self.state = np.load(folder / f"{STATE}.npy", mmap_mode="r+")
        self.arrays = {n: np.load(folder / f"{n}.npy", mmap_mode="r+") for n in arrays}

    def todo(self) -> NDArray[np.int64]:
        """Numbers of the parts that are not done, the same in all processes."""
        # As the first one sees it: other runs may fill the arrays too.
        return self.devices.fabric.broadcast(np.flatnonzero(self.state != DONE))

    def share(self, todo: NDArray[np.int64]) -> list[int]:
        """Those that this process has to fill."""
        return todo[self.devices.rank :: self.devices.world_size].tolist()

    def fill(self, steps: Iterable[Filled]) -> None:
        """Stores steps; what is done is on disk within seconds, also after an error."""
        reached = np.zeros_like(self.state)
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


def _create(
    folder: Path, arrays: Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]]
) -> None:
    """Makes a folder of arrays in one step, unless another run was faster."""
    new = folder.with_name(f".{uuid.uuid4().hex}")
    new.mkdir(parents=True)
    for name, (dtype, shape) in arrays.items():
        path = new / f"{name}.npy"
        np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape).flush()
    try:
        os.rename(new, folder)
    except OSError:
        if not folder.exists():
            raise
        shutil.rmtree(new)
