"""Features of many images, computed once and kept in files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightly_ext.data import printable
from lightly_ext.evaluate.devices import Devices
from lightly_ext.evaluate.frozen_model import FrozenModel
from lightly_ext.evaluate.images import (
    EvaluationImages,
    ImageFiles,
    Sample,
    centre_crop,
)
from lightly_ext.evaluate.resumable import DONE, Filled, ResumableArrays
from stellar_plugin.protocols import CropProtocol

Compute = Callable[[Tensor], Mapping[str, Tensor]]
UNREADABLE = 2  # beside the states TODO and DONE
MOST_UNREADABLE = 0.05
POOLED = "features"


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
    """

    arrays: Mapping[str, NDArray[np.generic]]
    readable: Tensor
    num_unreadable: int

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
        folder:
            Folder for the files, which all processes share.
    """

    model: FrozenModel
    devices: Devices
    folder: Path

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
        """Computes features of centre crops, or goes on where an earlier run ended.

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
            RuntimeError: If more than 5 % of the images are unreadable.
        """
        devices, folder = self.devices, self._folder(files, protocol, kind)
        transform = centre_crop(protocol, self.model.origin.interpolation)
        # Also finds out early whether the model takes images of this size.
        black = transform(torch.zeros(1, 3, 8, 8)).byte()
        shapes = {
            name: (value.dtype, (len(files), *value.shape[1:]))
            for name, value in _compute(devices, compute, black).items()
        }
        stored = ResumableArrays(devices, folder, shapes, len(files), "state")
        if len(stored.todo):
            cached = len(files) - len(stored.todo)
            if cached:
                devices.say(f"{cached} of {len(files)} images are cached.")
            loader = devices.loader(EvaluationImages(files, transform), stored.share)
            batches = devices.progress(loader, kind, len(loader))
            stored.fill(_filled(devices, compute, batches))
        devices.fabric.barrier()
        return _opened(devices, files, folder, list(shapes))

    def _folder(self, files: ImageFiles, protocol: CropProtocol, kind: str) -> Path:
        origin = self.model.origin
        identity = {
            "kind": kind,
            "model": origin.label,
            "sha256": origin.sha256,
            "mean": origin.mean,
            "std": origin.std,
            "interpolation": origin.interpolation,
            "precision": self.devices.precision,
            "resize": protocol.resize,
            "crop": protocol.crop,
            "images": files.fingerprint,
        }
        digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
        return self.folder / digest


def say_unreadable(
    devices: Devices, files: ImageFiles, unreadable: Sequence[int], remedy: str = ""
) -> None:
    """Says how many images could not be read, and which.

    Args:
        devices:
            Where it runs.
        files:
            All images.
        unreadable:
            Numbers of the unreadable ones.
        remedy:
            What else to do than to repair or to remove them.

    Raises:
        RuntimeError: If they are more than 5 %.
    """
    if not unreadable:
        return
    first = ", ".join(printable(files.root / files.names[i]) for i in unreadable[:3])
    text = f"{len(unreadable)} of {len(files)} images are unreadable ({first}"
    text += ", ...)" if len(unreadable) > 3 else ")"
    check_unreadable(len(unreadable), files, text, remedy)
    devices.say(f"Skipped: {text}.")


def check_unreadable(
    num_unreadable: int, files: ImageFiles, text: str = "", remedy: str = ""
) -> None:
    """Stops when too many images cannot be read; see `say_unreadable`.

    Raises:
        RuntimeError: If these are more than 5 % of the images.
    """
    if num_unreadable > MOST_UNREADABLE * len(files):
        count = f"{num_unreadable} of {len(files)} images in '{files.root}'"
        raise RuntimeError(
            f"{text or f'{count} are unreadable'}, too many for a score. Repair or "
            f"remove them{remedy}."
        )


def _filled(
    devices: Devices, compute: Compute, batches: Iterable[Sample]
) -> Iterator[Filled]:
    for batch in batches:
        rows = np.asarray(batch.number)
        state = np.where(np.asarray(batch.readable), DONE, UNREADABLE)
        yield Filled(rows, state, rows, _compute(devices, compute, batch.image))


def _compute(
    devices: Devices, compute: Compute, images: Tensor
) -> dict[str, NDArray[np.generic]]:
    with torch.no_grad(), devices.fabric.autocast():
        computed = compute(devices.fabric.to_device(images))
    return {name: values.cpu().numpy() for name, values in computed.items()}


def _opened(
    devices: Devices, files: ImageFiles, folder: Path, names: list[str]
) -> CachedFeatures:
    state = np.load(folder / "state.npy")
    unreadable = np.flatnonzero(state == UNREADABLE).tolist()
    say_unreadable(devices, files, unreadable, f" and delete '{folder}'")
    arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in names}
    readable = torch.from_numpy(np.flatnonzero(state == DONE))
    return CachedFeatures(arrays, readable, len(unreadable))
