"""What a classifier guesses of images: scored, and kept beside the result."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lightly_ext.durable import replace_text
from lightly_ext.evaluate.devices import Devices
from lightly_ext.evaluate.finite import not_finite
from lightly_ext.evaluate.images import ImageFiles
from lightly_ext.evaluate.reduction import reduce_sum

TOP_K = 5
GUESSES_NAME = "guesses.csv"
NO_GUESS, NOT_FINITE = -1, -2


@dataclass(frozen=True)
class Guesses:
    """The best guesses of images, each from one process.

    Attributes:
        files:
            The images, with labels.
        best:
            Classes, the best guess first; `NO_GUESS` for unreadable images: int64 with
            shape (len(files), num_guesses).
    """

    files: ImageFiles
    best: Tensor

    @property
    def labels(self) -> Tensor:
        """Classes of the readable images, int64 with shape (num_readable,)."""
        return self.files.label_tensor[self.best[:, 0] != NO_GUESS]

    @property
    def unreadable(self) -> list[int]:
        """Numbers of the images without a guess."""
        return (self.best[:, 0] == NO_GUESS).nonzero().flatten().tolist()

    @property
    def scores(self) -> dict[str, float]:
        """Accuracy and, of five guesses, how often one of them is right."""
        hits = self.best[self.best[:, 0] != NO_GUESS] == self.labels[:, None]
        scores = {"accuracy": int(hits[:, 0].sum()) / len(hits)}
        if hits.shape[1] == TOP_K:
            scores[f"top{TOP_K}"] = int(hits.any(dim=1).sum()) / len(hits)
        return scores

    def save(self, folder: Path) -> None:
        """Writes guesses.csv: image, class and guesses; none for unreadable images."""
        classes = (*self.files.classes, "")  # NO_GUESS is the last
        labels = self.files.label_tensor.tolist()
        text = io.StringIO()
        rows = csv.writer(text, lineterminator="\n")
        numbers = range(1, self.best.shape[1] + 1)
        rows.writerow(["image", "class", *(f"guess_{n}" for n in numbers)])
        for name, *row in zip(
            self.files.names, labels, *self.best.T.tolist(), strict=True
        ):
            rows.writerow([name, *(classes[c] for c in row)])
        folder.mkdir(parents=True, exist_ok=True)
        replace_text(folder / GUESSES_NAME, text.getvalue())


def best_guesses(logits: Tensor) -> Tensor:
    """The best class or, of more than five classes, the five best ones.

    Args:
        logits:
            Tensor with shape (batch_size, num_classes).

    Returns:
        Classes, of equal ones the first, int64 with shape (batch_size, num_guesses);
        `NOT_FINITE` where logits are not.
    """
    num_guesses = TOP_K if logits.shape[1] > TOP_K else 1
    order = logits.float().argsort(dim=1, descending=True, stable=True)
    finite = logits.isfinite().all(dim=1, keepdim=True)
    return order[:, :num_guesses].where(finite, NOT_FINITE)


def collect_guesses(
    devices: Devices,
    files: ImageFiles,
    found: Iterable[tuple[Tensor, Tensor]],
    num_guesses: int | None = None,
) -> Guesses:
    """Brings the guesses of all processes together; every process calls it.

    Args:
        devices:
            Where it runs.
        files:
            The images, with labels.
        found:
            Numbers of images, and their guesses as of `best_guesses`: of this process,
            which has none of another's images.
        num_guesses:
            Number of guesses of each image. None stands for that of `best_guesses`.

    Raises:
        RuntimeError: If logits are not finite.
    """
    num = num_guesses or (TOP_K if len(files.classes) > TOP_K else 1)
    best = torch.full((len(files), num), NO_GUESS)
    for numbers, guesses in found:
        best[numbers.cpu()] = guesses.cpu()
    best = reduce_sum(devices, best - NO_GUESS) + NO_GUESS
    if (best == NOT_FINITE).any():
        raise not_finite("Values of the classifier", devices.precision)
    return Guesses(files, best)
