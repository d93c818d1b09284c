from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lightly_ext.evaluate.dense.k_means import (
    centre_scores,
    k_means,
    lloyd,
    spread_start,
)
from lightly_ext.evaluate.devices import Devices


@pytest.fixture(scope="module")
def devices() -> Devices:
    return Devices(accelerator="cpu", num_workers=0)


def _points(num: int = 300, dim: int = 5, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(num, dim, generator=generator), dim=1).half()


class TestLloyd:
    def test_lloyd__as_scikit_learn(self, devices: Devices) -> None:
        cluster = pytest.importorskip("sklearn.cluster")
        points = _points()
        start = points[::50].float()
        ours = lloyd(devices, points.split(70), start, iterations=200)
        theirs = cluster.KMeans(
            len(start), init=start.numpy(), n_init=1, max_iter=200, tol=0
        )
        theirs.fit(points.float().numpy())
        assert ours.converged and 2 < ours.iterations < 200
        np.testing.assert_allclose(ours.centres, theirs.cluster_centers_, atol=1e-6)
        assert ours.inertia * len(points) == pytest.approx(theirs.inertia_, rel=1e-6)

    def test_lloyd__blocks_change_no_bit(self, devices: Devices) -> None:
        points = _points(1000, 7)
        start = points[:9].float()
        whole = lloyd(devices, [points], start, 30)
        parts = lloyd(devices, points.flip(0).split(13), start, 30)
        assert whole.centres.equal(parts.centres)
        assert whole.iterations == parts.iterations

    def test_lloyd__one_step(self, devices: Devices) -> None:
        """The empty cluster stays, the others are means; not yet converged."""
        points = torch.tensor([[1.0, 0], [0.5, 0], [0, 1]]).half()
        start = torch.tensor([[1.0, 0], [0, 1], [-9, -9]])
        found = lloyd(devices, [points], start, iterations=1)
        assert found.centres.tolist() == [[0.75, 0], [0, 1], [-9, -9]]
        assert found.inertia == pytest.approx(2 * 0.25**2 / 3)
        assert not found.converged
        assert lloyd(devices, [points], start, iterations=9).converged


class TestKMeans:
    def test_k_means__well_separated(self, devices: Devices) -> None:
        centres = torch.eye(4)
        noise = 0.01 * torch.randn(4, 50, 4, generator=torch.Generator().manual_seed(0))
        points = (centres[:, None] * 0.9 + noise).flatten(0, 1).half()
        found = k_means(devices, points, 4, seed=0, restarts=3, iterations=50)
        order = found.centres.argmax(dim=1)
        assert order.sort().values.tolist() == [0, 1, 2, 3]
        expected = points.double().view(4, 50, 4).mean(dim=1)[order]
        torch.testing.assert_close(found.centres.double(), expected)
        inertia = points.double().view(4, 50, 4).var(dim=1, correction=0).sum() / 4
        assert found.inertia == pytest.approx(float(inertia), rel=1e-6)

    def test_k_means__best_of_its_restarts(self, devices: Devices) -> None:
        """The starts of a seed are drawn one after the other."""
        points = _points(200, 3)
        found = [k_means(devices, points, 8, 0, n, 2).inertia for n in range(1, 5)]
        assert found == sorted(found, reverse=True)
        assert found[-1] < found[0]
        assert k_means(devices, points, 8, 0, 4, 2).inertia == found[-1]
        assert k_means(devices, points, 8, 4, 1, 2).inertia != found[0]


class TestSpreadStart:
    def test_spread_start__a_point_of_each_kind(self) -> None:
        points = torch.eye(6).double().repeat(20, 1)
        start = spread_start(points, 6, torch.Generator().manual_seed(0))
        assert start.sum(dim=0).tolist() == [1.0] * 6

    def test_spread_start__by_the_squared_distance(self) -> None:
        """From 0 the points 1 and 3 are drawn 1 : 9; the start is each alike."""
        points = torch.tensor([[0.0], [1.0], [3.0]]).double()
        drawn = {}
        for seed in range(3000):
            start = spread_start(points, 2, torch.Generator().manual_seed(seed))
            pair = tuple(start.flatten().tolist())
            drawn[pair] = drawn.get(pair, 0) + 1
        share = {pair: count / 3000 for pair, count in drawn.items()}
        expected = {(0, 1): 1 / 30, (0, 3): 9 / 30, (1, 0): 1 / 15, (1, 3): 4 / 15}
        expected |= {(3, 0): 9 / 39, (3, 1): 4 / 39}
        assert share.keys() == expected.keys()
        for pair, value in expected.items():
            assert share[pair] == pytest.approx(value, abs=0.03)

    def test_spread_start__too_few_differ(self) -> None:
        with pytest.raises(ValueError, match="Of 8 drawn patches 2 differ, too"):
            spread_start(torch.eye(2).double().repeat(4, 1), 3, torch.Generator())


class TestCentreScores:
    def test_centre_scores__orders_as_distances(self) -> None:
        points, centres = _points(40).float(), _points(6, seed=1).float()
        distances = torch.cdist(points, centres).square()
        scores = centre_scores(points, centres)
        lengths = points.square().sum(dim=1, keepdim=True)
        torch.testing.assert_close(lengths - 2 * scores, distances)
