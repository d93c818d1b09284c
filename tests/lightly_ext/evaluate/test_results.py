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

    def test_output__writable(
        self, devices: Devices, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "file").write_text("")
        Results(devices, str(tmp_path / "new" / "folder"))
        assert not (tmp_path / "new").exists()
        with pytest.raises(ValueError, match=r"output .*file/a' is no folder"):
            Results(devices, str(tmp_path / "file" / "a"))
        monkeypatch.setattr("os.access", lambda *_: False)  # root may write anywhere
        with pytest.raises(ValueError, match=r"cannot be written.*--output"):
            Results(devices, str(tmp_path / "out"))


class TestProtocol:
    def test_protocol__as_options_change_it(self, tmp_path: Path, model: str) -> None:
        given = make_given(tmp_path, model, resize=48, crop=32, limit=7)
        changed = given.results.protocol(given.model, KNN, data="b", neighbours=3)
        assert changed == KNN.replace(
            resize=48, crop=32, limit=7, data="b", neighbours=3
        )

    @pytest.mark.parametrize(
        ("options", "resize", "crop"),
        [
            ({}, 32, 32),  # its own size
            ({"resize": 40}, 40, 32),
            ({"crop": 16}, 32, 16),
            ({"crop": 48}, 48, 48),  # no black borders
            ({"resize": 64, "crop": 48}, 64, 48),
        ],
    )
    def test_protocol__size_of_the_model(
        self,
        options: dict[str, int],
        resize: int,
        crop: int,
        tmp_path: Path,
        model: str,
    ) -> None:
        given = make_given(tmp_path, model, **options)
        changed = given.results.protocol(given.model, KNN)
        assert (changed.resize, changed.crop) == (resize, crop)
        result = given.results.result(given.model, "knn", "a", changed, {})
        assert result.provenance["image_size"] == (32, 32)
        assert (result.protocol["resize"], result.protocol["crop"]) == (resize, crop)

    @pytest.mark.parametrize(
        ("source", "resize", "crop"),
        [
            ("patches", 256, 224),  # no size of its own
            ("timm:vit_tiny_patch16_224", 256, 224),  # not 248, its crop_pct says
            ("timm:vit_tiny_patch16_384", 384, 384),
            ("timm:resnet10t.c3_in1k", 201, 176),  # crop_pct 0.875
        ],
    )
    def test_protocol__sizes_of_timm(
        self, source: str, resize: int, crop: int, tmp_path: Path
    ) -> None:
        given = make_given(tmp_path, source, untrained=True)
        changed = given.results.protocol(given.model, KNN)
        assert (changed.resize, changed.crop) == (resize, crop)

    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"crop": 33}, "33 x 33 px: .*no multiple .*its own size|Its own size is"),
            ({"resize": 16}, "crop 32 is more than resize 16.*--resize.*--crop"),
            ({"resize": 32, "crop": 48}, "crop 48 is more than resize 32"),
        ],
    )
    def test_protocol__sizes_that_do_not_fit(
        self, options: dict[str, int], match: str, tmp_path: Path, model: str
    ) -> None:
        given = make_given(tmp_path, model, **options)
        with pytest.raises(ValueError, match=match):
            given.results.protocol(given.model, KNN)

    def test_protocol__not_square(self, tmp_path: Path) -> None:
        model = write_model(tmp_path / "wide", img_size=[32, 64])
        given = make_given(tmp_path, model)
        with pytest.raises(ValueError, match=r"images of 32 x 64 px.*name.*--crop"):
            given.results.protocol(given.model, KNN)
        given = make_given(tmp_path, model, crop=64)
        assert given.results.protocol(given.model, KNN).crop == 64

    def test_protocol__option_that_it_lacks(self, tmp_path: Path, model: str) -> None:
        given = make_given(tmp_path, model, resize=40)
        with pytest.raises(ValueError, match="efficiency has nothing that --resize"):
            given.results.protocol(given.model, EFFICIENCY)


class TestResults:
    def result(self, given: Given, **fields: Any) -> Result:
        protocol = given.results.protocol(given.model, KNN, data="a set", **fields)
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
        assert result.protocol == KNN.replace(data="a set", resize=32, crop=32).card()

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
        given.results.announce(given.model, given.results.protocol(given.model, KNN))
        said = capsys.readouterr().out
        assert "Protocol, mine:" in said and "  crop: 160\n" in said
        assert all(f"  {name}: " in said for name in KNN.card())
