from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lightly_ext.evaluate.dense import bank as bank_module
from lightly_ext.evaluate.dense.bank import (
    Bank,
    first_largest,
    patch_counts,
    sample_patches,
)


def _bank(features: Tensor, counts: Tensor) -> Bank:
    px = counts.sum(dim=0)
    return Bank(features.half().numpy(), counts.numpy(), px, 0, 0)


def test_patch_counts__of_cells_that_do_not_divide_the_image() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(-1, 3, (2, 7, 5), generator=generator)
    counts = patch_counts(labels, (3, 2), 3)
    expected = torch.zeros(2, 6, 3, dtype=torch.int64)
    for i, y, x in np.ndindex(2, 7, 5):
        if labels[i, y, x] >= 0:
            expected[i, y * 3 // 7 * 2 + x * 2 // 5, labels[i, y, x]] += 1
    assert counts.tolist() == expected.tolist()
    assert counts.sum() == (labels >= 0).sum()


class TestSamplePatches:
    def test_sample_patches__all_that_have_labels(self) -> None:
        counts = torch.tensor([[4, 0], [0, 0], [1, 3], [0, 4]])
        assert sample_patches(counts, 4, (0, 0)).tolist() == [0, 2, 3]
        assert sample_patches(counts, 9, (0, 0)).tolist() == [0, 2, 3]

    def test_sample_patches__rare_classes_rather(self) -> None:
        """9 patches of a class and 1 of another, whose number counts once, not 9 times.

        It is drawn if its U is less than 9 times each of the 9 others.
        """
        counts = torch.tensor([[4, 0]] * 9 + [[0, 4]])
        drawn = [sample_patches(counts, 1, (0, i)).item() for i in range(2000)]
        u = np.linspace(0, 1, 10001)
        expected = np.trapezoid((1 - u / 9) ** 9, u)
        assert np.mean(np.array(drawn) == 9) == pytest.approx(expected, abs=0.035)
        assert set(drawn) == set(range(10))

    def test_sample_patches__seed_and_number_decide(self) -> None:
        counts = torch.ones(50, 1, dtype=torch.int64)
        drawn = [sample_patches(counts, 5, s) for s in ((0, 0), (0, 0), (0, 1), (1, 0))]
        assert drawn[0].tolist() == drawn[1].tolist() == sorted(drawn[0].tolist())
        assert len({tuple(d.tolist()) for d in drawn}) == 3


def test_first_largest__as_a_stable_sort() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(0, 4, (40, 23), generator=generator).float()
    values[0] = torch.arange(23)
    for num in (1, 5, 23):
        expected = values.argsort(dim=1, descending=True, stable=True)[:, :num]
        found = first_largest(values, num)
        assert found.tolist() == expected.sort(dim=1).values.tolist()


class TestBank:
    @pytest.mark.parametrize("entries_at_once", [1, 3, 7, 1000])
    def test_nearest__in_blocks_as_at_once(
        self, entries_at_once: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(bank_module, "ENTRIES_AT_ONCE", entries_at_once)
        generator = torch.Generator().manual_seed(0)
        # Of few values, so that sums are exact and many are equal.
        keys = torch.randint(-1, 2, (40, 3), generator=generator).float()
        counts = torch.randint(0, 3, (40, 2), generator=generator)
        bank = _bank(keys, counts)
        entries = [i for i in range(40) if counts[i].any()]
        assert bank.entries.tolist() == entries and len(bank) < 40
        patches = torch.eye(3)[None].repeat(2, 1, 1)
        patches[1] = patches[1].flip(0) * 7  # their length does not count
        found = bank.nearest(patches, 6)
        for image, best in zip(patches, found, strict=True):
            for query, cosines, rows in zip(image, *best, strict=True):
                all_cosines = (keys @ F.normalize(query, dim=0)).tolist()
                order = sorted(entries, key=lambda i: (-all_cosines[i], i))[:6]
                assert rows.tolist() == sorted(order)
                assert cosines.tolist() == [all_cosines[i] for i in sorted(order)]

    def test_shares_and_classes(self) -> None:
        bank = _bank(torch.eye(3), torch.tensor([[1, 0, 3], [0, 0, 0], [2, 0, 0]]))
        assert bank.shares(torch.tensor([[0, 2]])).tolist() == [
            [[0.25, 0, 0.75], [1, 0, 0]]
        ]
        assert bank.classes.tolist() == [True, False, True]


def test_known_crop__any_number_of_threads() -> None:
    before, found = torch.get_num_threads(), []
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            found.append(bank_module.known_crop(224))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)
    assert found[0].shape == (1, 3, 224, 224) and found[0].dtype == torch.uint8
    assert len(found[0].unique()) > 100
