"""What all protocols have in common: fields, cards and their digests."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

# In a card: what decides, but could not be read.
NOT_TOLD = "not told"
FEATURES = ("sparse", "dense", "cls", "cls+dense", "lowrank")

# Every field that a protocol may have, in the order of the cards.
CARD_FIELDS = {
    "name": "Name of the protocol.",
    "source": "Who defined it.",
    "data": "Data set.",
    "split": "Which images train, choose and test.",
    "limit": "Number of images of each part that is used, None for all.",
    "features": 'One of `FEATURES`, or "auto", where the objective of the method acts.',
    "pooling": "How the features of an image become one vector.",
    "resize": "Length of the shorter side after resizing, px.",
    "crop": "Side of the crop at test time, px.",
    "longest": "Largest length of the longer side after resizing, px.",
    "stride": "Step of the sliding window, px.",
    "train_views": "How training images are cut.",
    "train_scale": "Range of the area of random crops, as fractions of the image.",
    "train_ratio": "Range of the factor on the resized size in training.",
    "test_views": "Other steps on test images, where there are any.",
    "inference": "How a prediction for a whole image is made.",
    "parts": "What an image is cut into, where that is not tokens.",
    "label_resolution": "Resolution at which labels are compared.",
    "classes": "The classes, or how label values become classes.",
    "num_classes": "Number of classes.",
    "bank": "Most patches of training images that are kept.",
    "neighbours": "Number of voting or shown neighbours.",
    "temperature": "Temperature of the votes, or of the loss at the start.",
    "head": "The trained part.",
    "target": "What a decoder predicts.",
    "backbone": '"frozen" or "trained", where that is a choice.',
    "loss": "Its loss.",
    "optimizer": "Its optimiser.",
    "lrs": "Learning rates to choose from.",
    "batch_sizes": "Batch sizes to choose from, or to time.",
    "weight_decay": "Weight decay.",
    "clip": "Largest norm of a gradient.",
    "epochs": "Passes over the training images.",
    "iterations": "Optimiser steps.",
    "warmup": "Steps of linear warm-up.",
    "schedule": "Learning rate over time.",
    "averaging": "What a score is a mean of.",
    "evaluation_batch": "Images of a batch, where a score depends on it.",
    "rule": "What else decides on a score.",
    "networks": "The networks that metrics look through, by hash.",
}
_OPEN = (None, "", ())

P = TypeVar("P", bound="Protocol")


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """What must be the same for two scores to stand in one column.

    A task adds the fields that decide on its scores; `CARD_FIELDS` says what each is.
    What a run fills in is None or empty until then, and missing from the card.
    """

    name: str
    source: str
    data: str = ""
    limit: int | None = None

    def card(self) -> dict[str, Any]:
        """Returns the fields that are filled in, with values that JSON knows."""
        fields = {name: getattr(self, name, None) for name in CARD_FIELDS}
        filled = {name: v for name, v in fields.items() if v not in _OPEN}
        return json.loads(json.dumps(filled))

    def replace(self: P, **fields: Any) -> P:
        """Returns the protocol with other values."""
        return dataclasses.replace(self, **fields)


@dataclass(frozen=True, kw_only=True)
class CropProtocol(Protocol):
    """Images are resized, and their centre is cut out, mostly to these sizes."""

    resize: int = 256
    crop: int = 224


@dataclass(frozen=True, kw_only=True)
class TrainedProtocol(CropProtocol):
    """Something is trained: a head, a decoder or everything."""

    split: str
    train_views: str
    head: str
    optimizer: str
    lrs: tuple[float, ...]
    batch_sizes: tuple[int, ...]
    weight_decay: float
    clip: float
    epochs: int
    schedule: str
    averaging: str


@dataclass(frozen=True, kw_only=True)
class RandomCropProtocol(TrainedProtocol):
    """Training images are cut randomly, anew in every epoch."""

    train_scale: tuple[float, float]


def card_digest(card: dict[str, Any]) -> str:
    """Short name of a card: the same for equal cards, and only for those."""
    text = json.dumps(card, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def json_values(value: Any) -> Any:
    """A value without what JSON does not know: NaN and infinities become None."""
    if isinstance(value, Mapping):
        return {str(k): json_values(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_values(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
