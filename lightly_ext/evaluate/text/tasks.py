"""What the scores on images and texts have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from lightly_ext.evaluate.images import ImageFiles

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
