from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from lightly_ext.demo.boards import make_board_sets
from lightly_ext.demo.export import export_image_folders
from lightly_ext.evaluate.classification.knn import Voters, knn_accuracy, run_knn
from lightly_ext.evaluate.cli import main
from lightly_ext.evaluate.result import Result
from lightly_ext.evaluate.session import Session
from tests.lightly_ext.evaluate.small import run_options, write_classes, write_model


def numbers(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def session_for(tmp_path: Path, model: str, **options: object) -> Session:
    values = {"output": str(tmp_path / "out"), "accelerator": "cpu", "num_workers": 0}
    values |= {"batch_size": 8, "resize": 32, "crop": 32, **options}
    return Session(model, **values)  # type: ignore[arg-type]


class TestKnnAccuracy:
    @pytest.mark.parametrize("at_once", [1, 60 * 7, 2**26])
    def test_knn_accuracy__against_brute_force(
        self, at_once: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(
            "lightly_ext.evaluate.classification.knn.NUMBERS_AT_ONCE", at_once
        )
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

    def test_knn_accuracy__computed_in_float32(self) -> None:
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
            blocks = voters.blocks(test, labels[:200])
            correct = sum(int(voters.num_correct(*block)) for block in blocks)
        assert correct / 200 == pytest.approx(expected, abs=0.011)

    def test_blocks__many_classes_need_no_memory(self) -> None:
        # One block of all queries would have 40 GB of votes.
        voters = Voters(torch.eye(1000), torch.arange(1000), 1000, 0.07)
        queries, labels = numbers(10_000, 8, seed=0), torch.arange(10_000)
        blocks = voters.blocks(queries, labels)
        assert max(len(rows) for rows, _ in blocks) * 1000 * 1000 <= 2**26
        assert torch.cat([rows for rows, _ in blocks]).equal(queries)
        assert torch.cat([numbers for _, numbers in blocks]).equal(labels)

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

    @pytest.mark.parametrize("temperature", [0.0, -1.0, 0.01, float("nan")])
    def test_knn_accuracy__temperature_of_float32(self, temperature: float) -> None:
        features, labels = torch.eye(5), torch.arange(5)
        with pytest.raises(ValueError, match=r"temperature must be at least 0\.0125"):
            knn_accuracy(features, labels, features, labels, 3, temperature)


class TestRunKnn:
    def test_run_knn__stores_what_was_run(self, tmp_path: Path) -> None:
        data = write_classes(tmp_path / "set", num=20)
        (data / "val/cat/0003.png").write_bytes(b"broken")
        session = session_for(tmp_path, write_model(tmp_path / "model"))
        result = run_knn(session, str(data), neighbours=5)
        assert result.scores == {"accuracy": 1.0, "num_test": 59}
        assert result.provenance["unreadable"] == {"train": 0, "test": 1}
        assert result.provenance["feature"] == "sparse"
        assert result.provenance["num_train"] == 60
        card = result.protocol
        assert (card["neighbours"], card["temperature"]) == (5, 0.07)
        assert (card["features"], card["data"]) == ("auto", "set")
        stored = Result.load(session.folder(result) / "result.json")
        assert stored.scores == result.scores and stored.protocol == card
        other = run_knn(session, str(data), neighbours=6)
        assert session.folder(other) != session.folder(result)

    def test_run_knn__another_model_and_precision(self, tmp_path: Path) -> None:
        data = str(write_classes(tmp_path / "set", num=10))
        options = {"untrained": True, "precision": "bf16-mixed", "limit": 9}
        session = session_for(tmp_path, "timm:test_resnet", **options)
        result = run_knn(session, data, neighbours=3)
        assert result.provenance["feature"] == "cls"
        assert result.protocol["limit"] == 9 and result.scores["num_test"] == 9

    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"neighbours": 7}, "neighbours must be in 1 to 6.*got 7"),
            ({"temperature": 0.0}, "temperature must be at least"),
            ({"features": "tokens"}, "features must be 'auto' or one of"),
        ],
    )
    def test_run_knn__impossible_options(
        self, tmp_path: Path, options: dict[str, object], match: str
    ) -> None:
        data = str(write_classes(tmp_path / "set", num=2))
        session = session_for(tmp_path, write_model(tmp_path / "model"))
        options = {"neighbours": 3, **options}
        with pytest.raises(ValueError, match=match):
            run_knn(session, data, **options)  # type: ignore[arg-type]
        assert not (tmp_path / "out").exists()

    def test_run_knn__features_that_are_not_finite(self, tmp_path: Path) -> None:
        data = str(write_classes(tmp_path / "set", num=2))
        session = session_for(tmp_path, write_model(tmp_path / "model"))
        session.model.std.fill_(float("nan"))
        with pytest.raises(RuntimeError, match="not finite at precision 32-true"):
            run_knn(session, data, neighbours=3)

    def test_run_knn__command_on_digit_boards(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        sets = make_board_sets(0, 1, 1, num_train_single=120, num_test_single=40)
        export_image_folders(sets, tmp_path / "boards")
        options = run_options(tmp_path)
        main(
            [
                *("knn", "--model", write_model(tmp_path / "model"), *options),
                *("--data", str(tmp_path / "boards/single"), "--neighbours", "5"),
            ]
        )
        said = capsys.readouterr().out
        (path,) = (tmp_path / "out").glob("knn-single-*/result.json")
        result = Result.load(path)
        assert result.scores["num_test"] == 40 and 0 <= result.scores["accuracy"] <= 1
        assert "single: 120 training images, 40 test images, 10 classes" in said
        assert "neighbours: 5" in said and "num_test 40" in said

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "launch",
        [
            ["-m", "lightly_ext.cli"],
            [
                *("-m", "torch.distributed.run", "--nproc_per_node", "2"),
                *("--master_port", "29641", "-m", "lightly_ext.cli"),
            ],
        ],
        ids=["own launch", "torchrun"],
    )
    def test_run_knn__two_processes(self, tmp_path: Path, launch: list[str]) -> None:
        sets = make_board_sets(0, 1, 1, num_train_single=160, num_test_single=81)
        export_image_folders(sets, tmp_path / "boards")
        model = write_model(tmp_path / "model")
        common = ["evaluate", "knn", "--model", model, *run_options(tmp_path)]
        common += ["--data", str(tmp_path / "boards/single")]
        main([*common[1:], "--output", str(tmp_path / "1")])
        done = subprocess.run(
            [
                *(sys.executable, *launch, *common),
                *("--output", str(tmp_path / "2"), "--devices", "2"),
            ],
            capture_output=True,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        assert done.stdout.count("Stored in ") == 1
        one, two = (
            json.loads(next(tmp_path.glob(f"{n}/knn-*/result.json")).read_text())
            for n in (1, 2)
        )
        assert one["scores"] == two["scores"] and one["protocol"] == two["protocol"]
        assert two["provenance"]["device"].startswith("2 x CPU")
