"""`stellar index` and `stellar search` with an index on a server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from qdrant_client import QdrantClient

from lightly_ext.evaluate import fingerprints
from lightly_ext.search import TokenIndex, qdrant
from lightly_ext.search.server_index import ServerIndex
from stellar_cli.__main__ import main
from stellar_plugin import Stellar
from tests.lightly_ext.evaluate.small import write_images, write_model

URL = "http://host:6333"
SERVER = ["--server", URL]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model whose tokens of different photos differ, as those of a trained one."""
    folder = tmp_path_factory.mktemp("models") / "model"
    model = Stellar.from_pretrained(write_model(folder, patch_size=8))
    with torch.no_grad():
        for parameter in model.encoder.parameters():
            if parameter.ndim > 1:
                parameter *= 4
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(fingerprints, "SETTLED_NS", 0)
    return write_images(tmp_path / "images", 6)


@pytest.fixture(autouse=True)
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> QdrantClient:
    """The client's local mode in the place of a server."""
    client = QdrantClient(path=str(tmp_path / "qdrant"))
    monkeypatch.setattr(qdrant, "new_client", lambda url: client)
    return client


def _index(model: str, data: Path, output: str, *options: str) -> None:
    quick = ["--accelerator", "cpu", "--num_workers", "0"]
    places = ["--model", model, "--data", str(data), "--output", output]
    main(["index", *places, *quick, *options])


def _search(index: str, photo: Path, file: Path, *options: str) -> dict[str, Any]:
    """Answers by name, less the name."""
    main(["search", index, str(photo), "--json", str(file), *options])
    answers = json.loads(file.read_text())
    scores = [answer["score"] for answer in answers]
    assert scores == sorted(scores, reverse=True)
    return {answer.pop("file"): answer for answer in answers}


@pytest.mark.filterwarnings("ignore:Local mode performs exact")
class TestServer:
    @pytest.mark.slow
    def test_commands__as_with_a_folder(
        self,
        model: str,
        data: Path,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        folder = str(tmp_path / "index")
        _index(model, data, folder)
        _index(model, data, "photos", *SERVER)
        assert f"6 images in 'photos at {URL}'. The model" in _said(capsys)
        (data / "0001.png").unlink()
        write_images(data / "new", 1, seed=3)
        (data / "0002.png").write_bytes((data / "new" / "0000.png").read_bytes())
        _index(model, data, folder)
        capsys.readouterr()
        _index(model, data, "photos", *SERVER)
        changes = "has 6 images: 1 new, 1 changed, 4 as indexed; 1 is gone."
        assert changes in _said(capsys)
        ours, theirs = ServerIndex.open(URL, "photos"), TokenIndex.open(folder)
        assert ours.contents() == theirs.contents()
        assert ours.sizes().equal(theirs.sizes())
        assert ours.card == theirs.card
        page, photo = tmp_path / "page.html", data / "0003.png"
        for options in (
            [],
            ["--by", "mean"],
            ["--by", "cls"],
            ["--token", "1"],
            ["--box", "5,5,30,30", "--weights", "uniform"],
        ):
            wanted = _search(folder, photo, tmp_path / "a.json", *options)
            found = _search(
                "photos",
                photo,
                tmp_path / "b.json",
                f"--page={page}",
                *SERVER,
                *options,
            )
            assert found.keys() == wanted.keys()
            scores = [answer["score"] for answer in wanted.values()]
            assert max(scores) - min(scores) > 5e-3  # else any would do
            for file, answer in wanted.items():
                score = found[file].pop("score")
                assert score == pytest.approx(answer.pop("score"), abs=1e-3)
                assert found[file] == answer
            assert page.read_text().startswith("<!DOCTYPE html>")
            page.unlink()

    def test_index__of_another_model(
        self, model: str, data: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        _index(model, data, "photos", *SERVER)
        before = ServerIndex.open(URL, "photos").contents()
        with pytest.raises(SystemExit):
            _index("patches:8", data, "photos", "--crop", "32", *SERVER)
        said = f"The index in 'photos at {URL}' has tokens of "
        assert said in capsys.readouterr().err
        assert ServerIndex.open(URL, "photos").contents() == before

    def test_index__stopped_and_run_again(
        self, model: str, data: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("lightly_ext.search.index.ROWS_AT_ONCE", 2)
        put, calls = ServerIndex.put, []

        def fails(index: ServerIndex, entries: Any) -> None:
            calls.append(len(entries))
            if len(calls) == 2:
                raise ConnectionError("gone")
            put(index, entries)

        monkeypatch.setattr(ServerIndex, "put", fails)
        with pytest.raises(SystemExit):
            _index(model, data, "photos", "--batch_size", "2", *SERVER)
        written = len(ServerIndex.open(URL, "photos"))
        assert 2 <= written < 6
        calls[:] = [0, 0]
        _index(model, data, "photos", "--batch_size", "2", *SERVER)
        assert len(ServerIndex.open(URL, "photos")) == 6
        assert sum(calls) == 6 - written

    def test_search__nothing_there(
        self, data: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit):
            main(["search", "photos", str(data / "0000.png"), *SERVER])
        assert f"There is no index photos at {URL}" in capsys.readouterr().err


def _said(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().out.split())
