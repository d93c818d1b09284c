"""All tokens of a folder on disk, and the nearest of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol as Interface

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from lightly_ext.evaluate.features import CachedFeatures, FeatureCache
from lightly_ext.evaluate.images import ImageFiles
from stellar_plugin.encoder import L2_NORM_EPS, Factorization
from stellar_plugin.protocols import CropProtocol
from stellar_plugin.visualize import token_masses

# Bytes that the widest tensor of one block takes: small beside any memory, large enough
# for a device to be busy.
BLOCK_BYTES = 2**26


class Rows(Interface):
    """What the index needs of an array: rows by their numbers, as from a memory map."""

    @property
    def shape(self) -> tuple[int, ...]: ...  # noqa: D102

    def __getitem__(self, rows: NDArray[np.int64], /) -> NDArray[np.generic]: ...


@dataclass(frozen=True)
class TokenIndex:
    """Tokens of many images and where they are, in memory-mapped arrays.

    Attributes:
        units:
            Sparse tokens, scaled to unit length, float16 with shape (num_images, r, d).
        norms:
            Lengths of the tokens before, float32 with shape (num_images, r).
        maps:
            Localization in steps of 1 / 255, uint8 with shape (num_images, r, n).
        masses:
            Share of its image that each token has, float32 with shape (num_images, r).
        readable:
            Numbers of the readable images, int64, ascending. The others have no tokens.
        grid_size:
            Height and width of the patch grid.
    """

    units: Rows
    norms: Rows
    maps: Rows
    masses: Rows
    readable: Tensor
    grid_size: tuple[int, int]

    @property
    def num_tokens(self) -> int:
        """Tokens of one image."""
        return self.units.shape[1]

    def tokens(self, images: Tensor) -> Tensor:
        """Tokens of some images as the encoder gave them, float32 (images, r, d).

        Args:
            images:
                Numbers of the images, int64.
        """
        rows = images.numpy()
        units = torch.from_numpy(np.array(self.units[rows])).float()
        return units * torch.from_numpy(np.array(self.norms[rows]))[..., None]

    def mass(self, image: int, token: int) -> float:
        """Share of an image that a token has, in [0, 1]."""
        return float(np.array(self.masses[np.array([image])])[0, token])

    def token_map(self, image: int, token: int) -> Tensor:
        """Localization of a token, float32 in [0, 1] with the shape of the grid."""
        values = np.array(self.maps[np.array([image])])[0, token]
        return torch.from_numpy(values).float().div(255).view(self.grid_size)

    def blocks(self, width: int) -> Iterator[tuple[Tensor, Tensor]]:
        """All tokens, some images at a time.

        Args:
            width:
                Numbers in the widest vector that is computed of a token: sets how many
                images are in a block.

        Yields:
            Numbers of the images, and their tokens as `tokens` returns them.
        """
        size = max(1, BLOCK_BYTES // (4 * self.num_tokens * width))
        for images in self.readable.split(size):
            yield images, self.tokens(images)


@dataclass(frozen=True)
class Neighbours:
    """The nearest tokens of some queries, the nearest first.

    Attributes:
        images:
            Numbers of their images, int64 with shape (num_queries, k).
        tokens:
            Numbers of the tokens in their images, int64 with the same shape.
        similarity:
            Their similarities, float32 with the same shape.
    """

    images: Tensor
    tokens: Tensor
    similarity: Tensor


def index_tokens(
    cache: FeatureCache, files: ImageFiles, protocol: CropProtocol
) -> tuple[TokenIndex, CachedFeatures]:
    """Factorizes all images, or reads what an earlier run left on disk.

    Args:
        cache:
            Computes the features, or has them.
        files:
            The images.
        protocol:
            Says how they are cut.

    Returns:
        The index, and the features that it is of.

    Raises:
        RuntimeError: If more than 5 % of the images are unreadable.
        ValueError: If the model has no localization.
    """
    grids: list[tuple[int, int]] = []

    def compute(images: Tensor) -> Mapping[str, Tensor]:
        result = cache.model(images)
        grids.append(result.grid_size)
        return quantised(result)

    cached = cache.features(files, protocol, "tokens, maps and masses", compute)
    index = TokenIndex(**cached.arrays, readable=cached.readable, grid_size=grids[0])
    return index, cached


def quantised(result: Factorization) -> dict[str, Tensor]:
    """Tokens and localization as the index keeps them: 2 bytes and 1 byte a number.

    Args:
        result:
            Factorization of a batch.

    Returns:
        "units", "norms", "maps" and "masses" of `TokenIndex`, a row per image.
    """
    tokens = result.sparse.float()
    maps = result.localization.float().mT
    return {
        "units": F.normalize(tokens, dim=-1, eps=L2_NORM_EPS).half(),
        "norms": tokens.norm(dim=-1),
        "maps": (maps * 255).round().byte(),
        "masses": token_masses(result.localization),
    }


def unit_length(tokens: Tensor) -> Tensor:
    """Tokens scaled to unit length, so that a product with another is the cosine."""
    return F.normalize(tokens, dim=-1, eps=L2_NORM_EPS)


def most_distinct(units: Tensor, number: int) -> list[int]:
    """Chooses vectors greedily, each the farthest from those chosen before.

    Args:
        units:
            Unit vectors with shape (num_vectors, dim).
        number:
            How many to choose, at most all of them.

    Returns:
        Numbers of the chosen vectors; the first vector is the first of them.
    """
    chosen = [0]
    closest = units @ units[0]
    while len(chosen) < min(number, len(units)):
        closest[chosen[-1]] = torch.inf
        chosen.append(int(closest.argmin()))
        closest = torch.maximum(closest, units @ units[chosen[-1]])
    return chosen


def nearest_tokens(
    index: TokenIndex,
    queries: Tensor,
    embed: Callable[[Tensor], Tensor],
    num_neighbours: int,
    exclude: Tensor | None = None,
    one_per_image: bool = True,
    width: int | None = None,
) -> Neighbours:
    """Searches the whole index, block by block, with a running list per query.

    Args:
        index:
            The tokens.
        queries:
            Queries with shape (num_queries, dim).
        embed:
            Maps tokens (num_images, r, d) to where they are compared, (num_images, r,
            dim); similarity is the product of embedding and query.
        num_neighbours:
            Length k of the lists; they are shorter where there are fewer tokens.
        exclude:
            Number of an image that is no neighbour, for each query, int64.
        one_per_image:
            Whether an image counts with its most similar token only.
        width:
            Numbers in the widest vector that `embed` computes of a token.

    Returns:
        The neighbours. Among equals the first image comes first, then the first token.
        Where a list is shorter than others, similarities are -inf.
    """
    device = queries.device
    num_queries = len(queries)
    best = torch.empty(num_queries, 0, device=device)
    where = torch.empty(num_queries, 0, dtype=torch.int64, device=device)
    for images, tokens in index.blocks(width or index.units.shape[2]):
        similarity = torch.einsum("ird,qd->qir", embed(tokens.to(device)), queries)
        place = images[:, None] * index.num_tokens + torch.arange(index.num_tokens)
        place = place.to(device).expand(num_queries, -1, -1)
        if exclude is not None:
            own = images.to(device) == exclude.to(device)[:, None]
            similarity = similarity.masked_fill(own[..., None], -torch.inf)
        if one_per_image:
            similarity, token = similarity.max(dim=2, keepdim=True)
            place = place.gather(2, token)
        # Stable, and earlier images come first: equals stay in their order.
        candidates = torch.cat([best, similarity.flatten(1)], dim=1)
        best, order = candidates.sort(dim=1, descending=True, stable=True)
        best, order = best[:, :num_neighbours], order[:, :num_neighbours]
        where = torch.cat([where, place.flatten(1)], dim=1).gather(1, order)
    best, where = best.cpu(), where.cpu()
    images = where.div(index.num_tokens, rounding_mode="floor")
    return Neighbours(images, where % index.num_tokens, best)


def prototype_usage(
    index: TokenIndex,
    prototypes: Tensor,
    embed: Callable[[Tensor], Tensor],
    width: int,
) -> Tensor:
    """Counts the tokens for which each prototype has the largest logit.

    Args:
        index:
            The tokens.
        prototypes:
            Prototypes with shape (num_prototypes, dim).
        embed:
            As for `nearest_tokens`.
        width:
            Numbers in the widest vector that `embed` computes of a token.

    Returns:
        Numbers of tokens, int64 with shape (num_prototypes,).
    """
    usage = torch.zeros(len(prototypes), dtype=torch.int64)
    for _, tokens in index.blocks(max(width, len(prototypes))):
        logits = embed(tokens.to(prototypes.device)) @ prototypes.mT
        winners = logits.argmax(dim=-1).flatten().cpu()
        usage += winners.bincount(minlength=len(prototypes))
    return usage
