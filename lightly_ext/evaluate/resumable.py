"""Arrays on disk that processes fill together, and go on with after an interruption."""

from __future__ import annotations

import math
import os
import shutil
import time
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightly_ext.durable import UNSUPPORTED
from lightly_ext.evaluate.devices import Devices

# dtype and shape of arrays, by the names of their files.
Arrays = Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]]
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
        arrays: Arrays,
        num_parts: int,
    ) -> None:
        self.devices = devices
        if devices.rank == 0:
            wanted = {**arrays, STATE: (np.dtype(np.uint8), (num_parts,))}
            if folder.exists() and not _intact(folder, wanted):
                devices.say(f"'{folder}' is damaged, so it is made anew.")
                shutil.rmtree(folder)
            if not folder.exists():
                _create(folder, wanted)
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


def read_arrays(
    folder: Path, names: Iterable[str]
) -> dict[str, NDArray[np.generic]] | None:
    """Memory-mapped arrays of a folder, None if one of the files is damaged."""
    try:
        return {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in names}
    except Exception:  # numpy raises anything on broken files
        return None


def _intact(folder: Path, arrays: Arrays) -> bool:
    # To read: a file that is opened to write and too short is filled up with zeros.
    found = read_arrays(folder, arrays)
    return found is not None and arrays == {
        name: (array.dtype, array.shape) for name, array in found.items()
    }


def _create(folder: Path, arrays: Arrays) -> None:
    """Makes a folder of arrays in one step, unless another run was faster.

    Raises:
        OSError: If they have no room; who wrote to a map without would be killed.
    """
    new = folder.with_name(f".{uuid.uuid4().hex}")
    try:
        new.mkdir(parents=True)
        for name, (dtype, shape) in arrays.items():
            path = new / f"{name}.npy"
            np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape).flush()
            _take_room(path)
    except OSError as error:
        shutil.rmtree(new, ignore_errors=True)
        size = sum(dtype.itemsize * math.prod(s) for dtype, s in arrays.values())
        raise OSError(
            f"'{folder}' needs {size / 2**20:.4g} MiB, which cannot be written: "
            f"{error.strerror}. Make room, or name another folder with --output."
        ) from error
    try:
        os.rename(new, folder)
    except OSError:
        if not folder.exists():
            raise
        shutil.rmtree(new)


def _take_room(path: Path) -> None:
    """Takes all blocks of a sparse file, where system and disk can."""
    if not hasattr(os, "posix_fallocate"):
        return
    with path.open("r+b") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
