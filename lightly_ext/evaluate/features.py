"""Features of many images, computed once and kept in files.

CACHE/NUMERICS/IMAGES has a row per image, with the hash of the file that it is of. Rows
of the same content in other folders of the same numerics are copied: after a few images
have changed, only these are computed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightly_ext.data import printable
from lightly_ext.evaluate.devices import Devices
from lightly_ext.evaluate.fingerprints import Contents
from lightly_ext.evaluate.frozen_model import FrozenModel
from lightly_ext.evaluate.images import (
    EvaluationImages,
    ImageFiles,
    Sample,
    centre_crop,
)
from lightly_ext.evaluate.numerics import (
    image_versions,
    known_image,
    numerics,
    numerics_folder,
)
from lightly_ext.evaluate.resumable import (
    DONE,
    STATE,
    Filled,
    ResumableArrays,
    read_arrays,
)
from stellar_plugin.protocols import CropProtocol
from stellar_plugin.wording import are, counted

Compute = Callable[[Tensor], Mapping[str, Tensor]]
UNREADABLE = 2  # beside the states TODO and DONE
MOST_UNREADABLE = 0.05
POOLED = "features"
HASHES = "contents"
# Rows copied at once.
CHUNK = 1024


@dataclass(frozen=True)
class CachedFeatures:
    """Arrays on disk, one row per image, and which rows count.

    Attributes:
        arrays:
            Memory-mapped arrays by name, each with a row per image, unreadable ones
            included.
        readable:
            Numbers of the readable images, int64, ascending.
        num_unreadable:
            Number of images that could not be read.
        num_reused:
            Number of images whose features an earlier run computed.
    """

    arrays: Mapping[str, NDArray[np.generic]]
    readable: Tensor
    num_unreadable: int
    num_reused: int

    def rows(self, name: str) -> Tensor:
        """The rows of the readable images, in memory."""
        array = self.arrays[name]
        if self.num_unreadable:
            array = array[self.readable.numpy()]
        return torch.from_numpy(np.array(array))


@dataclass(frozen=True)
class FeatureCache:
    """Features of a model: computed once, by all processes, and kept in files.

    Attributes:
        model:
            The model.
        devices:
            Where it runs. Every process computes a share of the images.
        contents:
            What is in the images of this run; also says in which folder, that all
            processes share, the files are.
    """

    model: FrozenModel
    devices: Devices
    contents: Contents

    @property
    def folder(self) -> Path:
        """Folder for the files."""
        return self.contents.cache

    def pooled(
        self, files: ImageFiles, protocol: CropProtocol, feature: str
    ) -> CachedFeatures:
        """One vector per image, the float32 array `POOLED`; see `features`."""

        def compute(images: Tensor) -> dict[str, Tensor]:
            return {POOLED: self.model.pooled(images, feature)}

        return self.features(files, protocol, f"pooled {feature}", compute)

    def features(
        self, files: ImageFiles, protocol: CropProtocol, kind: str, compute: Compute
    ) -> CachedFeatures:
        """Computes features of centre crops, as far as no earlier run has.

        Images that could not be read are tried again.

        Args:
            files:
                The images.
            protocol:
                Says how they are cut.
            kind:
                Says what `compute` computes: another kind, another cache.
            compute:
                Maps uint8 images (batch_size, 3, crop, crop), on the device, to tensors
                with a row per image, whose other sizes are always the same.

        Raises:
            RuntimeError: If more than 5 % of the images are unreadable, or the features
                of one are not finite.
        """
        devices = self.devices
        transform = centre_crop(protocol, self.model.origin.interpolation)
        # Also finds out early whether the model takes images of this size.
        known = _compute(devices, compute, transform(known_image()))
        hashes = self.contents.hashes(files)
        identity = {
            **numerics(self.model, devices),
            "model": self.model.origin.label,
            "kind": kind,
            "resize": protocol.resize,
            "crop": protocol.crop,
        }
        cache = numerics_folder(self.folder, devices, identity, known, image_versions())
        folder = cache / hashlib.sha256(hashes.tobytes()).hexdigest()[:16]
        shapes = {n: (v.dtype, (len(files), *v.shape[1:])) for n, v in known.items()}
        arrays = {**shapes, HASHES: (hashes.dtype, hashes.shape)}
        stored = ResumableArrays(devices, folder, arrays, len(files))
        if devices.rank == 0:
            stored.fill(_reused(stored, folder, hashes))
        todo = stored.todo()
        num_reused = len(files) - len(todo)
        if num_reused:
            devices.say(
                f"{kind}: {num_reused} of {len(files)} features reused from "
                f"'{cache}', {len(todo)} to compute."
            )
        if len(todo):
            images = EvaluationImages(files, transform)
            loader = devices.loader(images, stored.share(_distinct(hashes, todo)))
            batches = devices.progress(loader, kind, len(loader))
            stored.fill(_filled(devices, compute, batches, hashes))
            devices.fabric.barrier()
            if devices.rank == 0:
                stored.fill(_reused(stored, folder, hashes))
        devices.fabric.barrier()
        return _opened(devices, files, folder, list(shapes), num_reused)


def check_present(files: ImageFiles) -> None:
    """Checks that listed images are there; a few that are not count as unreadable.

    Raises:
        FileNotFoundError: If more than 5 % are missing.
    """
    if files.rows is not None:
        return  # a table lists what it has
    missing = [name for name in files.names if not (files.root / name).is_file()]
    if len(missing) > MOST_UNREADABLE * len(files):
        raise FileNotFoundError(
            f"{len(missing)} of {len(files)} images are not in '{files.root}', for "
            f"example '{printable(missing[0])}'."
        )


def say_unreadable(
    devices: Devices, files: ImageFiles, unreadable: Sequence[int]
) -> None:
    """Says how many images could not be read, and which.

    Args:
        devices:
            Where it runs.
        files:
            All images.
        unreadable:
            Numbers of the unreadable ones.

    Raises:
        RuntimeError: If they are more than 5 %.
    """
    if unreadable:
        text = unreadable_text(files, unreadable)
        check_unreadable(len(unreadable), files, text)
        devices.say(f"Skipped: {text}.")


def unreadable_text(files: ImageFiles, unreadable: Sequence[int]) -> str:
    """How many of some images are unreadable, and the first of them."""
    first = ", ".join(files.shown(i) for i in unreadable[:3])
    more = ", ..." if len(unreadable) > 3 else ""
    number = len(unreadable)
    count = f"{number} of {counted(len(files), 'image')} {are(number)} unreadable"
    return f"{count} ({first}{more})"


def check_unreadable(num_unreadable: int, files: ImageFiles, text: str = "") -> None:
    """Stops when too many images cannot be read; see `say_unreadable`.

    Raises:
        RuntimeError: If these are more than 5 % of the images.
    """
    if num_unreadable > MOST_UNREADABLE * len(files):
        count = (
            f"{num_unreadable} of {counted(len(files), 'image')} in '{files.root}' "
            f"{are(num_unreadable)} unreadable"
        )
        raise RuntimeError(
            f"{text or count}, too many for a score. Repair or remove them."
        )


def _reused(
    stored: ResumableArrays, folder: Path, hashes: NDArray[np.bytes_]
) -> Iterator[Filled]:
    """Rows of the same contents in all folders, for what is not done yet."""
    wanted = np.flatnonzero(stored.state != DONE)
    others = (path.parent for path in folder.parent.glob(f"[!.]*/{STATE}.npy"))
    for other in sorted(others):
        if not len(wanted):
            return
        arrays = read_arrays(other, (STATE, *stored.arrays))
        if arrays is None:  # damaged
            continue
        done = np.flatnonzero(arrays.pop(STATE) == DONE)
        of_hash = dict(zip(arrays[HASHES][done].tolist(), done.tolist(), strict=True))
        found = [i for i in wanted if hashes[i] in of_hash]
        for chunk in (found[i : i + CHUNK] for i in range(0, len(found), CHUNK)):
            rows = np.array([of_hash[hashes[i]] for i in chunk])
            values = {name: array[rows] for name, array in arrays.items()}
            yield Filled(np.array(chunk), DONE, chunk, values)
        wanted = np.setdiff1d(wanted, found)


def _distinct(hashes: NDArray[np.bytes_], todo: NDArray[np.int64]) -> NDArray[np.int64]:
    """One image of each content, as copies of it have equal features; ascending."""
    known = hashes[todo] != b""  # the others may be anything
    firsts = np.unique(hashes[todo[known]], return_index=True)[1]
    return np.union1d(todo[known][firsts], todo[~known])


def _filled(
    devices: Devices,
    compute: Compute,
    batches: Iterable[Sample],
    hashes: NDArray[np.bytes_],
) -> Iterator[Filled]:
    for batch in batches:
        rows = np.asarray(batch.number)
        # What had no hash is of unknown content, though it may be readable now.
        readable = np.asarray(batch.readable) & (hashes[rows] != b"")
        values = _compute(devices, compute, batch.image) if readable.any() else {}
        state = np.where(readable, DONE, UNREADABLE)
        yield Filled(rows, state, rows, {**values, HASHES: hashes[rows]})


def _compute(
    devices: Devices, compute: Compute, images: Tensor
) -> dict[str, NDArray[np.generic]]:
    with torch.no_grad(), devices.fabric.autocast():
        computed = compute(devices.fabric.to_device(images))
    return {name: values.cpu().numpy() for name, values in computed.items()}


def _opened(
    devices: Devices,
    files: ImageFiles,
    folder: Path,
    names: list[str],
    num_reused: int,
) -> CachedFeatures:
    state = np.load(folder / f"{STATE}.npy")
    unreadable = np.flatnonzero(state != DONE).tolist()  # and copies of such
    say_unreadable(devices, files, unreadable)
    arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in names}
    readable = torch.from_numpy(np.flatnonzero(state == DONE))
    return CachedFeatures(arrays, readable, len(unreadable), num_reused)
