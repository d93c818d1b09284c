from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from qdrant_client import QdrantClient, models
from qdrant_client.http.exceptions import (
    ResponseHandlingException,
    UnexpectedResponse,
)
from torch import Tensor

from lightly_ext.search import qdrant
from lightly_ext.search.entries import Entries
from lightly_ext.search.image_index import ImageIndex
from lightly_ext.search.index_card import IndexCard
from lightly_ext.search.qdrant import QdrantServer
from lightly_ext.search.query import By
from lightly_ext.search.server_index import ServerIndex
from lightly_ext.search.token_index import TokenIndex

URL, NAME = "http://host:6333", "photos"
NUM_TOKENS, DIM, CLS_DIM = 3, 80, 5
NAMES = [f"a'b/{i:04d}.jpg" for i in range(40)] + ["na\udcffme.jpg"]


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> QdrantClient:
    """What is in the place of a server."""
    client = QdrantClient(":memory:")
    monkeypatch.setattr(qdrant, "new_client", lambda url: client)
    monkeypatch.setattr(qdrant, "PAUSES", (0.0, 0.0))
    return client


def _card(**identity: str) -> IndexCard:
    made = {"sha256": "a", **identity}
    return IndexCard(NUM_TOKENS, DIM, CLS_DIM, (2, 2), 32, 32, made, "/images", {})


def _entries(files: list[str], seed: int = 0) -> Entries:
    generator = torch.Generator().manual_seed(seed)
    num = len(files)
    tokens = torch.randn(num, NUM_TOKENS, DIM, generator=generator)
    tokens[::5, 1] = 0  # as of an image with fewer clusters
    maps = torch.rand(num, NUM_TOKENS, 4, generator=generator)
    maps = maps / maps.sum(dim=1, keepdim=True)
    sizes = torch.tensor([[30, 40]]).expand(num, -1)
    stamps = torch.arange(num)[:, None] + torch.tensor([100, 2**60, 2**61])
    hashes = torch.randint(256, (num, 32), generator=generator).byte()
    cls = torch.randn(num, CLS_DIM, generator=generator)
    mean = tokens.mean(dim=1)
    masses = maps.mean(dim=2)
    return Entries(files, tokens, masses, maps, mean, cls, sizes, stamps, hashes)


def _both(folder: Path) -> tuple[TokenIndex, ServerIndex]:
    """The same images in a folder and on a server, after the same changes."""
    folders = TokenIndex.create(folder, _card())
    server = ServerIndex.create(URL, NAME, _card())

    def fill(index: ImageIndex) -> None:
        index.put(_entries(NAMES))
        index.put(_entries(NAMES[3:6], seed=1))  # changed
        index.drop([NAMES[7], NAMES[-2]])
        index.refresh()
        index.restamp({NAMES[8]: (1, 2, 3), NAMES[-1]: (-1, -1, -1)})
        index.tidy()
        index.refresh()

    fill(folders)
    fill(server)
    return folders, server


def _query(seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(NUM_TOKENS, DIM, generator=generator)


@pytest.mark.usefixtures("client")
@pytest.mark.filterwarnings("ignore:Local mode performs exact")
class TestServerIndex:
    def test_search__as_in_a_folder(self, tmp_path: Path) -> None:
        folder, server = _both(tmp_path)
        assert len(folder) == len(server) == 39
        for weights in (None, torch.tensor([0.2, 0.0, 0.8])):
            every = {f.file: f for f in folder.search(_query(), 39, weights)}
            for k, candidates in ((39, None), (39, 1000), (7, None), (7, 30)):
                found = server.search(_query(), k, weights, candidates=candidates)
                wanted = folder.search(_query(), k, weights, candidates=candidates)
                assert len({f.file for f in found}) == k
                scores = [f.score for f in found]
                assert scores == sorted(scores, reverse=True)
                # A folder keeps a byte per number, so close images may change places.
                for others in (wanted, [every[f.file] for f in found]):
                    there = [f.score for f in others]
                    assert scores == pytest.approx(there, abs=3e-3)

    def test_search__lists_no_other_images(
        self, client: QdrantClient, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        ServerIndex.create(URL, NAME, _card()).put(_entries(NAMES))
        monkeypatch.setattr(client, "scroll", None)  # there may be millions
        index = ServerIndex.open(URL, NAME)
        found = [f.file for f in index.search(_query(), 3)]
        assert list(index.entries(found).files) == found

    @pytest.mark.parametrize("by", ["mean", "cls"])
    def test_search__pooled_as_in_a_folder(self, tmp_path: Path, by: By) -> None:
        pooled = None if by == "mean" else _query()[0, :CLS_DIM]
        found, wanted = (
            index.search(_query(), 39, by=by, pooled=pooled)
            for index in _both(tmp_path)
        )
        there = {f.file: f for f in wanted}
        assert len(there) == len({f.file for f in found}) == 39
        scores = [f.score for f in found]
        assert scores == sorted(scores, reverse=True)
        # Half a step of a byte in each of few numbers.
        assert scores == pytest.approx([there[f.file].score for f in found], abs=9e-3)

    def test_search__scores_are_exact(self) -> None:
        index = ServerIndex.create(URL, NAME, _card())
        given = _entries(NAMES)
        index.put(given)
        weights = torch.tensor([0.5, 0.25, 0.25])
        found = index.search(_query(), 41, weights)
        query, tokens = (
            torch.nn.functional.normalize(x.double(), dim=-1)
            for x in (_query(), given.tokens)
        )
        for one in found:
            cosines = tokens[NAMES.index(one.file)] @ query.mT
            cosines[cosines.eq(0).all(dim=1)] = -1  # a token of zeros
            wanted = cosines.amax(dim=0) @ weights.double()
            assert one.score == pytest.approx(float(wanted), abs=1e-6)
            assert one.token == int(cosines[:, 0].argmax())
        assert len(found) == 41

    def test_entries__as_put(self, tmp_path: Path) -> None:
        folder, server = _both(tmp_path)
        assert list(server.files) == list(folder.files)
        assert server.contents() == folder.contents()
        assert server.sizes().equal(folder.sizes())
        assert server.contents()[NAMES[8]][0] == (1, 2, 3)
        (found,), (wanted,) = server.blocks(64), folder.blocks(64)
        assert list(found.files) == list(wanted.files)
        for name in ("tokens", "mean", "cls"):
            got, there = getattr(found, name), getattr(wanted, name)
            torch.testing.assert_close(got, there, atol=2e-2, rtol=0)
        assert found.tokens.any(dim=2).equal(wanted.tokens.any(dim=2))
        assert not found.tokens.any(dim=2).all()
        for name in ("masses", "maps", "sizes", "stamps", "hashes"):
            assert getattr(found, name).equal(getattr(wanted, name))
        assert [len(block) for block in server.blocks(16)] == [16, 16, 7]
        some = server.entries([server.files[4], server.files[1]])
        assert list(some.files) == [server.files[4], server.files[1]]
        assert some.tokens.equal(found.tokens[[4, 1]])

    def test_entries__image_without_tokens(self) -> None:
        index = ServerIndex.create(URL, NAME, _card())
        given = _entries(NAMES[:4])
        given.tokens[2] = 0
        index.put(given)
        assert index.entries([NAMES[2]]).tokens.eq(0).all()
        assert NAMES[2] not in [f.file for f in index.search(_query(), 4)]
        found = index.search(_query(), 4, by="cls", pooled=given.cls[2])
        assert (found[0].file, found[0].token) == (NAMES[2], 0)
        assert found[0].score == pytest.approx(1)

    def test_search__bad_input(self) -> None:
        index = ServerIndex.create(URL, NAME, _card())
        with pytest.raises(ValueError, match="'photos at http://host:6333' has no"):
            index.search(_query(), 1)
        index.put(_entries(NAMES[:2]))
        with pytest.raises(ValueError, match="k must be"):
            index.search(_query(), 0)
        with pytest.raises(ValueError, match=r"\(num_query_tokens, 80\)"):
            index.search(_query()[:, 1:], 1)

    def test_entries__dropped_meanwhile(self) -> None:
        index = ServerIndex.create(URL, NAME, _card())
        index.put(_entries(NAMES[:4]))
        assert len(index.files) == 4
        ServerIndex.open(URL, NAME).drop([NAMES[1]])
        with pytest.raises(
            ValueError, match=r"0001\.jpg' is not in the index 'photos at"
        ):
            index.entries(NAMES[:2])

    def test_open__nothing_there(self) -> None:
        with pytest.raises(FileNotFoundError, match="--output photos --server http"):
            ServerIndex.open(URL, NAME)

    def test_open__something_else(self, client: QdrantClient) -> None:
        one = models.VectorParams(size=2, distance=models.Distance.DOT)
        client.create_collection(NAME, vectors_config=one)
        with pytest.raises(ValueError, match="holds something else than an index"):
            ServerIndex.create(URL, NAME, _card())
        assert client.count(NAME).count == 0

    @pytest.mark.parametrize("name", ["", "a/b", "x" * 256])
    def test_open__path(self, name: str) -> None:
        with pytest.raises(ValueError, match="a name, not a path"):
            ServerIndex.open(URL, name)

    def test_create__other_model(self) -> None:
        ServerIndex.create(URL, NAME, _card())
        with pytest.raises(ValueError, match=r"sha256: a there, b here"):
            ServerIndex.create(URL, NAME, _card(sha256="b"))

    def test_create__elsewhere(self) -> None:
        ServerIndex.create(URL, NAME, _card()).put(_entries(NAMES[:2]))
        moved = replace(_card(), images="/moved", model={"model": "m"})
        assert len(ServerIndex.create(URL, NAME, moved)) == 2
        assert ServerIndex.open(URL, NAME).card == moved


class _Client:
    """Fails so many times, then answers."""

    def __init__(self, *errors: Exception, version: str = "1.20.0") -> None:
        self.errors, self.version, self.calls = [*errors], version, 0

    def info(self) -> Any:
        return models.VersionInfo(title="qdrant", version=self.version)

    def count(self, **_: Any) -> int:
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return 5


def _status(code: int) -> UnexpectedResponse:
    return UnexpectedResponse(code, "reason", b"what it says", httpx.Headers())


def _no_answer() -> ResponseHandlingException:
    return ResponseHandlingException(httpx.ReadTimeout("timed out"))


class TestQdrantServer:
    @pytest.fixture
    def connected(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> Callable[[_Client], QdrantServer]:
        def connect(client: _Client) -> QdrantServer:
            monkeypatch.setattr(qdrant, "new_client", lambda url: client)
            monkeypatch.setattr(qdrant, "_client_version", lambda: "1.20.0")
            monkeypatch.setattr(qdrant, "PAUSES", (0.0, 0.0))
            return QdrantServer(URL)

        return connect

    def test_call__tries_again(self, connected: Any) -> None:
        client = _Client(_no_answer(), _status(503))
        assert connected(client)("count", collection_name="x") == 5
        assert client.calls == 3

    @pytest.mark.parametrize(
        "error, calls, kind, message",
        [
            (_no_answer, 3, ConnectionError, "does not answer .*timed out.*does it"),
            (lambda: _status(503), 3, RuntimeError, "refuses: .*503"),
            (lambda: _status(400), 1, RuntimeError, "(?s)refuses: .*what it says"),
            (lambda: _status(403), 1, RuntimeError, "variable QDRANT_API_KEY"),
            (
                lambda: ResponseHandlingException(ValueError("no JSON")),
                1,
                RuntimeError,
                "answers as no Qdrant server does .*no JSON",
            ),
        ],
    )
    def test_call__fails(
        self,
        connected: Any,
        error: Callable[[], Exception],
        calls: int,
        kind: type[Exception],
        message: str,
    ) -> None:
        client = _Client(*(error() for _ in range(9)))
        with pytest.raises(kind, match=message):
            connected(client)("count", collection_name="x")
        assert client.calls == calls

    @pytest.mark.parametrize(
        "version, message",
        [
            ("1.15.5", r"is Qdrant 1\.15\.5: an index needs 1\.16 or newer"),
            ("1.17.0", r"'qdrant-client==1\.17\.\*'"),
            ("2.0.0", r"'qdrant-client==2\.0\.\*'"),
        ],
    )
    def test_init__versions(self, connected: Any, version: str, message: str) -> None:
        with pytest.raises(RuntimeError, match=message):
            connected(_Client(version=version))

    def test_init__no_url(self) -> None:
        with pytest.raises(ValueError, match="--server http://host:6333, got 'host'"):
            QdrantServer("host")

    def test_init__nobody_listens(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(qdrant, "PAUSES", ())
        with pytest.raises(ConnectionError, match=r"127\.0\.0\.1:1' does not answer"):
            QdrantServer("http://127.0.0.1:1")
