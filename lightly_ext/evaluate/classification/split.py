"""Which images of a classification set train, choose and test; the score of chance."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightly_ext.evaluate.classification.guesses import TOP_K
from lightly_ext.evaluate.datasets import ClassificationSet, find_classification_set
from lightly_ext.evaluate.devices import Devices
from stellar_plugin.protocols import HELD_OUT, HELD_OUT_SEED


@dataclass(frozen=True)
class Split:
    """A classification set with a part of its training set held out.

    Attributes:
        data:
            The set.
        kept:
            Numbers of the training images to train on, int64, ascending.
        held_out:
            Numbers of the other training images, int64, ascending.
    """

    data: ClassificationSet
    kept: Tensor
    held_out: Tensor

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.data.train.classes)

    @property
    def lost_classes(self) -> list[str]:
        """Classes without an image to train on."""
        labels = set(self.data.train.label_tensor[self.kept].tolist())
        return [c for i, c in enumerate(self.data.train.classes) if i not in labels]


def split_set(devices: Devices, data: str, limit: int | None = None) -> Split:
    """Finds a set, holds out a tenth of its training images, and says what is what.

    Args:
        devices:
            Where it runs.
        data:
            What `find_classification_set` finds.
        limit:
            Number of images of each part to use, None for all.

    Raises:
        ValueError: If there are less than two classes, or fewer images than classes.
    """
    found = find_classification_set(data).limited(limit)
    num_images, num_classes = len(found.train), len(found.train.classes)
    if num_classes < 2:
        raise ValueError(
            f"'{data}' has {num_classes} class(es) in its training set; a classifier "
            "needs two or more."
        )
    if num_images < num_classes:
        raise ValueError(
            f"'{data}' has {num_images} training images for {num_classes} classes; use "
            "at least one per class (a larger --limit)."
        )
    kept, held_out = hold_out(torch.arange(num_images))
    split = Split(found, kept, held_out)
    devices.say(
        f"{found.name}: {len(kept)} images to train on, {len(held_out)} held out, "
        f"{len(found.test)} to test, {num_classes} classes."
    )
    if split.lost_classes:
        devices.say(
            f"No image to train on is left of {len(split.lost_classes)} class(es): "
            f"{', '.join(split.lost_classes[:5])}."
        )
    return split


def hold_out(numbers: Tensor, most: int | None = None) -> tuple[Tensor, Tensor]:
    """Draws a tenth of some images by a seed of its own, the same in every run.

    Args:
        numbers:
            Numbers of the images.
        most:
            The most that are drawn.

    Returns:
        Numbers of the images that train, and of those held out, both ascending.
    """
    generator = torch.Generator().manual_seed(HELD_OUT_SEED)
    order = numbers[torch.randperm(len(numbers), generator=generator)]
    held_out = order[: max(1, round(HELD_OUT * len(order)))][:most]
    return order[len(held_out) :].sort()[0], held_out.sort()[0]


def label_chance(train: Tensor, test: Tensor, num_classes: int) -> dict[str, float]:
    """Scores of guesses by who knows how often each class occurs, but no image.

    The guesses are the most frequent classes of the training images; of equally
    frequent ones every choice counts alike, so for balanced classes this is k / C.

    Args:
        train:
            Classes of the training images, int64.
        test:
            Classes of the test images, int64.
        num_classes:
            Number of classes C.
    """
    counts = train.bincount(minlength=num_classes)
    shares = test.bincount(minlength=num_classes).double() / len(test)

    def chance(k: int) -> float:
        last = counts.sort(descending=True).values[k - 1]
        sure, tied = counts > last, counts == last
        part = (k - sure.sum()) / tied.sum()
        return float(shares[sure].sum() + part * shares[tied].sum())

    found = {"accuracy": chance(1)}
    return {**found, f"top{TOP_K}": chance(TOP_K)} if num_classes > TOP_K else found
