from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from lightly_ext.metrics import Voters, knn_accuracy


def numbers(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class TestKnnAccuracy:
    @pytest.mark.parametrize("at_once", [1, 60 * 7, 2**26])
    def test_knn_accuracy__against_brute_force(
        self, at_once: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("lightly_ext.metrics.knn.NUMBERS_AT_ONCE", at_once)
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

    @pytest.mark.parametrize(("num_neighbours", "temperature"), [(20, 0.07), (5, 0.5)])
    def test_knn_accuracy__against_scikit_learn(
        self, num_neighbours: int, temperature: float
    ) -> None:
        train, test = numbers(300, 8, seed=0), numbers(200, 8, seed=1)
        # Classes that features tell apart, but not well.
        label_of = numbers(8, 5, seed=2)
        train_labels = (train @ label_of + numbers(300, 5, seed=3)).argmax(dim=1)
        test_labels = (test @ label_of + numbers(200, 5, seed=4)).argmax(dim=1)
        classifier = KNeighborsClassifier(
            num_neighbours,
            metric="cosine",
            weights=lambda distance: np.exp((1 - distance) / temperature),
        )
        classifier.fit(train.double().numpy(), train_labels.numpy())
        expected = classifier.score(test.double().numpy(), test_labels.numpy())
        accuracy = knn_accuracy(
            train, train_labels, test, test_labels, num_neighbours, temperature
        )
        assert 0.3 < expected < 0.9
        assert accuracy == pytest.approx(expected)

    def test_knn_accuracy__any_precision_of_the_features(self) -> None:
        train, test = numbers(300, 8, seed=0).half(), numbers(200, 8, seed=1).half()
        labels = torch.arange(300) % 7
        wide = knn_accuracy(train.float(), labels, test.float(), labels[:200])
        with torch.autocast("cpu", torch.bfloat16):
            assert knn_accuracy(train, labels, test, labels[:200]) == wide

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    def test_voters__cuda_as_cpu(self) -> None:
        train, test = numbers(300, 8, seed=0), numbers(200, 8, seed=1)
        labels = torch.arange(300) % 7
        expected = knn_accuracy(train, labels, test, labels[:200])
        voters = Voters(train.cuda(), labels.cuda(), 20, 0.07)
        with torch.autocast("cuda", torch.float16):
            correct = (voters.classes(test).cpu() == labels[:200]).sum()
        assert int(correct) / 200 == expected

    def test_rows_at_once__votes_of_many_classes_fit(self) -> None:
        voters = Voters(torch.eye(8), 100_000 * torch.arange(8), 8, 0.07)
        assert voters.rows_at_once == 2**26 // 700_001

    @pytest.mark.parametrize("num_neighbours", [1, 4, 5, 9, 21])
    def test_knn_accuracy__ties(self, num_neighbours: int) -> None:
        """Copies of 3 vectors in 4 classes; products in float32 would tell them apart.

        Neighbours and classes are chosen one by one.
        """
        vectors, queries = numbers(3, 48, seed=0), numbers(40, 48, seed=1)
        copies = [i % 3 for i in range(21)]
        labels = [(i * i) % 4 for i in range(21)]
        found = []
        for query in queries:
            cosines = torch.cosine_similarity(query.double(), vectors.double())
            order = sorted(range(21), key=lambda i: (-cosines[copies[i]].item(), i))
            votes = [0.0] * 4
            for i in order[:num_neighbours]:
                votes[labels[i]] += float((cosines[copies[i]] / 0.07).exp())
            equal = [c for c in range(4) if votes[c] > max(votes) * (1 - 1e-9)]
            found.append(min(equal))
        for part in (queries, queries[:1]):
            of_part = torch.tensor(found[: len(part)])
            accuracy = knn_accuracy(
                vectors[copies], torch.tensor(labels), part, of_part, num_neighbours
            )
            assert accuracy == 1.0

    def test_knn_accuracy__many_votes_at_a_low_temperature(self) -> None:
        # exp(1 / 0.005) is beyond float32.
        train, labels = torch.eye(3).repeat(50, 1), torch.arange(150) % 3
        assert knn_accuracy(train, labels, train, labels, 150, 0.005) == 1.0

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

    @pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
    def test_knn_accuracy__temperature(self, temperature: float) -> None:
        features, labels = torch.eye(5), torch.arange(5)
        with pytest.raises(ValueError, match="temperature must be positive"):
            knn_accuracy(features, labels, features, labels, 3, temperature)
