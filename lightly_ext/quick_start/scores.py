"""What frozen features of photos are worth: with classes, and without."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.functional.image import peak_signal_noise_ratio
from torchvision.transforms.v2.functional import horizontal_flip, resize_image

from lightly_ext.evaluate.frozen_model import FrozenModel
from lightly_ext.metrics import effective_rank, knn_accuracy, localization_entropy
from lightly_ext.quick_start.files import PhotoSets
from stellar_plugin import Factorization, Stellar

RAW, UNTRAINED, PRIOR, TRAINED = "raw pixels", "untrained", "prior (MAE)", "trained"
CHANCE = "chance"
FEATURES = {
    "sparse": "sparse tokens",
    "cls": "CLS",
    "dense": "patches",
    "tokens": "all tokens",
}
# The feature of each encoder that is compared first, chosen before any is measured.
FIRST = {RAW: "dense", UNTRAINED: "sparse", PRIOR: "dense", TRAINED: "sparse"}
KNN, AGAIN = "knn", "again"
# Raw pixels of larger photos are averaged down to this side.
RAW_SIDE = 32
BATCH_SIZE = 50
# Side of the two crops of a photo that shall find each other.
CROP_SHARE = 0.7
MISSING = "–"

Scores = dict[str, float]


@dataclass(frozen=True)
class Seen:
    """What an encoder makes of photos.

    Attributes:
        features:
            Tensors with shape (num_photos, dim) by the names of `FEATURES`.
        sparse:
            Sparse tokens with shape (num_photos, num_queries, dim).
        localization:
            Localization with shape (num_photos, num_patches, num_queries), None without
            queries.
        grid_size:
            Height and width of the patch grid.
    """

    features: dict[str, Tensor]
    sparse: Tensor
    localization: Tensor | None
    grid_size: tuple[int, int]


def look(model: FrozenModel, images: Tensor) -> Seen:
    """Runs an encoder over photos.

    Args:
        model:
            The encoder.
        images:
            uint8 tensor with shape (num_photos, 3, side, side).

    Returns:
        What it makes of them, on the CPU. The mean of the sparse tokens, CLS, the mean
        of the patches, and the sparse tokens one behind the other are the features.
    """
    device = model.mean.device
    results = [model(batch.to(device)) for batch in images.split(BATCH_SIZE)]
    pooled = [_pooled(result) for result in results]
    localizes = model.num_queries and model.has_localization
    return Seen(
        {name: torch.cat([p[name] for p in pooled]) for name in pooled[0]},
        torch.cat([result.sparse.cpu() for result in results]),
        torch.cat([r.localization.cpu() for r in results]) if localizes else None,
        results[0].grid_size,
    )


def look_raw(images: Tensor) -> Seen:
    """The pixels themselves, as the only feature, "dense"."""
    side = min(RAW_SIDE, images.shape[-1])
    pixels = F.adaptive_avg_pool2d(images.float() / 255, side).flatten(1)
    return Seen({"dense": pixels}, torch.empty(len(images), 0, 0), None, (side, side))


def crops(images: Tensor) -> tuple[Tensor, Tensor]:
    """Two crops of each photo: above left, and below right, mirrored.

    Args:
        images:
            uint8 tensor with shape (num_photos, 3, side, side).

    Returns:
        Two tensors with the same shape.
    """
    side = images.shape[-1]
    part = max(1, round(CROP_SHARE * side))
    first, second = images[..., :part, :part], images[..., -part:, -part:]
    pair = (
        resize_image(crop, size=[side, side], antialias=True)
        for crop in (first, horizontal_flip(second))
    )
    return next(pair), next(pair)


def labelled_scores(bank: Seen, test: Seen, photos: PhotoSets) -> Scores:
    """Accuracy of kNN on each feature.

    Args:
        bank:
            Training photos, those of `PhotoSets.bank`.
        test:
            Test photos.
        photos:
            Their classes.

    Returns:
        `knn_X` for each feature X, in 0 to 1.
    """
    labels = photos.bank.label_tensor, photos.test.label_tensor
    return {
        f"{KNN}_{name}": knn_accuracy(
            features, labels[0], test.features[name], labels[1]
        )
        for name, features in bank.features.items()
    }


def found_again(first: Seen, second: Seen) -> Scores:
    """How often one crop of a photo finds the other among those of all photos.

    Args:
        first:
            Crops of the photos.
        second:
            Other crops of the same photos.

    Returns:
        `again_X` for each feature X, in 0 to 1: the part of photos of which the other
        crop is the nearest by cosine.
    """
    scores = {}
    for name, features in first.features.items():
        units = (F.normalize(x.double()) for x in (features, second.features[name]))
        nearest = (next(units) @ next(units).T).argmax(dim=1)
        hits = nearest == torch.arange(len(nearest))
        scores[f"{AGAIN}_{name}"] = float(hits.double().mean())
    return scores


def unlabelled_scores(test: Seen) -> Scores:
    """`rank_X` of each feature; `share` and `blur` of localization, in 0 to 1."""
    scores = {f"rank_{n}": float(effective_rank(x)) for n, x in test.features.items()}
    if test.localization is not None and test.localization.shape[-1] > 1:
        entropy = localization_entropy(test.localization)
        scores |= {"share": float(entropy.image), "blur": float(entropy.patch)}
    return scores


@torch.no_grad()
def reconstructions(model: Stellar, normalized: Tensor) -> Tensor:
    """Photos decoded from their tokens, in [0, 1], on the CPU."""
    size = normalized.shape[-2], normalized.shape[-1]
    batches = normalized.split(BATCH_SIZE)
    return torch.cat([model.reconstruct(batch, size).cpu() for batch in batches])


def psnr(images: Tensor, targets: Tensor) -> float:
    """Mean PSNR in dB of reconstructions in [0, 1], of photos of the same shape.

    Args:
        images:
            Tensor with shape (num_photos, 3, side, side).
        targets:
            uint8 tensor with the same shape.
    """
    ratio = peak_signal_noise_ratio(
        images,
        targets.float() / 255,
        data_range=1.0,
        reduction="elementwise_mean",
        dim=(1, 2, 3),
    )
    return float(ratio)


def chance(photos: PhotoSets) -> float:
    """Accuracy of whoever always says the most frequent class of the test photos.

    Without classes, that of guessing which photo another crop is of.
    """
    if photos.unlabelled:
        return 1 / len(photos.test)
    counts = photos.test.label_tensor.bincount()
    return float(counts.max() / counts.sum())


def first_scores(scores: Mapping[str, Scores], kind: str) -> dict[str, float]:
    """The accuracy of the first feature of each encoder, see `FIRST`.

    Args:
        scores:
            Scores by the names of the encoders.
        kind:
            `KNN` or `AGAIN`.
    """
    return {
        name: found[f"{kind}_{FIRST[name]}"]
        for name, found in scores.items()
        if f"{kind}_{FIRST[name]}" in found
    }


def standard_error(accuracy: float, number: int) -> float:
    """Standard deviation of an accuracy on so many test photos."""
    return math.sqrt(accuracy * (1 - accuracy) / number)


def is_above(one: float, other: float, number: int) -> bool:
    """Whether an accuracy is above another one by more than chance explains.

    That is two standard errors of the difference, as of independent photos: on the same
    photos the difference varies less.

    Args:
        one:
            Accuracy in 0 to 1.
        other:
            What it is compared with.
        number:
            Test photos of each.
    """
    errors = (standard_error(value, number) for value in (one, other))
    return one - other > 2 * math.hypot(*errors)


@dataclass(frozen=True)
class Table:
    """One table of the page.

    Attributes:
        title:
            What is in it.
        explanation:
            How it is measured.
        columns:
            Titles of the columns by the keys of the scores.
        rows:
            Scores by the titles of the rows.
        scale:
            Values are shown times this.
        number:
            Photos that accuracies are of, so that their standard errors are shown; None
            for what is no accuracy.
    """

    title: str
    explanation: str
    columns: Mapping[str, str]
    rows: Mapping[str, Scores]
    scale: float = 1.0
    number: int | None = None

    def cells(self) -> list[list[str]]:
        """Rows of text."""
        return [
            [title, *(self._shown(title, scores.get(key)) for key in self.columns)]
            for title, scores in self.rows.items()
        ]

    def _shown(self, title: str, value: float | None) -> str:
        if value is None:
            return MISSING
        text = f"{self.scale * value:.1f}"
        if self.number is None or title == CHANCE:
            return text
        return f"{text} ± {self.scale * standard_error(value, self.number):.1f}"


def tables(scores: Mapping[str, Scores], photos: PhotoSets) -> list[Table]:
    """Tables of accuracies, of classes if there are some, and of what needs none."""
    number = len(photos.test)
    if photos.unlabelled:
        kind, title = AGAIN, "Found again, %"
        how = (
            f"One crop of a test photo (above left, {CROP_SHARE:.0%} of its side) is "
            "compared with another one (below right, mirrored) of all test photos: how "
            "often the nearest by cosine is of the same photo. It is near to what "
            "training asks for, and says less than accuracy on classes."
        )
    else:
        kind, title = KNN, "kNN accuracy, %"
        how = "The 20 nearest training photos vote, by cosine. Nothing is fitted."
    columns = {f"{kind}_{key}": name for key, name in FEATURES.items()}
    guess = {CHANCE: dict.fromkeys(columns, chance(photos))}
    found = [Table(title, how, columns, guess | dict(scores), 100, number)]
    ranks = {f"rank_{key}": name for key, name in FEATURES.items()}
    rank = (
        "How many directions a feature of test photos uses: exp of the entropy of its "
        "singular values. 1 is a collapse; more is not always better."
    )
    found.append(Table("Effective rank", rank, ranks, scores))
    columns = {"psnr": "PSNR, dB", "share": "tokens in use, %", "blur": "blur, %"}
    how = (
        "PSNR: reconstruction from the tokens; for raw pixels, that of the mean "
        "training photo. Tokens in use: 100 where all tokens have as much of a photo, "
        "0 where one has all. Blur: 0 where each patch belongs to one token, 100 where "
        "to all alike."
    )
    scaled = {
        row: {k: v if k == "psnr" else 100 * v for k, v in s.items()}
        for row, s in scores.items()
    }
    return [*found, Table("Reconstruction and maps", how, columns, scaled)]


def to_markdown(found: Sequence[Table]) -> str:
    """The tables with what they mean, in Markdown."""
    parts = []
    for table in found:
        head = [table.title, *table.columns.values()]
        lines = [head, ["---", *["---:"] * len(table.columns)], *table.cells()]
        rows = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
        parts.append(f"{rows}\n\n{table.explanation}\n")
    return "\n".join(parts)


def to_json(
    scores: Mapping[str, Scores], chance_level: float, facts: Mapping[str, Any]
) -> str:
    """The numbers for programs: fractions in 0 to 1, decibels, and facts of the run."""
    content = {**facts, "chance": chance_level, "scores": scores}
    return json.dumps(content, indent=2) + "\n"


def _pooled(result: Factorization) -> dict[str, Tensor]:
    features = {"dense": result.dense.mean(dim=1)}
    if result.cls is not None:
        features["cls"] = result.cls
    if result.sparse.shape[1]:
        features["sparse"] = result.sparse.mean(dim=1)
        features["tokens"] = result.sparse.flatten(1)
    return {name: value.float().cpu() for name, value in features.items()}
