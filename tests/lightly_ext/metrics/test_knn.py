from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightly_ext.metrics import Voters, knn_accuracy
from lightly_ext.metrics.knn import rounding


def numbers(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class TestKnnAccuracy:
    @pytest.mark.parametrize("at_once", [1, 20 * 39 * 8 * 7, 2**29])
    def test_knn_accuracy__against_brute_force(
        self, at_once: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("lightly_ext.metrics.knn.BYTES_AT_ONCE", at_once)
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
        assert voters.rows_at_once == 2**29 // (12 * 700_001)

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


def brute_force(
    train: torch.Tensor, labels: torch.Tensor, queries: torch.Tensor, num: int
) -> torch.Tensor:
    """Classes by all products in float64, compared in float32, the first of equals."""
    unit, asked = (torch.nn.functional.normalize(x.double()) for x in (train, queries))
    similarities = (asked @ unit.T).float()
    order = similarities.argsort(dim=1, descending=True, stable=True)[:, :num]
    weights = (similarities.gather(1, order).double() / 0.07 - 1 / 0.07).exp()
    votes = weights.new_zeros(len(queries), int(labels.max()) + 1)
    return votes.scatter_add(1, labels[order], weights).float().argmax(dim=1)


def hard(kind: str) -> torch.Tensor:
    """Training features whose order float32 does not tell."""
    features = numbers(600, 24, seed=0)
    if kind == "copies":
        return features[torch.arange(600) % 9]
    if kind == "all alike":
        return features[:1].repeat(600, 1)
    if kind == "almost alike":
        return features[:1] + 1e-6 * features
    if kind == "a zero":
        return features * (torch.arange(600) % 7 > 0)[:, None]
    return features + {"random": 0.0, "one direction": 100.0}[kind]


class TestVoters:
    @pytest.mark.parametrize("spare", [0, 3, 32])
    @pytest.mark.parametrize(
        "kind",
        ["random", "one direction", "copies", "all alike", "almost alike", "a zero"],
    )
    def test_classes__as_by_brute_force_in_float64(
        self, kind: str, spare: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("lightly_ext.metrics.knn.SPARE", spare)
        train, labels = hard(kind), (7 * torch.arange(600)) % 11
        queries = torch.cat([numbers(50, 24, seed=1), train[:50], -train[:3]])
        for num in (1, 20):
            found = Voters(train, labels, num, 0.07).classes(queries)
            expected = brute_force(train, labels, queries, num)
            assert found.tolist() == expected.tolist()

    def test_classes__few_queries_need_all_products(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        train, queries = numbers(3000, 64, seed=0), numbers(200, 64, seed=1)
        labels, asked = torch.arange(3000) % 7, []
        among_all = Voters._among_all
        monkeypatch.setattr(
            Voters,
            "_among_all",
            lambda s, q: (asked.append(len(q)), among_all(s, q))[1],
        )
        Voters(train, labels, 20, 0.07).classes(queries)
        assert asked == []
        # 60 copies of a sample: who has it among 20 neighbours cannot tell them apart.
        train[1000:1060] = train[0]
        queries[:3] = train[0] + 0.1 * queries[:3]
        cosines = torch.cosine_similarity(queries[:, None], train[None], dim=2)
        best = cosines.sort(dim=1, descending=True).values
        expected = int((best[:, 19] - best[:, 51] < 1e-5).sum())
        Voters(train, labels, 20, 0.07).classes(queries)
        assert asked == [expected]
        assert 3 <= expected < 20

    def test_classes__whatever_precision_the_process_allows(self) -> None:
        train, queries = hard("one direction"), numbers(200, 24, seed=1)
        labels = torch.arange(600) % 11
        torch.set_float32_matmul_precision("medium")
        try:
            found = Voters(train, labels, 5, 0.07).classes(queries)
            assert torch.get_float32_matmul_precision() == "medium"
        finally:
            torch.set_float32_matmul_precision("highest")
        assert found.tolist() == brute_force(train, labels, queries, 5).tolist()

    @pytest.mark.parametrize("dim", [1, 24, 768])
    def test_rounding__bounds_what_float32_does(self, dim: int) -> None:
        a, b = (
            torch.nn.functional.normalize(numbers(500, dim, seed=seed).double().abs())
            for seed in (0, 1)
        )
        error = ((a.float() @ b.float().T).double() - a @ b.T).abs().max().item()
        assert error <= rounding(dim)
        # One after the other they reach farther, as the bound allows.
        terms = np.full(dim, (2 / 3) / dim, dtype=np.float32)
        one_by_one = float(np.add.accumulate(terms)[-1])
        error = abs(one_by_one - float(terms.astype(np.float64).sum()))
        assert error <= rounding(dim)
        assert dim < 768 or error > rounding(12)

    @pytest.mark.parametrize("kind", ["random", "all alike"])
    def test_memory__is_bounded(
        self, kind: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Beside both tensors of the bank; as large for any number of queries."""
        monkeypatch.setattr("lightly_ext.metrics.knn.BYTES_AT_ONCE", 2**20)
        train, labels = hard(kind).repeat(30, 1), torch.arange(18_000) % 11
        train += 0.01 * numbers(18_000, 24, seed=1) * (kind == "random")
        with PeakBytes() as making:
            voters = Voters(train, labels, 20, 0.07)
        assert train.nbytes <= making.peak < train.nbytes + 2**20
        assert voters.rows_at_once == 14
        queries = train[: 4 * voters.rows_at_once]
        with PeakBytes() as voting:
            for block in queries.split(voters.rows_at_once):
                voters.classes(block)
        assert 2**19 < voting.peak < 2**21


class PeakBytes(TorchDispatchMode):
    """Most bytes that new tensors held at once."""

    def __enter__(self) -> PeakBytes:
        self.held: dict[int, int] = {}
        self.peak = 0
        super().__enter__()
        return self

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        before = {
            id(x.untyped_storage())
            for x in tree_leaves((args, kwargs))
            if isinstance(x, torch.Tensor)
        }
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if id(storage) not in self.held and id(storage) not in before:
                    self.held[id(storage)] = storage.nbytes()
                    weakref.finalize(storage, self.held.pop, id(storage))
        self.peak = max(self.peak, sum(self.held.values()))
        return result
