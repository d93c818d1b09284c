from __future__ import annotations

from itertools import permutations

import pytest
import torch
from torch import Tensor

from lightly_ext.evaluate.dense.matching import (
    NO_CLASS,
    many_to_one,
    match_scores,
    one_class_scores,
    one_to_one,
    uniform_scores,
)


def _counts(clusters: int, classes: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(100, (clusters, classes), generator=generator)


class TestOneToOne:
    @pytest.mark.parametrize("size", range(1, 7))
    def test_one_to_one__best_of_all_permutations(self, size: int) -> None:
        counts = _counts(size, size, seed=size)
        best = max(
            sum(int(counts[i, j]) for i, j in enumerate(order))
            for order in permutations(range(size))
        )
        found = one_to_one(counts)
        assert found.sort().values.tolist() == list(range(size))
        assert int(counts[range(size), found].sum()) == best

    def test_one_to_one__more_clusters_than_classes(self) -> None:
        counts = _counts(6, 3, seed=0)
        best = max(
            sum(int(counts[i, j]) for j, i in enumerate(chosen))
            for chosen in permutations(range(6), 3)
        )
        found = one_to_one(counts)
        matched = found != NO_CLASS
        assert found[matched].sort().values.tolist() == [0, 1, 2]
        assert int(counts[matched, found[matched]].sum()) == best


class TestManyToOne:
    def test_many_to_one__most_px(self) -> None:
        counts = torch.tensor([[3, 1], [2, 5], [9, 0], [0, 0]])
        assert many_to_one(counts).tolist() == [0, 1, 0, NO_CLASS]


class TestMatchScores:
    def test_match_scores__loops_over_px(self) -> None:
        generator = torch.Generator().manual_seed(0)
        clusters = torch.randint(5, (2000,), generator=generator)
        labels = torch.randint(4, (2000,), generator=generator)
        classes = torch.tensor([2, NO_CLASS, 0, 0, 1])
        counts = torch.zeros(5, 4, dtype=torch.int64)
        hits, unions = [0] * 4, [0] * 4
        for cluster, label in zip(clusters.tolist(), labels.tolist(), strict=True):
            counts[cluster, label] += 1
            guess = int(classes[cluster])
            hits[label] += guess == label
            for c in {guess, label} - {NO_CLASS}:
                unions[c] += 1
        scores = match_scores(counts, classes)
        ious = [h / u for h, u in zip(hits, unions, strict=True)]
        assert scores.ious.tolist() == pytest.approx(ious)
        assert scores.miou == pytest.approx(sum(ious) / 4)
        assert scores.accuracy == pytest.approx(sum(hits) / 2000)

    def test_match_scores__class_without_px(self) -> None:
        counts = torch.tensor([[6, 2, 0], [0, 2, 0], [0, 0, 0]])
        scores = match_scores(counts, torch.tensor([0, 1, 2]))
        assert scores.ious.tolist()[:2] == [6 / 8, 2 / 4]
        assert scores.ious[2].isnan()
        assert scores.miou == (6 / 8 + 2 / 4) / 2

    def test_match_scores__order_of_clusters_means_nothing(self) -> None:
        counts = _counts(5, 5, seed=7)
        scores, turned = (
            match_scores(c, one_to_one(c)) for c in (counts, counts[[3, 0, 4, 1, 2]])
        )
        assert scores.ious.equal(turned.ious)


class TestGuesses:
    LABELS = torch.tensor([500, 300, 200])

    def test_one_class_scores(self) -> None:
        scores = one_class_scores(self.LABELS)
        assert (scores.miou, scores.accuracy) == (pytest.approx(0.5 / 3), 0.5)

    @pytest.mark.parametrize("num_clusters", [3, 5])
    def test_uniform_scores__as_drawn(self, num_clusters: int) -> None:
        labels = torch.arange(3).repeat_interleave(1000 * self.LABELS)
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randint(num_clusters, labels.shape, generator=generator)
        counts = torch.zeros(num_clusters, 3, dtype=torch.int64)
        counts.index_put_((drawn, labels), torch.tensor(1), accumulate=True)
        found = match_scores(counts, one_to_one(counts))
        expected = uniform_scores(self.LABELS, num_clusters)
        assert found.accuracy == pytest.approx(expected.accuracy, rel=0.02)
        assert found.miou == pytest.approx(expected.miou, rel=0.02)
        assert found.ious.tolist() == pytest.approx(expected.ious.tolist(), rel=0.02)
