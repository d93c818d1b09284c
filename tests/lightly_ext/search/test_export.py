from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from qdrant_client import QdrantClient

from lightly_ext.search import export, qdrant
from lightly_ext.search.entries import Entries
from lightly_ext.search.export import run_export, write_parquet
from lightly_ext.search.index_card import IndexCard
from lightly_ext.search.server_index import ServerIndex
from lightly_ext.search.token_index import TokenIndex
from stellar_cli.__main__ import main

NUM_TOKENS, DIM = 3, 8
# In a folder of a class, deeper, in none, and of bytes that are no text.
NAMES = ["cats/1.jpg", "dogs/puppies/2.jpg", "plain.jpg", "r\udcff/3.jpg"]
CARD = IndexCard(NUM_TOKENS, DIM, 0, (2, 2), 32, 32, {}, "/images", {})


def export_entries() -> Entries:
    num = len(NAMES)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(num, NUM_TOKENS, DIM, generator=generator)
    maps = torch.zeros(num, NUM_TOKENS, 4)
    maps[:, 0, 0] = 1  # upper left patch
    maps[:, 1, 1:] = torch.tensor([0.8, 1.0, 0.4])  # 0.4 is less than half
    maps[:, 2, 3] = 0.6
    maps[:, 1, 1] += 0.2
    maps[1, 1], maps[1, 0, 1:] = 0, torch.tensor([1.0, 1.0, 0.4])
    maps[2, 2] = 0  # nowhere, but with a vector
    tokens[1, 1] = 0  # a cluster that the image does not have
    sizes = torch.tensor([[30, 40], [32, 32], [1, 1], [64, 64]])
    return Entries(
        NAMES,
        tokens,
        maps.mean(dim=2),
        maps,
        tokens.mean(dim=1),
        torch.empty(num, 0),
        sizes,
        torch.zeros(num, 3, dtype=torch.int64),
        torch.zeros(num, 32, dtype=torch.uint8),
    )


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> TokenIndex:
    index = TokenIndex.create(tmp_path_factory.mktemp("index"), CARD)
    index.put(export_entries())
    index.refresh()
    return index


class TestExport:
    def test_run_export__numbers_of_the_index(
        self, index: TokenIndex, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        file = tmp_path / "tokens.parquet"
        main(["export", index.place, "--to", "parquet", "--output", str(file)])
        assert "11 tokens of 4 images" in capsys.readouterr().out
        table = pq.read_table(file)
        rows = table.to_pylist()
        assert [(r["image"], r["token"]) for r in rows] == [
            *(("cats/1.jpg", i) for i in (0, 1, 2)),
            *(("dogs/puppies/2.jpg", i) for i in (0, 2)),
            *(("plain.jpg", i) for i in (0, 1, 2)),
            *(("r\\xff/3.jpg", i) for i in (0, 1, 2)),
        ]
        labels = {r["image"]: r["label"] for r in rows}
        assert list(labels.values()) == ["cats", "dogs", None, "r\\xff"]
        (entries,) = index.blocks()
        vectors = table["vector"].combine_chunks().flatten().to_numpy()
        kept = entries.tokens.any(dim=2)
        assert torch.from_numpy(vectors.copy()).equal(entries.tokens[kept].flatten())
        assert table.schema.field("vector").type.list_size == DIM
        assert [r["mass"] for r in rows] == entries.masses[kept].tolist()
        assert (rows[0]["width"], rows[0]["height"]) == (40, 30)

    def test_run_export__boxes(self, index: TokenIndex, tmp_path: Path) -> None:
        run_export(index.place, str(tmp_path / "a.parquet"))
        rows = pq.read_table(tmp_path / "a.parquet").to_pylist()
        found = {
            (r["image"], r["token"]): tuple(r[k] for k in ("x0", "y0", "x1", "y1"))
            for r in rows
        }
        # Of 40 x 30 px the model sees the middle, 30 x 30 from x = 5 on.
        assert found["cats/1.jpg", 0] == (5, 0, 20, 15)
        assert found["cats/1.jpg", 1] == (5, 0, 35, 30)
        assert found["cats/1.jpg", 2] == (20, 15, 35, 30)
        assert found["dogs/puppies/2.jpg", 0] == (0, 0, 32, 32)
        assert found["plain.jpg", 0] == (0, 0, 1, 1)  # never less than a pixel
        assert found["plain.jpg", 2] == (None,) * 4

    def test_run_export__absent(self, index: TokenIndex, tmp_path: Path) -> None:
        run_export(index.place, str(tmp_path / "a.parquet"))
        rows = pq.read_table(tmp_path / "a.parquet").to_pylist()
        # 0.6 of a patch in all is half of one, none is not.
        assert [(r["image"], r["token"]) for r in rows if r["absent"]] == [
            ("plain.jpg", 2)
        ]

    def test_write_parquet__some_at_a_time(
        self, index: TokenIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        whole, parts = tmp_path / "whole.parquet", tmp_path / "parts.parquet"
        write_parquet(index, whole)
        monkeypatch.setattr(export, "ROWS_AT_ONCE", 2 * NUM_TOKENS)
        assert write_parquet(index, parts) == 11
        assert pq.ParquetFile(parts).num_row_groups == 2
        assert pq.read_table(parts).equals(pq.read_table(whole))

    def test_run_export__from_a_server(
        self, index: TokenIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        client = QdrantClient(":memory:")
        monkeypatch.setattr(qdrant, "new_client", lambda url: client)
        url, file = "http://host", tmp_path / "a.parquet"
        ServerIndex.create(url, "photos", CARD).put(export_entries())
        main(["export", "photos", f"--output={file}", "--server", url])
        run_export(index.place, str(tmp_path / "b.parquet"))
        found, wanted = pq.read_table(file), pq.read_table(tmp_path / "b.parquet")
        assert found.drop(["vector"]).equals(wanted.drop(["vector"]))

    def test_run_export__replaces_its_own_alone(
        self, index: TokenIndex, tmp_path: Path
    ) -> None:
        own, other = tmp_path / "own.parquet", tmp_path / "other.parquet"
        run_export(index.place, str(own))
        run_export(index.place, str(own))
        assert len(pq.read_table(own)) == 11
        pq.write_table(pq.read_table(own).replace_schema_metadata({}), other)
        text = tmp_path / "text.parquet"
        text.write_text("mine")
        for file in (other, text):
            before = file.read_bytes()
            with pytest.raises(FileExistsError, match="is there and no export"):
                run_export(index.place, str(file))
            assert file.read_bytes() == before

    def test_run_export__bad_input(self, index: TokenIndex, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="There is no index in"):
            run_export(str(tmp_path / "none"), str(tmp_path / "a"))
        with pytest.raises(FileNotFoundError, match="There is no folder"):
            run_export(index.place, str(tmp_path / "none" / "a"))
        with pytest.raises(ValueError, match="is a folder: name a file in it"):
            run_export(index.place, str(tmp_path))
        TokenIndex.create(tmp_path / "empty", CARD)
        with pytest.raises(ValueError, match="has no image"):
            run_export(str(tmp_path / "empty"), str(tmp_path / "a"))

    def test_run_export__read_only(
        self, index: TokenIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("os.access", lambda *_: False)  # root may write anywhere
        with pytest.raises(PermissionError, match="written: its folder is read-only"):
            run_export(index.place, str(tmp_path / "a"))

    def test_write_parquet__fails_in_the_middle(
        self, index: TokenIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def blocks(size: int) -> Iterator[Entries]:
            yield index.entries(NAMES[:1])
            raise OSError("gone")

        monkeypatch.setattr(TokenIndex, "blocks", lambda self, size: blocks(size))
        with pytest.raises(OSError, match="gone"):
            write_parquet(index, tmp_path / "a.parquet")
        assert not [*tmp_path.iterdir()]

    @pytest.mark.slow
    def test_write_parquet__killed(self, index: TokenIndex, tmp_path: Path) -> None:
        file = tmp_path / "a.parquet"
        code = (
            "import os, signal, sys\n"
            "from lightly_ext.search import export\n"
            "from lightly_ext.search.token_index import TokenIndex\n"
            "read = TokenIndex.entries\n"
            "def entries(self, files):\n"
            "    if files[0] == 'plain.jpg': os.kill(os.getpid(), signal.SIGKILL)\n"
            "    return read(self, files)\n"
            "TokenIndex.entries = entries\n"
            "export.ROWS_AT_ONCE = 1\n"
            "export.run_export(*sys.argv[1:])\n"
        )
        command = [sys.executable, "-c", code, index.place, str(file)]
        ended = subprocess.run(command, env=os.environ, check=False)
        assert ended.returncode == -signal.SIGKILL
        assert not file.exists()
