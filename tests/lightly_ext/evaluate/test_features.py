from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightly_ext.data import read_image
from lightly_ext.evaluate.features import (
    CachedFeatures,
    cache_features,
    pooled_features,
)
from lightly_ext.evaluate.images import ImageFiles, centre_crop, folder_images
from lightly_ext.evaluate.session import Session
from stellar_plugin.protocols import KNN
from tests.lightly_ext.evaluate.small import write_images, write_model


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
def session(tmp_path: Path) -> Session:
    return make_session(tmp_path, write_model(tmp_path / "model"))


def make_session(tmp_path: Path, model: str, **options: Any) -> Session:
    values = {"output": str(tmp_path / "out"), "accelerator": "cpu", "num_workers": 0}
    return Session(model, **{**values, "batch_size": 4, **options})


@pytest.fixture
def files(tmp_path: Path) -> ImageFiles:
    return folder_images(write_images(tmp_path / "images", 18))


PROTOCOL = KNN.replace(resize=36, crop=32)


def computed(
    session: Session, files: ImageFiles, kind: str = "a", protocol: Any = PROTOCOL
) -> tuple[CachedFeatures, list[int]]:
    """Features, and the sizes of the batches they took."""
    counted = Counted()
    cached = cache_features(session, files, protocol, kind, counted)
    return cached, counted.sizes[1:]


class TestCacheFeatures:
    def test_values_and_types(self, session: Session, files: ImageFiles) -> None:
        cached, sizes = computed(session, files)
        assert sizes == [4, 4, 4, 4, 2] and cached.num_unreadable == 0
        means = cached.rows("means")
        assert means.shape == (18, 3) and means.dtype == torch.float32
        first = cached.rows("first")
        assert first.shape == (18, 2, 2) and first.dtype == torch.float16
        crop = centre_crop(PROTOCOL, "bicubic")
        for i, name in enumerate(files.names):
            image = crop(read_image(files.root / name)).float()
            torch.testing.assert_close(means[i], image.mean(dim=(1, 2)))

    def test_a_second_time_from_files(
        self, session: Session, files: ImageFiles
    ) -> None:
        cached, _ = computed(session, files)
        again, sizes = computed(session, files)
        assert sizes == [] and again.rows("means").equal(cached.rows("means"))

    def test_resumes(
        self, tmp_path: Path, files: ImageFiles, capsys: pytest.CaptureFixture[str]
    ) -> None:
        model = write_model(tmp_path / "model")
        session = make_session(tmp_path, model)
        # The third batch: the first call is none.
        with pytest.raises(RuntimeError, match="the power went out"):
            cache_features(session, files, PROTOCOL, "a", Counted(fails_at=3))
        resumed, sizes = computed(session, files)
        assert sizes == [4, 4, 2]
        assert "8 of 18 images are cached" in capsys.readouterr().out
        whole, _ = computed(
            make_session(tmp_path, model, output=str(tmp_path / "other")), files
        )
        assert resumed.readable.equal(torch.arange(18))
        for name in ("means", "first"):
            assert resumed.rows(name).equal(whole.rows(name))

    def test_another_batch_size_continues(
        self, tmp_path: Path, files: ImageFiles
    ) -> None:
        model = write_model(tmp_path / "model")
        with pytest.raises(RuntimeError):
            session = make_session(tmp_path, model)
            cache_features(session, files, PROTOCOL, "a", Counted(fails_at=2))
        session = make_session(tmp_path, model, batch_size=7)
        assert computed(session, files)[1] == [7, 7]

    def test_whatever_matters_makes_another_cache(
        self, tmp_path: Path, files: ImageFiles
    ) -> None:
        first = write_model(tmp_path / "first")
        make = partial(make_session, tmp_path, first)
        session = make()
        images = len(files)
        asked = [
            (session, files, "a", PROTOCOL),
            (session, files, "another feature", PROTOCOL),
            (session, files, "a", PROTOCOL.replace(crop=16)),
            (session, files, "a", PROTOCOL.replace(resize=40)),
            (session, files[range(images - 1)], "a", PROTOCOL),
            (
                make(precision="bf16-mixed"),
                files,
                "a",
                PROTOCOL,
            ),
            (make(untrained=True), files, "a", PROTOCOL),
            (
                make(untrained=True, seed=1),
                files,
                "a",
                PROTOCOL,
            ),
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
        self, session: Session, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder = write_images(tmp_path / "images", 20)
        (folder / "0007.png").write_bytes(b"broken")
        files = folder_images(folder)
        cached, _ = computed(session, files)
        assert cached.num_unreadable == 1
        assert cached.readable.tolist() == [i for i in range(20) if i != 7]
        good = files[cached.readable.tolist()]
        assert cached.rows("means").equal(computed(session, good)[0].rows("means"))
        said = capsys.readouterr().out
        assert f"1 of 20 images are unreadable ({folder}/0007.png)" in said

    def test_too_many(self, session: Session, tmp_path: Path) -> None:
        folder = write_images(tmp_path / "images", 20)
        for i in (3, 7, 8, 9):
            (folder / f"000{i}.png").write_bytes(b"broken")
        pattern = r"4 of 20 .* unreadable \(.*03.png, .*07.png, .*08.png, \.\.\.\)"
        with pytest.raises(RuntimeError, match=pattern):
            computed(session, folder_images(folder))

    def test_repaired_images_need_the_folder_deleted(
        self, session: Session, tmp_path: Path
    ) -> None:
        folder = write_images(tmp_path / "images", 5)
        (folder / "0000.png").write_bytes(b"broken")
        with pytest.raises(RuntimeError, match=r"delete '(.*)'") as error:
            computed(session, folder_images(folder))
        cache = next((tmp_path / "out" / "cache").iterdir())
        assert str(cache) in str(error.value)


class TestPooledFeatures:
    @pytest.mark.parametrize("feature", ["sparse", "cls+dense"])
    def test_rows_of_the_model(
        self, session: Session, tmp_path: Path, feature: str
    ) -> None:
        folder = write_images(tmp_path / "images", 21)
        (folder / "0002.png").write_bytes(b"broken")
        names = folder_images(folder).names
        files = ImageFiles(folder, names, list(range(21)), tuple(map(str, range(21))))
        features, labels, num = pooled_features(session, files, PROTOCOL, feature)
        assert num == 1 and labels.tolist() == [i for i in range(21) if i != 2]
        crop = centre_crop(PROTOCOL, session.model.origin.interpolation)
        images = torch.stack([crop(read_image(folder / names[i])) for i in labels])
        expected = session.model.pooled(images, feature)
        torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-5)

    def test_precision__features_stay_float32(
        self, tmp_path: Path, files: ImageFiles
    ) -> None:
        model = write_model(tmp_path / "model")
        files = ImageFiles(files.root, files.names, [0] * 18, ("a",))
        exact, rounded = (
            pooled_features(
                make_session(tmp_path, model, precision=p), files, PROTOCOL, "sparse"
            )[0]
            for p in ("32-true", "bf16-mixed")
        )
        assert rounded.dtype == torch.float32 and not rounded.equal(exact)
        torch.testing.assert_close(rounded, exact, rtol=0.05, atol=0.05)
