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


class TestCores:
    """How the cores of a CPU are shared, with 12 of them."""

    @pytest.fixture
    def threads(self, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        """What torch is told."""
        told: list[int] = []
        monkeypatch.setattr("lightly_ext.evaluate.devices.num_cpus", lambda: 12)
        monkeypatch.setattr("torch.set_num_threads", told.append)
        monkeypatch.setattr("torch.get_num_threads", lambda: 12)
        return told

    @pytest.mark.parametrize(("num_workers", "readers"), [(None, 6), (3, 3), (0, 0)])
    def test_all_for_an_encoder_on_the_cpu(
        self, threads: list[int], num_workers: int | None, readers: int
    ) -> None:
        devices = Devices(accelerator="cpu", num_workers=num_workers)
        assert (devices.num_workers, threads) == (readers, [12])

    def test_fewer_threads_where_torch_has_fewer(
        self, threads: list[int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """By OMP_NUM_THREADS, or as two threads of a core compute no more than one."""
        monkeypatch.setattr("torch.get_num_threads", lambda: 5)
        assert Devices(accelerator="cpu").num_workers == 6
        assert threads == [5]

    def test_shared_by_processes(
        self, threads: list[int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("lightly_ext.evaluate.devices.Fabric", FakeFabric)
        devices = Devices(devices=5)
        assert (devices.num_workers, threads) == (1, [2])
        FakeFabric.device = torch.device("cuda")
        try:
            assert Devices(devices=5).num_workers == 2
        finally:
            FakeFabric.device = torch.device("cpu")
        assert threads == [2]


class FakeFabric:
    """Starts no processes."""

    device = torch.device("cpu")

    def __init__(self, **_: object) -> None: ...

    def launch(self) -> None: ...

    def seed_everything(self, *_: object, **__: object) -> None: ...


class TestLoader:
    @pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
    def test_no_more_readers_than_batches(self, tmp_path: Path) -> None:
        files = folder_images(write_images(tmp_path / "images", 7))
        images = EvaluationImages(files, centre_crop(KNN.replace(crop=8), "bicubic"))
        devices = Devices(batch_size=3, num_workers=8, accelerator="cpu")
        assert devices.loader(images).num_workers == 3
        assert devices.loader(images, batch_size=1).num_workers == 7
        assert devices.loader(images, range(3)).num_workers == 0
        assert devices.loader(images, [], 1).num_workers == 0

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
