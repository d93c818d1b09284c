from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from lightly_ext.evaluate.images import ImageFiles
from lightly_ext.evaluate.text.pairs import Pairs
from lightly_ext.evaluate.text.retrieval import (
    MOST_CAPTIONS,
    Retrieval,
    recall_chance,
    recalls,
)

COUNTS = torch.tensor([2, 1, 3, 5, 1, 2, 4])


def _random(counts: torch.Tensor, seed: int) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(seed)
    owners = torch.repeat_interleave(torch.arange(len(counts)), counts)
    images = F.normalize(torch.randn(len(counts), 6), dim=1)
    # A little closer to the own image, so that recalls are neither 0 nor 1.
    texts = F.normalize(torch.randn(len(owners), 6) + images[owners], dim=1)
    return images, texts, owners


def _brute_force(
    images: torch.Tensor, texts: torch.Tensor, owners: torch.Tensor
) -> dict[str, float]:
    # Of equal ones the first; copies are equal in float32.
    similarities = (texts.double() @ images.double().T).float().numpy()
    whose = owners.numpy()
    expected = {}
    for k in (1, 5):
        found = [
            whose[t] in np.argsort(-similarities[t], kind="stable")[:k]
            for t in range(len(texts))
        ]
        expected[f"t2i_recall_{k}"] = float(np.mean(found))
        found = [
            i in whose[np.argsort(-similarities[:, i], kind="stable")[:k]]
            for i in range(len(images))
        ]
        expected[f"i2t_recall_{k}"] = float(np.mean(found))
    return expected


@pytest.mark.parametrize("seed", range(3))
def test_recalls__brute_force(seed: int) -> None:
    values = _random(COUNTS, seed)
    assert recalls(*values) == pytest.approx(_brute_force(*values))


def test_recalls__copies_of_images_and_texts() -> None:
    images, texts, owners = _random(COUNTS, 3)
    images[3:], texts[4:9] = images[1], texts[0]
    expected = _brute_force(images, texts, owners)
    assert recalls(images, texts, owners) == pytest.approx(expected)
    # All alike is chance for texts: only the first image is ever found.
    alike = recalls(images[:1].expand_as(images), texts, owners)
    assert alike["t2i_recall_1"] == int(COUNTS[0]) / len(texts)


def test_recalls__chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    values = _random(COUNTS, 0)
    expected = recalls(*values)
    monkeypatch.setattr("lightly_ext.evaluate.text.retrieval.CHUNK", 4)
    assert recalls(*values) == expected


def test_recalls__perfect_and_worst() -> None:
    images, owners = torch.eye(8), torch.arange(8).repeat_interleave(2)
    assert set(recalls(images, images[owners], owners).values()) == {1.0}
    assert set(recalls(images, -images[owners], owners).values()) == {0.0}


def test_recalls__fewer_than_five() -> None:
    images = torch.eye(3)
    scores = recalls(images, images.roll(1, 0), torch.arange(3))
    assert scores["t2i_recall_1"] == 0 and scores["t2i_recall_5"] == 1
    assert recall_chance(torch.ones(3).long())["i2t_recall_5"] == 1


def test_recall_chance__mean_of_random_orders() -> None:
    owners = torch.repeat_interleave(torch.arange(len(COUNTS)), COUNTS)
    torch.manual_seed(0)
    sums = dict.fromkeys(recall_chance(COUNTS), 0.0)
    num = 400
    for _ in range(num):
        images, texts = torch.randn(len(COUNTS), 64), torch.randn(len(owners), 64)
        for name, value in recalls(images, texts, owners).items():
            sums[name] += value / num
    assert sums == pytest.approx(recall_chance(COUNTS), abs=0.03)


def test_score__unreadable_images_leave_with_their_captions() -> None:
    images, texts, owners = _random(COUNTS, 1)
    captions = [[f"{i} {j}" for j in range(n)] for i, n in enumerate(COUNTS.tolist())]
    files = ImageFiles(Path("x"), [f"{i}.jpg" for i in range(len(COUNTS))])
    pairs = Pairs("some", files, captions)
    rows = {text: texts[i] for i, text in enumerate(pairs.texts)}
    readable = torch.tensor([0, 2, 3, 5, 6])
    task = Retrieval("some", files, "", pairs)
    scores = task.score(
        images[readable],
        readable,
        lambda wanted: torch.stack([rows[t] for t in wanted]),
    )
    kept = torch.isin(owners, readable)
    whose = torch.searchsorted(readable, owners[kept])
    expected = _brute_force(images[readable], texts[kept], whose)
    assert scores.values == pytest.approx(expected)
    assert scores.num == 5
    assert scores.chance["t2i_recall_1"] == 1 / 5


def test_find__at_most_five_captions(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").touch()
    rows = "".join(f"a.jpg,caption {i}\n" for i in range(7))
    (tmp_path / "some.csv").write_text(f"image,caption\n{rows}")
    task = Retrieval.find(str(tmp_path / "some.csv"), None, None)
    assert len(task.pairs.texts) == MOST_CAPTIONS
