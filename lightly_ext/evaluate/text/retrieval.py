"""Retrieval: which image belongs to a text, which text to an image."""

from __future__ import annotations

from dataclasses import dataclass
from math import comb

import torch
from torch import Tensor

from lightly_ext.evaluate.text.pairs import Pairs, find_pairs
from lightly_ext.evaluate.text.tasks import (
    EmbedTexts,
    Scores,
    TextTask,
    best_ranks,
    similarities,
)

RECALL_AT = (1, 5)
# As CLIP counts on COCO, whose images have five captions, a few of them six.
MOST_CAPTIONS = 5
# Rows of the matrix of similarities at once.
CHUNK = 1024


@dataclass(frozen=True)
class Retrieval(TextTask):
    """Images with captions.

    Attributes:
        pairs: The images and captions; `files` are their images.
    """

    pairs: Pairs

    @classmethod
    def find(cls, data: str, images: str | None, limit: int | None) -> Retrieval:
        """Finds images with captions, see `find_pairs`."""
        pairs = find_pairs(data, images).limited(limit).first_captions(MOST_CAPTIONS)
        rule = f"cosine similarity; at most {MOST_CAPTIONS} captions of an image"
        return cls(pairs.name, pairs.files, rule, pairs)

    def score(
        self, images: Tensor, readable: Tensor, embed_texts: EmbedTexts
    ) -> Scores:
        """Recall in both directions; unreadable images leave with their captions."""
        pairs = self.pairs[readable.tolist()]
        texts = embed_texts(pairs.texts)
        values = recalls(images, texts, pairs.owners.to(images.device))
        return Scores(values, recall_chance(pairs.counts), len(pairs))


def recalls(images: Tensor, texts: Tensor, owners: Tensor) -> dict[str, float]:
    """Recall at 1 and 5 of texts to images ("t2i") and of images to texts ("i2t").

    A text finds its image if that is among the k most similar images. An image finds a
    text if one of its own is among the k most similar texts. Of equal ones the first in
    the list goes first.

    Args:
        images:
            Unit vectors, (num_images, dim).
        texts:
            Unit vectors, (num_texts, dim).
        owners:
            Number of the image of each text, int64 (num_texts,); every image has one.
    """
    numbers = torch.arange(len(images), device=images.device)
    return {
        **_recalls("t2i", texts, images, owners, numbers),
        **_recalls("i2t", images, texts, numbers, owners),
    }


def _recalls(
    name: str, queries: Tensor, others: Tensor, wanted: Tensor, labels: Tensor
) -> dict[str, float]:
    """How often the k most similar others have a label that a query wants."""
    found = [
        best_ranks(similarities(rows, others), rows_wanted[:, None] == labels)
        for rows, rows_wanted in zip(
            queries.split(CHUNK), wanted.split(CHUNK), strict=True
        )
    ]
    ranks = torch.cat(found)
    return {f"{name}_recall_{k}": float((ranks < k).double().mean()) for k in RECALL_AT}


def recall_chance(counts: Tensor) -> dict[str, float]:
    """What `recalls` gives for a random order.

    Args:
        counts:
            Number of texts of each image, int64 (num_images,).
    """
    num_images, num_texts = len(counts), int(counts.sum())
    chance = {f"t2i_recall_{k}": min(k / num_images, 1.0) for k in RECALL_AT}
    for k in RECALL_AT:
        # None of the own texts among k of all.
        missed = [
            comb(num_texts - count, k) / comb(num_texts, k) if k <= num_texts else 0.0
            for count in counts.tolist()
        ]
        chance[f"i2t_recall_{k}"] = 1 - sum(missed) / num_images
    return chance
