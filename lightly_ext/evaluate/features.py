"""Features of many images, computed once and kept in files."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightly_ext.evaluate.images import EvaluationImages, ImageFiles, centre_crop
from lightly_ext.evaluate.session import Session
from stellar_plugin.protocols import CropProtocol

Compute = Callable[[Tensor], Mapping[str, Tensor]]
TODO, DONE, UNREADABLE = 0, 1, 2
MOST_UNREADABLE = 0.05
SECONDS_BETWEEN_WRITES = 10


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


def pooled_features(
    session: Session, files: ImageFiles, protocol: CropProtocol, feature: str
) -> tuple[Tensor, Tensor, int]:
    """One vector per image, as kNN and linear probes use it.

    Args:
        session:
            Gives model and devices.
        files:
            Images with labels.
        protocol:
            Says how images are cut.
        feature:
            One of `FEATURES`.

    Returns:
        Features, float32 with shape (num_readable, dim); labels, int64 with shape
        (num_readable,); number of unreadable images.
    """
    cached = cache_pooled(session, files, protocol, feature)
    labels = files.label_tensor[cached.readable]
    return cached.rows("features"), labels, cached.num_unreadable


def cache_pooled(
    session: Session, files: ImageFiles, protocol: CropProtocol, feature: str
) -> CachedFeatures:
    """The cache of one vector per image, the array "features"; see `cache_features`."""
    return cache_features(
        session,
        files,
        protocol,
        f"pooled {feature}",
        lambda images: {"features": session.model.pooled(images, feature)},
    )


def cache_features(
    session: Session,
    files: ImageFiles,
    protocol: CropProtocol,
    kind: str,
    compute: Compute,
) -> CachedFeatures:
    """Computes features of centre crops, or continues where an earlier run ended.

    Every process computes a share of the images; all of them read the same files
    afterwards, so `session.output` must be a folder that they share.

    Args:
        session:
            Gives model, devices and the folder for the cache.
        files:
            The images.
        protocol:
            Says how they are cut.
        kind:
            Says what `compute` computes: another kind, another cache.
        compute:
            Maps uint8 images (batch_size, 3, crop, crop), on the device, to tensors
            with a row per image, whose other sizes are always the same.

    Returns:
        The features.

    Raises:
        RuntimeError: If more than 5 % of the images are unreadable.
    """
    folder = _cache_folder(session, files, protocol, kind)
    transform = centre_crop(protocol, session.model.origin.interpolation)
    images = EvaluationImages(files, transform)
    # Also finds out early whether the model takes images of this size.
    shapes = _compute(session, compute, transform(torch.zeros(1, 3, 8, 8)).byte())
    if session.rank == 0:
        _create(folder, len(files), shapes)
    session.fabric.barrier()
    state = np.load(folder / "state.npy", mmap_mode="r+")
    arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r+") for name in shapes}
    todo = np.flatnonzero(state == TODO)
    session.fabric.barrier()  # nobody fills in before everybody has looked
    if len(todo):
        if len(todo) < len(files):
            session.say(f"{len(files) - len(todo)} of {len(files)} images are cached.")
        share = todo[session.rank :: session.world_size].tolist()
        loader = session.loader(images, share)
        batches = session.progress(loader, kind, len(loader))
        _fill(batches, partial(_compute, session, compute), arrays, state)
    session.fabric.barrier()
    return _opened(session, files, folder, list(shapes))


def say_unreadable(
    session: Session, files: ImageFiles, unreadable: Sequence[int], remedy: str = ""
) -> None:
    """Says how many images could not be read, and which.

    Args:
        session:
            The run.
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
    first = ", ".join(str(files.root / files.names[i]) for i in unreadable[:3])
    text = f"{len(unreadable)} of {len(files)} images are unreadable ({first}"
    text += ", ...)" if len(unreadable) > 3 else ")"
    if len(unreadable) > MOST_UNREADABLE * len(files):
        raise RuntimeError(
            f"{text}, too many for a score. Repair or remove them{remedy}."
        )
    session.say(f"Skipped: {text}.")


def _fill(
    batches: Iterable[Any],
    compute: Callable[[Tensor], Mapping[str, Tensor]],
    arrays: Mapping[str, np.memmap[Any, Any]],
    state: np.memmap[Any, Any],
) -> None:
    """Computes batches; what is done is on disk within seconds, also after an error."""
    reached = np.array(state)
    written = time.monotonic()
    try:
        for batch in batches:
            rows = batch.number.numpy()
            for name, values in compute(batch.image).items():
                arrays[name][rows] = values.cpu().numpy()
            reached[rows] = np.where(batch.readable.numpy(), DONE, UNREADABLE)
            if time.monotonic() > written + SECONDS_BETWEEN_WRITES:
                _write(arrays, state, reached)
                written = time.monotonic()
    finally:
        _write(arrays, state, reached)


def _write(
    arrays: Mapping[str, np.memmap[Any, Any]],
    state: np.memmap[Any, Any],
    reached: NDArray[np.uint8],
) -> None:
    """Puts features on disk, and only then that they are there."""
    for array in arrays.values():
        array.flush()
    # Other processes write the state of other images.
    np.copyto(state, reached, where=reached != TODO)
    state.flush()


def _compute(session: Session, compute: Compute, images: Tensor) -> dict[str, Tensor]:
    with torch.no_grad(), session.fabric.autocast():
        return dict(compute(session.fabric.to_device(images)))


def _create(folder: Path, num_images: int, shapes: Mapping[str, Tensor]) -> None:
    """Makes the files, unless they are there; the one that tells so comes last."""
    if (folder / "state.npy").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    for name, example in shapes.items():
        dtype = example[:0].cpu().numpy().dtype
        _empty(folder / f"{name}.npy", dtype, (num_images, *example.shape[1:]))
    _empty(folder / "state.npy", np.dtype(np.uint8), (num_images,))


def _empty(path: Path, dtype: np.dtype[np.generic], shape: tuple[int, ...]) -> None:
    np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape).flush()


def _opened(
    session: Session, files: ImageFiles, folder: Path, names: list[str]
) -> CachedFeatures:
    state = np.load(folder / "state.npy")
    unreadable = np.flatnonzero(state == UNREADABLE).tolist()
    say_unreadable(session, files, unreadable, f" and delete '{folder}'")
    arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in names}
    readable = torch.from_numpy(np.flatnonzero(state == DONE))
    return CachedFeatures(arrays, readable, len(unreadable))


def _cache_folder(
    session: Session, files: ImageFiles, protocol: CropProtocol, kind: str
) -> Path:
    origin = session.model.origin
    identity = {
        "kind": kind,
        "model": origin.source,
        "sha256": origin.sha256,
        "mean": origin.mean,
        "std": origin.std,
        "interpolation": origin.interpolation,
        "precision": session.precision,
        "resize": protocol.resize,
        "crop": protocol.crop,
        "images": files.fingerprint,
    }
    digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
    return session.output / "cache" / digest
