from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from stellar_plugin.mmseg.result import _reached, _tested, fraction, sha256


class TestSha256:
    def test_file(self, tmp_path: Path) -> None:
        content = bytes(range(256)) * 5000  # more than one block
        (tmp_path / "weights").write_bytes(content)
        assert sha256(tmp_path / "weights") == hashlib.sha256(content).hexdigest()

    def test_no_file(self, tmp_path: Path) -> None:
        assert sha256(tmp_path) is None


def test_fraction() -> None:
    assert fraction(47.61) == 0.4761
    # Written as null: NaN is no JSON.
    assert fraction(float("nan")) is None


class TestReached:
    @pytest.mark.parametrize(
        ("card", "expected"),
        [
            (
                {"iterations": 40, "schedule": "linear"},
                {"iterations": 8, "schedule": "linear, stopped after 8 of 40"},
            ),
            (
                {"epochs": 5, "schedule": "constant"},
                {"epochs": 2, "schedule": "constant, stopped after 2 of 5"},
            ),
            (
                {"iterations": 8, "schedule": "linear"},
                {"iterations": 8, "schedule": "linear"},
            ),
        ],
    )
    def test_part_of_the_run(
        self, card: dict[str, object], expected: dict[str, object]
    ) -> None:
        assert _reached(card, iterations=8, epochs=2) == expected


class TestTested:
    def test_training_as_it_was_the_rest_as_it_is(self) -> None:
        trained = {"iterations": 4, "lrs": [1.0], "stride": 9, "limit": 5, "epochs": 1}
        card = {"iterations": 40, "warmup": 3, "stride": 7, "name": "x"}
        expected = {"iterations": 4, "lrs": [1.0], "stride": 7, "name": "x"}
        assert _tested(card, trained) == {**expected, "limit": 5, "epochs": 1}
        assert _tested({**card, "limit": 2}, trained)["limit"] == 2
        del trained["limit"]
        assert "limit" not in _tested(card, trained)
