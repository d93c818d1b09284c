from __future__ import annotations

import base64
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lightly_ext.durable import PARTIAL
from lightly_ext.evaluate import cli
from lightly_ext.evaluate.atlas import folder as folder_module
from lightly_ext.evaluate.atlas.atlas import run_atlas
from lightly_ext.evaluate.atlas.folder import AtlasFolder
from lightly_ext.evaluate.atlas.sheets import lit_region, square
from lightly_ext.evaluate.result import Result
from lightly_ext.evaluate.results import Results
from lightly_ext.modules import STELLARProjectionHead
from stellar_plugin.checkpoints import save_heads
from tests.lightly_ext.evaluate.small import (
    EMBED_DIM,
    NUM_QUERIES,
    SIZES,
    make_given,
    run_options,
    write_images,
    write_model,
)
from tests.page import Page

EVIL = "<script>alert(1)</script>'\"é猫.png".replace("/", "_")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    write_model(folder)
    head = STELLARProjectionHead(EMBED_DIM, 32, 8, 6)
    save_heads({"sparse_head": head.state_dict()}, folder)
    return str(folder)


def write_halves(folder: Path, num: int = 3) -> Path:
    """Images of 32 x 48 px: red on the left, but blue in the lower right quarter."""
    folder.mkdir(parents=True)
    for i in range(num):
        image = np.zeros((32, 48, 3), np.uint8)
        image[..., 0] = 200
        image[16:, 24:] = [0, 0, 200]
        Image.fromarray(image).save(folder / f"{i}.png")
    return folder


def script(path: Path) -> list[Any]:
    """The values that a script calls its function with."""
    text = path.read_text("ascii")
    return json.loads(f"[{text[text.index('(') + 1 : text.rindex(')')]}]")


def numbers(text: str, dtype: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), dtype)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


class TestTwoColours:
    @pytest.fixture(scope="class")
    def page(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        folder = tmp_path_factory.mktemp("halves")
        given = make_given(folder, "patches:8", **SIZES)
        data = str(write_halves(folder / "images"))
        return run_atlas(*given, data, concepts=5, clusters=2)

    def test_run_atlas__two_concepts_at_known_places(self, page: Path) -> None:
        stored = json.loads((page.parent / "atlas.json").read_text())
        red, blue = stored["concepts"]  # of five that were asked for
        assert (red["coverage"], blue["coverage"]) == (0.75, 0.25)
        assert stored["covered"] == 1 and stored["images"] == 3
        assert (red["images"], red["parts"]) == (3, 3)
        expected = np.zeros((4, 4))
        expected[2:, 2:] = 1
        np.testing.assert_allclose(blue["mean_map"], expected)
        np.testing.assert_allclose(red["mean_map"], 1 - expected)
        # Of 48 px the crop shows 8 to 40; of the lower right quarter half of the width.
        assert [e["file"] for e in blue["examples"]] == ["0.png", "1.png", "2.png"]
        for example in blue["examples"]:
            assert example["box"] == [24, 16, 40, 32]
            assert example["mass"] == 0.25
            assert example["similarity"] == pytest.approx(1, abs=1e-5)
        assert [e["box"] for e in red["examples"]] == [[8, 0, 40, 32]] * 3
        assert [n["concept"] for n in red["neighbours"]] == [1]
        assert "folders" not in red

    def test_run_atlas__pictures(self, page: Path) -> None:
        files = page.parent / "files"
        sheet = np.asarray(Image.open(files / "sheet-0000.jpg")).astype(int)
        assert sheet.shape == (32, 320, 3)
        assert abs(sheet[8, 32 + 8] - [200, 0, 0]).max() < 12
        assert abs(sheet[26, 64 + 26] - [0, 0, 200]).max() < 12
        assert sheet[:, 3 * 32 + 8 :].max() < 12
        region = np.asarray(Image.open(files / "region-0001.jpg")).astype(int)
        assert region.shape == (32, 96, 3)
        # 20 of 32 px around the blue quarter: bright there, dim beside it.
        assert region[24, 24, 2] > 180
        assert 30 < region[1, 1, 0] < 60  # a fifth of 200

    def test_run_atlas__numbers_of_the_page(self, page: Path) -> None:
        files = page.parent / "files"
        (data,) = script(files / "data.js")
        assert data["names"] == ["0.png", "1.png", "2.png"]
        assert (data["parts"], data["grid"], data["side"]) == (2, [4, 4], 32)
        assert data["labels"] is None and data["codes"]["found"] == 1
        concepts = numbers(data["of_part"], "<i2").reshape(3, 2)
        masses = numbers(data["masses"], "<f4").reshape(3, 2)
        np.testing.assert_array_equal(masses, np.where(concepts == 0, 0.75, 0.25))
        name, text = script(files / "maps-0000.js")
        packed = numbers(text, "u1").reshape(3, 2 * 16 // 2 + 16)
        blue = np.zeros((4, 4), int)
        blue[2:, 2:] = 1
        for row, order in zip(packed, concepts, strict=True):
            steps = np.stack([row[:16] >> 4, row[:16] & 15], axis=1).reshape(2, 4, 4)
            np.testing.assert_array_equal(steps[order.tolist().index(1)], 15 * blue)
            strongest = order[row[16:]].reshape(4, 4)
            np.testing.assert_array_equal(strongest, blue)
        name, text = script(files / "codes.js")
        assert name == "codes" and len(numbers(text, "i1")) % 6 == 0


class TestPage:
    def test_main__folders_names_and_damage(
        self, tmp_path: Path, source: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        root = tmp_path / "images"
        for i, name in enumerate(("cat", "d'<b>&")):
            write_images(root / name, 12, seed=i)
        (root / "cat" / "0000.png").rename(root / "cat" / EVIL)
        (root / "d'<b>&" / "0003.png").write_bytes(b"no image")
        options = ["--concepts", "4", *run_options(tmp_path)]
        cli.main(["atlas", "--model", source, "--data", str(root), *options])
        output = capsys.readouterr().out
        assert "Skipped: 1 of 24 images is unreadable" in output
        (path,) = tmp_path.glob("out/atlas-*/atlas/index.html")
        assert str(path) in output and "k-means of parts" in output
        page = Page(path.read_text("utf-8"))
        assert all(address.startswith(("files/", "#")) for address in page.addresses)
        assert "1 file could not be read" in page.text
        assert "random" not in page.text
        (data,) = script(path.parent / "files" / "data.js")
        assert f"cat/{EVIL}" in data["names"] and len(data["names"]) == 23
        assert "d'<b>&/0003.png" not in data["names"]
        assert data["folders"] == ["cat", "d'<b>&"]
        assert data["labels"] == [0] * 12 + [1] * 11
        stored = json.loads((path.parent / "atlas.json").read_text())
        assert stored["unreadable"] == 1 and stored["parts"] == f"{NUM_QUERIES} tokens"
        for concept in stored["concepts"]:
            shares = [entry["share"] for entry in concept["folders"]]
            assert sum(shares) == pytest.approx(1)
            assert shares == sorted(shares, reverse=True)
        coverage = [concept["coverage"] for concept in stored["concepts"]]
        assert sum(coverage) == pytest.approx(stored["covered"])
        assert coverage == sorted(coverage, reverse=True)
        result = Result.load(path.parents[1] / "result.json")
        assert result.scores["num_images"] == 23
        assert result.provenance["num_unreadable"] == 1

    @pytest.mark.slow
    def test_run_atlas__again_the_same_bytes(self, tmp_path: Path, source: str) -> None:
        data = str(write_images(tmp_path / "images", 5))
        pages = []
        for run in range(2):
            given = make_given(tmp_path, source, **SIZES)
            pages.append(run_atlas(*given, data, concepts=3))
            if run == 0:
                first = contents(pages[0].parent)
                (pages[0].parent / "files" / "old.js").write_text("")
        assert pages[0] == pages[1] and contents(pages[1].parent) == first
        given = make_given(tmp_path, source, **SIZES)
        other = run_atlas(*given, data, concepts=2)
        assert other != pages[0]
        result = Result.load(other.parents[1] / "result.json")
        assert result.provenance["num_reused"] == 5

    @pytest.mark.slow
    def test_main__two_processes(self, tmp_path: Path, source: str) -> None:
        data = str(write_images(tmp_path / "images", 12))
        found = []
        for devices in (1, 2):
            output = tmp_path / str(devices)
            for task in ("atlas", "visualize"):
                run = [task, "--model", source, "--data", data]
                run += ["--devices", str(devices), *run_options(output)]
                if devices == 1:
                    cli.main(run)
                else:  # Lightning starts the command anew for the second process
                    command = [sys.executable, "-m", "stellar_cli", *run]
                    subprocess.run(command, check=True, timeout=120)
            (page,) = output.glob("out/atlas-*/atlas")
            (sheet, _) = sorted(output.glob("out/visualize-*/sheet_*.png"))
            found.append((contents(page), sheet.read_bytes()))
        assert found[0] == found[1]

    @pytest.mark.slow
    def test_run_atlas__prototypes(self, tmp_path: Path, source: str) -> None:
        data = str(write_images(tmp_path / "images", 5))
        given = make_given(tmp_path, source, **SIZES)
        page = run_atlas(*given, data, concepts=2, prototypes=True)
        stored = json.loads((page.parent / "atlas.json").read_text())
        assert all(0 <= c["prototype"] < 6 for c in stored["concepts"])
        assert len(stored["concepts"]) <= 2
        assert "All other prototypes share the rest" in page.read_text()

    @pytest.mark.slow
    def test_run_atlas__one_image_and_random_weights(
        self, tmp_path: Path, source: str
    ) -> None:
        data = str(write_images(tmp_path / "images", 1))
        given = make_given(tmp_path, source, untrained=True, **SIZES)
        page = run_atlas(*given, data)
        stored = json.loads((page.parent / "atlas.json").read_text())
        assert 1 <= len(stored["concepts"]) <= NUM_QUERIES
        assert "weights of this model are random" in page.read_text()

    @pytest.mark.slow
    def test_run_atlas__a_kill_leaves_the_old(
        self, tmp_path: Path, source: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        data = str(write_images(tmp_path / "images", 4))
        page = run_atlas(*make_given(tmp_path, source, **SIZES), data, concepts=2)
        before = contents(page.parent)

        def killed(*_: Any) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(folder_module, "write_maps", killed)
            # As after a kill, which cleans nothing up.
            patch.setattr(shutil, "rmtree", lambda *_, **__: None)
            with pytest.raises(KeyboardInterrupt):
                run_atlas(*make_given(tmp_path, source, **SIZES), data, concepts=2)
        assert contents(page.parent) == before
        assert list(page.parents[1].glob(f".*{PARTIAL}"))
        again = run_atlas(*make_given(tmp_path, source, **SIZES), data, concepts=2)
        assert again == page and contents(page.parent) == before
        assert not list(page.parents[1].glob(f".*{PARTIAL}"))

    @pytest.mark.slow
    def test_run_atlas__images_change_meanwhile(
        self, tmp_path: Path, source: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        data = write_images(tmp_path / "images", 4)
        given = make_given(tmp_path, source, **SIZES)
        save = Results.save

        def changing(results: Results, *args: Any, **kwargs: Any) -> Path:
            (data / "0002.png").write_bytes(b"no image")
            return save(results, *args, **kwargs)

        monkeypatch.setattr(Results, "save", changing)
        with pytest.raises(RuntimeError, match=r"0002.png' cannot be read any more"):
            run_atlas(*given, str(data), concepts=2)


@pytest.mark.parametrize(
    ("files", "folders", "labels"),
    [
        (["0.png", "1.png"], [], None),
        (["a/0.png", "a/1.png"], [], None),
        (["0.png", "a/0.png", "b/c/0.png", "a/1.png"], [".", "a", "b/c"], [0, 1, 2, 1]),
    ],
)
def test_folders(
    files: list[str], folders: list[str], labels: list[int] | None
) -> None:
    table = SimpleNamespace(files=SimpleNamespace(names=files))
    others = dict.fromkeys(
        ("model", "devices", "concepts", "cut", "protocol", "result")
    )
    values: dict[str, Any] = {**others, "table": table}
    found, numbers = AtlasFolder(**values).folders
    assert found == folders
    assert (None if numbers is None else numbers.tolist()) == labels


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ((40, 40, 60, 50), (35, 30, 30)),  # at least three tenths
        ((0, 0, 40, 20), (0, 0, 50)),  # moved inside
        ((60, 20, 100, 60), (50, 15, 50)),
        ((0, 0, 100, 90), (0, 0, 100)),
    ],
)
def test_square(box: tuple[int, ...], expected: tuple[int, ...]) -> None:
    assert square(box, 100) == pytest.approx(expected)


def test_lit_region__patches_with_half_of_the_maximum() -> None:
    part_map = torch.zeros(7, 7)
    part_map[2, 2:6] = torch.tensor([0.4, 0.2, 0.19, 0.2])  # the third is dark
    image = torch.full((3, 112, 112), 200, dtype=torch.uint8)
    region = lit_region(image, part_map, torch.tensor([0, 32, 112, 48]))
    expected = np.full((112, 112, 3), 40)  # a fifth
    expected[32:48, 32:64] = expected[32:48, 80:96] = 200
    np.testing.assert_array_equal(region, expected)
