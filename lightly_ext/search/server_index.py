"""An index of tokens on a Qdrant server, for more than one machine."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightly_ext.evaluate.fingerprints import Stamp
from lightly_ext.search.entries import Entries
from lightly_ext.search.image_index import Content, Found
from lightly_ext.search.index_card import IndexCard
from lightly_ext.search.points import (
    FILE,
    file_of,
    maps_of,
    point_id,
    to_points,
    vector_config,
)
from lightly_ext.search.qdrant import QdrantServer
from lightly_ext.search.query import By, Query, check_asked
from lightly_ext.search.scoring import sketch_matrix
from lightly_ext.search.token_index import CANDIDATES

# What a collection says of itself: the card, as text.
CARD = "stellar_index"
# What Qdrant refuses in the name of a collection.
NO_NAME = re.compile(r'[<>:"/\\|?*\0\x1f]')
# A request may have 32 MB; a number has at most 22 characters.
NUMBERS_AT_ONCE = 1_000_000
POINTS_AT_ONCE, LISTED_AT_ONCE = 1000, 10_000
# Of the means in bytes, so many times k are scored anew by the whole ones.
OVERSAMPLING = 4.0


class ServerIndex:
    """Tokens of many images in a collection of a Qdrant server.

    The server scores: by the sum over the tokens of a query of the greatest product
    with a token of an image, where the query's tokens are multiplied by their weights.
    The methods do what those of `TokenIndex` do.

    Args:
        server:
            The server.
        name:
            Name of the collection.
        card:
            What the index says of itself.
    """

    def __init__(self, server: QdrantServer, name: str, card: IndexCard) -> None:
        self.card = card
        self._server = server
        self._name = name
        self._files: dict[str, Mapping[str, Any]] | None = None

    @classmethod
    def open(cls, url: str, name: str) -> ServerIndex:
        """Opens an index.

        Args:
            url:
                The server, see `QdrantServer`.
            name:
                Name of the collection.

        Raises:
            FileNotFoundError: If the server has no such collection.
            ValueError: If the collection is no index.
        """
        server = QdrantServer(url)
        card = _read_card(server, name)
        if card is None:
            raise FileNotFoundError(
                f"There is no index {_place(server, name)}: `stellar index --model "
                f"MODEL --data FOLDER --output {name} --server {url}` makes one."
            )
        return cls(server, name, card)

    @classmethod
    def create(cls, url: str, name: str, card: IndexCard) -> ServerIndex:
        """Makes an index, or opens one of tokens that were made in the same way.

        Raises:
            ValueError: If the collection is no index, or one of other tokens.
        """
        server = QdrantServer(url)
        there = _read_card(server, name)
        if there is None:
            server(
                "create_collection",
                collection_name=name,
                vectors_config=vector_config(card),
                on_disk_payload=True,
                metadata={CARD: card.to_json()},
            )
        else:
            there.check_same(card, _place(server, name))
            # By the first ones: many small steps do not add up.
            card = replace(card, known=there.known, versions=there.versions)
            if there != card:
                metadata = {CARD: card.to_json()}
                server("update_collection", collection_name=name, metadata=metadata)
        return cls.open(url, name)

    @property
    def place(self) -> str:
        """Where the index is, for messages."""
        return _place(self._server, self._name)

    def __len__(self) -> int:
        if self._files is None:
            return self._ask("count", exact=True).count
        return len(self._files)

    @property
    def files(self) -> Sequence[str]:
        """Names of the images, sorted."""
        return list(self._listed())

    @property
    def num_bytes(self) -> None:
        """Not told by a server."""

    def contents(self) -> dict[str, Content]:
        """Stamps and hashes of all files, of when they were read."""
        return {
            file: (tuple(payload["stamp"]), bytes.fromhex(payload["hash"]))
            for file, payload in self._listed().items()
        }

    def sizes(self) -> Tensor:
        """Height and width of all images in px, int64 with shape (len(self), 2)."""
        sizes = [payload["size"] for payload in self._listed().values()]
        return torch.tensor(sizes, dtype=torch.int64).reshape(-1, 2)

    def _listed(self) -> dict[str, Mapping[str, Any]]:
        """What is told of all files, in the order of their names."""
        if self._files is None:
            payloads = self._payloads([*FILE, "stamp", "hash", "size"])
            found = {file_of(payload): payload for payload in payloads}
            self._files = dict(sorted(found.items()))
        return self._files

    def _payloads(self, names: list[str]) -> Iterator[Mapping[str, Any]]:
        start, more = None, True
        while more:
            points, start = self._ask(
                "scroll", limit=LISTED_AT_ONCE, offset=start, with_payload=names
            )
            yield from (point.payload for point in points)
            more = start is not None

    def put(self, entries: Entries) -> None:
        """Adds images, or replaces them; `refresh` shows them."""
        wanted = (len(entries), self.card.num_tokens, self.card.dim)
        if entries.tokens.shape != wanted:
            raise ValueError(
                f"tokens must be {wanted}, got {tuple(entries.tokens.shape)}."
            )
        size = max(1, NUMBERS_AT_ONCE // (self.card.num_tokens * self.card.dim))
        for start in range(0, len(entries), size):
            part = entries[range(start, min(start + size, len(entries)))]
            self._ask("upsert", points=to_points(part), wait=True)

    def drop(self, files: Sequence[str]) -> None:
        """Removes images; `refresh` shows that."""
        for start in range(0, len(files), POINTS_AT_ONCE):
            ids = [point_id(file) for file in files[start : start + POINTS_AT_ONCE]]
            self._ask("delete", points_selector=ids, wait=True)

    def restamp(self, stamps: Mapping[str, Stamp]) -> None:
        """Replaces the stamps of files whose content is as it was."""
        from qdrant_client import models

        files = list(stamps)
        for start in range(0, len(files), POINTS_AT_ONCE):
            changes = [
                models.SetPayloadOperation(
                    set_payload=models.SetPayload(
                        payload={"stamp": list(stamps[file])}, points=[point_id(file)]
                    )
                )
                for file in files[start : start + POINTS_AT_ONCE]
            ]
            self._ask("batch_update_points", update_operations=changes, wait=True)

    def tidy(self) -> None:
        """Nothing: a server does it by itself."""

    def refresh(self) -> None:
        """Looks at what is there now."""
        self._files = None

    def blocks(self, size: int = 1024) -> Iterator[Entries]:
        """All images, some at a time, in the order of `files`."""
        files = self.files
        for start in range(0, len(files), size):
            yield self.entries(files[start : start + size])

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
        """Finds the images that are most like a query, see `TokenIndex.search`.

        An image whose tokens are all zeros is not found. Where equals stand at the end
        of the list, the server decides which of them are in it.
        """
        check_asked(self.place, len(self), k, candidates)
        query = Query.of(self.card, tokens, weights, by, pooled)
        if query.pooled is not None:
            asked = self._ask_pooled(query.pooled, by)
        else:
            asked = self._ask_tokens(
                query.tokens * query.weights[:, None], k, candidates
            )
        points = self._ask(
            "query_points", limit=k, with_payload=[*FILE], **asked
        ).points
        scores = {file_of(point.payload): point.score for point in points}
        order = sorted(scores, key=lambda file: (-scores[file], file))
        heaviest = query.tokens[query.heaviest].float()
        matched = self._matched(order, heaviest)
        return [Found(f, scores[f], m) for f, m in zip(order, matched, strict=True)]

    def _ask_tokens(
        self, folded: Tensor, k: int, candidates: int | None
    ) -> dict[str, Any]:
        """Asks by late interaction; the tokens are multiplied by their weights."""
        from qdrant_client import models

        asked = {"query": folded.tolist(), "using": "tokens"}
        if candidates is None:
            return {**asked, "search_params": models.SearchParams(exact=True)}
        in_bytes = models.QuantizationSearchParams(rescore=False)
        first = models.Prefetch(
            query=(folded.float() @ sketch_matrix(self.card.dim)).tolist(),
            using="sketch",
            limit=max(candidates, k),
            params=models.SearchParams(quantization=in_bytes),
        )
        return {**asked, "prefetch": first}

    def _ask_pooled(self, pooled: Tensor, by: By) -> dict[str, Any]:
        from qdrant_client import models

        rescored = models.QuantizationSearchParams(
            rescore=True, oversampling=OVERSAMPLING
        )
        params = models.SearchParams(quantization=rescored)
        return {"query": pooled.tolist(), "using": by, "search_params": params}

    def _matched(self, files: Sequence[str], direction: Tensor) -> Iterator[int]:
        """The token of each image that is most like a direction."""
        for points in self._points_of(files, ["present"], ["tokens"]):
            for point in points:
                present = point.payload["present"]
                if not present:  # found by its CLS token
                    yield 0
                    continue
                cosines = torch.tensor(point.vector["tokens"]) @ direction
                yield present[int(cosines.argmax())]

    def entries(self, files: Sequence[str]) -> Entries:
        """All that is kept of some images, by the names of their files.

        Raises:
            ValueError: If one is not, or no longer, in the index.
        """
        card, size = self.card, len(files)
        tokens = torch.zeros(size, card.num_tokens, card.dim)
        mean, cls = torch.empty(size, card.dim), torch.empty(size, card.cls_dim)
        maps, payloads = [], []
        points = [p for part in self._points_of(files, True, True) for p in part]
        for i, point in enumerate(points):
            vectors, payload = point.vector, point.payload
            if payload["present"]:
                tokens[i, payload["present"]] = torch.tensor(vectors["tokens"])
            mean[i] = torch.tensor(vectors["mean"])
            if card.cls_dim:
                cls[i] = torch.tensor(vectors["cls"])
            maps.append(maps_of(payload["maps"], card.num_tokens))
            payloads.append(payload)

        def numbers(name: str, dtype: torch.dtype) -> Tensor:
            return torch.tensor([payload[name] for payload in payloads], dtype=dtype)

        return Entries(
            files,
            tokens,
            numbers("masses", torch.float32),
            torch.stack(maps),
            mean,
            cls,
            numbers("size", torch.int64),
            numbers("stamp", torch.int64),
            torch.tensor([list(bytes.fromhex(p["hash"])) for p in payloads]).byte(),
        )

    def _points_of(
        self, files: Sequence[str], payload: Any, vectors: Any
    ) -> Iterator[list[Any]]:
        """Points of files in their order, some at a time."""
        size = max(1, NUMBERS_AT_ONCE // (self.card.num_tokens * self.card.dim))
        for start in range(0, len(files), size):
            part = files[start : start + size]
            found = self._ask(
                "retrieve",
                ids=[point_id(file) for file in part],
                with_payload=payload,
                with_vectors=vectors,
            )
            by_id = {point.id: point for point in found}
            if gone := [file for file in part if point_id(file) not in by_id]:
                raise ValueError(
                    f"'{gone[0]}' is not in the index '{self.place}': if it was "
                    "dropped meanwhile, run the same command again."
                )
            yield [by_id[point_id(file)] for file in part]

    def _ask(self, method: str, **arguments: Any) -> Any:
        return self._server(method, collection_name=self._name, **arguments)


def _place(server: QdrantServer, name: str) -> str:
    return f"{name} at {server.url}"


def _read_card(server: QdrantServer, name: str) -> IndexCard | None:
    """The card of a collection, None where there is no such collection.

    Raises:
        ValueError: If it is no name, or a collection of something else.
    """
    if not name or len(name) > 255 or NO_NAME.search(name):
        raise ValueError(
            f"On a server an index has a name, not a path: 'photos', got '{name}'."
        )
    if not server("collection_exists", collection_name=name):
        return None
    about = server("get_collection", collection_name=name).config.metadata or {}
    if CARD not in about:
        raise ValueError(
            f"The collection '{name}' at '{server.url}' holds something else than an "
            "index: choose another name."
        )
    return IndexCard.from_json(about[CARD], _place(server, name))
