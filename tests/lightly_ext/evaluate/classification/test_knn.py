from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightly_ext.data import read_image
from lightly_ext.demo.boards import make_board_sets
from lightly_ext.demo.export import export_image_folders
from lightly_ext.evaluate import fingerprints
from lightly_ext.evaluate.classification.knn import run_knn
from lightly_ext.evaluate.cli import main
from lightly_ext.evaluate.datasets import find_classification_set
from lightly_ext.evaluate.features import POOLED
from lightly_ext.evaluate.frozen_model import FrozenModel
from lightly_ext.evaluate.images import ImageFiles, centre_crop
from lightly_ext.evaluate.result import Result
from lightly_ext.metrics import knn_accuracy
from stellar_plugin.checkpoints import read_checkpoint, untrained_encoder
from stellar_plugin.protocols import KNN
from tests.lightly_ext.evaluate.small import (
    SIZES,
    Given,
    make_given,
    run_options,
    write_classes,
    write_model,
)


def _given(tmp_path: Path, model: str, **options: Any) -> Given:
    return make_given(tmp_path, model, **SIZES, **options)


class TestRunKnn:
    def test_run_knn__stores_what_was_run(self, tmp_path: Path) -> None:
        data = write_classes(tmp_path / "set", num=20)
        (data / "val/cat/0003.png").write_bytes(b"broken")
        given = _given(tmp_path, write_model(tmp_path / "model"))
        result = run_knn(*given, str(data), neighbours=5)
        assert result.scores == {"accuracy": 1.0, "num_test": 59}
        assert result.provenance["unreadable"] == {"train": 0, "test": 1}
        assert result.provenance["feature"] == "sparse"
        assert result.provenance["num_train"] == 60
        card = result.protocol
        assert (card["neighbours"], card["temperature"]) == (5, 0.07)
        assert (card["features"], card["data"]) == ("auto", "set")
        stored = Result.load(given.results.folder(result) / "result.json")
        assert stored.scores == result.scores and stored.protocol == card
        other = run_knn(*given, str(data), neighbours=6)
        assert given.results.folder(other) != given.results.folder(result)

    def test_run_knn__chance_and_the_untrained_architecture(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        data = write_classes(tmp_path / "set", num=6)
        for i in range(3):  # training images are cats most often, test images never
            shutil.copyfile(
                data / f"train/eel/000{i}.png", data / f"train/cat/a{i}.png"
            )
        for path in (data / "val/cat").iterdir():
            shutil.copyfile(data / "train/dog" / path.name, path)
        source = write_model(tmp_path / "model")
        given = _given(tmp_path, source, controls=None)
        result = run_knn(*given, str(data), neighbours=3)
        # Weights of the seed, built by hand.
        torch.manual_seed(0)
        by_hand = untrained_encoder(read_checkpoint(source))
        crop = centre_crop(KNN.replace(**SIZES), "bicubic")
        found = find_classification_set(str(data))

        def features(files: ImageFiles) -> Tensor:
            images = [read_image(files.root / name) for name in files.names]
            model = FrozenModel(by_hand, given.model.origin)
            return model.pooled(torch.stack([crop(i) for i in images]), "sparse")

        expected = knn_accuracy(
            features(found.train),
            found.train.label_tensor,
            features(found.test),
            found.test.label_tensor,
            num_neighbours=3,
        )
        stored = Result.load(given.results.folder(result) / "result.json")
        assert stored.untrained["accuracy"] == pytest.approx(float(expected))
        assert stored.chance == {"accuracy": 6 / 18}
        said = capsys.readouterr().out
        levels = f"(chance 0.333333, untrained {stored.untrained['accuracy']:.6g})"
        assert f"accuracy {stored.scores['accuracy']:.6g} {levels}" in said
        # A result of its own, in the place that --untrained has; it is found again.
        alone = _given(tmp_path, source, untrained=True)
        untrained = run_knn(*alone, str(data), neighbours=3)
        paths = set((tmp_path / "out").glob("knn-*"))
        assert paths == {given.results.folder(result), alone.results.folder(untrained)}
        assert untrained.scores == stored.untrained
        run_knn(*given, str(data), neighbours=3)
        assert "The same architecture, untrained" not in capsys.readouterr().out

    def test_run_knn__looks_at_every_file_once(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        data = write_classes(tmp_path / "set", num=4)
        looked: list[str] = []
        look = fingerprints._look

        def counted(files: ImageFiles, *arguments: Any) -> Any:
            looked.append(files.names[arguments[-1]])
            return look(files, *arguments)

        monkeypatch.setattr(fingerprints, "_look", counted)
        given = _given(tmp_path, write_model(tmp_path / "model"))
        for run in (1, 2):
            run_knn(*given, str(data), neighbours=3)
            found = find_classification_set(str(data))
            names = [*found.train.names, *found.test.names]
            assert sorted(looked) == sorted(run * names)

    def test_run_knn__a_place_for_each_measurement(self, tmp_path: Path) -> None:
        model = write_model(tmp_path / "model")
        sets = [write_classes(tmp_path / part / "flowers", num=4) for part in "abc"]
        shutil.copyfile(sets[2] / "val/cat/0000.png", sets[2] / "val/eel/0000.png")
        given = _given(tmp_path, model)
        half = _given(tmp_path, model, precision="bf16-mixed")
        places = [
            g.results.folder(run_knn(*g, str(data), neighbours=2))
            for g, data in [(given, sets[0]), (half, sets[0]), (given, sets[2])]
        ]
        stored = {path.parent for path in (tmp_path / "out").glob("knn-*/result.json")}
        assert len(stored) == 3 and set(places) == stored
        # Equal images elsewhere are the same.
        moved = run_knn(*given, str(sets[1]), neighbours=2)
        assert given.results.folder(moved) == places[0]
        scores = [Result.load(p / "result.json").scores["accuracy"] for p in places]
        assert scores == [1.0, 1.0, 11 / 12]

    def test_run_knn__images_and_labels_that_changed(self, tmp_path: Path) -> None:
        data = write_classes(tmp_path / "set", num=10)
        given = _given(tmp_path, write_model(tmp_path / "model"))

        def accuracy_and_reused() -> tuple[float, int]:
            result = run_knn(*given, str(data), neighbours=3)
            return result.scores["accuracy"], result.provenance["num_reused"]

        assert accuracy_and_reused() == (1.0, 0)
        # Cats are dogs now: other images under the same names, of equal sizes.
        for path in sorted((data / "val/cat").iterdir()):
            path.write_bytes((data / "val/dog" / path.name).read_bytes())
        assert accuracy_and_reused() == (pytest.approx(2 / 3), 60)
        (data / "train/eel").rename(data / "eel")
        (data / "train/dog").rename(data / "train/eel")
        (data / "eel").rename(data / "train/dog")
        assert accuracy_and_reused() == (0.0, 60)

    def test_run_knn__another_model_and_precision(self, tmp_path: Path) -> None:
        data = str(write_classes(tmp_path / "set", num=10))
        options = {"untrained": True, "precision": "bf16-mixed", "limit": 9}
        given = _given(tmp_path, "timm:test_resnet", **options)
        result = run_knn(*given, data, neighbours=3)
        assert result.provenance["feature"] == "cls"
        assert result.protocol["limit"] == 9 and result.scores["num_test"] == 9

    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"neighbours": 7}, "neighbours must be in 1 to 6.*got 7"),
            ({"temperature": 0.0}, "temperature must be positive"),
            ({"features": "tokens"}, "features must be 'auto' or one of"),
        ],
    )
    def test_run_knn__impossible_options(
        self, tmp_path: Path, options: dict[str, object], match: str
    ) -> None:
        data = str(write_classes(tmp_path / "set", num=2))
        given = _given(tmp_path, write_model(tmp_path / "model"))
        options = {"neighbours": 3, **options}
        with pytest.raises(ValueError, match=match):
            run_knn(*given, data, **options)  # type: ignore[arg-type]
        assert not (tmp_path / "out").exists()

    @pytest.mark.slow
    def test_run_knn__command_on_digit_boards(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        sets = make_board_sets(0, 1, 1, num_train_single=120, num_test_single=40)
        export_image_folders(sets, tmp_path / "boards")
        model, data = write_model(tmp_path / "model"), str(tmp_path / "boards/single")
        options = ["--data", data, "--neighbours", "5", *run_options(tmp_path)]
        main(["knn", "--model", model, *options])
        said = capsys.readouterr().out
        (path,) = (tmp_path / "out").glob("knn-single-*/result.json")
        result = Result.load(path)
        assert result.scores["num_test"] == 40
        given, found = _given(tmp_path, model), find_classification_set(data)
        pooled = [
            (given.cache.pooled(p, KNN.replace(**SIZES), "sparse").rows(POOLED))
            for p in (found.train, found.test)
        ]
        train, test = (p.label_tensor for p in (found.train, found.test))
        expected = knn_accuracy(pooled[0], train, pooled[1], test, 5)
        assert result.scores["accuracy"] == pytest.approx(expected)
        assert "single: 120 training images, 40 test images, 10 classes" in said
        assert "neighbours: 5" in said and "num_test 40" in said

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "launch",
        [
            ["-m", "stellar_cli"],
            [
                *("-m", "torch.distributed.run", "--standalone"),
                *("--nproc_per_node", "2", "-m", "stellar_cli"),
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
