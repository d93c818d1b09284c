from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from lightly_ext.evaluate.classification.guesses import (
    NO_GUESS,
    NOT_FINITE,
    best_guesses,
    collect_guesses,
)
from lightly_ext.evaluate.devices import Devices
from lightly_ext.evaluate.images import ImageFiles


@pytest.fixture(scope="module")
def devices() -> Devices:
    return Devices(accelerator="cpu", num_workers=0)


def _files(labels: list[int], num_classes: int) -> ImageFiles:
    names = [f"{i}.png" for i in range(len(labels))]
    return ImageFiles(Path("."), names, labels, tuple("abcdefgh"[:num_classes]))


def test_scores__counts_of_the_best_and_of_the_best_five(devices: Devices) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(200, 8, generator=generator)
    labels = torch.randint(8, (200,), generator=generator)
    files = _files(labels.tolist(), 8)
    parts = torch.arange(200).split(150)
    found = ((part, best_guesses(logits[part])) for part in parts)
    ranks = (logits > logits.gather(1, labels[:, None])).sum(dim=1)
    assert collect_guesses(devices, files, found).scores == {
        "accuracy": int((ranks < 1).sum()) / 200,
        "top5": int((ranks < 5).sum()) / 200,
    }


def test_best_guesses__ties_and_what_is_not_finite(devices: Devices) -> None:
    logits = torch.tensor([[0.0, 2, 2], [1, 1, 1], [0, 0, torch.nan]])
    assert best_guesses(logits).tolist() == [[1], [0], [NOT_FINITE]]
    assert best_guesses(torch.zeros(1, 6)).tolist() == [[0, 1, 2, 3, 4]]
    found = [(torch.arange(3), best_guesses(logits))]
    with pytest.raises(RuntimeError, match="not finite at precision 32-true: the"):
        collect_guesses(devices, _files([0, 1, 2], 3), found)


def test_save__names_and_unreadable_images(devices: Devices, tmp_path: Path) -> None:
    found = [(torch.tensor([2, 0]), torch.tensor([[1], [0]]))]
    guesses = collect_guesses(devices, _files([0, 1, 2], 3), found)
    assert guesses.best.tolist() == [[0], [NO_GUESS], [1]]
    assert guesses.scores == {"accuracy": 0.5} and guesses.unreadable == [1]
    guesses.save(tmp_path / "new")
    rows = list(csv.reader((tmp_path / "new/guesses.csv").open()))
    assert rows == [
        ["image", "class", "guess_1"],
        ["0.png", "a", "a"],
        ["1.png", "b", ""],
        ["2.png", "c", "b"],
    ]
