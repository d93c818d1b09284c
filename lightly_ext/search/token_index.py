"""An index of tokens on disk, and the images in it that are most like a query."""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightly_ext.evaluate.fingerprints import Stamp
from lightly_ext.search.entries import Entries
from lightly_ext.search.image_index import Content, Found
from lightly_ext.search.index_card import CARD_NAME, IndexCard
from lightly_ext.search.query import By, Query, check_asked
from lightly_ext.search.scoring import (
    SKETCH_DIM,
    cosines,
    one_thread,
    quantised,
    restored,
    sketch_matrix,
    unit_length,
)
from lightly_ext.search.store import ROWS_AT_ONCE, LanceStore

TOKENS, SKETCH = ("tokens", "token_factors"), ("sketch", "sketch_factors")
POOLED = {"mean": ("mean", "mean_factor"), "cls": ("cls", "cls_factor")}
WHERE = ("masses", "maps", "sizes", "stamps", "hashes")
CANDIDATES = 1000
# Of short and of whole tokens: as many as stay in the cache of a core while they are
# compared, which takes half the time of more.
ROWS_OF_SKETCH, ROWS_OF_TOKENS = 1024, 32


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
        self._store.check(_widths(self.card))
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
        there = None
        if (folder / CARD_NAME).is_file():
            there = IndexCard.load(folder)
            there.check_same(card, str(folder))
            # By the first ones: many small steps do not add up.
            card = replace(card, known=there.known, versions=there.versions)
        if card != there:
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

    @property
    def num_bytes(self) -> int:
        """Bytes on disk, see `LanceStore.num_bytes`."""
        return self._store.num_bytes

    def tidy(self) -> None:
        """Makes the files on disk few and small again; see `LanceStore.tidy`."""
        self._store.tidy()

    def refresh(self) -> None:
        """Looks at what is in the table now."""
        self._files, self._numbers = self._store.files()
        self._sketch = None

    def entries(self, files: Sequence[str]) -> Entries:
        """All that is kept of some images, by the names of their files.

        Raises:
            ValueError: If one is not in the index.
        """
        numbers = [bisect.bisect_left(self._files, file) for file in files]
        for number, file in zip(numbers, files, strict=True):
            if self._files[number : number + 1] != [file]:
                raise ValueError(f"'{file}' is not in the index '{self.place}'.")
        cls = POOLED["cls"] if self.card.cls_dim else ()
        names = [*TOKENS, *POOLED["mean"], *cls, *WHERE]
        return self._entries(files, self._store.rows(self._numbers[numbers], names))

    def blocks(self, size: int = 1024) -> Iterator[Entries]:
        """All images, some at a time, in the order of `files`."""
        for start in range(0, len(self), size):
            yield self.entries(self._files[start : start + size])

    def contents(self) -> dict[str, Content]:
        """Stamps and hashes of all files, of when they were read."""
        found: list[Content] = []
        for block in self._store.blocks(self._numbers, ["stamps", "hashes"]):
            stamps, hashes = map(tuple, block["stamps"].tolist()), block["hashes"]
            found += zip(stamps, map(bytes, hashes), strict=True)
        return dict(zip(self._files, found, strict=True))

    def sizes(self) -> Tensor:
        """Height and width of all images in px, int64 with shape (len(self), 2)."""
        blocks = self._store.blocks(self._numbers, ["sizes"])
        sizes = [torch.from_numpy(block["sizes"].copy()) for block in blocks]
        return torch.cat(sizes) if sizes else torch.empty(0, 2, dtype=torch.int64)

    def restamp(self, stamps: Mapping[str, Stamp]) -> None:
        """Replaces the stamps of files whose content is as it was; see `put`."""
        chosen = [i for i, file in enumerate(self._files) if file in stamps]
        for start in range(0, len(chosen), ROWS_AT_ONCE):
            part = chosen[start : start + ROWS_AT_ONCE]
            files = [self._files[i] for i in part]
            rows = self._store.rows(self._numbers[part])
            rows["stamps"] = np.array([stamps[file] for file in files], np.int64)
            self._store.put(files, rows)

    def search(
        self,
        tokens: Tensor,
        k: int,
        weights: Tensor | None = None,
        *,
        by: By = "maxsim",
        pooled: Tensor | None = None,
        candidates: int | None = CANDIDATES,
    ) -> list[Found]:
        """Finds the images that are most like a query.

        By "maxsim" each token of the query looks for its like, see
        `late_interaction.maxsim`. Candidates are found by short tokens and then scored
        by the whole ones, so that scores are exact, and so is the list where there are
        no more images than candidates. By "mean" and "cls" all images are scored, by
        the cosine of one vector.

        Args:
            tokens:
                Tokens of the query with shape (num_query_tokens, dim), of any length.
            k:
                Number of images; all of them if there are fewer.
            weights:
                Weight of each, at least 0, with shape (num_query_tokens,). None weighs
                all alike, with a sum of one.
            by:
                "maxsim", or what stands for a whole image: "mean" of its tokens, or
                "cls".
            pooled:
                What stands for the query by "mean" (None: the weighted mean of its
                tokens) or by "cls", with shape (dim,) or (cls_dim,), of any length.
            candidates:
                Number of candidates of "maxsim", None for all images.

        Returns:
            The images, the best first, of equals the first by name.

        Raises:
            ValueError: If the index is empty or has no CLS tokens, k is not positive,
                or tokens, weights and pooled do not fit.
        """
        check_asked(self.place, len(self), k, candidates)
        query = Query.of(self.card, tokens, weights, by, pooled)
        with one_thread():
            if query.pooled is not None:
                scores = self._pooled_scores(query.pooled, POOLED[by])
                chosen = _best(scores, k)
                scores, matched = scores[chosen], self._exact(query, chosen)[1]
            elif candidates is not None and len(self) > max(candidates, k):
                chosen = np.sort(_best(self._rough(query), max(candidates, k)))
                scores, matched = self._exact(query, chosen)
            else:
                chosen = np.arange(len(self))
                scores, matched = self._exact_of_all(query)
            scores = _rounded(scores)
            best = _best(scores, k).tolist()
        return [
            Found(self._files[chosen[i]], float(scores[i]), int(matched[i]))
            for i in best
        ]

    def _pooled_scores(self, pooled: Tensor, names: tuple[str, str]) -> Tensor:
        scores = torch.empty(len(self), dtype=torch.float64)
        for places, rows in self._store.scan(self._numbers, names):
            steps, factors = _tensors(rows, names)
            scores[places] = restored(steps, factors.double()) @ pooled
        return scores

    def _rough(self, query: Query) -> Tensor:
        """Scores of all images by short tokens."""
        if self._sketch is None:
            self._sketch = self._read_sketch()
        short = query.tokens.float() @ sketch_matrix(self.card.dim)
        weights = query.weights.float()
        parts = (part.split(ROWS_OF_SKETCH) for part in self._sketch)
        scores = [
            cosines(short, steps, factors).amax(dim=1) @ weights
            for steps, factors in zip(*parts, strict=True)
        ]
        return torch.cat(scores)

    def _read_sketch(self) -> tuple[Tensor, Tensor]:
        short = sketch_matrix(self.card.dim).shape[1]
        shape = len(self), self.card.num_tokens
        steps = torch.empty(*shape, short, dtype=torch.int8)
        factors = torch.empty(shape)
        for places, rows in self._store.scan(self._numbers, SKETCH):
            part, factors[places] = _tensors(rows, SKETCH)
            steps[places] = part.unflatten(1, steps.shape[1:])
        return steps, factors

    def _exact(self, query: Query, chosen: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Scores of images, and their token most like the query's heaviest.

        In float64: equal images have equal scores, wherever in a block they stand.
        """
        blocks = self._store.blocks(self._numbers[chosen], TOKENS)
        found = [self._compare(query, rows) for rows in blocks]
        scores, matched = zip(*found, strict=True)
        return torch.cat(scores), torch.cat(matched)

    def _exact_of_all(self, query: Query) -> tuple[Tensor, Tensor]:
        scores = torch.empty(len(self), dtype=torch.float64)
        matched = torch.empty(len(self), dtype=torch.int64)
        for places, rows in self._store.scan(self._numbers, TOKENS):
            scores[places], matched[places] = self._compare(query, rows)
        return scores, matched

    def _compare(
        self, query: Query, rows: dict[str, NDArray[Any]]
    ) -> tuple[Tensor, Tensor]:
        steps, factors = _tensors(rows, TOKENS)
        steps = steps.unflatten(1, (self.card.num_tokens, self.card.dim))
        parts = steps.split(ROWS_OF_TOKENS), factors.split(ROWS_OF_TOKENS)
        found = [
            cosines(query.tokens, *part).max(dim=1) for part in zip(*parts, strict=True)
        ]
        best, numbers = (torch.cat(values) for values in zip(*found, strict=True))
        return best @ query.weights, numbers[:, query.heaviest]

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
            numbers("hashes"),
        )


def _tensors(rows: dict[str, NDArray[Any]], names: Sequence[str]) -> list[Tensor]:
    return [torch.from_numpy(rows[name]) for name in names]


def _rounded(scores: Tensor) -> Tensor:
    """Scores that do not depend on which images stand beside one in a block."""
    return scores.double().round(decimals=9)


def _best(scores: Tensor, k: int) -> NDArray[np.int64]:
    """Numbers of the best scores, of equals the first; rounding makes none unequal."""
    rounded = _rounded(scores)
    worst = rounded.topk(min(k, len(scores))).values[-1]
    kept = (rounded >= worst).nonzero().flatten()  # sorting all takes longer
    order = rounded[kept].sort(descending=True, stable=True).indices
    return kept[order[:k]].numpy()


def _widths(card: IndexCard) -> dict[str, int]:
    """How many numbers each column of the table has for an image."""
    count, patches = card.num_tokens, math.prod(card.grid_size)
    short = min(card.dim, SKETCH_DIM)
    widths = dict(zip(TOKENS, (count * card.dim, count), strict=True))
    widths |= dict(zip(SKETCH, (count * short, count), strict=True))
    widths |= dict(zip(POOLED["mean"], (card.dim, 1), strict=True))
    if card.cls_dim:
        widths |= dict(zip(POOLED["cls"], (card.cls_dim, 1), strict=True))
    return widths | dict(zip(WHERE, (count, count * patches, 2, 3, 32), strict=True))


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
    columns |= {name: getattr(entries, name) for name in ("sizes", "stamps", "hashes")}
    return {
        k: v.flatten(1).numpy() if v.ndim > 2 else v.numpy() for k, v in columns.items()
    }


def _short(units: Tensor) -> tuple[Tensor, Tensor]:
    """Short tokens in bytes: their lengths tell how much was cut off, and stay."""
    short = units @ sketch_matrix(units.shape[-1])
    steps, factors = quantised(short)
    return steps, factors * short.norm(dim=-1)
