from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from lightly_ext.evaluate.images import EvaluationImages, centre_crop, folder_images
from lightly_ext.evaluate.result import Result
from lightly_ext.evaluate.session import Session
from stellar_plugin import Stellar
from stellar_plugin.protocols import EFFICIENCY, KNN
from tests.lightly_ext.evaluate.small import write_images, write_model


def make_session(tmp_path: Path, model: str, **options: Any) -> Session:
    values = {"output": str(tmp_path / "out"), "accelerator": "cpu", "num_workers": 0}
    return Session(model, **{**values, **options})


@pytest.fixture
def model(tmp_path: Path) -> str:
    return write_model(tmp_path / "runs" / "mine" / "model")


class TestOptions:
    @pytest.mark.parametrize(
        "option", ["batch_size", "devices", "resize", "crop", "limit"]
    )
    def test_at_least_one(self, tmp_path: Path, option: str) -> None:
        with pytest.raises(ValueError, match=f"{option} must be at least 1, got 0"):
            make_session(tmp_path, "a", **{option: 0})

    def test_num_workers(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="num_workers must be at least 0, got -1"):
            make_session(tmp_path, "a", num_workers=-1)

    def test_protocol__options_that_it_knows(self, tmp_path: Path) -> None:
        session = make_session(tmp_path, "a", resize=40, crop=32)
        assert session.protocol(KNN) == KNN.replace(resize=40, crop=32)
        assert session.protocol(EFFICIENCY) == EFFICIENCY.replace(crop=32)

    def test_model_is_loaded_when_needed(self, tmp_path: Path) -> None:
        session = make_session(tmp_path, str(tmp_path / "gone"))
        with pytest.raises(FileNotFoundError, match="There is no checkpoint"):
            _ = session.model

    @pytest.mark.parametrize(
        ("model", "options", "name"),
        [
            ("runs/mine/model", {}, "mine"),
            ("runs/mine/checkpoints/last.ckpt", {}, "last"),
            ("x/mae_pretrain.pth", {}, "mae_pretrain"),
            ("stellar-b16", {}, "stellar-b16"),
            ("microsoft/STELLAR", {}, "STELLAR"),
            ("timm:resnet50", {}, "timm:resnet50"),
            ("timm:resnet50", {"weights": "moco/v2.pth.tar"}, "v2.pth"),
            ("timm:resnet50", {"untrained": True}, "timm:resnet50 (untrained)"),
            ("runs/mine/model", {"name": "ours"}, "ours"),
        ],
    )
    def test_name(
        self, tmp_path: Path, model: str, options: dict[str, Any], name: str
    ) -> None:
        assert make_session(tmp_path, model, **options).name == name

    def test_protocol__as_options_change_it(self, tmp_path: Path) -> None:
        session = make_session(tmp_path, "a", resize=40, crop=32, limit=7)
        changed = session.protocol(KNN, data="b", neighbours=3)
        assert (changed.resize, changed.crop, changed.limit) == (40, 32, 7)
        assert (changed.data, changed.neighbours) == ("b", 3)
        assert make_session(tmp_path, "a").protocol(KNN) == KNN
        # A task may decide itself.
        assert session.protocol(KNN, crop=64).crop == 64


class TestModels:
    def test_load_stellar(self, tmp_path: Path, model: str) -> None:
        session = make_session(tmp_path, model)
        stellar = session.load_stellar()
        expected = Stellar.from_pretrained(model).state_dict()
        assert all(v.equal(expected[k]) for k, v in stellar.state_dict().items())
        assert not any(p.requires_grad for p in stellar.parameters())

    def test_load_stellar__untrained_with_the_encoder_of_the_run(
        self, tmp_path: Path, model: str
    ) -> None:
        session = make_session(tmp_path, model, untrained=True, seed=4)
        encoder = session.model.backbone.state_dict()
        ours = session.load_stellar().encoder.state_dict()
        assert all(v.equal(ours[k]) for k, v in encoder.items())

    def test_load_stellar__only_of_stellar(self, tmp_path: Path) -> None:
        session = make_session(tmp_path, "timm:test_resnet", untrained=True)
        with pytest.raises(ValueError, match=r"needs a STELLAR model .* is pooled by"):
            session.load_stellar()

    def test_with_model(self, tmp_path: Path, model: str) -> None:
        session = make_session(tmp_path, model, crop=32)
        assert session.model.num_queries == 4
        other = session.with_model(write_model(tmp_path / "six", num_queries=6))
        assert (other.model.num_queries, other.name) == (6, "six")
        assert (session.model.num_queries, session.name) == (4, "mine")
        assert other.protocol(KNN).crop == 32


class TestLoader:
    def test_share_of_a_process(
        self, tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        files = folder_images(write_images(tmp_path / "images", 7))
        images = EvaluationImages(files, centre_crop(KNN.replace(crop=8), "bicubic"))
        session = make_session(tmp_path, model, batch_size=2)
        batches = list(session.loader(images))
        assert [b.number.tolist() for b in batches] == [[0, 1], [2, 3], [4, 5], [6]]
        assert batches[0].image.dtype == torch.uint8
        monkeypatch.setattr(Session, "rank", 1)
        monkeypatch.setattr(Session, "world_size", 3)
        numbers = [b.number.tolist() for b in session.loader(images)]
        assert numbers == [[1, 4]]
        numbers = [b.number.tolist() for b in session.loader(images, [6, 0], 1)]
        assert numbers == [[6], [0]]


class TestResults:
    def result(self, session: Session, **fields: Any) -> Result:
        protocol = session.protocol(KNN, data="a set", **fields)
        return session.result("knn", "a set", protocol, {"accuracy": 0.5}, feature="x")

    def test_provenance(self, tmp_path: Path, model: str) -> None:
        result = self.result(make_session(tmp_path, model, seed=3, batch_size=5))
        known = result.provenance
        assert (known["seed"], known["batch_size"], known["feature"]) == (3, 5, "x")
        assert (known["model"], known["method"]) == (model, "STELLAR")
        assert len(known["sha256"]) == 64 and known["precision"] == "32-true"
        assert {"python", "torch", "timm"} <= set(known["versions"])
        assert known["device"].startswith("1 x CPU")
        assert result.protocol == KNN.replace(data="a set").card()

    def test_folder__same_run_same_folder(self, tmp_path: Path, model: str) -> None:
        session = make_session(tmp_path, model)
        folder = session.folder(self.result(session))
        again = make_session(tmp_path, model, batch_size=3)
        assert again.folder(self.result(again)) == folder
        assert folder.parent == tmp_path / "out"
        assert folder.name.startswith("knn-a_set-mine-")

    def test_folder__another_run_another_folder(
        self, tmp_path: Path, model: str
    ) -> None:
        session = make_session(tmp_path, model)
        seeded = make_session(tmp_path, model, seed=1)
        cropped = make_session(tmp_path, model, crop=16)
        trained_on = make_session(tmp_path, model, untrained=True)
        results = [
            self.result(session),
            self.result(session, neighbours=10),
            self.result(seeded),
            self.result(cropped),
            self.result(trained_on),
            dataclasses.replace(self.result(session), data="another set"),
        ]
        assert len({session.folder(result) for result in results}) == len(results)

    def test_save__prints_and_stores(
        self, tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        session = make_session(tmp_path, model)
        result = self.result(session)
        folder = session.save(result)
        said = capsys.readouterr().out
        assert "knn, mine on a set: accuracy 0.5" in said and str(folder) in said
        assert Result.load(folder / "result.json").scores == {"accuracy": 0.5}
        assert (folder / "result.md").is_file()

    def test_announce__the_whole_card(
        self, tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        session = make_session(tmp_path, model, crop=160)
        session.announce(session.protocol(KNN))
        said = capsys.readouterr().out
        assert "Protocol, mine:" in said and "  crop: 160\n" in said
        assert all(f"  {name}: " in said for name in KNN.card())
