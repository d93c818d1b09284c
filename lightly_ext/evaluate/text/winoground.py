"""Winoground: two images and two captions of the same words, which belong together.

- [0]: Winoground: Probing Vision and Language Models for Visio-Linguistic
  Compositionality, 2022, https://arxiv.org/abs/2204.03162
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from lightly_ext.evaluate.images import ImageFiles
from lightly_ext.evaluate.text.tasks import (
    EmbedTexts,
    Scores,
    TextTask,
    similarities,
)

# Each of two choices is right by half; both right similarities are the two highest of
# four in one of six orders.
CHANCE = {
    "winoground_text": 1 / 4,
    "winoground_image": 1 / 4,
    "winoground_group": 1 / 6,
}


@dataclass(frozen=True)
class Winoground(TextTask):
    """Examples of two images and two captions.

    Attributes:
        captions: Two captions of each example; images 2 i and 2 i + 1 are its images.
    """

    captions: Sequence[tuple[str, str]]

    @classmethod
    def find(cls, folder: str, limit: int | None) -> Winoground:
        """Reads the data set as the hub has it: examples.jsonl beside images/*.png.

        Raises:
            FileNotFoundError: If one of the two is not there.
            ValueError: If the file is of another layout.
        """
        root = Path(folder)
        if (root / "data").is_dir():
            root /= "data"
        path = root / "examples.jsonl"
        if not path.is_file() or not (root / "images").is_dir():
            raise FileNotFoundError(
                f"Winoground is not in '{folder}': '{path}' and the folder "
                f"'{root / 'images'}' (of images.zip) are needed."
            )
        lines = path.read_text(encoding="utf-8").splitlines()
        try:
            examples = [json.loads(line) for line in lines if line.strip()][:limit]
            captions = [(e["caption_0"], e["caption_1"]) for e in examples]
            images = [(e["image_0"], e["image_1"]) for e in examples]
        except (KeyError, ValueError) as error:
            raise ValueError(
                f"'{path}' must have an object with caption_0, caption_1, image_0 and "
                f"image_1 in each line: {error!r}."
            ) from error
        names = [f"{Path(name).stem}.png" for name in chain.from_iterable(images)]
        rule = "cosine similarity; an equal one is no success"
        return cls("Winoground", ImageFiles(root / "images", names), rule, captions)

    def score(
        self, images: Tensor, readable: Tensor, embed_texts: EmbedTexts
    ) -> Scores:
        """Scores the examples of which both images are readable."""
        texts = embed_texts(list(chain.from_iterable(self.captions)))
        _, values = pair_similarities(images, readable, texts)
        return Scores(winoground_scores(values), CHANCE, len(values))


def pair_similarities(
    images: Tensor, readable: Tensor, texts: Tensor
) -> tuple[Tensor, Tensor]:
    """Similarities inside of the pairs of which both images are readable.

    Args:
        images:
            Embeddings of the readable images, (num_readable, dim).
        readable:
            Their numbers; 2 i and 2 i + 1 are pair i.
        texts:
            Embeddings of the texts, (2 * num_pairs, dim), likewise.

    Returns:
        Numbers of the pairs, int64 (num_whole,), on the device of `images`, and the
        similarity of text t and image i, (num_whole, 2, 2) in this order.
    """
    numbers = readable.to(images.device)
    rows = torch.zeros_like(texts)
    rows[numbers] = images
    known = torch.zeros(len(texts), dtype=torch.bool, device=images.device)
    known[numbers] = True
    whole = known.unflatten(0, (-1, 2)).all(dim=1).nonzero().flatten()
    of_texts, of_images = (x.unflatten(0, (-1, 2))[whole] for x in (texts, rows))
    return whole, similarities(of_texts, of_images)


def winoground_scores(similarities: Tensor) -> dict[str, float]:
    """Text, image and group score.

    Args:
        similarities:
            Of caption c and image i, with shape (num_examples, 2, 2) in this order.
    """
    right = similarities.diagonal(dim1=1, dim2=2)  # caption 0 and image 0, 1 and 1
    other_image = similarities.flip(2).diagonal(dim1=1, dim2=2)
    other_caption = similarities.flip(1).diagonal(dim1=1, dim2=2)
    text = (right > other_caption).all(dim=1)
    image = (right > other_image).all(dim=1)
    scores = {"text": text, "image": image, "group": text & image}
    return {f"winoground_{k}": float(v.double().mean()) for k, v in scores.items()}
