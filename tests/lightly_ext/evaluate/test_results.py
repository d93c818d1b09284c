from __future__ import annotations

import copy
import dataclasses
import inspect
import json
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from lightly_ext.evaluate.classification.knn import run_knn
from lightly_ext.evaluate.devices import Devices
from lightly_ext.evaluate.frozen_model import FrozenModel, Origin
from lightly_ext.evaluate.identity import (
    BY_CONTENT,
    NOT_DECIDING,
    ON_THE_CARD,
    TRAINED_PARTS,
)
from lightly_ext.evaluate.reconstruction.reconstruction import run_reconstruction
from lightly_ext.evaluate.report.protocol_cards import known_protocols
from lightly_ext.evaluate.result import Result
from lightly_ext.evaluate.results import (
    Results,
)
from stellar_cli.tasks import TASKS
from stellar_plugin.encoder import StellarEncoder
from stellar_plugin.protocols import EFFICIENCY, KNN, Protocol
from tests.lightly_ext.evaluate.small import (
    MODEL_NAME,
    VIT,
    Given,
    make_given,
    write_model,
)


@pytest.fixture
def model(tmp_path: Path) -> str:
    return write_model(tmp_path / "runs" / "mine" / "model")


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Given:
    folder = tmp_path_factory.mktemp("given")
    return make_given(folder, write_model(folder / "runs" / "mine" / "model"))


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
        result = make_result(given, protocol=changed)
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


INPUTS = {"data": "hash of the images"}


def make_result(
    given: Given,
    run: Callable[..., Any] = run_knn,
    options: Mapping[str, Any] = MappingProxyType({}),
    protocol: Protocol = KNN,
    inputs: Mapping[str, str] = INPUTS,
) -> Result:
    """A result as a task makes it that was called with some options."""
    required = {
        name: "a set"
        for name, p in inspect.signature(run).parameters.items()
        if p.default is p.empty and name not in Given._fields
    }
    results = given.results.of_run(run, *given, **required | dict(options))
    return results.result(
        given.model, "knn", "a set", protocol, {"accuracy": 0.5}, inputs, feature="x"
    )


def task_options() -> list[tuple[str, str, inspect.Parameter]]:
    """Task, name and signature of every option of every task that takes a model."""
    found = []
    for task, (module, _) in TASKS.items():
        if task == "report":
            continue
        room = import_module(f"lightly_ext.evaluate.{module}")
        run = getattr(room, f"run_{task.replace('-', '_')}")
        assert run is not inspect.unwrap(run), f"{task} is not decorated"
        for name, parameter in inspect.signature(run).parameters.items():
            if name not in Given._fields:
                found.append((task, name, parameter))
    return found


class TestIdentity:
    @pytest.mark.parametrize(
        ("task", "name", "parameter"),
        [pytest.param(*o, id=f"{o[0]}-{o[1]}") for o in task_options()],
    )
    def test_every_option_decides_or_is_said_otherwise(
        self, given: Given, task: str, name: str, parameter: inspect.Parameter
    ) -> None:
        module = import_module(f"lightly_ext.evaluate.{TASKS[task][0]}")
        run = getattr(module, f"run_{task.replace('-', '_')}")
        said = NOT_DECIDING | ON_THE_CARD | BY_CONTENT
        if name not in TRAINED_PARTS:  # a folder with weights, see below
            one, other = (make_result(given, run, {name: v}) for v in ("one", "other"))
            same = one.digest == other.digest
            assert same == (name in said or hasattr(KNN, name))
        # Text that names a file decides by what is in the file.
        is_text = str(parameter.annotation) in ("str", "str | None", "list[str] | None")
        if name not in said | TRAINED_PARTS and is_text:
            assert name in ("features", "text_model", "by", "parts")

    @pytest.mark.slow
    @pytest.mark.parametrize("name", known_protocols())
    def test_every_field_of_every_protocol_decides(
        self, given: Given, name: str
    ) -> None:
        protocol = known_protocols()[name]
        digests = [make_result(given, protocol=protocol).digest]
        for field in dataclasses.fields(protocol):
            changed = protocol.replace(**{field.name: "another"})
            digests.append(make_result(given, protocol=changed).digest)
        assert len(set(digests)) == len(dataclasses.fields(protocol)) + 1

    @pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(Origin)])
    def test_every_fact_of_the_model_decides_but_its_path(
        self, given: Given, field: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before = make_result(given).digest
        another = {"weights taken": "teacher"} if field == "facts" else "another"
        changed = dataclasses.replace(given.model.origin, **{field: another})
        monkeypatch.setattr(given.model, "origin", changed)
        assert (make_result(given).digest != before) == (field != "source")

    def test_architecture_decides(self, given: Given) -> None:
        # Random weights of another architecture may have the same name and seed.
        digests = {make_result(given).digest}
        changes: list[dict[str, Any]] = [
            {"num_heads": 2},
            {"pos_antialias": True},
            {"norm_eps": 1e-6},
            {"depth": 2},
        ]
        for change in changes:
            other = StellarEncoder(MODEL_NAME, num_queries=4, **{**VIT, **change})
            model = FrozenModel(other, given.model.origin)
            digests.add(make_result(given._replace(model=model)).digest)
        assert len(digests) == 5

    def test_devices__precision_and_seed_decide_and_nothing_else(
        self, given: Given
    ) -> None:
        digests = set()
        for name, value in (
            ("precision", "bf16-mixed"),
            ("seed", 1),
            ("batch_size", 3),
        ):
            devices = copy.copy(given.devices)
            setattr(devices, name, value)
            results = Results(devices, str(given.results.output / "elsewhere"))
            digests.add(make_result(given._replace(results=results)).digest)
        assert len(digests) == 3
        assert make_result(given).digest in digests

    def test_contents_of_trained_parts_decide(
        self, given: Given, tmp_path: Path
    ) -> None:
        digests = set()
        for folder, content in (("a", b"1"), ("b", b"2"), ("c", b"1")):
            (tmp_path / folder).mkdir()
            (tmp_path / folder / "model.safetensors").write_bytes(content)
            options = {"decoder": str(tmp_path / folder)}
            result = make_result(given, run_reconstruction, options)
            digests.add(result.digest)
            assert len(result.identity["options"]["decoder"]) == 64
        assert len(digests) == 2

    def test_inputs_decide_and_are_stored(self, given: Given, tmp_path: Path) -> None:
        result = make_result(given, inputs={"data": "x"})
        assert result.digest != make_result(given, inputs={"data": "y"}).digest
        result.save(tmp_path)
        stored = json.loads((tmp_path / "result.json").read_text())["identity"]
        assert stored["inputs"] == {"data": "x"}
        assert stored["options"] == {"precision": "32-true", "seed": 0}
        origin = given.model.origin
        assert stored["model"]["sha256"] == origin.sha256
        assert stored["model"]["interpolation"] == "bicubic"
        assert Result.load(tmp_path / "result.json").digest == result.digest

    def test_a_task_that_is_not_decorated(self, given: Given) -> None:
        with pytest.raises(AssertionError, match="decorated with `evaluation`"):
            given.results.result(given.model, "knn", "a", KNN, {}, INPUTS)


class TestResults:
    def result(self, given: Given, **fields: Any) -> Result:
        protocol = given.results.protocol(given.model, KNN, data="a set", **fields)
        return make_result(given, protocol=protocol)

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
        assert "in place of" not in said
        given.results.save(dataclasses.replace(result, scores={"accuracy": 0.75}))
        said = capsys.readouterr().out
        assert f"Stored in {folder}, in place of an earlier one of the same run" in said
        assert Result.load(folder / "result.json").scores == {"accuracy": 0.75}
        assert {path.name for path in folder.iterdir()} == {"result.json", "result.md"}

    def test_save__many_scores_are_a_table(
        self, tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        given = make_given(tmp_path, model)
        scores = {**{f"part_{i}": i / 8 for i in range(5)}, "num_images": 6}
        chance = {"part_3": 0.0625}
        result = dataclasses.replace(self.result(given), scores=scores, chance=chance)
        given.results.save(result, control=False)
        lines = [line.split() for line in capsys.readouterr().out.splitlines()]
        assert ["knn,", "mine", "on", "a", "set:", "num_images", "6"] in lines
        assert ["part_3", "0.375", "0.0625", "not", "told"] in lines
        assert sum(line[:1] == ["num_images"] for line in lines) == 0
        capsys.readouterr()
        given.results.save(result, control=False, curves=[["batch", "1"], ["a", "2"]])
        lines = [line.split() for line in capsys.readouterr().out.splitlines()]
        assert ["batch", "1"] in lines and ["a", "2"] in lines

    def test_announce__the_whole_card(
        self, tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        given = make_given(tmp_path, model, crop=160)
        given.results.announce(given.model, given.results.protocol(given.model, KNN))
        said = capsys.readouterr().out
        assert "Protocol, mine:" in said and "  crop: 160\n" in said
        assert all(f"  {name}: " in said for name in KNN.card())
