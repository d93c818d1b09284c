from __future__ import annotations

import json
from itertools import chain
from pathlib import Path

import pytest
import torch

from lightly_ext.evaluate.text.winoground import (
    CHANCE,
    Winoground,
    pair_similarities,
    winoground_scores,
)


@pytest.mark.parametrize(
    ("similarities", "text", "image", "group"),
    [
        ([[0.9, 0.1], [0.2, 0.8]], 1, 1, 1),
        # Image 1 is closer to everything: both images find their captions ...
        ([[0.3, 0.4], [0.1, 0.9]], 1, 0, 0),
        # ... and the same with caption 1, for captions.
        ([[0.3, 0.1], [0.4, 0.9]], 0, 1, 0),
        ([[0.1, 0.9], [0.8, 0.2]], 0, 0, 0),
        ([[0.5, 0.5], [0.5, 0.5]], 0, 0, 0),
    ],
)
def test_winoground_scores__closed_form(
    similarities: list[list[float]], text: float, image: float, group: float
) -> None:
    assert winoground_scores(torch.tensor([similarities])) == {
        "winoground_text": text,
        "winoground_image": image,
        "winoground_group": group,
    }


def test_winoground_scores__brute_force_and_chance() -> None:
    torch.manual_seed(0)
    similarities = torch.rand(20_000, 2, 2)
    text = image = group = 0
    for (a, b), (c, d) in similarities.tolist():  # rows: captions
        right_text, right_image = a > c and d > b, a > b and d > c
        text += right_text
        image += right_image
        group += right_text and right_image
    scores = winoground_scores(similarities)
    assert [20_000 * s for s in scores.values()] == [text, image, group]
    assert scores == pytest.approx(CHANCE, abs=0.01)


def test_pair_similarities__without_unreadable_images() -> None:
    readable = torch.tensor([0, 1, 3, 6, 7])
    images = readable[:, None].float()
    texts = torch.arange(1.0, 9.0)[:, None]
    whole, similarities = pair_similarities(images, readable, texts)
    assert whole.tolist() == [0, 3]
    assert similarities.tolist() == [[[0, 1], [0, 2]], [[42, 49], [48, 56]]]


def _write(root: Path, num: int = 3) -> Path:
    (root / "images").mkdir(parents=True)
    lines = [
        json.dumps(
            {
                "id": i,
                "image_0": f"ex_{i}_img_0",
                "image_1": f"ex_{i}_img_1",
                "caption_0": f"some plants {i}",
                "caption_1": f"plants some {i}",
            }
        )
        for i in range(num)
    ]
    (root / "examples.jsonl").write_text("\n".join(lines) + "\n")
    return root


@pytest.mark.parametrize("inner", ["", "data"])
def test_find__layout_of_the_hub(tmp_path: Path, inner: str) -> None:
    _write(tmp_path / inner)
    task = Winoground.find(str(tmp_path), None)
    assert task.captions[2] == ("some plants 2", "plants some 2")
    assert task.files.names[4:] == ["ex_2_img_0.png", "ex_2_img_1.png"]
    assert task.files.root == tmp_path / inner / "images"
    assert len(Winoground.find(str(tmp_path), 2).files) == 4


def test_score__pairs_meet_their_captions(tmp_path: Path) -> None:
    task = Winoground.find(str(_write(tmp_path / "w")), None)
    rows = {text: i for i, text in enumerate(chain(*task.captions))}
    readable = torch.tensor([0, 1, 2, 4, 5])
    scores = task.score(
        torch.eye(6)[readable],
        readable,
        lambda texts: torch.eye(6)[[rows[t] for t in texts]],
    )
    assert scores.num == 2
    assert set(scores.values.values()) == {1.0}


def test_find__missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"examples.jsonl' and the folder"):
        Winoground.find(str(tmp_path), None)
    _write(tmp_path)
    (tmp_path / "examples.jsonl").write_text('{"caption_0": "x"}\n')
    with pytest.raises(ValueError, match="caption_1"):
        Winoground.find(str(tmp_path), None)
