from __future__ import annotations

import pytest

from lightly_ext.evaluate.curves import curve_rows
from lightly_ext.evaluate.devices import Devices


class TestCurveRows:
    def test_curve_rows__a_column_per_point(self) -> None:
        # Points in the order of their numbers; what a curve lacks is empty.
        scores = {
            "change_of_s": {"0": 0.0, "15": 0.25, "5": 0.12345},
            "change_of_l_moved_back": {"4": 1 / 3},
            "change_of_s_other_image": 0.5,
            "num_images": 7,
        }
        assert curve_rows("equivariance", scores, {}) == [
            ["shift in px", "0", "4", "5", "15"],
            ["change of s", "0", "", "0.123", "0.25"],
            ["change of l moved back", "", "0.333", "", ""],
        ]

    def test_curve_rows__untrained_below(self) -> None:
        scores = {"cosine_distance": {"0.5": 0.25, "1.0": None}}
        untrained = {"cosine_distance": {"0.5": 0.75}}
        assert curve_rows("stability", scores, untrained) == [
            ["area of the crop", "0.5", "1.0"],
            ["cosine distance", "0.25", ""],
            ["- untrained", "0.75", ""],
        ]

    def test_curve_rows__no_curve(self) -> None:
        assert curve_rows("knn", {"accuracy": 0.5}, {}) == []
        assert curve_rows("mine", {"a": {"x": 2.0}}, {})[0] == ["point", "x"]


class TestSayTable:
    @pytest.mark.parametrize("width", [80, 120])
    def test_say_table__whole_in_a_terminal(
        self,
        width: int,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.setenv("COLUMNS", str(width))
        shifts = {str(px): px / 7 for px in (0, 4, 5, 10, 15, 20, 25, 30)}
        scores = {"change_of_l_horizontal": shifts, "identity_matches": shifts}
        rows = curve_rows("equivariance", scores, {})
        Devices().say_table(rows)
        printed = capsys.readouterr().out
        lines = printed.splitlines()
        assert max(map(len, lines)) <= width
        assert "\u2026" not in printed
        for number in (*rows[0][1:], *rows[1][1:]):
            assert any(number in line.split() for line in lines)
        assert len(lines) <= 7

    def test_say_table__nothing_without_rows(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        devices = Devices()
        devices.say_table([])
        devices.say_table([["score", "chance"]])
        assert capsys.readouterr().out == ""
