"""What commands ask of an index, in a folder or on a server."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from lightly_ext.evaluate.fingerprints import Stamp
from lightly_ext.search.entries import Entries
from lightly_ext.search.index_card import IndexCard
from lightly_ext.search.query import By

# Stamp and SHA-256 of a file; a plain tuple, as there may be millions.
Content = tuple[Stamp, bytes]


@dataclass(frozen=True)
class Found:
    """An image that is like a query.

    Attributes:
        file: Name of its file, relative to the folder of the images.
        score: How alike, at most one where weights sum to one.
        token: Its token that is most like the query's heaviest.
    """

    file: str
    score: float
    token: int


class ImageIndex(Protocol):
    """An index of the tokens of images; see `TokenIndex` for each method.

    Attributes:
        card:
            What the index says of itself.
    """

    card: IndexCard

    @property
    def place(self) -> str:
        """Where the index is, for messages."""

    @property
    def files(self) -> Sequence[str]:
        """Names of the images, sorted."""

    def __len__(self) -> int: ...

    @property
    def num_bytes(self) -> int | None:
        """Bytes on disk, None where that is not told."""

    def put(self, entries: Entries) -> None:
        """Adds images, or replaces them; `refresh` shows them."""

    def drop(self, files: Sequence[str]) -> None:
        """Removes images; `refresh` shows that."""

    def tidy(self) -> None:
        """Makes what is stored small again after many changes."""

    def refresh(self) -> None:
        """Looks at what is there now."""

    def entries(self, files: Sequence[str]) -> Entries:
        """All that is kept of some images, by the names of their files."""

    def blocks(self, size: int = ...) -> Iterator[Entries]:
        """All images, some at a time, in the order of `files`."""

    def contents(self) -> dict[str, Content]:
        """Stamps and hashes of all files, of when they were read."""

    def sizes(self) -> Tensor:
        """Height and width of all images in px, int64 with shape (len(self), 2)."""

    def restamp(self, stamps: Mapping[str, Stamp]) -> None:
        """Replaces the stamps of files whose content is as it was."""

    def search(
        self,
        tokens: Tensor,
        k: int,
        weights: Tensor | None = None,
        *,
        by: By = ...,
        pooled: Tensor | None = None,
        candidates: int | None = ...,
    ) -> list[Found]:
        """Finds the images that are most like a query, the best first."""
