"""What `stellar concepts` looks for: named tokens, chosen tokens, prototypes."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from lightly_ext.evaluate.devices import Devices
from lightly_ext.evaluate.frozen_model import FrozenModel
from lightly_ext.evaluate.images import ImageFiles
from lightly_ext.evaluate.pictures.token_index import (
    Neighbours,
    TokenIndex,
    most_distinct,
    nearest_tokens,
    prototype_usage,
    unit_length,
)
from lightly_ext.evaluate.prototypes import load_sparse_head
from lightly_ext.modules import STELLARProjectionHead

Choice = Literal["random", "distinct", "prototypes"]
NO_IMAGE = -1
# Random tokens that the distinct ones are chosen from.
NUM_CANDIDATES = 1024


@dataclass(frozen=True)
class Query:
    """A token or a prototype to look for.

    Attributes:
        number:
            Number of the token in its image, or of the prototype.
        image:
            Number of the image of the token, `NO_IMAGE` for a prototype.
        note:
            What else is known of it.
    """

    number: int
    image: int = NO_IMAGE
    note: str = ""


@dataclass(frozen=True)
class Search:
    """Queries, and how tokens are compared with them.

    Attributes:
        queries:
            What is looked for.
        vectors:
            Where the queries are, float32 with shape (num_queries, dim).
        embed:
            Maps tokens (..., d) to where they are compared, (..., dim).
        width:
            Numbers in the widest vector that `embed` computes of a token.
        measure:
            What the product of query and embedding is.
    """

    queries: Sequence[Query]
    vectors: Tensor
    embed: Callable[[Tensor], Tensor]
    width: int
    measure: str

    def run(
        self, index: TokenIndex, num_neighbours: int, one_per_image: bool
    ) -> Neighbours:
        """Searches all tokens; the image of a query is no neighbour of it."""
        own = torch.tensor([query.image for query in self.queries])
        return nearest_tokens(
            index,
            self.vectors,
            self.embed,
            num_neighbours,
            own,
            one_per_image,
            self.width,
        )


def plan_search(
    model: FrozenModel,
    devices: Devices,
    files: ImageFiles,
    query: Sequence[str] | None,
    prototypes: Sequence[str] | None,
    choose: Choice,
    num_queries: int,
) -> Callable[[TokenIndex], Search]:
    """Checks what is wanted, before the tokens of a folder are computed.

    Args:
        model:
            What is evaluated.
        devices:
            Where it runs.
        files:
            The images.
        query:
            Named tokens.
        prototypes:
            Named prototypes.
        choose:
            What to look for if nothing is named.
        num_queries:
            How many of them.

    Returns:
        Makes the search once the tokens are there.

    Raises:
        ValueError: If there is no such image, token or prototype.
    """
    device = devices.device
    if query:
        tokens = [named_token(q, files, model.num_queries) for q in query]
        return lambda index: token_search(index, tokens, files, device)
    if prototypes or choose == "prototypes":
        head = load_sparse_head(model)
        named = named_prototypes(prototypes or [], head)
        return lambda index: prototype_search(
            named or most_used_prototypes(index, head, num_queries), head
        )
    return lambda index: token_search(
        index, chosen_tokens(index, choose, num_queries, devices.seed), files, device
    )


def named_token(text: str, files: ImageFiles, num_tokens: int) -> Query:
    """Reads IMAGE:TOKEN.

    Args:
        text:
            Name of an image, relative to the folder of the images or as a path into it,
            and number of a token.
        files:
            The images.
        num_tokens:
            Number of tokens per image.

    Raises:
        ValueError: If it is none, or there is no such image or token.
    """
    name, _, number = text.rpartition(":")
    if not name or not number.isdecimal():
        raise ValueError(
            f"query must be IMAGE:TOKEN, for example 'cats/001.jpg:3', got '{text}'."
        )
    if int(number) >= num_tokens:
        raise ValueError(
            f"query '{text}': token must be in 0 to {num_tokens - 1}, got {number}."
        )
    for candidate in (name, Path(os.path.relpath(name, files.root)).as_posix()):
        if candidate in files.names:
            return Query(int(number), files.names.index(candidate))
    raise ValueError(
        f"query '{text}': there is no image '{name}' among the {len(files)} of "
        f"'{files.root}'. Names are relative to the folder, like '{files.names[0]}'."
    )


def named_prototypes(texts: Sequence[str], head: STELLARProjectionHead) -> list[Query]:
    """Reads numbers of prototypes.

    Args:
        texts:
            Numbers, or several separated by commas.
        head:
            Has the prototypes.

    Raises:
        ValueError: If one is no number, or there is no such prototype.
    """
    numbers = [part.strip() for text in texts for part in text.split(",")]
    total = head.prototypes.out_features
    for number in numbers:
        if not number.isdecimal() or int(number) >= total:
            raise ValueError(
                f"prototypes must be numbers in 0 to {total - 1}, for example '12,57', "
                f"got '{number}'."
            )
    return [Query(int(number)) for number in numbers]


def chosen_tokens(
    index: TokenIndex, choose: Choice, num_queries: int, seed: int
) -> list[Query]:
    """Draws tokens of readable images.

    Args:
        index:
            The tokens.
        choose:
            "random", or "distinct": each far from those before it, of some random ones.
        num_queries:
            How many, at most as many as there are.
        seed:
            Decides on the draw.
    """
    total = len(index.readable) * index.num_tokens
    count = NUM_CANDIDATES if choose == "distinct" else num_queries
    rng = np.random.default_rng(seed)
    drawn = torch.from_numpy(rng.choice(total, min(count, total), replace=False))
    images = index.readable[drawn // index.num_tokens]
    numbers = drawn % index.num_tokens
    if choose == "distinct":
        tokens = index.tokens(images)[torch.arange(len(drawn)), numbers]
        order = most_distinct(unit_length(tokens), num_queries)
        images, numbers = images[order], numbers[order]
    pairs = zip(numbers.tolist(), images.tolist(), strict=True)
    return [Query(number, image) for number, image in pairs]


def token_search(
    index: TokenIndex,
    queries: Sequence[Query],
    files: ImageFiles,
    device: torch.device,
) -> Search:
    """Looks for tokens by the cosine in the space of the encoder.

    Raises:
        ValueError: If the image of a query is unreadable.
    """
    images = torch.tensor([query.image for query in queries])
    unreadable = images[~torch.isin(images, index.readable)].tolist()
    if unreadable:
        raise ValueError(
            f"The image '{files.names[unreadable[0]]}' of a query is unreadable: name "
            "another."
        )
    numbers = torch.tensor([query.number for query in queries])
    tokens = index.tokens(images)[torch.arange(len(queries)), numbers]
    return Search(
        queries,
        unit_length(tokens).to(device),
        unit_length,
        tokens.shape[1],
        "cosine similarity to the token of the query",
    )


def prototype_search(queries: Sequence[Query], head: STELLARProjectionHead) -> Search:
    """Looks for the tokens with the largest logits of prototypes."""
    numbers = [query.number for query in queries]
    return Search(
        queries,
        head.prototypes.weight[numbers],
        head,
        _width(head),
        "logit of the prototype: its product with the projected token",
    )


def most_used_prototypes(
    index: TokenIndex, head: STELLARProjectionHead, num_queries: int
) -> list[Query]:
    """The prototypes that are the nearest of most tokens, the most used first."""
    usage = prototype_usage(index, head.prototypes.weight, head, _width(head))
    counts, numbers = usage.sort(descending=True, stable=True)
    total = int(usage.sum())
    return [
        Query(number, note=f"nearest prototype of {count} of {total} tokens")
        for number, count in zip(numbers.tolist(), counts.tolist(), strict=True)
        if count
    ][:num_queries]


def _width(head: STELLARProjectionHead) -> int:
    layers = [layer for layer in head.modules() if isinstance(layer, nn.Linear)]
    return max(layer.in_features for layer in layers)
