from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from lightly_ext.evaluate.result import Result, shown_value
from stellar_plugin.protocols import KNN

RESULT = Result(
    "knn",
    "my model",
    "Food-101",
    {"accuracy": 0.123456789, "num_test": 25250},
    KNN.card(),
    {"sha256": "abc", "seed": 0, "unreadable": {"train": 0, "test": 2}},
)


class TestResult:
    def test_save_and_load(self, tmp_path: Path) -> None:
        RESULT.save(tmp_path / "new" / "folder")
        loaded = Result.load(tmp_path / "new" / "folder" / "result.json")
        assert loaded == RESULT and loaded.digest == RESULT.digest

    def test_to_markdown(self, tmp_path: Path) -> None:
        RESULT.save(tmp_path)
        text = (tmp_path / "result.md").read_text()
        head = "# knn: my model on Food-101\n\n| score |  | chance | untrained |\n| ---"
        assert text.startswith(head)
        lines = text.splitlines()
        assert "| accuracy | 0.123457 | not told | not told |" in lines
        assert "| num_test | 25250 |  |  |" in lines
        told = replace(RESULT, chance={"accuracy": 0.01}, untrained={"accuracy": 0.1})
        assert "| accuracy | 0.123457 | 0.01 | 0.1 |" in told.to_markdown()
        assert "| neighbours | 20 |" in lines and "| temperature | 0.07 |" in lines
        assert "| unreadable | train 0, test 2 |" in lines
        piped = replace(RESULT, provenance={"command": "stellar | tee <log>"})
        assert "| command | stellar \\| tee &lt;log> |" in piped.to_markdown()
        # What a protocol does not use is not on its card.
        assert not any(line.startswith("| epochs") for line in lines)

    def test_to_markdown__curves_have_a_table_of_their_own(self) -> None:
        scores = {"fid": {"16": 2.5, "8": 4.0}, "num_images": 3}
        text = replace(RESULT, task="rank", scores=scores).to_markdown()
        tables = "| num_images | 3 |  |  |\n\n| number of tokens | 8 | 16 |\n| --- |"
        assert tables in text
        assert "| fid | 4 | 2.5 |" in text.splitlines()

    def test_digest__of_card_model_weights_and_seed(self) -> None:
        others = [
            replace(RESULT, protocol=KNN.replace(neighbours=10).card()),
            replace(RESULT, model="another"),
            replace(RESULT, provenance={"sha256": "abd", "seed": 0}),
            replace(RESULT, provenance={"sha256": "abc", "seed": 1}),
        ]
        assert len({r.digest for r in [RESULT, *others]}) == 5
        later = {"sha256": "abc", "seed": 0, "date": "another day"}
        same = replace(RESULT, scores={"accuracy": 0.5}, provenance=later)
        assert same.digest == RESULT.digest

    @pytest.mark.parametrize("text", ["{", '{"task": "knn"}', '{"a": 1}', "[1]"])
    def test_load__no_result(self, tmp_path: Path, text: str) -> None:
        path = tmp_path / "result.json"
        path.write_text(text)
        with pytest.raises(ValueError, match=r"result.json' is no stored result"):
            Result.load(path)

    def test_save__is_plain_json(self, tmp_path: Path) -> None:
        nan, inf = float("nan"), float("inf")
        scores = {"accuracy": nan, "curve": {"5": inf, "6": 0.5}, "list": (1.0, -inf)}
        replace(RESULT, scores=scores).save(tmp_path)
        text = (tmp_path / "result.json").read_text()
        assert "NaN" not in text and "Infinity" not in text
        stored = json.loads(text)
        assert stored["protocol"] == KNN.card()
        expected = {
            "accuracy": None,
            "curve": {"5": None, "6": 0.5},
            "list": [1.0, None],
        }
        assert stored["scores"] == expected

    def test_save__whole_or_not_at_all(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        RESULT.save(tmp_path)

        def full(path: Path, text: str, **options: str) -> None:
            path.write_bytes(text[:9].encode())
            raise OSError("no space left on device")

        monkeypatch.setattr(Path, "write_text", full)
        with pytest.raises(OSError, match="no space left"):
            replace(RESULT, scores={"accuracy": 0.9}).save(tmp_path)
        assert Result.load(tmp_path / "result.json") == RESULT

    def test_load__of_an_older_version(self, tmp_path: Path) -> None:
        RESULT.save(tmp_path)
        stored = json.loads((tmp_path / "result.json").read_text())
        del stored["identity"]
        stored["scores"]["accuracy"] = float("nan")
        (tmp_path / "result.json").write_text(json.dumps(stored))
        loaded = Result.load(tmp_path / "result.json")
        assert loaded.scores["accuracy"] is None and loaded.identity == {}
        # What it tells decides, for example on another precision.
        of = {**RESULT.provenance, "precision": "bf16-mixed"}
        assert replace(loaded, provenance=of).digest != loaded.digest == RESULT.digest


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.1 + 0.2, "0.3"),
        (25250, "25250"),
        ((0.485, 0.456), "0.485, 0.456"),
        ({"train": 1, "test": [2, 0.5]}, "train 1, test 2, 0.5"),
        ("as it is", "as it is"),
    ],
)
def test_shown_value(value: object, text: str) -> None:
    assert shown_value(value) == text
