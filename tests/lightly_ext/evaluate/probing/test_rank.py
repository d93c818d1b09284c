from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lightly_ext.evaluate.classification.split import Split
from lightly_ext.evaluate.cli import main
from lightly_ext.evaluate.datasets import (
    ClassificationSet,
    find_classification_set,
    find_images,
)
from lightly_ext.evaluate.devices import Devices
from lightly_ext.evaluate.frozen_model import FrozenModel
from lightly_ext.evaluate.images import ImageFiles
from lightly_ext.evaluate.probing import rank
from lightly_ext.evaluate.probing.rank import models_by_rank, run_rank, stored_result
from lightly_ext.evaluate.reconstruction import reconstruction
from lightly_ext.evaluate.reconstruction.autoencoder import own_latent
from lightly_ext.evaluate.result import Result
from lightly_ext.evaluate.results import Results, evaluation
from stellar_plugin.protocols import LINEAR, RECONSTRUCTION, Protocol
from tests.lightly_ext.evaluate.reconstruction.metric_weights import tiny_networks
from tests.lightly_ext.evaluate.small import (
    SIZES,
    Given,
    make_given,
    run_options,
    write_classes,
    write_images,
    write_model,
)


def write_models(folder: Path, *num_tokens: int) -> list[str]:
    return [write_model(folder / f"r{r}", num_queries=r) for r in num_tokens]


def _given(tmp_path: Path, model: str, **options: Any) -> Given:
    return make_given(tmp_path, model, **SIZES, **options)


class Fakes:
    """Stands for both evaluations: accuracy falls with r, FID too."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[str, str]] = []
        self.target: dict[int, str] = {}
        monkeypatch.setattr(rank, "run_linear", evaluation(self.linear))
        reconstruction = evaluation(self.reconstruction)
        monkeypatch.setattr(rank, "run_reconstruction", reconstruction)
        monkeypatch.setattr(rank, "load_networks", tiny_networks)

    def linear(
        self, model: FrozenModel, devices: Devices, results: Results, data: str
    ) -> Result:
        given = Given(model, devices, results)
        protocol = given.results.protocol(given.model, LINEAR, data=Path(data).name)
        score = 1 - given.model.num_queries / 100
        found = find_classification_set(data).limited(results.limit)
        files = (found.train, found.test)
        return self._stored(given, "linear", protocol, {"accuracy": score}, *files)

    def reconstruction(
        self,
        model: FrozenModel,
        devices: Devices,
        results: Results,
        data: str,
        latent: str | None = None,
        tokenizer: str | None = None,
        inception: str | None = None,
        lpips_net: str | None = None,
        force: bool = False,
    ) -> Result:
        results = results.settled(latent=latent or own_latent(model, True))
        given = Given(model, devices, results)
        r = given.model.num_queries
        protocol = given.results.protocol(
            given.model,
            RECONSTRUCTION,
            data=Path(data).name,
            networks=("tiny",),
            target=self.target.get(r, "pixels"),
        )
        files = find_images(data, limit=results.limit)[1]
        scores = {"fid": 40.0 / r}
        return self._stored(given, "reconstruction", protocol, scores, files)

    def _stored(
        self,
        given: Given,
        task: str,
        protocol: Protocol,
        scores: dict[str, float],
        *files: ImageFiles,
    ) -> Result:
        self.calls.append((task, given.model.origin.name))
        result = given.results.result(
            *(given.model, task, str(protocol.data), protocol, scores),
            {"data": given.results.fingerprint(*files)},
        )
        given.results.save(result)
        return result


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> Fakes:
    return Fakes(monkeypatch)


class TestModelsByRank:
    def test_models_by_rank__ascending(self, tmp_path: Path) -> None:
        first, *others = write_models(tmp_path, 4, 6, 2)
        models = models_by_rank(_given(tmp_path, first).model, others)
        assert [(r, m.origin.name) for r, m in models.items()] == [
            (2, "r2"),
            (4, "r4"),
            (6, "r6"),
        ]

    def test_models_by_rank__the_same_number_twice(self, tmp_path: Path) -> None:
        first = write_model(tmp_path / "a")
        other = write_model(tmp_path / "b")
        with pytest.raises(ValueError, match=r"'.*a' and '.*b' both have 4 tokens"):
            models_by_rank(_given(tmp_path, first).model, [other])

    def test_models_by_rank__no_tokens(self, tmp_path: Path) -> None:
        given = _given(tmp_path, "timm:resnet10t", untrained=True)
        with pytest.raises(ValueError, match=r"resnet10t' \(.*\) has no sparse tokens"):
            models_by_rank(given.model, ["timm:resnet10t"])

    def test_models_by_rank__one_model(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="One model makes no curve"):
            run_rank(*_given(tmp_path, "patches"), "gone", [])


class TestRunRank:
    @pytest.mark.slow
    def test_run_rank__curve_and_figure(self, tmp_path: Path, fakes: Fakes) -> None:
        data = write_classes(tmp_path / "set", num=1)
        first, *others = write_models(tmp_path, 4, 6, 2)
        given = _given(tmp_path, first)
        result = run_rank(*given, str(data), others, force=True)
        assert result.scores == {
            "accuracy": {"2": 0.98, "4": 0.96, "6": 0.94},
            "fid": {"2": 20.0, "4": 10.0, "6": 40.0 / 6},
        }
        assert result.model == "r2, r4, r6"
        assert result.provenance["num_queries"] == [2, 4, 6]
        (path,) = (tmp_path / "out").glob("rank-*/result.json")
        assert json.loads(path.read_text())["scores"] == result.scores
        assert (path.parent / "rank.png").read_bytes()[:4] == b"\x89PNG"
        assert (path.parent / "rank.md").read_text().splitlines()[2:] == [
            "| 2 | r2 | 98.00 | 20.00 |",
            "| 4 | r4 | 96.00 | 10.00 |",
            "| 6 | r6 | 94.00 | 6.67 |",
        ]

    @pytest.mark.slow
    def test_run_rank__repeats_nothing(self, tmp_path: Path, fakes: Fakes) -> None:
        data = str(write_classes(tmp_path / "set", num=1))
        first, other = write_models(tmp_path, 4, 2)
        before = run_rank(*_given(tmp_path, first), data, [other], force=True)
        assert len(fakes.calls) == 4
        again = run_rank(*_given(tmp_path, first), data, [other], force=True)
        assert len(fakes.calls) == 4
        assert again.scores == before.scores
        run_rank(*_given(tmp_path, first, seed=1), data, [other], force=True)
        assert len(fakes.calls) == 8
        run_rank(*_given(tmp_path, first, limit=3), data, [other], force=True)
        assert len(fakes.calls) == 12
        write_images(tmp_path / "set" / "val" / "cat", 1, seed=5)  # replaced images
        run_rank(*_given(tmp_path, first), data, [other], force=True)
        assert len(fakes.calls) == 16

    @pytest.mark.slow
    def test_run_rank__other_weights_are_evaluated(
        self, tmp_path: Path, fakes: Fakes
    ) -> None:
        data = str(write_classes(tmp_path / "set", num=1))
        first, other = write_models(tmp_path, 4, 2)
        run_rank(*_given(tmp_path, first), data, [other], force=True)
        fakes.calls.clear()
        write_model(Path(first), num_queries=4, mlp_ratio=2)
        run_rank(*_given(tmp_path, first), data, [other], force=True)
        assert fakes.calls == [("reconstruction", "r4"), ("linear", "r4")]

    def test_run_rank__cards_differ(self, tmp_path: Path, fakes: Fakes) -> None:
        data = str(write_classes(tmp_path / "set", num=1))
        first, other = write_models(tmp_path, 4, 2)
        fakes.target = {2: "tokens"}
        with pytest.raises(
            ValueError, match="cards of reconstruction differ in target"
        ):
            run_rank(*_given(tmp_path, first), data, [other], force=True)

    def test_run_rank__training_images_are_not_reconstructed(
        self, tmp_path: Path, fakes: Fakes, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        files = ImageFiles(tmp_path, ["a.png"], [0], ["a"])
        found = ClassificationSet("pets", files, files, (0.5, 1.0))
        split = Split(found, torch.tensor([0]), torch.tensor([]))
        monkeypatch.setattr(rank, "check_linear", lambda *_: split)
        first, other = write_models(tmp_path, 4, 2)
        with pytest.raises(ValueError, match=r"share '.*': name the images"):
            run_rank(*_given(tmp_path, first), str(tmp_path), [other])
        assert not fakes.calls

    def test_test_images__of_a_known_set_and_of_a_folder(self, tmp_path: Path) -> None:
        folders = [tmp_path / name for name in ("train", "val")]
        parts = [ImageFiles(folder, ["a.png"], [0], ["a"]) for folder in folders]
        found = ClassificationSet("pets", *parts, (0.5, 1.0))
        assert rank._test_images(f"pets:{tmp_path}", found) == f"pets:{tmp_path}"
        assert rank._test_images(str(tmp_path), found) == str(tmp_path / "val")

    @pytest.mark.slow
    def test_run_rank__command(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(rank, "load_networks", tiny_networks)
        monkeypatch.setattr(reconstruction, "load_networks", tiny_networks)
        data = write_classes(tmp_path / "set", num=24)
        images = write_images(tmp_path / "photos", 12)
        first, other = write_models(tmp_path, 4, 2)
        main(
            [
                *("rank", "--model", first, "--others", other, "--data", str(data)),
                *("--images", str(images), "--force"),
                *run_options(tmp_path),
            ]
        )
        (path,) = (tmp_path / "out").glob("rank-*/result.json")
        scores = json.loads(path.read_text())["scores"]
        assert list(scores["accuracy"]) == ["2", "4"]
        for task in ("linear", "reconstruction"):
            stored = list((tmp_path / "out").glob(f"{task}-*/result.json"))
            values = {
                str(r.provenance["num_queries"]): r.scores
                for r in map(Result.load, stored)
            }
            name = "accuracy" if task == "linear" else "fid"
            assert scores[name] == {k: values[k][name] for k in ("2", "4")}


def test_stored_result__broken_files_are_passed_over(tmp_path: Path) -> None:
    given = _given(tmp_path, write_model(tmp_path / "a"))
    (tmp_path / "out" / "x").mkdir(parents=True)
    (tmp_path / "out" / "x" / "result.json").write_text("{")
    results = given.results.of_run(rank.run_linear, *given, "a set")
    assert stored_result(results, given.model, LINEAR, {}) is None
