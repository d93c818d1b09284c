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
from stellar_plugin import Stellar
from tests.lightly_ext.evaluate.small import DECODER, MODEL_NAME, VIT
from tests.page import Page

SCORES = {
    "no model": {"knn_sparse": 0.8, "psnr": 16.0},
    "random weights": {"knn_sparse": 0.75, "knn_dense": 0.85, "psnr": 4.0},
    "trained": {"knn_sparse": 0.95, "knn_dense": 0.5, "psnr": 21.25},
}
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
                {"0": ["", "absent, 0.02%"]},
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
        tokens = [f"token {i}" for i in range(3)]  # counted from 0
        assert re.findall(r"<span>(token \d+|absent[^<]*)</span>", page) == [
            *tokens,
            "absent, 0.02%",
        ]
        assert "$" not in page


class TestGallery:
    def test_token_gallery__share_of_each_token(self, sets: BoardSets) -> None:
        torch.manual_seed(0)
        sizes = {**VIT, **DECODER, "img_size": 60, "patch_size": 12}
        model = Stellar(MODEL_NAME, num_queries=3, **sizes)
        boards = sets.test[:2]
        with torch.no_grad():
            masses = model(normalized(model, boards.images)).localization.mean(dim=1)
        notes = token_gallery(model, boards).notes
        assert list(notes) == ["board 0", "board 1"]
        for (board, *shown), expected in zip(
            notes.values(), masses.tolist(), strict=True
        ):
            assert board in notes
            for text, mass in zip(shown, expected, strict=True):
                few = mass < 0.5 / 25
                assert text == (f"absent, {mass:.2%}" if few else f"{mass:.1%}")

    def test_save__enlarged(self, tmp_path: Path) -> None:
        row = np.full((2, 4, 5, 3), 9, dtype=np.uint8)
        Gallery({"a": row}).save(tmp_path / "new" / "a.png")
        with Image.open(tmp_path / "new" / "a.png") as image:
            # Two tiles of 5 px and three gaps of 2 px, three times as large.
            assert image.size == (3 * 16, 3 * 8)
