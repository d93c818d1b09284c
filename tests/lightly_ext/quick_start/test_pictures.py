from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from lightly_ext.evaluate.images import ImageFiles
from lightly_ext.quick_start.pictures import (
    CONTRAST,
    NUM_NEIGHBOURS,
    NUM_QUERIES,
    OPACITY,
    Shown,
    distinct_tokens,
    marked_token,
    near_tokens,
)
from lightly_ext.quick_start.scores import Seen


class TestDistinctTokens:
    def test_distinct_tokens__each_direction_before_any_comes_again(self) -> None:
        # Three directions, one of them once.
        units = torch.eye(3)[:2].repeat(10, 1)
        units[15] = torch.tensor([0.0, 0, 1])
        for seed in range(3):
            places = distinct_tokens(units, 3, seed)
            assert {int(units[place].argmax()) for place in places} == {0, 1, 2}
            assert 15 in places

    def test_distinct_tokens__the_farthest_of_a_circle(self) -> None:
        angles = torch.deg2rad(torch.tensor([0.0, 10.0, 170.0, 95.0, 91.0, 270.0]))
        units = torch.stack([angles.cos(), angles.sin()], dim=1)
        first, second, third = distinct_tokens(units, 3, seed=0)
        cosines = units @ units.T
        assert second == int(cosines[first].argmin())
        closest = torch.maximum(cosines[first], cosines[second])
        assert third == int(closest.argmin())

    def test_distinct_tokens__each_once(self) -> None:
        units = F.normalize(torch.ones(4, 3), dim=1)  # all the same
        assert sorted(distinct_tokens(units, 9, 0)) == [0, 1, 2, 3]


def test_near_tokens__nearest_of_other_photos() -> None:
    torch.manual_seed(0)
    sparse = torch.randn(12, 2, 8)
    localization = torch.rand(12, 4, 2).softmax(dim=2)
    localization[3] = torch.tensor([0.95, 0.05])  # token 1 is absent
    seen = Seen({}, sparse, localization, (2, 2))
    images = torch.zeros(12, 3, 8, 8, dtype=torch.uint8)
    files = ImageFiles(Path(), [f"{i}.png" for i in range(12)])
    gallery = near_tokens(Shown(images, seen, files), seed=0)
    units = F.normalize(sparse, dim=2)
    present = torch.ones(12, 2, dtype=torch.bool)
    present[3, 1] = False
    places = present.nonzero().tolist()
    chosen = [places[i] for i in distinct_tokens(units[present], NUM_QUERIES, 0)]
    assert len(gallery.notes) == len(gallery.rows) == NUM_QUERIES
    for (image, token), notes in zip(chosen, gallery.notes.values(), strict=True):
        cosines = units @ units[image, token]
        best = torch.where(present, cosines, -2.0).amax(dim=1)
        others = sorted(set(range(12)) - {image}, key=lambda i: -best[i].item())
        expected = [f"{i}.png, {best[i]:.2f}" for i in others[:NUM_NEIGHBOURS]]
        assert notes == [f"{image}.png", *expected]


def test_marked_token__pale_where_it_is_not_its_colour_where_it_is() -> None:
    picture = np.zeros((2, 2, 3), np.uint8)  # black
    weights = torch.tensor([[0.0, 1.0], [0.5, 0.0]])
    colour = np.array([200, 0, 100], np.uint8)
    shown = marked_token(picture, weights, colour).astype(float)
    pale = 255 - 255 * CONTRAST
    for row, column, weight in ((0, 0, 0.0), (0, 1, 1.0), (1, 0, 0.5)):
        expected = pale + OPACITY * weight * (colour - pale)
        assert np.abs(shown[row, column] - expected).max() <= 0.5
