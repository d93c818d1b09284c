from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightly_ext.data import read_image
from lightly_ext.evaluate.features import POOLED, CachedFeatures
from lightly_ext.evaluate.images import ImageFiles, centre_crop, folder_images
from stellar_plugin.protocols import KNN
from tests.lightly_ext.evaluate.small import (
    Given,
    make_given,
    write_images,
    write_model,
)


class Counted:
    """Mean colours, and the number of images that they were asked of.

    The first call is no batch: it finds out shapes.
    """

    def __init__(self, fails_at: int | None = None) -> None:
        self.sizes: list[int] = []
        self.fails_at = fails_at

    def __call__(self, images: Tensor) -> Mapping[str, Tensor]:
        if len(self.sizes) == self.fails_at:
            raise RuntimeError("the power went out")
        self.sizes.append(len(images))
        means = images.float().mean(dim=(2, 3))
        return {"means": means, "first": images[:, 0, :2, :2].half()}


@pytest.fixture
def given(tmp_path: Path) -> Given:
    return _given(tmp_path, write_model(tmp_path / "model"))


def _given(tmp_path: Path, model: str, **options: Any) -> Given:
    return make_given(tmp_path, model, **{"batch_size": 4, **options})


@pytest.fixture
def files(tmp_path: Path) -> ImageFiles:
    return folder_images(write_images(tmp_path / "images", 18))


PROTOCOL = KNN.replace(resize=36, crop=32)


def computed(
    given: Given, files: ImageFiles, kind: str = "a", protocol: Any = PROTOCOL
) -> tuple[CachedFeatures, list[int]]:
    """Features, and the sizes of the batches they took."""
    counted = Counted()
    cached = given.cache.features(files, protocol, kind, counted)
    return cached, counted.sizes[1:]


class TestFeatures:
    def test_values_and_types(self, given: Given, files: ImageFiles) -> None:
        cached, sizes = computed(given, files)
        assert sizes == [4, 4, 4, 4, 2] and cached.num_unreadable == 0
        means = cached.rows("means")
        assert means.shape == (18, 3) and means.dtype == torch.float32
        first = cached.rows("first")
        assert first.shape == (18, 2, 2) and first.dtype == torch.float16
        crop = centre_crop(PROTOCOL, "bicubic")
        for i, name in enumerate(files.names):
            image = crop(read_image(files.root / name)).float()
            torch.testing.assert_close(means[i], image.mean(dim=(1, 2)))

    def test_a_second_time_from_files(self, given: Given, files: ImageFiles) -> None:
        cached, _ = computed(given, files)
        again, sizes = computed(given, files)
        assert sizes == [] and again.rows("means").equal(cached.rows("means"))

    def test_resumes(
        self, tmp_path: Path, files: ImageFiles, capsys: pytest.CaptureFixture[str]
    ) -> None:
        model = write_model(tmp_path / "model")
        given = _given(tmp_path, model)
        # The third batch: the first call is none.
        with pytest.raises(RuntimeError, match="the power went out"):
            given.cache.features(files, PROTOCOL, "a", Counted(fails_at=3))
        resumed, sizes = computed(given, files)
        assert sizes == [4, 4, 2]
        assert "8 of 18 images are cached" in capsys.readouterr().out
        whole, _ = computed(
            _given(tmp_path, model, output=str(tmp_path / "other")), files
        )
        assert resumed.readable.equal(torch.arange(18))
        for name in ("means", "first"):
            assert resumed.rows(name).equal(whole.rows(name))

    def test_another_batch_size_continues(
        self, tmp_path: Path, files: ImageFiles
    ) -> None:
        model = write_model(tmp_path / "model")
        with pytest.raises(RuntimeError):
            given = _given(tmp_path, model)
            given.cache.features(files, PROTOCOL, "a", Counted(fails_at=2))
        given = _given(tmp_path, model, batch_size=7)
        assert computed(given, files)[1] == [7, 7]

    def test_whatever_matters_makes_another_cache(
        self, tmp_path: Path, files: ImageFiles
    ) -> None:
        first = write_model(tmp_path / "first")
        make = partial(_given, tmp_path, first)
        given = make()
        images = len(files)
        asked = [
            (given, files, "a", PROTOCOL),
            (given, files, "another feature", PROTOCOL),
            (given, files, "a", PROTOCOL.replace(crop=16)),
            (given, files, "a", PROTOCOL.replace(resize=40)),
            (given, files[range(images - 1)], "a", PROTOCOL),
            (make(precision="bf16-mixed"), files, "a", PROTOCOL),
            (make(untrained=True), files, "a", PROTOCOL),
            (make(untrained=True, seed=1), files, "a", PROTOCOL),
        ]
        for arguments in asked:
            assert sum(computed(*arguments)[1]) >= images - 1
        for arguments in asked:
            assert computed(*arguments)[1] == []
        # The same folder with other weights in it.
        write_model(tmp_path / "first", num_queries=3)
        assert sum(computed(make(), files)[1]) == images


class TestUnreadable:
    def test_skipped_counted_and_named(
        self, given: Given, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder = write_images(tmp_path / "images", 20)
        (folder / "0007.png").write_bytes(b"broken")
        files = folder_images(folder)
        cached, _ = computed(given, files)
        assert cached.num_unreadable == 1
        assert cached.readable.tolist() == [i for i in range(20) if i != 7]
        good = files[cached.readable.tolist()]
        assert cached.rows("means").equal(computed(given, good)[0].rows("means"))
        said = capsys.readouterr().out
        assert f"1 of 20 images are unreadable ({folder}/0007.png)" in said

    def test_too_many(self, given: Given, tmp_path: Path) -> None:
        folder = write_images(tmp_path / "images", 20)
        for i in (3, 7, 8, 9):
            (folder / f"000{i}.png").write_bytes(b"broken")
        pattern = r"4 of 20 .* unreadable \(.*03.png, .*07.png, .*08.png, \.\.\.\)"
        with pytest.raises(RuntimeError, match=pattern):
            computed(given, folder_images(folder))

    def test_repaired_images_need_the_folder_deleted(
        self, given: Given, tmp_path: Path
    ) -> None:
        folder = write_images(tmp_path / "images", 5)
        (folder / "0000.png").write_bytes(b"broken")
        with pytest.raises(RuntimeError, match=r"delete '(.*)'") as error:
            computed(given, folder_images(folder))
        cache = next((tmp_path / "out" / "cache").iterdir())
        assert str(cache) in str(error.value)


class TestPooled:
    @pytest.mark.parametrize("feature", ["sparse", "cls+dense"])
    def test_rows_of_the_model(
        self, given: Given, tmp_path: Path, feature: str
    ) -> None:
        folder = write_images(tmp_path / "images", 21)
        (folder / "0002.png").write_bytes(b"broken")
        files = folder_images(folder)
        cached = given.cache.pooled(files, PROTOCOL, feature)
        assert cached.num_unreadable == 1
        assert cached.readable.tolist() == [i for i in range(21) if i != 2]
        crop = centre_crop(PROTOCOL, given.model.origin.interpolation)
        good = [files.names[i] for i in cached.readable]
        images = torch.stack([crop(read_image(folder / name)) for name in good])
        expected = given.model.pooled(images, feature)
        torch.testing.assert_close(cached.rows(POOLED), expected, rtol=1e-5, atol=1e-5)

    def test_precision__features_stay_float32(
        self, tmp_path: Path, files: ImageFiles
    ) -> None:
        model = write_model(tmp_path / "model")
        exact, rounded = (
            _given(tmp_path, model, precision=p)
            .cache.pooled(files, PROTOCOL, "sparse")
            .rows(POOLED)
            for p in ("32-true", "bf16-mixed")
        )
        assert rounded.dtype == torch.float32 and not rounded.equal(exact)
        torch.testing.assert_close(rounded, exact, rtol=0.05, atol=0.05)
