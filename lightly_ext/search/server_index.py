"""An index of tokens on a Qdrant server, for more than one machine."""

from __future__ import annotations

import base64
import hashlib
import os
import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightly_ext.search.entries import Entries
from lightly_ext.search.image_index import Found
from lightly_ext.search.index_card import IndexCard
from lightly_ext.search.qdrant import QdrantServer
from lightly_ext.search.scoring import SKETCH_DIM, sketch_matrix, unit_length
from lightly_ext.search.token_index import CANDIDATES

# What a collection says of itself: the card, as text.
CARD = "stellar_index"
# What Qdrant refuses in the name of a collection.
NO_NAME = re.compile(r'[<>:"/\\|?*\0\x1f]')
# A request may have 32 MB; a number has at most 22 characters.
NUMBERS_AT_ONCE = 1_000_000
POINTS_AT_ONCE = 1000
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
        self._stamps: dict[str, tuple[int, int]] | None = None

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
        metadata = {CARD: card.to_json()}
        if there is None:
            server(
                "create_collection",
                collection_name=name,
                vectors_config=_vectors(card),
                on_disk_payload=True,
                metadata=metadata,
            )
        else:
            there.check_same(card, _place(server, name))
            if there != card:
                server("update_collection", collection_name=name, metadata=metadata)
        return cls.open(url, name)

    @property
    def place(self) -> str:
        """Where the index is, for messages."""
        return _place(self._server, self._name)

    def __len__(self) -> int:
        if self._stamps is None:
            return self._ask("count", exact=True).count
        return len(self._stamps)

    @property
    def files(self) -> Sequence[str]:
        """Names of the images, sorted."""
        return list(self.stamps())

    def stamps(self) -> dict[str, tuple[int, int]]:
        """Size in bytes and time of change in ns of all files, when they were read."""
        if self._stamps is None:
            listed, start = {}, None
            while True:
                points, start = self._ask(
                    "scroll",
                    limit=10 * POINTS_AT_ONCE,
                    offset=start,
                    with_payload=["file", "file_bytes", "stamp"],
                )
                for point in points:
                    listed[_file(point.payload)] = tuple(point.payload["stamp"])
                if start is None:
                    break
            self._stamps = dict(sorted(listed.items()))
        return self._stamps

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
            self._ask("upsert", points=_points(part), wait=True)

    def drop(self, files: Sequence[str]) -> None:
        """Removes images; `refresh` shows that."""
        for start in range(0, len(files), POINTS_AT_ONCE):
            ids = [_id(file) for file in files[start : start + POINTS_AT_ONCE]]
            self._ask("delete", points_selector=ids, wait=True)

    def tidy(self) -> None:
        """Nothing: a server does it by itself."""

    def refresh(self) -> None:
        """Looks at what is there now."""
        self._stamps = None

    def entries(self, numbers: Sequence[int]) -> Entries:
        """All that is kept of some images, by their numbers in `files`."""
        files = self.files
        return self._entries([files[i] for i in numbers])

    def blocks(self, size: int = 1024) -> Iterator[Entries]:
        """All images, some at a time, in the order of `files`."""
        files = self.files
        for start in range(0, len(files), size):
            yield self._entries(files[start : start + size])

    def search(
        self,
        tokens: Tensor,
        k: int,
        weights: Tensor | None = None,
        candidates: int | None = CANDIDATES,
    ) -> list[Found]:
        """Finds the images with the most similar tokens, see `TokenIndex.search`.

        An image of which no token has a direction is never found. Of equals at the end
        of the list the server decides which are in it.
        """
        query = unit_length(tokens.cpu())
        if weights is None:
            weights = torch.full((len(query),), 1 / len(query))
        folded = query * weights.float().cpu()[:, None]
        found = self._late_interaction(folded, k, candidates)
        scores = {_file(point.payload): point.score for point in found}
        order = sorted(scores, key=lambda file: (-scores[file], file))
        heaviest = query[weights.argmax()]
        return [
            Found(file, scores[file], token)
            for file, token in zip(order, self._matched(order, heaviest), strict=True)
        ]

    def _late_interaction(
        self, folded: Tensor, k: int, candidates: int | None
    ) -> list[Any]:
        from qdrant_client import models

        first = None
        if candidates is not None:
            in_bytes = models.QuantizationSearchParams(rescore=False)
            first = models.Prefetch(
                query=(folded @ sketch_matrix(self.card.dim)).tolist(),
                using="sketch",
                limit=max(candidates, k),
                params=models.SearchParams(quantization=in_bytes),
            )
        return self._ask(
            "query_points",
            prefetch=first,
            query=folded.tolist(),
            using="tokens",
            limit=k,
            search_params=models.SearchParams(exact=True) if first is None else None,
            with_payload=["file", "file_bytes"],
        ).points

    def _matched(self, files: Sequence[str], direction: Tensor) -> Iterator[int]:
        """The token of each image that is most like a direction."""
        for points in self._points_of(files, ["present"], ["tokens"]):
            for point in points:
                cosines = torch.tensor(point.vector["tokens"]) @ direction
                yield point.payload["present"][int(cosines.argmax())]

    def _entries(self, files: Sequence[str]) -> Entries:
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
            maps.append(_bytes_to_maps(payload["maps"], card.num_tokens))
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
                ids=[_id(file) for file in part],
                with_payload=payload,
                with_vectors=vectors,
            )
            by_id = {point.id: point for point in found}
            if gone := [file for file in part if _id(file) not in by_id]:
                raise RuntimeError(
                    f"'{gone[0]}' was dropped from the index {self.place} meanwhile: "
                    "run the same command again."
                )
            yield [by_id[_id(file)] for file in part]

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


def _vectors(card: IndexCard) -> Mapping[str, Any]:
    """What the server keeps: whole vectors on disk, by which they are found in memory.

    Without graphs: candidates are found by a scan of bytes, as in a folder.
    """
    from qdrant_client import models

    in_bytes = models.ScalarQuantization(
        scalar=models.ScalarQuantizationConfig(
            type=models.ScalarType.INT8, always_ram=True
        )
    )
    many = models.MultiVectorConfig(comparator=models.MultiVectorComparator.MAX_SIM)

    def vectors(size: int, **options: Any) -> Any:
        return models.VectorParams(
            size=size,
            distance=models.Distance.DOT,
            datatype=models.Datatype.FLOAT16,
            on_disk=True,
            hnsw_config=models.HnswConfigDiff(m=0),
            **options,
        )

    sketch_dim = min(card.dim, SKETCH_DIM)
    named = {
        "tokens": vectors(card.dim, multivector_config=many),
        "sketch": vectors(
            sketch_dim, multivector_config=many, quantization_config=in_bytes
        ),
        "mean": vectors(card.dim, quantization_config=in_bytes),
    }
    if card.cls_dim:
        named["cls"] = vectors(card.cls_dim, quantization_config=in_bytes)
    return named


def _id(file: str) -> str:
    """What a point is found by, always the same for the same name."""
    return str(uuid.UUID(bytes=hashlib.sha256(os.fsencode(file)).digest()[:16]))


def _points(entries: Entries) -> list[Any]:
    from qdrant_client import models

    tokens = unit_length(entries.tokens.cpu())
    sketch = tokens @ sketch_matrix(tokens.shape[-1])
    pooled = {"mean": unit_length(entries.mean.cpu())}
    if entries.cls.shape[1]:
        pooled["cls"] = unit_length(entries.cls.cpu())
    steps = (entries.maps.cpu() * 255).round().byte().numpy()
    points = []
    for i, file in enumerate(entries.files):
        # A token of zeros is like nothing, and of no token Qdrant wants to know.
        present = tokens[i].any(dim=1).nonzero().flatten()
        vectors: Any = {name: values[i].tolist() for name, values in pooled.items()}
        if len(present):
            vectors["tokens"] = tokens[i, present].tolist()
            vectors["sketch"] = sketch[i, present].tolist()
        payload = {
            **_file_payload(file),
            "present": present.tolist(),
            "masses": entries.masses[i].tolist(),
            "maps": base64.b64encode(steps[i].tobytes()).decode(),
            "size": entries.sizes[i].tolist(),
            "stamp": entries.stamps[i].tolist(),
        }
        points.append(models.PointStruct(id=_id(file), vector=vectors, payload=payload))
    return points


def _file_payload(file: str) -> dict[str, str]:
    """The name of a file; as bytes too where it is no text."""
    text = os.fsencode(file).decode(errors="backslashreplace")
    return {"file": text} | (
        {} if text == file else {"file_bytes": os.fsencode(file).hex()}
    )


def _file(payload: Mapping[str, Any]) -> str:
    if "file_bytes" in payload:
        return os.fsdecode(bytes.fromhex(payload["file_bytes"]))
    return payload["file"]


def _bytes_to_maps(text: str, num_tokens: int) -> Tensor:
    steps = torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
    return steps.unflatten(0, (num_tokens, -1)).float() / 255
