from __future__ import annotations

import pytest

from stellar_plugin.mmseg.card.stages import of_training, reached, resumed


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
            (
                {"iterations": "not told", "schedule": "not told"},
                {"iterations": "not told", "schedule": "not told"},
            ),
        ],
    )
    def test_part_of_the_run(
        self, card: dict[str, object], expected: dict[str, object]
    ) -> None:
        assert reached(card, steps=8, epochs=2) == expected


class TestResumed:
    def test_nothing_changed(self) -> None:
        now = {"lrs": (1.0,), "rule": None, "split": "train"}
        assert resumed({"lrs": [1.0], "split": "train"}, now, 3) is None

    def test_before_is_not_told(self) -> None:
        assert resumed({}, {"rule": "averaged weights"}, 3) == (
            "averaged weights; resumed at iteration 3, how it was trained before is "
            "not told"
        )


class TestOfTraining:
    def test_what_training_decided_on(self) -> None:
        card = {
            "iterations": 4,
            "lrs": [1.0],
            "stride": 9,
            "limit": 5,
            "split": "a / b",
        }
        expected = {"iterations": 4, "lrs": [1.0], "limit": 5, "split": "a"}
        assert of_training(card) == expected
