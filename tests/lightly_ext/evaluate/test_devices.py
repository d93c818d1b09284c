from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightly_ext.evaluate.devices import Devices
from lightly_ext.evaluate.images import EvaluationImages, centre_crop, folder_images
from stellar_plugin.protocols import KNN
from tests.lightly_ext.evaluate.small import write_images


class TestOptions:
    @pytest.mark.parametrize("option", ["batch_size", "devices"])
    def test_at_least_one(self, option: str) -> None:
        with pytest.raises(ValueError, match=f"{option} must be at least 1, got 0"):
            Devices(accelerator="cpu", **{option: 0})  # type: ignore[arg-type]

    def test_num_workers(self) -> None:
        with pytest.raises(ValueError, match="num_workers must be at least 0, got -1"):
            Devices(num_workers=-1)


class TestLoader:
    def test_share_of_a_process(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        files = folder_images(write_images(tmp_path / "images", 7))
        images = EvaluationImages(files, centre_crop(KNN.replace(crop=8), "bicubic"))
        devices = Devices(batch_size=2, num_workers=0, accelerator="cpu")
        batches = list(devices.loader(images))
        assert [b.number.tolist() for b in batches] == [[0, 1], [2, 3], [4, 5], [6]]
        assert batches[0].image.dtype == torch.uint8
        monkeypatch.setattr(Devices, "rank", 1)
        monkeypatch.setattr(Devices, "world_size", 3)
        numbers = [b.number.tolist() for b in devices.loader(images)]
        assert numbers == [[1, 4]]
        numbers = [b.number.tolist() for b in devices.loader(images, [6, 0], 1)]
        assert numbers == [[6], [0]]


def test_say__only_the_first_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    devices = Devices(accelerator="cpu", num_workers=0)
    devices.say("[bold]first")
    monkeypatch.setattr(Devices, "rank", 1)
    devices.say("second")
    assert capsys.readouterr().out == "[bold]first\n"
