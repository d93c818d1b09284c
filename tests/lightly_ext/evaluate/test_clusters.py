from __future__ import annotations

import itertools
import warnings

import torch
from torch import Tensor
from torch.nn import functional as F

from lightly_ext.evaluate.clusters import cluster_patches


def _spread(points: Tensor, labels: Tensor) -> float:
    """Sum of squared distances to the centres."""
    return sum(
        float((points[labels == k] - points[labels == k].mean(dim=0)).square().sum())
        for k in labels.unique().tolist()
    )


class TestClusterPatches:
    def test_cluster_patches__brute_force(self) -> None:
        # Every partition of 7 patches into 3 clusters, of three directions with noise.
        generator = torch.Generator().manual_seed(0)
        kinds = torch.tensor([0, 1, 1, 2, 0, 2, 2])
        lengths = 1 + 9 * torch.rand(7, 1, generator=generator)
        noise = 0.2 * torch.randn(7, 3, generator=generator)
        dense = lengths * (torch.eye(3)[kinds] + noise)
        unit = F.normalize(dense.double(), dim=1)
        found = cluster_patches(dense[None], 3, seed=0)[0]
        partitions = map(torch.tensor, itertools.product(range(3), repeat=7))
        best = min(partitions, key=lambda labels: _spread(unit, labels))
        assert torch.equal(found[:, None] == found, best[:, None] == best)
        assert torch.equal(found[:, None] == found, kinds[:, None] == kinds)

    def test_cluster_patches__each_image_alone(self) -> None:
        generator = torch.Generator().manual_seed(1)
        dense = torch.randn(4, 20, 5, generator=generator)
        together = cluster_patches(dense, 6, seed=3)
        alone = [cluster_patches(image[None], 6, seed=3) for image in dense]
        assert torch.equal(together, torch.cat(alone))
        assert all(image.unique().tolist() == list(range(6)) for image in together)
        assert not torch.equal(together, cluster_patches(dense, 6, seed=4))

    def test_cluster_patches__fewer_kinds_than_clusters(self) -> None:
        dense = torch.tensor([[1.0, 0], [0, 2], [3, 0], [0, 4]])[None]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            parts = cluster_patches(dense, 16, seed=0)[0]
            blank = cluster_patches(torch.zeros(1, 4, 2), 16, seed=0)[0]
        assert parts[0] == parts[2] != parts[1] == parts[3]
        assert blank.tolist() == [0, 0, 0, 0]
