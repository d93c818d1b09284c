from __future__ import annotations

import pytest
import torch

from lightly_ext.evaluate.frozen_model import FrozenModel, Origin
from lightly_ext.evaluate.parts import (
    Cut,
    choose_cut,
    cluster_parts,
    patch_parts,
    token_parts,
)
from lightly_ext.evaluate.raw_patches import RawPatches
from stellar_plugin import StellarEncoder


def _stellar() -> StellarEncoder:
    torch.manual_seed(0)
    kwargs = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1}
    return StellarEncoder(num_queries=3, num_heads=2, **kwargs).eval()


def _frozen(backbone: torch.nn.Module) -> FrozenModel:
    return FrozenModel(backbone, Origin("m", "STELLAR", "0", image_size=(32, 32)))


class TestTokenParts:
    @torch.no_grad()
    def test_token_parts__rebuild_the_lowrank(self) -> None:
        result = _stellar()(torch.randn(2, 3, 32, 32))
        parts = token_parts(result)
        torch.testing.assert_close(parts.maps.mT @ parts.vectors, result.lowrank)
        torch.testing.assert_close(parts.maps.sum(dim=1), torch.ones(2, 16))
        torch.testing.assert_close(parts.masses, parts.maps.mean(dim=2))


class TestPatchParts:
    @torch.no_grad()
    def test_patch_parts__a_patch_each(self) -> None:
        result = _stellar()(torch.randn(2, 3, 32, 32))
        parts = patch_parts(result)
        assert parts.vectors.equal(result.dense)
        assert parts.maps[1].equal(torch.eye(16))
        assert (parts.masses == 1 / 16).all()


class TestClusterParts:
    def test_cluster_parts__colours(self) -> None:
        # Left half one colour, right half another: two clusters, the third is nothing.
        images = torch.ones(1, 3, 32, 32)
        images[..., 16:] *= -2
        parts = cluster_parts(RawPatches(8)(images), 3, seed=0)
        assert parts.masses.sort(descending=True).values.tolist() == [[0.5, 0.5, 0.0]]
        for vector, cluster_map, mass in zip(*(p[0] for p in parts[:3]), strict=True):
            left = cluster_map.view(4, 4)[:, :2]
            assert left.unique().numel() == 1
            value = float(vector.unique())
            assert value == (0.0 if mass == 0 else 1.0 if left[0, 0] else -2.0)


class TestChooseCut:
    def test_choose_cut__tokens(self) -> None:
        model = _frozen(_stellar())
        assert choose_cut(model, 32, None, 0) == Cut(3, False, 0)
        assert choose_cut(model, 32, 5, 1) == Cut(5, True, 1)
        assert (
            choose_cut(model, 32, 5, 1).kind == "5 k-means clusters of patches, seed 1"
        )

    def test_choose_cut__clusters(self) -> None:
        assert choose_cut(_frozen(RawPatches(8)), 32, None, 0) == Cut(16, True, 0)

    def test_choose_cut__too_few_patches(self) -> None:
        with pytest.raises(ValueError, match="too few for 16 clusters"):
            choose_cut(_frozen(RawPatches(16)), 32, None, 0)
