"""A bank of labelled patches, on disk, and the patches in it that are nearest."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from lightly_ext.evaluate.dense.label_maps import LabelledImages
from lightly_ext.evaluate.devices import Devices
from lightly_ext.evaluate.features import UNREADABLE
from lightly_ext.evaluate.frozen_model import FrozenModel, select_tokens
from lightly_ext.evaluate.masks import MaskedSample
from lightly_ext.evaluate.numerics import (
    image_versions,
    known_image,
    numerics,
    numerics_folder,
)
from lightly_ext.evaluate.reduction import count_unreadable
from lightly_ext.evaluate.results import Results
from lightly_ext.evaluate.resumable import DONE, Arrays, Filled, ResumableArrays
from stellar_plugin.protocols import InContextProtocol

FEATURES, COUNTS, PX = "patches", "counts", "px"
# Entries whose features are on the device at once, and numbers of a block of
# similarities: 200 MB of ViT-B, 128 MB.
ENTRIES_AT_ONCE = 2**16
NUMBERS_AT_ONCE = 2**25
ROWS_AT_ONCE = 2**18


class Neighbours(NamedTuple):
    """The nearest entries of some patches.

    Attributes:
        similarities: Cosines, float32 with shape (num_patches, neighbours).
        rows: Their rows in the bank, int64 with the same shape, ascending.
    """

    similarities: Tensor
    rows: Tensor


@dataclass(frozen=True)
class Bank:
    """Labelled patches of training images.

    Attributes:
        features:
            Unit vectors, float16 with shape (num_rows, dim), on disk.
        counts:
            Px of each class in the patch, with shape (num_rows, num_classes), on disk;
            rows without any are no entries.
        px:
            Px of each class in the crops of all training images, int64 with shape
            (num_classes,).
        num_unreadable:
            Number of training images that could not be read.
        num_reused:
            Number of training images that an earlier run put in.
    """

    features: NDArray[np.generic]
    counts: NDArray[np.generic]
    px: Tensor
    num_unreadable: int
    num_reused: int

    def __len__(self) -> int:
        return len(self.entries)

    @cached_property
    def entries(self) -> NDArray[np.int64]:
        """Rows of the entries, ascending."""
        has = [block.any(axis=1) for block in self._count_blocks()]
        return np.flatnonzero(np.concatenate(has))

    @cached_property
    def classes(self) -> Tensor:
        """Whether an entry has px of a class, bool with shape (num_classes,)."""
        has = [block.any(axis=0) for block in self._count_blocks()]
        return torch.from_numpy(np.stack(has).any(axis=0))

    def shares(self, rows: Tensor) -> Tensor:
        """Label distributions of entries.

        Args:
            rows:
                Rows of entries, int64 of any shape.

        Returns:
            Shares of the classes among the px that count, float64 with shape
            (*rows.shape, num_classes).
        """
        counts = torch.from_numpy(self.counts[rows.numpy()].astype(np.float64))
        return counts / counts.sum(dim=-1, keepdim=True)

    def nearest(self, patches: Tensor, neighbours: int) -> list[Neighbours]:
        """The entries that are most similar to each patch; of equal ones the first.

        Exact: every entry is compared, in blocks. Each image is computed alone, so that
        the others of its batch do not decide.

        Args:
            patches:
                Features of images, with shape (num_images, num_patches, dim).
            neighbours:
                Number of entries to find, at most `len(self)`.

        Returns:
            What was found, by image, on the CPU.
        """
        with torch.autocast(patches.device.type, enabled=False):
            queries = F.normalize(patches.float(), dim=2)
            found: list[Neighbours | None] = [None] * len(queries)
            for start, block in self._blocks(queries):
                for i, query in enumerate(queries):
                    best = _best(query @ block.T, start, neighbours)
                    found[i] = _merged(found[i], best, neighbours)
        entries = torch.from_numpy(self.entries)
        return [
            Neighbours(best.similarities.cpu(), entries[best.rows.cpu()])
            for best in found
            if best is not None
        ]

    def _count_blocks(self) -> Iterator[NDArray[np.generic]]:
        for start in range(0, len(self.counts), ROWS_AT_ONCE):
            yield self.counts[start : start + ROWS_AT_ONCE]

    def _blocks(self, queries: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Features of successive entries on the device of queries, and their start."""
        size = max(1, min(ENTRIES_AT_ONCE, NUMBERS_AT_ONCE // queries.shape[1]))
        for start in range(0, len(self), size):
            block = self.features[self.entries[start : start + size]]
            yield start, torch.from_numpy(block).to(queries.device).float()


def first_largest(values: Tensor, num: int) -> Tensor:
    """Columns of the largest values of each row, of equal ones the first.

    Args:
        values:
            Tensor with shape (num_rows, num_columns).
        num:
            Number of columns, at most `num_columns`.

    Returns:
        int64 tensor with shape (num_rows, num), ascending.
    """
    largest, columns = values.topk(min(num + 1, values.shape[1]), dim=1)
    least, columns = largest[:, num - 1 : num], columns[:, :num].sort(dim=1).values
    # Where the next one is equal too, `topk` leaves open which it takes.
    tied = (least == largest[:, num:]).any(dim=1)
    if tied.any():
        of_tied, least = values[tied], least[tied]
        above, equal = of_tied > least, of_tied == least
        room = num - above.sum(dim=1, keepdim=True)
        taken = above | (equal & (equal.cumsum(dim=1, dtype=torch.int32) <= room))
        columns[tied] = taken.nonzero()[:, 1].view(-1, num)
    return columns


def _best(similarities: Tensor, start: int, num: int) -> Neighbours:
    columns = first_largest(similarities, min(num, similarities.shape[1]))
    return Neighbours(similarities.gather(1, columns), start + columns)


def _merged(one: Neighbours | None, other: Neighbours, num: int) -> Neighbours:
    """The best of both, in the order of rows: of equal ones the first stay."""
    if one is None:
        return other
    similarities, rows = (torch.cat(p, dim=1) for p in zip(one, other, strict=True))
    best = _best(similarities, 0, num)
    return Neighbours(best.similarities, rows.gather(1, best.rows))


def build_bank(
    model: FrozenModel,
    devices: Devices,
    results: Results,
    images: LabelledImages,
    protocol: InContextProtocol,
) -> Bank:
    """Puts patches of all training images into a bank, as far as no earlier run has.

    Args:
        model:
            What computes features.
        devices:
            The processes, each of which fills a share.
        results:
            Where the bank is kept.
        images:
            The training images; of fewer patches than images, some of them.
        protocol:
            Says how they are cut, which features are taken and how many.

    Raises:
        ValueError: If a label map has a value that is no class.
        RuntimeError: If too many images are unreadable, or features are not finite.
    """
    images = images.limited(protocol.bank)  # of each at least one
    filling = _Filling(model, devices, images, protocol)
    folder = _folder(filling, results)
    stored = ResumableArrays(devices, folder, filling.arrays, len(images))
    todo = stored.todo()
    num_reused = len(images) - len(todo)
    if num_reused:
        devices.say(f"Bank: {num_reused} of {len(images)} images are in it already.")
    if len(todo):
        cut: Any = images.cut(protocol, model.origin.interpolation)
        loader: Any = devices.loader(cut, stored.share(todo))
        stored.fill(filling.steps(devices.progress(loader, "bank", len(loader))))
    devices.fabric.barrier()
    unreadable = np.flatnonzero(stored.state != DONE).tolist()
    features, counts = (
        stored.arrays[name].reshape(-1, size) for name, size in filling.sizes.items()
    )
    bank = Bank(
        features,
        counts,
        torch.from_numpy(stored.arrays[PX].sum(axis=0)),
        count_unreadable(devices, images.files, unreadable),
        num_reused,
    )
    size = sum(array.nbytes for array in (bank.features, bank.counts)) / 2**20
    devices.say(
        f"Bank: {len(bank)} patches of {len(images)} images, at most {filling.quota} "
        f"of {math.prod(filling.grid)} of an image; {size:.4g} MiB in '{folder}'."
    )
    return bank


def _folder(filling: _Filling, results: Results) -> Path:
    """Folder of a bank: another one for all that decides on its rows."""
    devices, protocol = filling.devices, filling.protocol
    identity = {
        **numerics(filling.model, devices),
        "kind": f"bank of {protocol.features}",
        "resize": protocol.resize,
        "crop": protocol.crop,
    }
    known = {FEATURES: filling.known.cpu().numpy()}
    cache = numerics_folder(results.cache, devices, identity, known, image_versions())
    images = filling.images
    inputs = results.fingerprint(images.files, images.maps)
    classes = sorted(images.values.class_of.items())
    decides = json.dumps([inputs, classes, filling.quota, devices.seed])
    return cache / hashlib.sha256(decides.encode()).hexdigest()[:16]


class _Filling:
    """Computes the rows of images: as many for each."""

    def __init__(
        self,
        model: FrozenModel,
        devices: Devices,
        images: LabelledImages,
        protocol: InContextProtocol,
    ) -> None:
        self.model = model
        self.devices = devices
        self.images = images
        self.protocol = protocol
        self.grid = model.map_size(protocol.crop)
        self.quota = min(math.prod(self.grid), protocol.bank // len(images))

        # Features of one input tell what hashes do not: how the code reads weights.
        self.known = self.features(known_crop(protocol.crop))
        self.sizes = {FEATURES: self.known.shape[-1], COUNTS: len(images.values)}

    @property
    def arrays(self) -> Arrays:
        """Dtypes and shapes on disk."""
        most_px = math.prod(-(-self.protocol.crop // side) for side in self.grid)
        dtypes = {FEATURES: np.dtype(np.float16), COUNTS: np.min_scalar_type(most_px)}
        num = len(self.images)
        rows = {n: (dtypes[n], (num, self.quota, s)) for n, s in self.sizes.items()}
        return {**rows, PX: (np.dtype(np.int64), (num, self.sizes[COUNTS]))}

    def features(self, images: Tensor) -> Tensor:
        """Features of the patches of uint8 images, see `patch_features`."""
        return patch_features(self.model, self.devices, images, self.protocol.features)

    def steps(self, batches: Iterable[MaskedSample]) -> Iterator[Filled]:
        """Fills in batches of images."""
        for batch in batches:
            numbers, readable = np.asarray(batch.number), np.asarray(batch.readable)
            labels = self.images.classes(batch)
            counts = patch_counts(labels, self.grid, len(self.images.values))
            patches = F.normalize(self.features(batch.image), dim=2).half().cpu()
            rows = [
                self._sampled(int(number), counts[i], patches[i])
                for i, number in enumerate(numbers)
            ]
            values = {
                FEATURES: torch.stack([features for features, _ in rows]).numpy(),
                COUNTS: torch.stack([of_classes for _, of_classes in rows]).numpy(),
                PX: counts.sum(dim=1).numpy(),
            }
            state = np.where(readable, DONE, UNREADABLE)
            yield Filled(numbers, state, numbers, values)

    def _sampled(
        self, number: int, counts: Tensor, patches: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The entries of an image, and rows of zeros behind them."""
        chosen = sample_patches(counts, self.quota, (self.devices.seed, number))
        room = (0, 0, 0, self.quota - len(chosen))
        return F.pad(patches[chosen], room), F.pad(counts[chosen], room)


def patch_features(
    model: FrozenModel, devices: Devices, images: Tensor, feature: str
) -> Tensor:
    """Features of the patches of images.

    Args:
        model:
            What computes them.
        devices:
            Where it runs.
        images:
            uint8 tensor with shape (batch_size, 3, height, width).
        feature:
            "dense" or "lowrank".

    Returns:
        Float32 tensor on the device with shape (batch_size, num_patches, dim).
    """
    with torch.no_grad(), devices.fabric.autocast():
        result = model(devices.fabric.to_device(images))
        return select_tokens(result, feature).float()


def patch_counts(labels: Tensor, grid: tuple[int, int], num_classes: int) -> Tensor:
    """Px of each class in each patch.

    Args:
        labels:
            Classes, int64 with shape (batch_size, height, width); negative ones count
            nowhere.
        grid:
            Rows and columns of patches.
        num_classes:
            Number of classes.

    Returns:
        Counts, int64 with shape (batch_size, num_patches, num_classes).
    """
    rows, columns = (
        torch.arange(side) * cells // side
        for side, cells in zip(labels.shape[1:], grid, strict=True)
    )
    cells = rows[:, None] * grid[1] + columns
    cells = cells + torch.arange(len(labels))[:, None, None] * math.prod(grid)
    valid = labels >= 0
    pairs = cells[valid] * num_classes + labels[valid]
    size = (len(labels), math.prod(grid), num_classes)
    return torch.bincount(pairs, minlength=math.prod(size)).view(size)


def sample_patches(counts: Tensor, quota: int, seed: tuple[int, int]) -> Tensor:
    """Chooses entries of an image, rather those whose classes are rare in it.

    A patch is taken if a uniform number times the sum, over its classes, of how many
    patches have them is among the smallest. One whose px are all ignored is never.

    Args:
        counts:
            Px of each class in each patch, with shape (num_patches, num_classes).
        quota:
            Number of patches to take, if there are as many.
        seed:
            Decides on the numbers: seed of the run and number of the image.

    Returns:
        Numbers of patches, int64, ascending.
    """
    has = (counts > 0).double()
    scores = has @ has.sum(dim=0)
    scores *= torch.from_numpy(np.random.default_rng(seed).random(len(counts)))
    scores[~has.any(dim=1)] = math.inf
    order = scores.argsort(stable=True)[: min(quota, int(has.any(dim=1).sum()))]
    return order.sort().values


def known_crop(side: int) -> Tensor:
    """Colours in the size of a crop, uint8 with shape (1, 3, side, side).

    Nearest: what is computed between px is rounded otherwise by other numbers of
    threads, and a run with these would not find the bank.
    """
    return F.interpolate(known_image(), size=(side, side), mode="nearest")
