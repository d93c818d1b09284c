from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lightly_ext.evaluate.plots import save_line_plot
from lightly_ext.evaluate.report.exhibits import find_exhibits
from lightly_ext.evaluate.report.report import run_report
from lightly_ext.evaluate.result import Result
from tests.browser import browser, find_browser
from tests.page import Page


def _store(folder: Path, task: str, scores: dict[str, object]) -> Path:
    card = {"name": task, "data": "photos"}
    Result(task, "my <model>", "photos", scores, card, {"seed": 0}).save(folder)
    return folder


@pytest.fixture()
def runs(tmp_path: Path) -> Path:
    runs = tmp_path / "runs"
    curve = {str(i): i / 30 for i in range(0, 31, 5)}
    plotted = _store(runs / "equi #1", "equivariance", {"change_of_s": curve})
    points = {float(x): y for x, y in curve.items()}
    save_line_plot(plotted / "equivariance.png", {"S": points}, "shift in px", "change")
    shown = _store(runs / "vis", "visualize", {"num_images": 2})
    sheet = np.full((300, 2400, 3), 90, np.uint8)
    Image.fromarray(sheet).save(shown / "sheet_01.png")
    Image.fromarray(sheet).save(shown / "tokens_01_a.png")
    (shown / "broken.png").write_bytes(b"no picture")
    (shown / "index.html").write_text("<p>tokens")
    atlas = _store(runs / "atlas-1", "atlas", {"num_images": 2})
    (atlas / "atlas").mkdir()
    (atlas / "atlas" / "index.html").write_text("<p>atlas")
    _store(runs / "knn", "knn", {"accuracy": 0.5})
    return runs


class TestExhibits:
    def test_find_exhibits__what_there_is(self, runs: Path) -> None:
        results = {
            path: Result.load(path) for path in sorted(runs.glob("*/result.json"))
        }
        atlas, plotted, shown = find_exhibits(results, runs / "report")
        assert atlas.pages == {"atlas/index.html": "../atlas-1/atlas/index.html"}
        assert atlas.pictures == []
        assert [p.address for p in plotted.pictures] == [
            "../equi%20%231/equivariance.png"
        ]
        assert shown.title == "visualize: my <model> on photos"
        assert shown.address == "../vis"
        assert [p.name for p in shown.pictures] == ["sheet_01.png"]
        assert shown.pages == {"index.html": "../vis/index.html"}

    def test_run_report__shows_and_links_them(self, runs: Path) -> None:
        folder = run_report(str(runs))
        page = Page((folder / "report.html").read_text())
        (kind, plot), (other, sheet) = page.decoded()
        assert (kind, other) == ("png", "jpeg")
        # The plot as it is; the sheet shrunk to 1200 px, its grey as it was.
        stored = Image.open(runs / "equi #1" / "equivariance.png")
        assert (np.asarray(plot) == np.asarray(stored)).all()
        assert sheet.size == (1200, 150)
        assert abs(np.asarray(sheet).astype(int) - 90).max() <= 2
        texts = [image["alt"] for image in page.images]
        assert texts == [
            "equivariance: my <model> on photos: equivariance.png",
            "visualize: my <model> on photos: sheet_01.png",
        ]
        links = [a for a in page.addresses if not a.startswith("data:")]
        assert {"../atlas-1/atlas/index.html", "../vis/index.html"} < set(links)
        for link in links:
            assert (folder / link.replace("%20", " ").replace("%23", "#")).exists()
        text = (folder / "report.md").read_text()
        assert "[atlas/index.html](../atlas-1/atlas/index.html)" in text
        assert "shift in px: 15" in page.text

    @pytest.mark.slow
    @pytest.mark.skipif(find_browser() is None, reason="needs a Chromium")
    def test_run_report__nothing_is_cut_on_a_phone(
        self, runs: Path, tmp_path: Path
    ) -> None:
        address = (run_report(str(runs)) / "report.html").as_uri()
        with browser(str(find_browser()), tmp_path / "profile") as page:
            page.open(address, 390, 800)
            assert page.value("document.documentElement.scrollWidth <= 390")
            cut = "[...document.querySelectorAll('.scroll')].filter("
            cut += "box => box.scrollWidth > box.clientWidth).length"
            assert page.value(cut) == 0
            title = "getComputedStyle(document.querySelector('td'), '::before')"
            assert page.value(f"{title}.content") == '"photos: accuracy, %"'
            assert page.complaints == []
