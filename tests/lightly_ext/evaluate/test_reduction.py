from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lightly_ext.evaluate.devices import Devices
from lightly_ext.evaluate.images import EvaluationImages, ImageFiles
from lightly_ext.evaluate.reduction import (
    ImageMeans,
    count_unreadable,
    pair_loader,
    partners,
)
from tests.lightly_ext.evaluate.small import Given, make_given


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
        with pytest.raises(
            RuntimeError,
            match="Values of none are not finite at precision",
        ):
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
