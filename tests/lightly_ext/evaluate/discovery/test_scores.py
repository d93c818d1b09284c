from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import adjusted_rand_score

from lightly_ext.evaluate.discovery.scores import (
    adjusted_rand_index,
    is_found,
    part_boxes,
)
from lightly_ext.evaluate.probing.localization import overlap_counts
from tests.lightly_ext.evaluate.discovery.discovery_loops import (
    box_of,
    rand_index_of_pairs,
)


class TestAdjustedRandIndex:
    @pytest.mark.parametrize("seed", range(6))
    def test_adjusted_rand_index__pairs_and_scikit_learn(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        a, b = rng.integers(4, size=40), rng.integers(1 + seed, size=40)
        b[:20] = np.minimum(a[:20], seed)
        counts, _ = overlap_counts(torch.tensor(a), torch.tensor(b), 5)
        found = adjusted_rand_index(counts)
        assert found == pytest.approx(rand_index_of_pairs(a, b), abs=1e-12)
        assert found == pytest.approx(adjusted_rand_score(a, b), abs=1e-12)

    @pytest.mark.parametrize(
        ("counts", "expected"),
        [
            ([[5, 0], [0, 9]], 1.0),  # the same
            ([[7], [0]], 1.0),  # one object in one part
            ([[4], [3]], 0.0),  # one object in two parts
            ([[4, 3]], 0.0),  # two objects in one part
            ([[1, 0], [0, 1]], 1.0),  # no part with two px
            # 4 pairs together of 28, 12 in each partition.
            ([[2, 2], [2, 2]], (4 - 144 / 28) / (12 - 144 / 28)),
        ],
    )
    def test_adjusted_rand_index__closed_forms(
        self, counts: list[list[int]], expected: float
    ) -> None:
        found = adjusted_rand_index(torch.tensor(counts))
        assert found == pytest.approx(expected, abs=1e-12)

    def test_adjusted_rand_index__more_px_than_pairs_in_int64(self) -> None:
        counts = torch.tensor([[2**33, 0], [0, 2**33]])
        assert adjusted_rand_index(counts) == 1.0


class TestIsFound:
    def test_is_found__by_half(self) -> None:
        boxes = torch.tensor([[0.0, 0, 2, 2], [5, 5, 6, 6]])
        assert is_found(boxes, torch.tensor([[0.0, 0, 4, 2]])) == 1.0  # exactly half
        assert is_found(boxes, torch.tensor([[0.0, 0, 4.1, 2]])) == 0.0
        assert is_found(boxes, torch.tensor([[9.0, 9, 10, 10], [5, 5, 6, 6]])) == 1.0


class TestPartBoxes:
    def test_part_boxes__around_all_px(self) -> None:
        generator = torch.Generator().manual_seed(0)
        parts = torch.randint(30, (6, 9), generator=generator)
        parts[parts == 3] = 4
        found = part_boxes(parts, 20)
        assert found.dtype == torch.float64
        for part in range(20):
            mask = parts.numpy() == part
            expected = box_of(mask) if mask.any() else (0, 0, 0, 0)
            assert found[part].tolist() == list(expected)
        assert found[3].tolist() == [0, 0, 0, 0]
