from __future__ import annotations

from pathlib import Path

import torch
from torch.nn import functional as F

from lightly_ext.evaluate.images import ImageFiles
from lightly_ext.quick_start.pictures import (
    NUM_NEIGHBOURS,
    NUM_QUERIES,
    Shown,
    distinct_tokens,
    near_tokens,
)
from lightly_ext.quick_start.scores import Seen


class TestDistinctTokens:
    def test_distinct_tokens__each_direction_before_any_comes_again(self) -> None:
        # Three directions, one of them once.
        units = torch.eye(3)[:2].expand(10, 2, 3).clone()
        units[7, 1] = torch.tensor([0.0, 0, 1])
        for seed in range(3):
            places = distinct_tokens(units, 3, seed)
            assert {int(units[place].argmax()) for place in places} == {0, 1, 2}
            assert (7, 1) in places

    def test_distinct_tokens__the_farthest_of_a_circle(self) -> None:
        angles = torch.deg2rad(torch.tensor([0.0, 10.0, 170.0, 95.0, 91.0, 270.0]))
        units = torch.stack([angles.cos(), angles.sin()], dim=1)[:, None]
        first, second, third = (p for p, _ in distinct_tokens(units, 3, seed=0))
        cosines = (units @ units[:, 0].T)[:, 0]
        assert second == int(cosines[first].argmin())
        closest = torch.maximum(cosines[first], cosines[second])
        assert third == int(closest.argmin())

    def test_distinct_tokens__each_once(self) -> None:
        units = F.normalize(torch.ones(2, 2, 3), dim=2)  # all the same
        assert sorted(distinct_tokens(units, 9, 0)) == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_near_tokens__nearest_of_other_photos() -> None:
    torch.manual_seed(0)
    sparse = torch.randn(12, 2, 8)
    localization = torch.rand(12, 4, 2).softmax(dim=2)
    seen = Seen({}, sparse, localization, (2, 2))
    images = torch.zeros(12, 3, 8, 8, dtype=torch.uint8)
    files = ImageFiles(Path(), [f"{i}.png" for i in range(12)])
    gallery = near_tokens(Shown(images, seen, files), seed=0)
    units = F.normalize(sparse, dim=2)
    chosen = distinct_tokens(units, NUM_QUERIES, 0)
    assert len(gallery.notes) == len(gallery.rows) == NUM_QUERIES
    for (image, token), notes in zip(chosen, gallery.notes.values(), strict=True):
        best = (units @ units[image, token]).amax(dim=1)
        others = sorted(set(range(12)) - {image}, key=lambda i: -best[i].item())
        expected = [f"{i}.png, {best[i]:.2f}" for i in others[:NUM_NEIGHBOURS]]
        assert notes == [f"{image}.png", *expected]
