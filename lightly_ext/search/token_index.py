"""An index of tokens on disk, and the images in it that are most like a query."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightly_ext.metrics.late_interaction import maxsim
from lightly_ext.search.entries import Entries
from lightly_ext.search.image_index import Found
from lightly_ext.search.index_card import CARD_NAME, IndexCard
from lightly_ext.search.scoring import (
    quantised,
    restored,
    sketch_matrix,
    unit_length,
)
from lightly_ext.search.store import LanceStore

TOKENS, SKETCH = ("tokens", "token_factors"), ("sketch", "sketch_factors")
POOLED = {"mean": ("mean", "mean_factor"), "cls": ("cls", "cls_factor")}
WHERE = ("masses", "maps", "sizes", "stamps")
CANDIDATES = 1000
ROWS_OF_SKETCH = 8192


@dataclass
class TokenIndex:
    """Tokens of many images in a folder.

    Attributes:
        folder:
            The folder.
        card:
            What the index says of itself.
    """

    folder: Path
    card: IndexCard
    _store: LanceStore = field(init=False, repr=False)
    _files: list[str] = field(init=False, repr=False)
    _numbers: NDArray[np.int64] = field(init=False, repr=False)
    _sketch: tuple[Tensor, Tensor] | None = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._store = LanceStore(self.folder)
        self.refresh()

    @classmethod
    def open(cls, folder: Path | str) -> TokenIndex:
        """Opens an index.

        Raises:
            FileNotFoundError: If there is none in the folder.
            ValueError: If its card cannot be read.
        """
        folder = Path(folder)
        return cls(folder, IndexCard.load(folder))

    @classmethod
    def create(cls, folder: Path | str, card: IndexCard) -> TokenIndex:
        """Makes an index, or opens one of tokens that were made in the same way.

        Raises:
            ValueError: If the folder has an index of other tokens.
        """
        folder = Path(folder)
        if (folder / CARD_NAME).is_file():
            IndexCard.load(folder).check_same(card, str(folder))
        card.save(folder)
        return cls.open(folder)

    def __len__(self) -> int:
        return len(self._files)

    @property
    def place(self) -> str:
        """Where the index is, for messages."""
        return str(self.folder)

    @property
    def files(self) -> Sequence[str]:
        """Names of the images, sorted."""
        return self._files

    def put(self, entries: Entries) -> None:
        """Adds images, or replaces them; `refresh` shows them.

        Raises:
            ValueError: If the tokens have another shape than those of the index.
        """
        wanted = (len(entries), self.card.num_tokens, self.card.dim)
        if entries.tokens.shape != wanted:
            raise ValueError(
                f"tokens must be {wanted}, got {tuple(entries.tokens.shape)}."
            )
        self._store.put(entries.files, _columns(entries))

    def drop(self, files: Sequence[str]) -> None:
        """Removes images; `refresh` shows that."""
        self._store.drop(files)

    def tidy(self) -> None:
        """Makes the files on disk few and small again; see `LanceStore.tidy`."""
        self._store.tidy()

    def refresh(self) -> None:
        """Looks at what is in the table now."""
        self._files, self._numbers = self._store.files()
        self._sketch = None

    def entries(self, numbers: Sequence[int]) -> Entries:
        """All that is kept of some images, by their numbers in `files`."""
        cls = POOLED["cls"] if self.card.cls_dim else ()
        names = [*TOKENS, *POOLED["mean"], *cls, *WHERE]
        rows = self._store.rows(self._numbers[list(numbers)], names)
        return self._entries([self._files[i] for i in numbers], rows)

    def blocks(self, size: int = 1024) -> Iterator[Entries]:
        """All images, some at a time, in the order of `files`."""
        for start in range(0, len(self), size):
            yield self.entries(range(start, min(start + size, len(self))))

    def stamps(self) -> dict[str, tuple[int, int]]:
        """Size in bytes and time of change in ns of all files, when they were read."""
        found: list[tuple[int, int]] = []
        for block in self._store.blocks(self._numbers, ["stamps"]):
            found += map(tuple, block["stamps"].tolist())
        return dict(zip(self._files, found, strict=True))

    def search(
        self,
        tokens: Tensor,
        k: int,
        weights: Tensor | None = None,
        candidates: int | None = CANDIDATES,
    ) -> list[Found]:
        """Finds the images with the most similar tokens, see `scoring.maxsim`.

        Candidates are found by short tokens and then scored by the whole ones, so that
        scores are exact, and so is the list where there are no more images than
        candidates.

        Args:
            tokens:
                Tokens of the query with shape (num_query_tokens, dim), of any length.
            k:
                Number of images; all of them if there are fewer.
            weights:
                Weight of each, with shape (num_query_tokens,). None weighs all alike,
                with a sum of one.
            candidates:
                Number of candidates, None for all images.

        Returns:
            The images, the best first, of equals the first by name.

        Raises:
            ValueError: If the index is empty, k is not positive, or tokens and weights
                do not fit.
        """
        self._check(tokens, k)
        query = unit_length(tokens.cpu())
        if weights is None:
            weights = torch.full((len(query),), 1 / len(query))
        if weights.shape != query.shape[:1]:
            raise ValueError(
                f"weights must be one for each of {len(query)} tokens, got "
                f"{tuple(weights.shape)}."
            )
        weights = weights.float().cpu()
        chosen = np.arange(len(self))
        if candidates is not None and len(self) > max(candidates, k):
            rough = self._rough(query, weights)
            best = rough.topk(max(candidates, k)).indices
            chosen = np.sort(best.numpy())
        scores, matched = self._exact(query, weights, chosen)
        order = scores.sort(descending=True, stable=True).indices[:k]
        return [
            Found(self._files[chosen[i]], float(scores[i]), int(matched[i]))
            for i in order.tolist()
        ]

    def _check(self, tokens: Tensor, k: int) -> None:
        if not len(self):
            raise ValueError(f"The index in '{self.place}' has no image.")
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}.")
        if tokens.ndim != 2 or not len(tokens) or tokens.shape[1] != self.card.dim:
            raise ValueError(
                f"tokens must be (num_query_tokens, {self.card.dim}), got "
                f"{tuple(tokens.shape)}."
            )

    def _rough(self, query: Tensor, weights: Tensor) -> Tensor:
        """Scores of all images by short tokens."""
        if self._sketch is None:
            self._sketch = self._read_sketch()
        short = query @ sketch_matrix(self.card.dim)
        blocks = zip(
            *(part.split(ROWS_OF_SKETCH) for part in self._sketch), strict=True
        )
        return torch.cat([maxsim(short, weights, restored(*b)) for b in blocks])

    def _read_sketch(self) -> tuple[Tensor, Tensor]:
        blocks = list(self._store.blocks(self._numbers, SKETCH))
        steps, factors = (
            torch.from_numpy(np.concatenate([b[n] for b in blocks])) for n in SKETCH
        )
        return steps.unflatten(1, (self.card.num_tokens, -1)), factors

    def _exact(
        self, query: Tensor, weights: Tensor, chosen: NDArray[np.int64]
    ) -> tuple[Tensor, Tensor]:
        """Scores of images, and their token most like the query's heaviest."""
        heaviest = query[weights.argmax()]
        scores, matched = [], []
        for block in self._store.blocks(self._numbers[chosen], TOKENS):
            steps, factors = (torch.from_numpy(block[name].copy()) for name in TOKENS)
            tokens = restored(
                steps.unflatten(1, (self.card.num_tokens, self.card.dim)), factors
            )
            scores.append(maxsim(query, weights, tokens))
            matched.append((tokens @ heaviest).argmax(dim=1))
        return torch.cat(scores), torch.cat(matched)

    def _entries(self, files: Sequence[str], rows: dict[str, NDArray[Any]]) -> Entries:
        card = self.card

        def vectors(names: tuple[str, str], *shape: int) -> Tensor:
            steps, factors = (torch.from_numpy(rows[name].copy()) for name in names)
            return restored(steps.unflatten(1, shape), factors)

        def numbers(name: str) -> Tensor:
            return torch.from_numpy(rows[name].copy())

        maps = numbers("maps").unflatten(1, (card.num_tokens, -1))
        no_cls = torch.empty(len(files), 0)
        return Entries(
            files,
            vectors(TOKENS, card.num_tokens, card.dim),
            numbers("masses"),
            maps.float() / 255,
            vectors(POOLED["mean"], card.dim),
            vectors(POOLED["cls"], card.cls_dim) if card.cls_dim else no_cls,
            numbers("sizes"),
            numbers("stamps"),
        )


def _columns(entries: Entries) -> dict[str, NDArray[Any]]:
    """What the table keeps: vectors in bytes, maps in steps of 1 / 255."""
    units = unit_length(entries.tokens.cpu())
    columns = dict(zip(TOKENS, quantised(units), strict=True))
    columns |= dict(zip(SKETCH, _short(units), strict=True))
    columns |= dict(zip(POOLED["mean"], quantised(entries.mean.cpu()), strict=True))
    if entries.cls.shape[1]:
        columns |= dict(zip(POOLED["cls"], quantised(entries.cls.cpu()), strict=True))
    columns["masses"] = entries.masses.float().cpu()
    columns["maps"] = (entries.maps.cpu() * 255).round().byte()
    columns |= {"sizes": entries.sizes, "stamps": entries.stamps}
    return {
        k: v.flatten(1).numpy() if v.ndim > 2 else v.numpy() for k, v in columns.items()
    }


def _short(units: Tensor) -> tuple[Tensor, Tensor]:
    """Short tokens in bytes: their lengths tell how much was cut off, and stay."""
    short = units @ sketch_matrix(units.shape[-1])
    steps, factors = quantised(short)
    return steps, factors * short.norm(dim=-1)
