from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from lightly_ext.evaluate.dense import regions
from lightly_ext.evaluate.dense.regions import (
    PATCHES,
    draw_patches,
    strongest_at_px,
)
from lightly_ext.evaluate.features import CachedFeatures


class TestStrongestAtPx:
    def test_strongest_at_px__parts_in_blocks(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(regions, "PARTS_AT_ONCE", 3)
        scores = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
        scores[:, 5] = scores[:, 1]  # the first of equal ones
        maps = F.interpolate(
            scores.mT.view(1, 8, 2, 3), (12, 12), mode="bilinear", align_corners=False
        )
        found = strongest_at_px(scores, (2, 3), 12)
        assert found.equal(maps[0].argmax(dim=0))
        assert 5 not in found and len(found.unique()) > 2


class TestDrawPatches:
    def test_draw_patches__evenly_by_the_seed(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Of images 0, 2 and 3; a patch is the number of its image and its place."""
        monkeypatch.setattr(regions, "CLUSTERED_PATCHES", 20)
        image, place = np.indices((4, 9))
        patches = np.stack([image, place], axis=2).astype(np.float16)
        cached = CachedFeatures({PATCHES: patches}, torch.tensor([0, 2, 3]), 1, 0)
        drawn = draw_patches(cached, seed=0)
        assert drawn.dtype == torch.float16
        assert drawn[:, 0].tolist() == [0] * 6 + [2] * 6 + [3] * 6
        places = [part.tolist() for part in drawn[:, 1].split(6)]
        assert all(len(set(p)) == 6 for p in places)
        assert places[0] != places[1]
        assert draw_patches(cached, seed=0).equal(drawn)
        assert not draw_patches(cached, seed=1).equal(drawn)

    def test_draw_patches__all_there_are(self) -> None:
        patches = np.arange(24, dtype=np.float16).reshape(2, 3, 4)
        cached = CachedFeatures({PATCHES: patches}, torch.arange(2), 0, 0)
        drawn = draw_patches(cached, seed=0)
        assert drawn.flatten().tolist() == list(range(24))
