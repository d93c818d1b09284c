"""The examples of docs/token_search.md that read an export."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from lightly_ext.metrics.late_interaction import maxsim
from lightly_ext.search.export import write_parquet
from lightly_ext.search.token_index import TokenIndex
from tests.lightly_ext.search.test_export import CARD, NAMES, export_entries

DOCS = Path(__file__).parents[3] / "docs" / "token_search.md"


class _FlatIndex:
    """Stands for faiss.IndexFlatIP, which need not be installed."""

    def __init__(self, dim: int) -> None:
        self.vectors = np.empty((0, dim), np.float32)

    def add(self, vectors: NDArray[np.float32]) -> None:
        self.vectors = np.concatenate([self.vectors, vectors])

    def search(self, query: NDArray[np.float32], k: int) -> tuple[Any, Any]:
        cosines = query @ self.vectors.T
        rows = np.argsort(-cosines, axis=1, kind="stable")[:, :k]
        return np.take_along_axis(cosines, rows, axis=1), rows


class _Dataset:
    """Stands for LightlyStudio's: the images of a folder, and what is added to them."""

    samples: dict[str, list[SimpleNamespace]]

    def add_images_from_path(self, path: str, tag_depth: int) -> None:
        assert tag_depth == 1
        self.samples = {str(Path(path) / name): [] for name in NAMES[:3]}

    def __iter__(self) -> Any:
        for path, boxes in self.samples.items():
            yield SimpleNamespace(file_path_abs=path, add_annotation=boxes.append)


def _run(
    package: str, folder: Path, monkeypatch: pytest.MonkeyPatch, **modules: Any
) -> dict[str, Any]:
    """Runs the example of a package, with others in the place of its modules."""
    blocks = re.findall(r"```python\n(.*?)```", DOCS.read_text(), flags=re.S)
    (code,) = [block for block in blocks if f"import {package}" in block]
    for name, content in modules.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name.replace("__", "."), module)
    monkeypatch.chdir(folder)
    found: dict[str, Any] = {}
    exec(compile(code, str(DOCS), "exec"), found)
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    index = TokenIndex.create(tmp_path / "index", CARD)
    index.put(export_entries())
    index.refresh()
    write_parquet(index, tmp_path / "tokens.parquet")
    return tmp_path


def test_faiss__is_late_interaction(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = _run("faiss", folder, monkeypatch, faiss={"IndexFlatIP": _FlatIndex})
    (entries,) = TokenIndex.open(folder / "index").blocks()
    wanted = maxsim(entries.tokens[0], entries.masses[0], entries.tokens)
    scores = dict(zip(entries.files, wanted.tolist(), strict=True))
    scores["r\\xff/3.jpg"] = scores.pop("r\udcff/3.jpg")
    assert found["scores"] == pytest.approx(scores, abs=1e-6)
    best = max(scores, key=lambda name: scores[name])
    assert capsys.readouterr().out.startswith(f"[('{best}'")


def test_lightly_studio__boxes_of_tokens(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[bool] = []
    found = _run(
        "lightly_studio",
        folder,
        monkeypatch,
        lightly_studio={
            "ImageDataset": SimpleNamespace(create=_Dataset),
            "start_gui": lambda: started.append(True),
        },
        lightly_studio__core={},
        lightly_studio__core__annotation={"CreateObjectDetection": SimpleNamespace},
    )
    samples = found["dataset"].samples
    first = samples[str(folder / "photos" / "cats/1.jpg")]
    assert [vars(box) for box in first[:1]] == [
        {
            "class_name": "token 0",
            "confidence": 0.25,
            **{"x": 5, "y": 0, "width": 15, "height": 15},
        }
    ]
    assert [len(boxes) for boxes in samples.values()] == [3, 2, 2]
    assert started == [True]
