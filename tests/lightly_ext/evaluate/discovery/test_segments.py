from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional as F

from lightly_ext.evaluate.clusters import cluster_patches
from lightly_ext.evaluate.discovery.normalized_cut import cut_object
from lightly_ext.evaluate.discovery.segments import (
    centre_segments,
    cluster_segments,
    grid_segments,
    inner_object,
    ncut_segments,
    token_segments,
)
from stellar_plugin.encoder import Factorization
from tests.lightly_ext.evaluate.discovery.discovery_loops import inner_area


def _result(num_images: int = 3) -> Factorization:
    """Localization and features of 4 x 6 patches, 5 tokens."""
    generator = torch.Generator().manual_seed(0)
    shape = (num_images, 24, 5)
    localization = F.softmax(torch.randn(shape, generator=generator), dim=2)
    dense = torch.randn(num_images, 24, 7, generator=generator)
    sparse = torch.zeros(num_images, 5, 7)
    return Factorization(None, sparse, dense, (4, 6), lambda *_: localization)


class TestSegmentsOfPatches:
    def test_token_segments__strongest_of_each_patch(self) -> None:
        result = _result()
        winners = result.localization.argmax(dim=2).view(3, 4, 6)
        px = winners.repeat_interleave(8, dim=1).repeat_interleave(8, dim=2)
        for found, expected in zip(token_segments(result, (32, 48)), px, strict=True):
            assert torch.equal(found.parts, expected)
            assert found.num_parts == 5
            assert torch.equal(found.object, inner_object(expected, 5))

    def test_cluster_segments__of_each_image(self) -> None:
        result = _result()
        clusters = cluster_patches(result.dense, 3, seed=1).view(3, 4, 6)
        found = cluster_segments(result, (4, 6), 3, seed=1)
        assert torch.equal(torch.stack([f.parts for f in found]), clusters)
        assert {f.num_parts for f in found} == {3}

    def test_ncut_segments__object_and_the_rest(self) -> None:
        result = _result()
        for found, dense in zip(
            ncut_segments(result, (8, 12)), result.dense, strict=True
        ):
            patches = cut_object(dense, (4, 6)).view(4, 6)
            px = patches.repeat_interleave(2, dim=0).repeat_interleave(2, dim=1)
            assert torch.equal(found.object, px)
            assert torch.equal(found.parts, px.long())
            assert found.num_parts == 2


class TestReferences:
    def test_grid_segments__inner_cells(self) -> None:
        found = grid_segments(16, (12, 12))
        expected = torch.zeros(12, 12, dtype=torch.bool)
        expected[3:9, 3:9] = True
        assert torch.equal(found.object, expected)
        assert found.parts.unique().tolist() == list(range(16))
        # Cells that are all at the border alike: the whole image.
        assert grid_segments(4, (12, 12)).object.all()

    def test_centre_segments__half_the_area(self) -> None:
        found = centre_segments((100, 200))
        assert torch.equal(found.parts, found.object.long())
        rows, columns = found.object.nonzero().unbind(dim=1)
        edges = [rows.min(), rows.max() + 1, columns.min(), columns.max() + 1]
        assert edges == [15, 85, 29, 171]
        assert abs(found.object.sum() / 20000 - 0.5) < 0.01


class TestInnerObject:
    def test_inner_object__loops(self) -> None:
        rng = np.random.default_rng(0)
        sizes = set()
        for _ in range(30):
            parts = rng.integers(6, size=(7, 8))
            parts[2:5, 2:6] = rng.integers(4, 6, size=(3, 4))
            found = inner_object(torch.tensor(parts), 6).numpy()
            np.testing.assert_array_equal(found, inner_area(parts))
            sizes.add(found.sum())
        assert len(sizes) > 5

    def test_inner_object__one_part(self) -> None:
        assert inner_object(torch.zeros(4, 5, dtype=torch.int64), 3).all()
