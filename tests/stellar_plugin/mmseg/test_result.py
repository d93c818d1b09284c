from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from stellar_plugin.mmseg.result import _reached, sha256


class TestSha256:
    def test_file(self, tmp_path: Path) -> None:
        content = bytes(range(256)) * 5000  # more than one block
        (tmp_path / "weights").write_bytes(content)
        assert sha256(tmp_path / "weights") == hashlib.sha256(content).hexdigest()

    def test_no_file(self, tmp_path: Path) -> None:
        assert sha256(tmp_path) is None


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
