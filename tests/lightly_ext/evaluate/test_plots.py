from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lightly_ext.evaluate.plots import COLOURS, save_line_plot


def _pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3)


def _has_colour(path: Path, colour: str) -> bool:
    rgb = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    distance = np.abs(_pixels(path).astype(int) - rgb).max(axis=1)
    return bool((distance < 12).sum() > 150)


class TestSaveLinePlot:
    def test_save_line_plot__series_have_their_colours(self, tmp_path: Path) -> None:
        series = {f"model {i}": {1: i, 2: i + 1, 5: 2 * i} for i in range(3)}
        path = tmp_path / "new" / "plot.png"
        save_line_plot(path, series, "shift in px", "change", title="models")
        assert [_has_colour(path, c) for c in COLOURS[:6]] == [True] * 3 + [False] * 3

    def test_save_line_plot__small_file_of_fixed_size(self, tmp_path: Path) -> None:
        rng = np.random.default_rng(0)
        series = {
            f"a model of a long name {i}": dict(enumerate(rng.random(30)))
            for i in range(6)
        }
        errors = {name: dict.fromkeys(range(30), 0.1) for name in series}
        path = tmp_path / "plot.png"
        save_line_plot(path, series, "x", "y", errors, {"other": 0.5, "another": 2.0})
        assert path.stat().st_size <= 100_000
        assert Image.open(path).size == (840, 555)

    def test_save_line_plot__errors_and_references_are_drawn(
        self, tmp_path: Path
    ) -> None:
        series = {"S": {0: 0.0, 1: 1.0}}
        inks = []
        path = tmp_path / "plot.png"
        band = {"S": {0: 0.2, 1: 0.2}}
        for errors, references in ((None, None), (band, None), (None, {"r": 0.5})):
            save_line_plot(path, series, "x", "y", errors, references)
            inks.append((_pixels(path) < 245).any(axis=1).sum())
        save_line_plot(path, series, "x", "y", references={"S": 0.5})
        # A reference of the series' own: dashed in its colour, no entry in the legend
        assert 200 < (_pixels(path) < 245).any(axis=1).sum() - inks[0] < inks[2]
        assert inks[1] > inks[0] + 1000
        assert inks[2] > inks[0] + 500

    def test_save_line_plot__powers_are_straight_on_log_axes(
        self, tmp_path: Path
    ) -> None:
        straightness = []
        for log in (False, True):
            points = {float(x): float(x**2) for x in range(1, 65)}
            path = tmp_path / "plot.png"
            save_line_plot(path, {"S": points}, "x", "y", log=log)
            image = np.asarray(Image.open(path).convert("RGB")).astype(int)[:450]
            blue = np.abs(image - [0, 0x72, 0xB2]).max(axis=-1) < 12
            straightness.append(-np.corrcoef(np.nonzero(blue))[0, 1])
        assert straightness[0] < 0.99 < 0.998 < straightness[1]

    def test_save_line_plot__order_of_points_is_irrelevant(
        self, tmp_path: Path
    ) -> None:
        paths = [tmp_path / "a.png", tmp_path / "b.png"]
        for path, xs in zip(paths, ([1, 2, 3], [3, 1, 2]), strict=True):
            save_line_plot(path, {"S": {x: x**2 for x in xs}}, "x", "y")
        assert paths[0].read_bytes() == paths[1].read_bytes()

    @pytest.mark.parametrize("series", [{}, {"full": {1: 1}, "bare": {}}])
    def test_save_line_plot__nothing_to_draw(
        self, series: dict[str, dict[float, float]], tmp_path: Path
    ) -> None:
        with pytest.raises(ValueError, match="needs points in every series"):
            save_line_plot(tmp_path / "plot.png", series, "x", "y")
