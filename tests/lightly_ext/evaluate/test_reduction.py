from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lightly_ext.evaluate.devices import Devices
from lightly_ext.evaluate.images import EvaluationImages, ImageFiles
from lightly_ext.evaluate.probing.equivariance import run_equivariance
from lightly_ext.evaluate.probing.stability import run_stability
from lightly_ext.evaluate.probing.where import run_where
from lightly_ext.evaluate.reduction import (
    ImageMeans,
    count_unreadable,
    pair_loader,
    partners,
)
from lightly_ext.evaluate.result import Result
from tests import distributed
from tests.lightly_ext.evaluate.small import (
    Given,
    make_given,
    write_images,
    write_model,
)


def _given(tmp_path: Path, model: str = "patches", **options: Any) -> Given:
    return make_given(tmp_path, model, **{"batch_size": 4, **options})


class TestImageMeans:
    def test_image_means__against_numpy(self, tmp_path: Path) -> None:
        generator = torch.Generator().manual_seed(0)
        values = torch.rand(100, generator=generator, dtype=torch.float64)
        means = ImageMeans(["all", "few"])
        for part in values.split(7):
            means.add("all", part)
        means.add("few", values[:1])
        means.add("few", values[:0])
        reduced = means.reduce(_given(tmp_path).devices)
        assert reduced["all"].value == pytest.approx(values.mean().item(), rel=1e-12)
        error = values.numpy().std(ddof=1) / 10
        assert reduced["all"].standard_error == pytest.approx(error, rel=1e-9)
        assert reduced["all"].num_images == 100
        assert reduced["few"] == (values[0].item(), 0.0, 1)

    def test_image_means__no_number(self, tmp_path: Path) -> None:
        means = ImageMeans(["change", "none"])
        means.add("change", torch.ones(2))
        with pytest.raises(RuntimeError, match="No image gave a value of none"):
            means.reduce(_given(tmp_path).devices)
        means.add("none", torch.tensor([0.0, torch.nan]))
        with pytest.raises(RuntimeError, match="none is not finite for some image"):
            means.reduce(_given(tmp_path).devices)


class TestPairLoader:
    @pytest.mark.parametrize("num_images", [2, 5, 8, 11])
    @pytest.mark.parametrize("world_size", [1, 2, 3])
    def test_pair_loader__each_image_once_beside_its_other(
        self,
        num_images: int,
        world_size: int,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        files = ImageFiles(tmp_path, [f"{i}.png" for i in range(num_images)])
        images = EvaluationImages(files, lambda image: image)
        given = _given(tmp_path, batch_size=3)
        monkeypatch.setattr(Devices, "world_size", world_size)
        numbers, half = [], num_images // 2
        for rank in range(world_size):
            monkeypatch.setattr(Devices, "rank", rank)
            for batch in pair_loader(given.devices, images):
                numbers += batch.number.tolist()
                one, two = partners(torch.ones(len(batch.number)).bool())
                distance = batch.number[two] - batch.number[one]
                assert (distance.abs() == half).all()
                assert len(one) == len(batch.number) // 2 * 2
        assert sorted(numbers) == list(range(num_images))

    def test_partners__unreadable(self) -> None:
        readable = torch.tensor(
            [True, True, False, True, True, False, True, True, True]
        )
        one, two = partners(readable)
        assert one.tolist() == [0, 1, 6, 7] and two.tolist() == [1, 0, 7, 6]


class TestCountUnreadable:
    def test_count_unreadable__says_which(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        files = ImageFiles(Path("photos"), [f"{i}.png" for i in range(100)])
        assert count_unreadable(_given(tmp_path).devices, files, []) == 0
        assert capsys.readouterr().out == ""
        assert count_unreadable(_given(tmp_path).devices, files, [7, 3]) == 2
        text = "Skipped: 2 of 100 images are unreadable (photos/3.png, photos/7.png)."
        assert text in capsys.readouterr().out
        with pytest.raises(RuntimeError, match=r"6 of 100 .*2.png, \.\.\.\), too many"):
            count_unreadable(_given(tmp_path).devices, files, range(6))


@pytest.mark.slow
def test_probing_experiments__two_processes_as_one(tmp_path: Path) -> None:
    source = write_model(tmp_path / "model")
    data = write_images(tmp_path / "images", 7, size=(64, 70))
    rng = np.random.default_rng(0)
    (tmp_path / "masks").mkdir()
    for path in data.iterdir():
        coarse = rng.integers(3, size=(4, 5), dtype=np.uint8)
        Image.fromarray(coarse).resize((70, 64), 0).save(tmp_path / "masks" / path.name)
    (data / "broken.png").write_bytes(b"no PNG")
    Image.new("L", (70, 64)).save(tmp_path / "masks" / "broken.png")
    for i in range(20):  # so that one broken image is not too many
        (data / f"copy{i}.png").write_bytes((data / "0000.png").read_bytes())
        mask = (tmp_path / "masks" / "0000.png").read_bytes()
        (tmp_path / "masks" / f"copy{i}.png").write_bytes(mask)
    (tmp_path / "meet").mkdir()
    work: Callable[..., list[Any]] = partial(_all_scores, tmp_path, source)
    parts = distributed.run(work, tmp_path / "meet")
    assert parts[0] == parts[1]
    alone = [result.scores for result in _run_all(tmp_path, source, devices=1)]
    for ours, expected in zip(parts[0], alone, strict=True):
        assert ours.keys() == expected.keys()
        assert ours["num_images"] == 27
        for name, value in expected.items():
            assert ours[name] == pytest.approx(value, rel=1e-5, abs=1e-12), name


def _run_all(folder: Path, source: str, devices: int) -> list[Result]:
    given = _given(folder, source, devices=devices, resize=62, crop=32)
    assert given.devices.world_size == devices
    data = str(folder / "images")
    return [
        run_equivariance(*given, data),
        *run_stability(*given, data),
        run_where(*given, data, str(folder / "masks")),
    ]


def _all_scores(folder: Path, source: str, rank: int, world_size: int) -> list[Any]:
    """Scores of one of several processes, started as torchrun does."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0}
    names |= {"WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    os.environ.update({name: str(value) for name, value in names.items()})
    os.environ.update(TORCHELASTIC_RUN_ID="test", MASTER_ADDR="localhost")
    return [dict(result.scores) for result in _run_all(folder, source, world_size)]
