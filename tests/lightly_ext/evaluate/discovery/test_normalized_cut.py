from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from lightly_ext.evaluate.discovery.normalized_cut import cut_object, second_eigenvector
from stellar_plugin.protocols import NCUT_SIMILARITY, NCUT_WEAK_EDGE

GRID = (5, 6)


def _two_kinds(mask: Tensor) -> Tensor:
    """Features of patches: two orthogonal directions, with a little noise."""
    generator = torch.Generator().manual_seed(0)
    dense = torch.zeros(mask.numel(), 8)
    dense[torch.arange(mask.numel()), mask.flatten().long()] = 1
    return dense + 0.02 * torch.randn(dense.shape, generator=generator)


class TestCutObject:
    def test_cut_object__two_kinds_of_patches(self) -> None:
        mask = torch.zeros(GRID, dtype=torch.bool)
        mask[1:3, 2:5] = True
        # The smaller side has the larger values: they sum to zero over degrees.
        for dense in (_two_kinds(mask), 7 * _two_kinds(mask)):
            assert torch.equal(cut_object(dense, GRID), mask.flatten())
        assert torch.equal(cut_object(_two_kinds(~mask), GRID), mask.flatten())

    def test_cut_object__what_hangs_together_with_the_largest_value(self) -> None:
        # Two places of one kind; noise decides on the patch with the largest value,
        # corners do not join.
        mask = torch.zeros(GRID, dtype=torch.bool)
        mask[0, 0] = mask[1, 1] = mask[1, 2] = mask[4, 5] = True
        found = cut_object(_two_kinds(mask), GRID)
        places = [{0}, {7, 8}, {29}]
        assert set(found.nonzero().flatten().tolist()) in places

    def test_cut_object__nothing_to_cut(self) -> None:
        dense = torch.ones(30, 4) + 0.1 * torch.rand(30, 4)
        assert cut_object(dense, GRID).all()
        assert cut_object(torch.ones(1, 4), (1, 1)).tolist() == [True]

    def test_cut_object__brute_force(self) -> None:
        # With all eigenvectors, and a flood fill.
        generator = torch.Generator().manual_seed(1)
        for _ in range(5):
            dense = torch.randn(30, 3, generator=generator)
            unit = dense.double().numpy()
            unit /= np.linalg.norm(unit, axis=1, keepdims=True)
            weights = np.where(unit @ unit.T > NCUT_SIMILARITY, 1, NCUT_WEAK_EDGE)
            scale = 1 / np.sqrt(weights.sum(axis=1))
            values, vectors = np.linalg.eigh(
                np.eye(30) - scale[:, None] * weights * scale
            )
            assert values[2] - values[1] > 1e-6
            vector = scale * vectors[:, 1]
            size = np.abs(vector)  # patches with the same neighbours have the same
            seed = int(np.flatnonzero(size > size.max() - 1e-9)[0])
            side = vector > vector.mean()
            side = side if side[seed] else ~side
            area, todo = {seed}, [seed]
            while todo:
                y, x = divmod(todo.pop(), 6)
                for v, u in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
                    inside = 0 <= v < 5 and 0 <= u < 6
                    if inside and side[6 * v + u] and 6 * v + u not in area:
                        area.add(6 * v + u)
                        todo.append(6 * v + u)
            found = cut_object(dense, GRID).nonzero().flatten().tolist()
            assert set(found) == area


class TestSecondEigenvector:
    def test_second_eigenvector__solves_the_problem(self) -> None:
        rng = np.random.default_rng(0)
        half = rng.random((12, 12))
        weights = half + half.T
        vector = second_eigenvector(weights)
        degrees = weights.sum(axis=1)
        laplacian = np.diag(degrees) - weights
        value = vector @ laplacian @ vector / (vector @ (degrees * vector))
        residual = laplacian @ vector - value * degrees * vector
        assert np.abs(residual).max() < 1e-12
        all_values = np.sort(np.linalg.eigvals(laplacian / degrees[:, None]).real)
        assert value == pytest.approx(all_values[1], abs=1e-12)

    def test_second_eigenvector__two_blocks(self) -> None:
        # Of blocks of a and b nodes: constant on each, orthogonal to the degrees.
        a, b, eps = 3, 5, 0.01
        weights = np.full((a + b, a + b), eps)
        weights[:a, :a] = weights[a:, a:] = 1
        vector = second_eigenvector(weights)
        degrees = (a * (a + b * eps), b * (b + a * eps))
        ratio = -degrees[0] / degrees[1]
        np.testing.assert_allclose(vector / vector[0], [1] * a + [ratio] * b, atol=1e-9)
