"""What the scores on images and texts have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightly_ext.evaluate.images import ImageFiles
from lightly_ext.evaluate.text.pairs import Pairs

# Maps texts to unit vectors, float32 (num_texts, dim), on the device.
EmbedTexts = Callable[[Sequence[str]], Tensor]


class Scores(NamedTuple):
    """Scores of a task.

    Attributes:
        values: Fractions in 0 to 1 by name.
        chance: What guessing gives, by the same names.
        num: What the scores are means of: number of images or of examples.
    """

    values: dict[str, float]
    chance: dict[str, float]
    num: int


@dataclass(frozen=True)
class TextTask(ABC):
    """Images and texts, and how well they find each other.

    Attributes:
        name: Name of the set in tables.
        files: The images.
        rule: How the scores are made, for the card.
    """

    name: str
    files: ImageFiles
    rule: str

    @property
    def texts(self) -> list[Any]:
        """All else that decides, values that JSON knows: the fields of the set."""
        common = {field.name for field in fields(TextTask)}
        own = [getattr(self, f.name) for f in fields(self) if f.name not in common]
        return [v.captions if isinstance(v, Pairs) else v for v in own]

    @abstractmethod
    def score(
        self, images: Tensor, readable: Tensor, embed_texts: EmbedTexts
    ) -> Scores:
        """Scores embeddings.

        Args:
            images:
                Unit vectors of the readable images, float32 (num_readable, dim).
            readable:
                Numbers of the readable images, int64 (num_readable,), ascending.
            embed_texts:
                Embeds texts.
        """


def similarities(first: Tensor, second: Tensor) -> Tensor:
    """Products of the rows of two tensors, or of two stacks of them, float32.

    Of equal rows exactly equal, wherever they stand: summed in float64.

    Args:
        first:
            Tensor with shape (..., num_first, dim).
        second:
            Tensor with shape (..., num_second, dim).

    Returns:
        Tensor with shape (..., num_first, num_second).
    """
    return (first.double() @ second.double().mT).float()


def best_ranks(values: Tensor, wanted: Tensor) -> Tensor:
    """Rank of the best wanted column of each row, 0 for the first.

    Args:
        values:
            Similarities; of equal ones the first column goes first. Tensor with shape
            (num_rows, num_columns).
        wanted:
            At least one column of each row, bool with the same shape.

    Returns:
        int64 tensor with shape (num_rows,).
    """
    best, column = values.masked_fill(~wanted, -torch.inf).max(dim=1, keepdim=True)
    before = torch.arange(values.shape[1], device=values.device) < column
    return ((values > best) | ((values == best) & before)).sum(dim=1)
