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

from lightly_ext.demo.metrics import mean_psnr
from lightly_ext.demo.photos.files import PhotoSets
from lightly_ext.demo.probes import linear_accuracy
from lightly_ext.evaluate.frozen_model import FrozenModel
from lightly_ext.metrics import effective_rank, knn_accuracy, localization_entropy
from stellar_plugin import Factorization, Stellar

RAW, UNTRAINED, PRIOR, TRAINED = "raw pixels", "untrained", "prior (MAE)", "trained"
FEATURES = {
    "sparse": "sparse tokens",
    "cls": "CLS",
    "dense": "dense",
    "tokens": "all tokens",
}
# Raw pixels of larger photos are averaged down to this side.
RAW_SIDE = 32
BATCH_SIZE = 50
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


def labelled_scores(bank: Seen, test: Seen, photos: PhotoSets) -> Scores:
    """Accuracy of kNN and logistic regression on each feature.

    Args:
        bank:
            Training photos, those of `PhotoSets.bank`.
        test:
            Test photos.
        photos:
            Their classes.

    Returns:
        `knn_X` and `linear_X` for each feature X, in 0 to 1.
    """
    labels = photos.bank.label_tensor, photos.test.label_tensor
    scores: Scores = {}
    for name, features in bank.features.items():
        other = test.features[name]
        scores[f"knn_{name}"] = knn_accuracy(features, labels[0], other, labels[1])
        scores[f"linear_{name}"] = linear_accuracy(
            features.numpy(), labels[0].numpy(), other.numpy(), labels[1].numpy()
        )
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
    """PSNR in dB of reconstructions, of photos uint8 (num_photos, 3, side, side)."""
    return mean_psnr(images, targets.float() / 255)


def chance(photos: PhotoSets) -> float:
    """Accuracy of whoever always says the most frequent class of the test photos."""
    counts = photos.test.label_tensor.bincount()
    return float(counts.max() / counts.sum())


def best(scores: Mapping[str, float], kind: str) -> float:
    """The best accuracy of "knn" or "linear" over all features."""
    return max(v for name, v in scores.items() if name.startswith(f"{kind}_"))


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
    """

    title: str
    explanation: str
    columns: Mapping[str, str]
    rows: Mapping[str, Scores]
    scale: float = 1.0

    def cells(self) -> list[list[str]]:
        """Rows of text."""
        return [
            [title, *(self._shown(scores.get(key)) for key in self.columns)]
            for title, scores in self.rows.items()
        ]

    def _shown(self, value: float | None) -> str:
        return MISSING if value is None else f"{self.scale * value:.1f}"


def tables(scores: Mapping[str, Scores], chance_level: float | None) -> list[Table]:
    """Tables of accuracies, if there are classes, and of what needs none."""
    found = []
    if chance_level is not None:
        for kind, title, how in (
            ("knn", "kNN", "The 20 nearest training photos by cosine vote."),
            ("linear", "linear", "Logistic regression, features standardised, C = 1."),
        ):
            columns = {f"{kind}_{key}": name for key, name in FEATURES.items()}
            guess = {"chance": dict.fromkeys(columns, chance_level)}
            found.append(
                Table(f"{title} accuracy, %", how, columns, guess | dict(scores), 100)
            )
    ranks = {f"rank_{key}": name for key, name in FEATURES.items()}
    rank = "How many directions a feature of test photos uses: exp of the entropy of "
    rank += "its singular values. 1 is a collapse; more is not always better."
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
    scores: Mapping[str, Scores], chance_level: float | None, facts: Mapping[str, Any]
) -> str:
    """The numbers for programs: fractions in 0 to 1, decibels, and facts of the run."""
    content = {**facts, "chance": chance_level, "scores": scores}
    return json.dumps(content, indent=2) + "\n"


def standard_error(accuracy: float, number: int) -> float:
    """Standard deviation of an accuracy on so many test photos."""
    return math.sqrt(accuracy * (1 - accuracy) / number)


def _pooled(result: Factorization) -> dict[str, Tensor]:
    features = {"dense": result.dense.mean(dim=1)}
    if result.cls is not None:
        features["cls"] = result.cls
    if result.sparse.shape[1]:
        features["sparse"] = result.sparse.mean(dim=1)
        features["tokens"] = result.sparse.flatten(1)
    return {name: value.float().cpu() for name, value in features.items()}
