from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lightly_ext.data import read_image
from lightly_ext.evaluate import cli
from lightly_ext.evaluate.images import centre_crop
from lightly_ext.evaluate.pictures.gallery import GAP, LINE, PANEL_SIDE
from lightly_ext.evaluate.pictures.seen import Seen, sheet_columns, token_pictures
from lightly_ext.evaluate.pictures.visualize import run_visualize
from stellar_plugin import Stellar
from stellar_plugin.pca import pca_pictures
from stellar_plugin.protocols import VISUALIZE
from stellar_plugin.visualize import (
    Uint8Array,
    overlay_localization,
    strongest_token,
    to_pictures,
    token_palette,
)
from tests.lightly_ext.evaluate.small import (
    IMAGE_SIZE,
    NUM_QUERIES,
    SIZES,
    Given,
    make_given,
    run_options,
    write_images,
    write_model,
)
from tests.page import Page

FACTOR = PANEL_SIDE // IMAGE_SIZE
PANEL = FACTOR * IMAGE_SIZE


def _given(tmp_path: Path, model: str, **options: Any) -> Given:
    return make_given(tmp_path, model, **SIZES, **options)


def _panel(path: Path, row: int, column: int) -> Uint8Array:
    """A picture of a sheet in its own size."""
    top = LINE + row * (LINE + PANEL + GAP)
    left = GAP + column * (PANEL + GAP)
    sheet = np.asarray(Image.open(path))
    return sheet[top : top + PANEL, left : left + PANEL][::FACTOR, ::FACTOR]


def _columns(path: Path) -> int:
    return (Image.open(path).width - GAP) // (PANEL + GAP)


class TestRunVisualize:
    def test_run_visualize__panels(self, tmp_path: Path) -> None:
        source = write_model(tmp_path / "model")
        folder = write_images(tmp_path / "images", 3)
        given = _given(tmp_path, source, batch_size=2)
        (sheet,) = run_visualize(*given, str(folder))
        assert sheet.name == "sheet_01.png"
        assert (sheet.parent / "result.json").is_file()
        assert _columns(sheet) == 6  # with the shares
        cut = centre_crop(given.results.protocol(given.model, VISUALIZE), "bicubic")
        images = torch.stack([cut(read_image(p)) for p in sorted(folder.iterdir())])
        inputs = images.permute(0, 2, 3, 1).numpy()
        result = given.model(images)
        matrices = (result.localization, strongest_token(result.localization))
        model = Stellar.from_pretrained(source)
        with torch.no_grad():
            decoded = model.reconstruct(given.model.normalize(images))
        expected = [
            inputs,
            *(overlay_localization(inputs, m, result.grid_size) for m in matrices),
            pca_pictures(result.dense, result.grid_size, (IMAGE_SIZE, IMAGE_SIZE)),
            to_pictures(decoded),
        ]
        for row in range(3):
            for column, pictures in enumerate(expected):
                # Batches of another size round differently.
                difference = pictures[row].astype(int) - _panel(sheet, row, column)
                assert np.abs(difference).max() <= 1

    @pytest.mark.slow
    def test_run_visualize__same_again(self, tmp_path: Path) -> None:
        source = write_model(tmp_path / "model")
        folder = write_images(tmp_path / "images", 9)
        runs = []
        for _ in range(2):
            paths = run_visualize(*_given(tmp_path, source), str(folder))
            assert [path.name for path in paths] == ["sheet_01.png", "sheet_02.png"]
            runs.append([path.read_bytes() for path in paths])
        assert runs[0] == runs[1]

    def test_run_visualize__baseline(self, tmp_path: Path) -> None:
        folder = write_images(tmp_path / "images", 4)
        given = _given(tmp_path, "timm:resnet10t", untrained=True)
        (sheet,) = run_visualize(*given, str(folder), num_images=2)
        assert _columns(sheet) == 3
        legend = Image.open(sheet).height - 2 * (LINE + PANEL + GAP)
        assert legend > 0 and not legend % LINE
        with pytest.raises(ValueError, match="no latent queries"):
            run_visualize(*given, str(folder), tokens=True)

    def test_run_visualize__no_reconstruction(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder = write_images(tmp_path / "images", 2)
        source = write_model(tmp_path / "codes", target="tokens", num_codes=16)
        (sheet,) = run_visualize(*_given(tmp_path, source), str(folder))
        assert _columns(sheet) == 5
        assert "comes without its tokenizer" in capsys.readouterr().out
        source = write_model(tmp_path / "none", target=None)
        (sheet,) = run_visualize(*_given(tmp_path, source), str(folder))
        assert _columns(sheet) == 3  # no localization either

    def test_run_visualize__command(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        source = write_model(tmp_path / "model")
        folder = write_images(tmp_path / "images", 5)
        (folder / "0002.png").write_bytes(b"no image")
        cli.main(
            [
                *("visualize", "--model", source, "--data", str(folder)),
                *("--tokens", "--threshold", "0.5", *run_options(tmp_path)),
            ]
        )
        output = capsys.readouterr().out
        text = f"1 of 5 images is unreadable ({folder / '0002.png'})"
        assert f"Skipped: {text}." in output
        (sheet,) = tmp_path.glob("out/visualize-*/sheet_01.png")
        assert str(sheet) in output
        tokens = sorted(path.name for path in sheet.parent.glob("tokens_*.png"))
        names = ("0000", "0001", "0003", "0004")
        assert tokens == [f"tokens_{i + 1:02d}_{n}.png" for i, n in enumerate(names)]
        assert _columns(sheet.parent / tokens[0]) == 1 + NUM_QUERIES

    def test_run_visualize__single_file(self, tmp_path: Path) -> None:
        source = write_model(tmp_path / "model")
        folder = write_images(tmp_path / "images", 3)
        given = _given(tmp_path, source)
        (sheet,) = run_visualize(*given, str(folder / "0001.png"))
        # The page has the same part of the photo, as large as the file has it.
        page = Page((sheet.parent / "index.html").read_text())
        photo = page.decoded()[0][1]
        side = min(read_image(folder / "0001.png").shape[1:]) // IMAGE_SIZE * IMAGE_SIZE
        assert photo.size == (side, side)
        cut = centre_crop(given.results.protocol(given.model, VISUALIZE), "bicubic")
        expected = cut(read_image(folder / "0001.png")).permute(1, 2, 0).numpy()
        np.testing.assert_array_equal(_panel(sheet, 0, 0), expected)
        legend = Image.open(sheet).height - (LINE + PANEL + GAP)
        assert legend > 0 and not legend % LINE

    def test_run_visualize__bad_input(self, tmp_path: Path) -> None:
        source = write_model(tmp_path / "model")
        given = _given(tmp_path, source)
        folder = tmp_path / "images"
        folder.mkdir()
        with pytest.raises(ValueError, match="no image below"):
            run_visualize(*given, str(folder))
        (folder / "a.png").write_bytes(b"no image")
        with pytest.raises(ValueError, match=r"None of the 1 images.*is readable"):
            run_visualize(*given, str(folder))
        with pytest.raises(ValueError, match="num_images must be at least 1, got 0"):
            run_visualize(*given, str(folder), num_images=0)
        with pytest.raises(ValueError, match=r"threshold must be in \[0, 1\], got 2"):
            run_visualize(*given, str(folder), tokens=True, threshold=2)
        with pytest.raises(ValueError, match="add --tokens"):
            run_visualize(*given, str(folder), threshold=0.5)


SHARES = {0: "55.0%, maximum 0.90", 1: "45.0%, maximum 0.80"}


class TestPictures:
    def _seen(self) -> Seen:
        localization = torch.tensor([[[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.5, 0.5]]])
        picture = np.full((1, 4, 4, 3), 100, dtype=np.uint8)
        dense = torch.arange(12.0).view(1, 4, 3)
        return Seen(["a.png"], picture, dense, (2, 2), localization, None, None)

    def test_token_pictures__shares_and_areas(self) -> None:
        pictures = token_pictures(self._seen(), 0, threshold=0.6)
        # Means and maxima of the columns; 0.6 of the maxima.
        titles = [f"token {i}, {share}" for i, share in SHARES.items()]
        assert list(pictures) == ["input", *titles]
        inside = dict(zip(titles, ([[1, 1], [0, 0]], [[0, 0], [1, 1]]), strict=True))
        for colour, (title, patches) in zip(
            token_palette(2), inside.items(), strict=True
        ):
            area = np.kron(patches, np.ones((2, 2), int))[..., None] > 0
            tinted = (50 + 0.5 * colour).round().astype(np.uint8)
            expected = np.where(area, tinted, np.uint8(50))
            np.testing.assert_array_equal(pictures[title], expected)

    def test_token_pictures__full_colour_at_each_maximum(self) -> None:
        pictures = token_pictures(self._seen(), 0, threshold=None)
        columns = ([1, 6 / 9, 2 / 9, 5 / 9], [1 / 8, 4 / 8, 1, 5 / 8])
        shown = zip(token_palette(2), list(pictures.values())[1:], columns, strict=True)
        for colour, picture, parts in shown:
            expected = np.array(parts)[:, None] * 0.5 * colour + 50
            found = picture[::2, ::2].reshape(4, 3)
            np.testing.assert_allclose(found, expected, atol=0.51)

    @pytest.mark.parametrize("threshold", [None, 0.5])
    def test_token_pictures__a_token_next_to_nothing_is_absent(
        self, threshold: float | None
    ) -> None:
        localization = torch.tensor([[0.9993, 0.0007], *[[1.0, 0]] * 3])[None]
        seen = dataclasses.replace(self._seen(), localization=localization)
        pictures = token_pictures(seen, 0, threshold)
        assert list(pictures)[1:] == [
            "token 0, 100.0%, maximum 1.00",
            "token 1, absent, 0.02%",
        ]
        assert (pictures["token 1, absent, 0.02%"] == 50).all()

    def test_sheet_columns__clusters_instead_of_tokens(self) -> None:
        clusters = torch.tensor([[1, 0, 0, 1]])
        seen = dataclasses.replace(self._seen(), localization=None, clusters=clusters)
        columns = sheet_columns(seen)
        assert list(columns) == ["input", "clusters of patches", "patch features, PCA"]
        colours = token_palette(2)[[[1, 0], [0, 1]]]
        expected = 0.45 * 100 + 0.55 * np.kron(colours, np.ones((2, 2, 1)))
        shown = columns["clusters of patches"][0]
        np.testing.assert_allclose(shown, expected, atol=1)

    def test_sheet_columns__what_there_is(self) -> None:
        assert list(sheet_columns(self._seen())) == [
            "input",
            "tokens, by their lead",
            "strongest token",
            "patch features, PCA",
        ]
