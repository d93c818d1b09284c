from __future__ import annotations

import pytest
import torch

from lightly_ext.evaluate.knn import knn_accuracy


class TestKnnAccuracy:
    @pytest.mark.parametrize("at_once", [1, 60 * 7, 2**26])
    def test_knn_accuracy__against_brute_force(
        self, at_once: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("lightly_ext.evaluate.knn.NUMBERS_AT_ONCE", at_once)
        generator = torch.Generator().manual_seed(0)
        train = torch.randn(60, 8, generator=generator)
        test = torch.randn(40, 8, generator=generator)
        train_labels = torch.randint(4, (60,), generator=generator)
        test_labels = torch.randint(4, (40,), generator=generator)
        hits = 0
        for feature, label in zip(test, test_labels, strict=True):
            cosine = torch.cosine_similarity(feature[None], train)
            votes = torch.zeros(4)
            for i in cosine.argsort(descending=True)[:7]:
                votes[train_labels[i]] += (cosine[i] / 0.1).exp()
            hits += int(votes.argmax() == label)
        accuracy = knn_accuracy(train, train_labels, test, test_labels, 7, 0.1)
        assert accuracy == pytest.approx(hits / 40)

    def test_knn_accuracy__own_neighbour(self) -> None:
        features = torch.randn(30, 16, generator=torch.Generator().manual_seed(0))
        labels = torch.arange(30)
        assert knn_accuracy(features, labels, 5 * features, labels) == 1.0

    def test_knn_accuracy__near_votes_win(self) -> None:
        # Two far neighbours of class 1 against a near one of class 0.
        train = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
        labels = torch.tensor([0, 1, 1])
        test = torch.tensor([[1.0, 0.2]])
        assert knn_accuracy(train, labels, test, torch.tensor([0]), 3) == 1.0

    def test_knn_accuracy__too_few_samples(self) -> None:
        features, labels = torch.eye(5), torch.arange(5)
        with pytest.raises(ValueError, match=r"must be in 1 to 5.*got 20"):
            knn_accuracy(features, labels, features, labels)
