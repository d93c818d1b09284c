"""Means over images that several processes measured, and what they could not read."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightly_ext.evaluate.devices import Devices
from lightly_ext.evaluate.features import say_unreadable
from lightly_ext.evaluate.finite import not_finite
from lightly_ext.evaluate.images import EvaluationImages, ImageFiles, Sample

Name = TypeVar("Name", bound=Hashable)


class Mean(NamedTuple):
    """Mean of a number over images.

    Attributes:
        value: The mean.
        standard_error: Standard deviation over images / sqrt(num_images), 0 for one.
        num_images: Number of images.
    """

    value: float
    standard_error: float
    num_images: int


class ImageMeans(Generic[Name]):
    """Collects named numbers of images, in float64.

    Args:
        names:
            Names of the numbers, the same in all processes.
    """

    def __init__(self, names: Iterable[Name]) -> None:
        # Sum, sum of squares and number of images
        self._sums = {name: torch.zeros(3, dtype=torch.float64) for name in names}

    def add(self, name: Name, values: Tensor) -> None:
        """Adds a number of some images, a tensor with shape (num_images,)."""
        values = values.detach().double()
        sums = (values.sum(), values.square().sum(), torch.ones_like(values).sum())
        self._sums[name] += torch.stack(sums).cpu()

    def reduce(self, devices: Devices) -> dict[Name, Mean]:
        """Means over the images of all processes, the same in each process.

        Raises:
            RuntimeError: If no image has one of the numbers, or it is not finite.
        """
        total = reduce_sum(devices, torch.stack(list(self._sums.values())))
        return {
            name: _mean(devices, name, *numbers)
            for name, numbers in zip(self._sums, total.tolist(), strict=True)
        }


def reduce_sum(devices: Devices, values: Tensor) -> Tensor:
    """Sum over processes, on the CPU."""
    values = values.to(devices.device)
    total = devices.fabric.all_reduce(values, reduce_op="sum")
    assert isinstance(total, Tensor)
    return total.cpu()


def require_pairs(files: ImageFiles) -> None:
    """Checks that each image can have another one beside it.

    Raises:
        ValueError: If there is one image only.
    """
    if len(files) < 2:
        raise ValueError(f"'{files.root}' has one image; another one is its reference.")


def pair_loader(devices: Devices, images: EvaluationImages) -> DataLoader[Sample]:
    """Loads the images of this process in pairs: each beside another as its reference.

    The other one is half the list away: where images are sorted by class, of another
    class. Only the last image of an odd number stands alone.
    """
    half = len(images) // 2
    pairs = [[i, half + i] for i in range(half)]
    pairs += [[2 * half]] if len(images) % 2 else []
    mine = pairs[devices.rank :: devices.world_size]
    # An even size, so that no pair is torn apart.
    size = max(2, devices.batch_size // 2 * 2)
    return devices.loader(images, [i for pair in mine for i in pair], size)


def measure_pairs(
    devices: Devices,
    images: EvaluationImages,
    names: Iterable[Name],
    text: str,
    measure: Callable[[Tensor, Tensor, ImageMeans[Name]], None],
) -> tuple[dict[Name, Mean], int]:
    """Measures images in the pairs of `pair_loader`, each in one process.

    Args:
        devices:
            Where it runs.
        images:
            The images.
        names:
            Names of the numbers, the same in all processes.
        text:
            What the progress bar says.
        measure:
            Adds the numbers of a batch: gets the images, on the device, and which of
            them could be read.

    Returns:
        Means over the images of all processes, and the number of unreadable ones.
    """
    loader = pair_loader(devices, images)
    means = ImageMeans[Name](names)
    unreadable = []
    for batch in devices.progress(loader, text, len(loader)):
        unreadable += batch.number[~batch.readable].tolist()
        inputs, readable = devices.fabric.to_device((batch.image, batch.readable))
        with torch.no_grad(), devices.fabric.autocast():
            measure(inputs, readable, means)
    num_unreadable = count_unreadable(devices, images.files, unreadable)
    return means.reduce(devices), num_unreadable


def partners(readable: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of a batch of `pair_loader`, and the rows of their other images.

    Args:
        readable:
            Whether an image could be read, bool with shape (batch_size,).

    Returns:
        Two int64 tensors with shape (num_readable_in_readable_pairs,).
    """
    rows = torch.arange(len(readable) // 2 * 2, device=readable.device)
    rows = rows[readable[rows] & readable[rows ^ 1]]
    return rows, rows ^ 1


def count_unreadable(
    devices: Devices, files: ImageFiles, numbers: Iterable[int]
) -> int:
    """Counts the images that could not be read, and says which.

    Args:
        devices:
            Where it runs.
        files:
            All images.
        numbers:
            Numbers of the unreadable ones that this process found.

    Returns:
        Number of unreadable images, of all processes.

    Raises:
        RuntimeError: If they are more than 5 %.
    """
    found = torch.zeros(len(files))
    found[list(numbers)] = 1
    unreadable = reduce_sum(devices, found).nonzero().flatten().tolist()
    say_unreadable(devices, files, unreadable)
    return len(unreadable)


def _mean(
    devices: Devices, name: object, total: float, squares: float, count: float
) -> Mean:
    shown = " ".join(map(str, name)) if isinstance(name, tuple) else name
    if not count:
        raise RuntimeError(f"No image gave a value of {shown}.")
    mean = total / count
    if not math.isfinite(mean):
        raise not_finite(f"Values of {shown}", devices.precision)
    variance = max(0.0, squares / count - mean**2) * count / max(count - 1, 1)
    return Mean(mean, (variance / count) ** 0.5, int(count))
