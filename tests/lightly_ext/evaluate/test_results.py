from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from lightly_ext.evaluate.devices import Devices
from lightly_ext.evaluate.result import Result
from lightly_ext.evaluate.results import Results
from stellar_plugin.protocols import EFFICIENCY, KNN
from tests.lightly_ext.evaluate.small import Given, make_given, write_model


@pytest.fixture
def model(tmp_path: Path) -> str:
    return write_model(tmp_path / "runs" / "mine" / "model")


@pytest.fixture
def devices() -> Devices:
    return Devices(accelerator="cpu", num_workers=0)


class TestOptions:
    @pytest.mark.parametrize("option", ["resize", "crop", "limit"])
    def test_at_least_one(self, devices: Devices, option: str) -> None:
        with pytest.raises(ValueError, match=f"{option} must be at least 1, got 0"):
            Results(devices, **{option: 0})  # type: ignore[arg-type]

    def test_protocol__as_options_change_it(self, devices: Devices) -> None:
        results = Results(devices, resize=40, crop=32, limit=7)
        changed = results.protocol(KNN, data="b", neighbours=3)
        assert (changed.resize, changed.crop, changed.limit) == (40, 32, 7)
        assert (changed.data, changed.neighbours) == ("b", 3)
        assert Results(devices).protocol(KNN) == KNN
        # A task may decide itself.
        assert results.protocol(KNN, crop=64).crop == 64

    def test_protocol__options_that_it_knows(self, devices: Devices) -> None:
        results = Results(devices, resize=40, crop=32)
        assert results.protocol(KNN) == KNN.replace(resize=40, crop=32)
        assert results.protocol(EFFICIENCY) == EFFICIENCY.replace(crop=32)


class TestResults:
    def result(self, given: Given, **fields: Any) -> Result:
        protocol = given.results.protocol(KNN, data="a set", **fields)
        return given.results.result(
            given.model, "knn", "a set", protocol, {"accuracy": 0.5}, feature="x"
        )

    def test_provenance(self, tmp_path: Path, model: str) -> None:
        result = self.result(make_given(tmp_path, model, seed=3, batch_size=5))
        known = result.provenance
        assert (known["seed"], known["batch_size"], known["feature"]) == (3, 5, "x")
        assert (known["model"], known["method"]) == (model, "STELLAR")
        assert len(known["sha256"]) == 64 and known["precision"] == "32-true"
        assert {"python", "torch", "timm"} <= set(known["versions"])
        assert known["device"].startswith("1 x CPU")
        assert result.protocol == KNN.replace(data="a set").card()

    def test_folder__same_run_same_folder(self, tmp_path: Path, model: str) -> None:
        given = make_given(tmp_path, model)
        folder = given.results.folder(self.result(given))
        again = make_given(tmp_path, model, batch_size=3)
        assert again.results.folder(self.result(again)) == folder
        assert folder.parent == tmp_path / "out"
        assert folder.name.startswith("knn-a_set-mine-")

    def test_folder__another_run_another_folder(
        self, tmp_path: Path, model: str
    ) -> None:
        given = make_given(tmp_path, model)
        seeded = make_given(tmp_path, model, seed=1)
        cropped = make_given(tmp_path, model, crop=16)
        trained_on = make_given(tmp_path, model, untrained=True)
        results = [
            self.result(given),
            self.result(given, neighbours=10),
            self.result(seeded),
            self.result(cropped),
            self.result(trained_on),
            dataclasses.replace(self.result(given), data="another set"),
        ]
        assert len({given.results.folder(result) for result in results}) == len(results)

    def test_save__prints_and_stores(
        self, tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        given = make_given(tmp_path, model)
        result = self.result(given)
        folder = given.results.save(result)
        said = capsys.readouterr().out
        assert "knn, mine on a set: accuracy 0.5" in said and str(folder) in said
        assert Result.load(folder / "result.json").scores == {"accuracy": 0.5}
        assert (folder / "result.md").is_file()

    def test_announce__the_whole_card(
        self, tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        given = make_given(tmp_path, model, crop=160)
        given.results.announce(given.model, given.results.protocol(KNN))
        said = capsys.readouterr().out
        assert "Protocol, mine:" in said and "  crop: 160\n" in said
        assert all(f"  {name}: " in said for name in KNN.card())
