from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightly_ext.evaluate.text.mmvp import Mmvp, mmvp_score

RIGHT = [[0.6, 0.4], [0.1, 0.2]]
FIRST_ONLY = [[0.6, 0.4], [0.3, 0.2]]
SECOND_ONLY = [[0.3, 0.4], [0.1, 0.2]]
TIE = [[0.5, 0.5], [0.1, 0.2]]


@pytest.mark.parametrize(
    ("pair", "expected"),
    [(RIGHT, 1), (FIRST_ONLY, 0), (SECOND_ONLY, 0), (TIE, 0)],
)
def test_mmvp_score__both_of_a_pair(pair: list[list[float]], expected: float) -> None:
    assert mmvp_score(torch.tensor([pair]), ["Texts"]) == expected


def test_mmvp_score__mean_over_patterns() -> None:
    similarities = torch.tensor([RIGHT, RIGHT, FIRST_ONLY, TIE])
    assert mmvp_score(similarities, ["a", "b", "b", "b"]) == pytest.approx(2 / 3)


def test_mmvp_score__chance() -> None:
    torch.manual_seed(0)
    score = mmvp_score(torch.rand(20_000, 2, 2), ["a", "b"] * 10_000)
    assert score == pytest.approx(1 / 4, abs=0.01)


def _write(root: Path, rows: list[str]) -> str:
    (root / "MLLM_VLM Images").mkdir(parents=True, exist_ok=True)
    text = "\n".join(["Question ID,Type,Statement", *rows])
    (root / "Questions.csv").write_text(text)
    return str(root)


ROWS = [
    '1,Texts,"the word on it, in red"',
    "2,Texts,no word",
    "3,Quantity and Count,one bird",
    "4,Quantity and Count,two birds",
]


def test_find__layout_of_the_hub(tmp_path: Path) -> None:
    task = Mmvp.find(_write(tmp_path, ROWS), None)
    assert task.statements[0] == "the word on it, in red"
    assert task.patterns == ["Texts", "Quantity and Count"]
    assert task.files.names[2:] == [
        "Quantity and Count/3.jpg",
        "Quantity and Count/4.jpg",
    ]
    limited = Mmvp.find(str(tmp_path), 1)
    assert (limited.statements, limited.patterns) == (task.statements[:2], ["Texts"])


def test_score__prompts_and_order(tmp_path: Path) -> None:
    task = Mmvp.find(_write(tmp_path, ROWS), None)
    seen: list[str] = []

    def embed(texts: list[str]) -> torch.Tensor:
        seen.extend(texts)
        return torch.eye(4)

    # The images of the second pair are the wrong way round.
    images = torch.eye(4)[[0, 1, 3, 2]]
    scores = task.score(images, torch.arange(4), embed)
    assert scores.values == {"mmvp": 0.5}
    assert scores.num == 2
    assert seen[3] == "a photo of two birds"


def test_find__missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"Questions\.csv' and the folder"):
        Mmvp.find(str(tmp_path), None)
    for rows in (ROWS[:3], [], ["1,Texts", "2,Texts"], [ROWS[0], ROWS[2]]):
        with pytest.raises(ValueError, match="rows of number, pattern and statement"):
            Mmvp.find(_write(tmp_path, rows), None)
