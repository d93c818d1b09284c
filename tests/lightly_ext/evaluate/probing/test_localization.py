from __future__ import annotations

import itertools

import pytest
import torch

from lightly_ext.evaluate.probing.localization import (
    best_overlap,
    best_parts_iou,
    one_to_one_overlap,
    overlap_counts,
    overlap_ious,
    parts_iou,
    uniform_parts,
)


class TestOverlapCounts:
    def test_overlap_counts__against_a_loop(self) -> None:
        generator = torch.Generator().manual_seed(0)
        parts = torch.randint(5, (20, 30), generator=generator)
        labels = torch.tensor([3, 7, 200])[
            torch.randint(3, (20, 30), generator=generator)
        ]
        counts, values = overlap_counts(parts, labels, 6)
        assert values.tolist() == [3, 7, 200]
        for part, label in itertools.product(range(6), range(3)):
            both = (parts == part) & (labels == values[label])
            assert counts[part, label] == both.sum()

    def test_overlap_counts__no_px(self) -> None:
        nothing = torch.zeros(0, dtype=torch.int64)
        counts, values = overlap_counts(nothing, nothing, 4)
        assert counts.shape == (4, 0) and values.numel() == 0


class TestOverlapIoUs:
    def test_overlap_ious__closed_form(self) -> None:
        counts = torch.tensor([[2, 1], [0, 3], [0, 0]])
        expected = [[2 / 3, 1 / 6], [0, 3 / 4], [0, 0]]
        torch.testing.assert_close(
            overlap_ious(counts), torch.tensor(expected, dtype=torch.float64)
        )


class TestOneToOneOverlap:
    @pytest.mark.parametrize("shape", [(4, 4), (5, 3), (2, 5)])
    def test_one_to_one_overlap__against_all_assignments(
        self, shape: tuple[int, int]
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        ious = torch.rand(shape, generator=generator, dtype=torch.float64)
        wide = ious if shape[0] <= shape[1] else ious.mT
        rows = range(wide.shape[0])
        best = max(
            float(wide[list(rows), list(columns)].sum())
            for columns in itertools.permutations(range(wide.shape[1]), len(rows))
        )
        assert one_to_one_overlap(ious) == pytest.approx(best / shape[1], rel=1e-12)
        expected = ious.max(dim=0).values.mean()
        assert best_overlap(ious) == pytest.approx(float(expected), rel=1e-12)


class TestBestPartsIoU:
    @pytest.mark.parametrize("seed", range(20))
    def test_best_parts_iou__against_all_subsets(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        hits, misses = torch.randint(9, (2, 6), generator=generator)
        subsets = itertools.product([False, True], repeat=6)
        best = max(parts_iou(hits, misses, torch.tensor(s)) for s in subsets)
        assert best_parts_iou(hits, misses) == pytest.approx(best, rel=1e-12)


def test_parts_iou__closed_form() -> None:
    hits, misses = torch.tensor([2, 1, 1]), torch.tensor([1, 2, 1])
    assert parts_iou(hits, misses, torch.tensor([True, False, True])) == 3 / 6
    nothing = torch.zeros(3, dtype=torch.int64)
    assert parts_iou(nothing, misses, nothing.bool()) == 0.0


class TestUniformParts:
    @pytest.mark.parametrize(
        ("num_parts", "grid"),
        [(16, (4, 4)), (24, (4, 6)), (8, (2, 4)), (7, (1, 7)), (1, (1, 1))],
    )
    def test_uniform_parts__rectangles(
        self, num_parts: int, grid: tuple[int, int]
    ) -> None:
        rows, columns = grid
        parts = uniform_parts(num_parts, (8 * rows, 5 * columns))
        numbers = torch.arange(num_parts).view(grid)
        expected = numbers.repeat_interleave(8, 0).repeat_interleave(5, 1)
        assert torch.equal(parts, expected)

    def test_uniform_parts__sizes_differ_by_one_px(self) -> None:
        areas = torch.bincount(uniform_parts(24, (14, 15)).flatten())
        assert len(areas) == 24
        assert set(areas.tolist()) == {3 * 2, 3 * 3, 4 * 2, 4 * 3}
