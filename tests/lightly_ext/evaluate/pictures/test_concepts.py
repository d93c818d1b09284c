from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lightly_ext.data import read_image
from lightly_ext.evaluate import cli
from lightly_ext.evaluate.images import ImageFiles, centre_crop
from lightly_ext.evaluate.pictures.concept_queries import Query, chosen_tokens
from lightly_ext.evaluate.pictures.concepts import Found, Search, run_concepts
from lightly_ext.evaluate.pictures.token_index import (
    Neighbours,
    TokenIndex,
    unit_length,
)
from lightly_ext.modules import STELLARProjectionHead
from stellar_plugin.checkpoints import read_checkpoint, save_heads
from stellar_plugin.protocols import CONCEPTS
from stellar_plugin.visualize import shown_mass, token_palette
from tests.lightly_ext.evaluate.small import (
    EMBED_DIM,
    NUM_QUERIES,
    SIZES,
    Given,
    make_given,
    run_options,
    write_images,
    write_model,
)
from tests.page import Page

NUM_PROTOTYPES = 6


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    write_model(folder)
    head = STELLARProjectionHead(EMBED_DIM, 32, 8, NUM_PROTOTYPES)
    save_heads({"sparse_head": head.state_dict()}, folder)
    return str(folder)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve images, of which b/... are copies of the first six, and in their order."""
    root = tmp_path_factory.mktemp("images")
    write_images(root / "a", 6)
    shutil.copytree(root / "a", root / "b")
    return root


def _given(tmp_path: Path, model: str, **options: Any) -> Given:
    return make_given(tmp_path, model, **SIZES, **options)


def _concepts(page: Path) -> list[dict[str, Any]]:
    stored = json.loads((page.parent / "neighbours.json").read_text())
    return stored["concepts"]


def _tokens(given: Given, root: Path) -> torch.Tensor:
    """Tokens of all images, straight from the model."""
    cut = centre_crop(given.results.protocol(given.model, CONCEPTS), "bicubic")
    files = sorted(root.rglob("*.png"))
    return given.model(torch.stack([cut(read_image(file)) for file in files])).sparse


class TestTokens:
    def test_run_concepts__copies_are_nearest(
        self, tmp_path: Path, source: str, images: Path
    ) -> None:
        given = _given(tmp_path, source)
        query = ["a/0002.png:1", str(images / "b" / "0004.png") + ":3"]
        page = run_concepts(*given, str(images), query=query, num_neighbours=4)
        first, second = _concepts(page)
        asked = [(c["query"]["image"], c["query"]["token"]) for c in (first, second)]
        assert asked == [("a/0002.png", 1), ("b/0004.png", 3)]
        for concept, copy in ((first, "b/0002.png"), (second, "a/0004.png")):
            nearest = concept["neighbours"][0]
            assert nearest["image"] == copy
            assert nearest["token"] == concept["query"]["token"]
            assert nearest["similarity"] == pytest.approx(1, abs=1e-5)
            names = [found["image"] for found in concept["neighbours"]]
            assert len(set(names)) == 4
            assert concept["query"]["image"] not in names

    def test_run_concepts__brute_force(
        self, tmp_path: Path, source: str, images: Path
    ) -> None:
        given = _given(tmp_path, source)
        page = run_concepts(
            *given,
            str(images),
            query=["a/0003.png:0"],
            num_neighbours=99,
            one_per_image=False,
        )
        (concept,) = _concepts(page)
        units = unit_length(_tokens(given, images)).double()
        cosine = units @ units[3, 0]
        found = concept["neighbours"]
        assert len(found) == 11 * NUM_QUERIES
        numbers = [6 * (f["image"][0] == "b") + int(f["image"][5]) for f in found]
        values = [f["similarity"] for f in found]
        assert values == sorted(values, reverse=True)
        expected = [
            cosine[n, f["token"]].item() for n, f in zip(numbers, found, strict=True)
        ]
        np.testing.assert_allclose(values, expected, atol=2e-3)

    @pytest.mark.slow
    def test_run_concepts__random_by_seed(
        self, tmp_path: Path, source: str, images: Path
    ) -> None:
        asked = []
        for seed in (0, 0, 1):
            given = _given(tmp_path / str(seed), source, seed=seed)
            page = run_concepts(*given, str(images), num_queries=5, num_neighbours=2)
            asked.append([str(concept["query"]) for concept in _concepts(page)])
        assert asked[0] == asked[1]
        assert asked[0] != asked[2]
        assert len(set(asked[0])) == 5

    def test_chosen_tokens__distinct(self) -> None:
        # Three directions, one of them once: each is chosen before any comes again.
        units = np.zeros((10, 2, 3), np.float16)
        units[:, 0, 0] = units[:, 1, 1] = 1
        units[7, 1] = [0, 0, 1]
        index = TokenIndex(
            units,
            np.ones((10, 2), np.float32),
            np.zeros((10, 2, 1), np.uint8),
            np.zeros((10, 2), np.float32),
            torch.arange(2, 10),
            (1, 1),
        )
        queries = chosen_tokens(index, "distinct", 3, seed=0)
        places = [(query.image, query.number) for query in queries]
        assert {int(units[place].argmax()) for place in places} == {0, 1, 2}
        assert (7, 1) in places
        assert len(chosen_tokens(index, "random", 99, seed=0)) == 16

    def _found(self, maps: np.ndarray) -> Found:
        """What is found of two images of 2 x 2 patches, maps (2, 4, num_tokens)."""
        num_tokens = maps.shape[2]
        index = TokenIndex(
            np.ones((2, num_tokens, 3), np.float16),
            np.ones((2, num_tokens), np.float32),
            (maps.swapaxes(1, 2) * 255).round().astype(np.uint8),
            maps.mean(axis=1).astype(np.float32),
            torch.arange(2),
            (2, 2),
        )
        query = Query(1, image=0)
        search = Search([query], torch.ones(1, 3), unit_length, 3, "cosine")
        neighbours = Neighbours(
            torch.tensor([[1, 0]]),
            torch.tensor([[0, 0]]),
            torch.tensor([[0.5, -torch.inf]]),
        )
        files = ImageFiles(Path(), ["cat/1.png", "dog/1.png"])
        return Found(files, index, search, neighbours, 0.5)

    def test_found__threshold_and_missing_neighbours(self) -> None:
        first = [[0.8], [0.4], [0.39], [0]], [[0.5], [0.2], [0.3], [0]]
        found = self._found(np.array(first))
        assert found.of(0) == [(1, 0, 0.5)]
        picture = np.zeros((4, 4, 3), np.uint8)
        tile = found.tile(picture, 0, 0, 0.25)
        assert tile.area.tolist() == [[True, True], [False, False]]
        assert tile.note == "token 0, 39.8%, similarity 0.250"
        tile = found.tile(picture, 1, 0, None)
        assert tile.area.tolist() == [[True, False], [True, False]]
        assert (tile.name, tile.note) == ("dog/1.png", "token 0, 25.0%")

    def test_found__a_token_next_to_nothing_is_absent(self) -> None:
        # A mass of 0.00018 has a maximum, too.
        localization = np.array([[[0.9993, 0.0007], *[[1, 0]] * 3]] * 2)
        found = self._found(localization)
        tile = found.tile(np.zeros((4, 4, 3), np.uint8), 0, 1, None)
        assert not tile.area.any()
        assert tile.note == "token 1, absent, 0.02%"
        stored = json.loads(found.to_json())["concepts"][0]
        assert stored["query"]["mass"] == pytest.approx(0.0007 / 4)
        assert stored["neighbours"][0]["mass"] == pytest.approx(0.9998, abs=1e-4)

    def test_found__a_token_has_the_colour_of_its_number(self) -> None:
        found = self._found(np.full((2, 4, 3), 1 / 3))
        (row,) = found.rows(
            {0: np.zeros((4, 4, 3), np.uint8)} | {1: np.ones((4, 4, 3))}
        )
        assert (
            row.query is not None and row.query.colour is not row.neighbours[0].colour
        )
        assert row.colour.tolist() == token_palette(3)[1].tolist()
        assert row.neighbours[0].colour.tolist() == token_palette(3)[0].tolist()
        assert row.neighbours[0].name == "dog/1.png"


class TestPrototypes:
    def _logits(self, given: Given, root: Path) -> torch.Tensor:
        """Logits straight from the model and the saved head, (images, r, K)."""
        head = STELLARProjectionHead(EMBED_DIM, 32, 8, NUM_PROTOTYPES)
        head.load_state_dict(
            read_checkpoint(given.model.origin.source).heads["sparse_head"]
        )
        with torch.no_grad():
            return head.prototypes(head(_tokens(given, root)))

    def test_run_concepts__prototypes(
        self, tmp_path: Path, source: str, images: Path
    ) -> None:
        given = _given(tmp_path, source)
        page = run_concepts(
            *given, str(images), prototypes=["4,0", "2"], num_neighbours=12
        )
        concepts = _concepts(page)
        assert [c["query"] for c in concepts] == [{"prototype": k} for k in (4, 0, 2)]
        logits = self._logits(given, images)
        for concept, k in zip(concepts, (4, 0, 2), strict=True):
            values = [found["similarity"] for found in concept["neighbours"]]
            expected = logits[..., k].amax(dim=1).sort(descending=True).values
            np.testing.assert_allclose(values, expected, atol=5e-3)

    def test_run_concepts__most_used(
        self, tmp_path: Path, source: str, images: Path
    ) -> None:
        given = _given(tmp_path, source)
        page = run_concepts(*given, str(images), choose="prototypes", num_queries=2)
        winners = self._logits(given, images).argmax(dim=-1).flatten()
        counts, numbers = winners.bincount(minlength=NUM_PROTOTYPES).sort(
            descending=True, stable=True
        )
        used = [k for k, n in zip(numbers.tolist(), counts.tolist(), strict=True) if n]
        found = [concept["query"]["prototype"] for concept in _concepts(page)]
        assert found == used[:2]
        text = f"nearest prototype of {counts[0]} of {len(winners)} tokens"
        assert text in page.read_text()


class TestCommand:
    def test_main__page(
        self, tmp_path: Path, source: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        root = write_images(tmp_path / "images", 24)
        evil = '<b onclick="x">&amp;.png'
        (root / "0000.png").rename(root / evil)
        (root / "0005.png").write_bytes(b"no image")
        cli.main(
            [
                *("concepts", "--model", source, "--data", str(root)),
                *("--query", f"{evil}:2", "--query=0003.png:1"),
                *("--num_neighbours", "5", "--threshold", "0.7"),
                *run_options(tmp_path),
            ]
        )
        output = capsys.readouterr().out
        assert "Skipped: 1 of 24 images are unreadable" in output
        assert "0005.png" in output
        (path,) = tmp_path.glob("out/concepts-*/index.html")
        assert str(path) in output
        text = path.read_text()
        page = Page(text)
        assert "http" not in text.lower()
        assert not any("onclick" in values for values in page.images)
        pictures = page.decoded()
        assert [kind for kind, _ in pictures] == ["jpeg", "png"] * 12
        assert {layer.size for _, layer in pictures[1::2]} == {(2, 2)}
        concepts = _concepts(path)
        for place in (c for concept in concepts for c in concept["neighbours"]):
            mass = shown_mass(place["mass"], 4)
            shown = f"token {place['token']}, {mass}, similarity "
            shown += f"{place['similarity']:.3f}"
            assert f"{place['image']} {shown}".split() in [
                caption.split() for caption in page.captions
            ]
        mass = shown_mass(concepts[0]["query"]["mass"], 4)
        assert page.captions[0].split() == f"{evil} token 2, {mass}".split()
        assert "counted from 0" in text and "32 x 32 px, from the" in text
        card = json.loads((path.parent / "result.json").read_text())
        assert "at least 0.7 of its maximum" in card["protocol"]["rule"]
        assert card["scores"] == {"num_images": 23, "num_tokens": 23 * NUM_QUERIES}
        assert card["provenance"]["num_unreadable"] == 1
        picture = Image.open(path.parent / "concepts.png")
        assert picture.width > picture.height

    @pytest.mark.slow
    def test_main__two_processes(
        self, tmp_path: Path, source: str, images: Path
    ) -> None:
        found = []
        for devices in (1, 2):
            output = tmp_path / str(devices)
            for task in ("concepts", "visualize"):
                run = [task, "--model", source, "--data", str(images)]
                run += ["--devices", str(devices), *run_options(output)]
                if devices == 1:
                    cli.main(run)
                else:  # Lightning starts the command anew for the second process
                    command = [sys.executable, "-m", "stellar_cli", *run]
                    subprocess.run(command, check=True, timeout=120)
            (neighbours,) = output.glob("out/concepts-*/neighbours.json")
            (sheet, _) = sorted(output.glob("out/visualize-*/sheet_*.png"))
            found.append((json.loads(neighbours.read_text()), sheet.read_bytes()))
        assert found[0] == found[1]

    def test_main__impossible(self, tmp_path: Path, source: str, images: Path) -> None:
        options = ["--data", str(images), *run_options(tmp_path)]
        with pytest.raises(ValueError, match="token must be in 0 to 3, got 4"):
            cli.main(
                ["concepts", "--model", source, "--query", "a/0001.png:4", *options]
            )


class TestBadInput:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"threshold": 1.5}, r"threshold must be in \[0, 1\], got 1.5"),
            ({"num_queries": 0}, "num_queries must be at least 1, got 0"),
            ({"num_neighbours": 0}, "num_neighbours must be at least 1, got 0"),
            ({"query": ["a:1"], "prototypes": ["1"]}, "not both"),
            ({"query": ["a/0001.png"]}, "IMAGE:TOKEN.*got 'a/0001.png'"),
            ({"query": ["a/0001.png:-1"]}, "IMAGE:TOKEN"),
            ({"query": ["a/0001.png:4"]}, "token must be in 0 to 3, got 4"),
            ({"query": ["0001.png:1"]}, r"no image '0001.png'.*'a/0000.png'"),
            ({"prototypes": ["1,6"]}, "numbers in 0 to 5.*got '6'"),
            ({"prototypes": ["one"]}, "numbers in 0 to 5.*got 'one'"),
        ],
    )
    def test_run_concepts__options(
        self,
        tmp_path: Path,
        source: str,
        images: Path,
        options: dict[str, Any],
        message: str,
    ) -> None:
        with pytest.raises(ValueError, match=message):
            run_concepts(*_given(tmp_path, source), str(images), **options)
        assert not (tmp_path / "out").exists()  # before any work

    def test_run_concepts__models(
        self, tmp_path: Path, source: str, images: Path
    ) -> None:
        plain = _given(tmp_path, "timm:resnet10t", untrained=True)
        with pytest.raises(ValueError, match="no latent queries"):
            run_concepts(*plain, str(images))

    def test_run_concepts__images(self, tmp_path: Path, source: str) -> None:
        folder = tmp_path / "few"
        folder.mkdir()
        given = _given(tmp_path, source)
        with pytest.raises(ValueError, match="no image below"):
            run_concepts(*given, str(folder))
        write_images(folder, 1)
        with pytest.raises(ValueError, match=r"need 2 readable images.*has 1"):
            run_concepts(*given, str(folder))
        write_images(folder, 22)
        (folder / "0003.png").write_bytes(b"no image")
        with pytest.raises(ValueError, match=r"'0003.png' of a query is unreadable"):
            run_concepts(*given, str(folder), query=["0003.png:0"])
