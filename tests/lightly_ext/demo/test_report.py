from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lightly_ext.demo.boards import BoardSets
from lightly_ext.demo.features import normalized
from lightly_ext.demo.report import Gallery, render_page, token_gallery
from lightly_ext.demo.table import METRICS, gain, table_rows, to_json, to_markdown
from lightly_ext.evaluate.pictures.gallery import GAP, LINE
from stellar_plugin import Stellar
from tests.lightly_ext.evaluate.small import DECODER, MODEL_NAME, VIT
from tests.page import Page

SCORES = {
    "no model": {"knn_sparse": 0.8, "psnr": 16.0},
    "random weights": {"knn_sparse": 0.75, "knn_dense": 0.85, "psnr": 4.0},
    "trained": {"knn_sparse": 0.95, "knn_dense": 0.5, "psnr": 21.25},
}
NOTES = ["token 0, 71.0%, maximum 0.98", "token 1, absent, 0.02%", "token 2, 28.9%"]
BY_KEY = {metric.key: metric for metric in METRICS}


class TestTable:
    def test_gain__against_the_best_of_the_task(self) -> None:
        assert gain(BY_KEY["knn_sparse"], SCORES) == pytest.approx(0.10)
        assert gain(BY_KEY["knn_dense"], SCORES) == pytest.approx(-0.35)
        assert gain(BY_KEY["psnr"], SCORES) == pytest.approx(5.25)
        assert gain(BY_KEY["mmseg_miou"], SCORES) is None

    def test_table_rows__texts(self) -> None:
        rows = {row[0]: row[1:] for row in table_rows(SCORES)}
        assert rows["kNN accuracy, sparse tokens"] == ["80.0", "75.0", "95.0", "+10.0"]
        assert rows["reconstruction PSNR"][-2:] == ["21.2 dB", "+5.2 dB"]
        assert rows["prototype usage"] == ["–"] * 4

    def test_to_markdown__one_line_per_metric(self) -> None:
        lines = to_markdown(SCORES).splitlines()
        table = [line for line in lines if line.startswith("|")]
        assert len(table) == 2 + len(METRICS)
        assert {line.count("|") for line in table} == {6}
        assert "patch mIoU (linear probe on patches)" in "".join(table)
        assert "mmseg mIoU (mim train)" in "".join(table)

    def test_to_json__values(self) -> None:
        data = json.loads(to_json(SCORES, {"seed": 3}))
        assert data["seed"] == 3
        assert data["metrics"]["psnr"]["trained"] == 21.25
        assert data["metrics"]["psnr"]["unit"] == "dB"
        assert data["metrics"]["mmseg_miou"]["trained"] is None


class TestRenderPage:
    @pytest.fixture()
    def page(self) -> str:
        rng = np.random.default_rng(0)
        row = rng.integers(256, size=(8, 6, 6, 3), dtype=np.uint8)
        tokens = rng.integers(256, size=(3, 4, 6, 6, 3), dtype=np.uint8)
        return render_page(
            SCORES,
            Gallery({"input": row, "a < b": row[::-1]}),
            Gallery(
                {str(i): row for i, row in enumerate(tokens)},
                {str(i): [f"board {i}", *NOTES] for i in range(3)},
            ),
            {"machine": "5 > 4 cores"},
        )

    def test_render_page__is_self_contained(self, page: str) -> None:
        addresses = Page(page).addresses
        assert len(addresses) == 2 * 8 + 3 * 4
        assert all(a.startswith("data:image/png;base64,") for a in addresses)
        assert not re.search(r"https?://|<script|<link|url\(|@import", page)

    def test_render_page__pictures_are_whole(self, page: str) -> None:
        rng = np.random.default_rng(0)
        row = rng.integers(256, size=(8, 6, 6, 3), dtype=np.uint8)
        first = re.findall(r"base64,([^\"]+)", page)[0]
        image = np.array(Image.open(io.BytesIO(base64.b64decode(first))))
        np.testing.assert_array_equal(image, row[0])

    def test_render_page__says_what_it_is(self, page: str) -> None:
        text = " ".join(page.split())
        assert "a toy that proves the machinery, not a benchmark" in text
        assert "a &lt; b" in page
        assert "5 &gt; 4 cores" in page
        assert "from 3 tokens" in page
        captions = [caption.strip() for caption in Page(page).captions]
        assert captions == [text for i in range(3) for text in (f"board {i}", *NOTES)]
        assert "$" not in page

    def test_render_page__every_picture_is_told_from_the_others(
        self, page: str
    ) -> None:
        texts = [image["alt"] for image in Page(page).images]
        assert len(set(texts)) == len(texts) == 2 * 8 + 3 * 4
        assert "Test board 7: a < b" in texts
        assert "2, token 1, absent, 0.02%" in texts


class TestGallery:
    def test_token_gallery__share_of_each_token(self, sets: BoardSets) -> None:
        torch.manual_seed(0)
        sizes = {**VIT, **DECODER, "img_size": 60, "patch_size": 12}
        model = Stellar(MODEL_NAME, num_queries=3, **sizes)
        boards = sets.test[:2]
        with torch.no_grad():
            maps = model(normalized(model, boards.images)).localization
        masses, peaks = maps.mean(dim=1).tolist(), maps.amax(dim=1).tolist()
        notes = token_gallery(model, boards).notes
        assert list(notes) == ["board 0", "board 1"]
        for i, shown in enumerate(notes.values()):
            assert shown[0] == f"board {i}"
            for token, text in enumerate(shown[1:]):
                mass, peak = masses[i][token], peaks[i][token]
                few = mass < 0.5 / 25
                share = f"absent, {mass:.2%}" if few else f"{mass:.1%}"
                rest = "" if few else f", maximum {peak:.2f}"
                assert text == f"token {token}, {share}{rest}"

    def test_save__rows_have_labels(self, tmp_path: Path) -> None:
        rows = {
            name: np.full((2, 60, 60, 3), i, np.uint8) for i, name in enumerate("ab")
        }
        Gallery(rows).save(tmp_path / "new" / "a.png")
        picture = np.asarray(Image.open(tmp_path / "new" / "a.png"))
        # Two boards in three times their size, and a line of text above each row.
        assert picture.shape == (2 * (LINE + 180 + GAP), GAP + 2 * (180 + GAP), 3)
        for i in range(2):
            top = i * (LINE + 180 + GAP) + LINE
            assert (picture[top : top + 180, GAP : GAP + 180] == i).all()
            assert (picture[top - LINE : top] < 255).any()

    def test_save__notes_above_each_picture(self, tmp_path: Path) -> None:
        row = np.full((2, 60, 60, 3), 9, np.uint8)
        path = tmp_path / "a.png"
        Gallery({"board 0": row}, {"board 0": ["board 0", "token 0, 100.0%"]}).save(
            path
        )
        picture = np.asarray(Image.open(path))
        assert picture.shape == (LINE + 180 + GAP, GAP + 2 * (180 + GAP), 3)
        for left in (GAP, GAP + 180 + GAP):
            assert (picture[:LINE, left : left + 180] < 255).any()
