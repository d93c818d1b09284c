"""MMVP-VLM: pairs of images that CLIP finds alike, told apart by two statements.

- [0]: Eyes Wide Shut? Exploring the Visual Shortcomings of Multimodal LLMs, 2024,
  https://arxiv.org/abs/2401.06209
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lightly_ext.evaluate.images import ImageFiles
from lightly_ext.evaluate.text.tasks import EmbedTexts, Scores, TextTask
from lightly_ext.evaluate.text.winoground import pair_similarities

QUESTIONS, IMAGES = "Questions.csv", "MLLM_VLM Images"
PROMPT = "a photo of {}"


@dataclass(frozen=True)
class Mmvp(TextTask):
    """Pairs of images with a statement each.

    Attributes:
        statements: Of each image.
        patterns: Visual pattern of each pair; images 2 i and 2 i + 1 are pair i.
    """

    statements: Sequence[str]
    patterns: Sequence[str]

    @classmethod
    def find(cls, folder: str, limit: int | None) -> Mmvp:
        """Reads the data set as the hub has it: Questions.csv, MLLM_VLM Images/*/*.jpg.

        Raises:
            FileNotFoundError: If one of the two is not there.
            ValueError: If the file is of another layout.
        """
        root = Path(folder)
        path = root / QUESTIONS
        if not path.is_file() or not (root / IMAGES).is_dir():
            raise FileNotFoundError(
                f"MMVP-VLM is not in '{folder}': '{path}' and the folder "
                f"'{root / IMAGES}' are needed."
            )
        rows = _read_rows(path)
        num_pairs = min(limit or len(rows), len(rows) // 2)
        first = [i * (len(rows) // 2) // num_pairs * 2 for i in range(num_pairs)]
        rows = [row for i in first for row in rows[i : i + 2]]
        names = [f"{pattern}/{number}.jpg" for number, pattern, _ in rows]
        rule = (
            f"each of two statements ('{PROMPT.format('...')}') chooses the more "
            "similar of two images; both must be right; mean over pairs of a visual "
            "pattern, then over patterns"
        )
        files = ImageFiles(root / IMAGES, names)
        patterns = [row[1] for row in rows[::2]]
        return cls("MMVP", files, rule, [row[2] for row in rows], patterns)

    def score(
        self, images: Tensor, readable: Tensor, embed_texts: EmbedTexts
    ) -> Scores:
        """Scores the pairs of which both images are readable."""
        texts = embed_texts([PROMPT.format(text) for text in self.statements])
        whole, similarities = pair_similarities(images, readable, texts)
        patterns = [self.patterns[i] for i in whole.tolist()]
        score = mmvp_score(similarities, patterns)
        return Scores({"mmvp": score}, {"mmvp": 1 / 4}, len(whole))


def mmvp_score(similarities: Tensor, patterns: Sequence[str]) -> float:
    """Accuracy of pairs, mean over patterns.

    Args:
        similarities:
            Of statement s and image i, with shape (num_pairs, 2, 2) in this order.
        patterns:
            Visual pattern of each pair.
    """
    first = similarities[:, 0, 0] > similarities[:, 0, 1]
    second = similarities[:, 1, 1] > similarities[:, 1, 0]
    right = (first & second).double()
    numbers = {name: i for i, name in enumerate(dict.fromkeys(patterns))}
    groups = torch.tensor([numbers[name] for name in patterns], device=right.device)
    means = [right[groups == i].mean() for i in range(len(numbers))]
    return float(torch.stack(means).mean())


def _read_rows(path: Path) -> list[list[str]]:
    """Number, pattern and statement of each image, two rows for each pair."""
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = [row for row in csv.reader(file) if row][1:]
    whole = len(rows) % 2 == 0 and all(len(row) == 3 for row in rows)
    if not rows or not whole or [r[1] for r in rows[::2]] != [r[1] for r in rows[1::2]]:
        raise ValueError(
            f"'{path}' must have a first line of names, then rows of number, "
            "pattern and statement, two of the same pattern for each pair."
        )
    return rows
