from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, v2

from lightly_ext.data import read_image
from lightly_ext.evaluate.images import (
    EvaluationImages,
    ImageFiles,
    centre_crop,
    folder_images,
    train_crop,
)
from stellar_plugin.protocols import KNN, LINEAR_PAPER
from tests.lightly_ext.evaluate.small import write_images


def listed(*labels: int) -> ImageFiles:
    names = [f"{i}.png" for i in range(len(labels))]
    return ImageFiles(Path("a"), names, list(labels), ("x", "y", "z"))


class TestImageFiles:
    def test_getitem__keeps_names_and_labels_together(self) -> None:
        chosen = listed(0, 1, 2, 1)[[3, 0]]
        assert chosen.names == ["3.png", "0.png"] and chosen.labels == [1, 0]
        assert chosen.classes == ("x", "y", "z")

    @pytest.mark.parametrize("limit", [3, 6, 9, 12])
    def test_limited__of_each_class_its_share(self, limit: int) -> None:
        files = listed(*[0] * 6, *[1] * 6, *[2] * 6)
        labels = files.limited(limit).label_tensor
        assert labels.bincount().tolist() == [limit // 3] * 3

    def test_limited__shares_of_unequal_classes(self) -> None:
        files = listed(*[0] * 60, *[1] * 30, *[2] * 10)
        for limit in range(1, 101):
            counts = files.limited(limit).label_tensor.bincount(minlength=3)
            assert counts.sum() == limit
            shares = torch.tensor([0.6, 0.3, 0.1]) * limit
            assert ((counts - shares).abs() < 1).all()

    @pytest.mark.parametrize("limit", [None, 4, 100])
    def test_limited__nothing_to_leave_out(self, limit: int | None) -> None:
        files = listed(0, 1, 2, 1)
        assert files.limited(limit) is files

    def test_label_tensor(self) -> None:
        labels = listed(2, 0).label_tensor
        assert labels.tolist() == [2, 0] and labels.dtype == torch.int64
        with pytest.raises(ValueError, match="images in 'a' have no labels"):
            _ = ImageFiles(Path("a"), ["0.png"]).label_tensor


class TestEvaluationImages:
    def test_getitem(self, tmp_path: Path) -> None:
        files = folder_images(write_images(tmp_path, 3))
        (tmp_path / "0001.png").write_bytes(b"broken")
        crop = centre_crop(KNN.replace(resize=20, crop=16), "bicubic")
        images = EvaluationImages(files, crop)
        assert len(images) == 3
        image, number, readable, size = images[2]
        assert (number, readable) == (2, True) and image.dtype == torch.uint8
        assert tuple(size) == read_image(tmp_path / "0002.png").shape[1:]
        assert image.equal(crop(read_image(tmp_path / "0002.png")))
        image, number, readable, size = images[1]
        assert (number, readable, size.tolist()) == (1, False, [0, 0])
        assert image.shape == (3, 16, 16) and not image.any()

    def test_getitem__images_that_the_transform_fails_on(self, tmp_path: Path) -> None:
        def check(image: torch.Tensor) -> torch.Tensor:
            if image.shape[1] > 8 and image[0, 0, 0] == values[1]:
                raise ValueError("not this one")
            return image[:, :8, :8]

        files = folder_images(write_images(tmp_path, 3))
        values = [read_image(tmp_path / name)[0, 0, 0] for name in files.names]
        images = EvaluationImages(files, check)
        assert [images[i].readable for i in range(3)] == [True, False, True]

    def test_getitem__lines(self, tmp_path: Path) -> None:
        for number, size in enumerate([(1, 20000), (20000, 1)]):
            Image.new("RGB", size, (9, 9, 9)).save(tmp_path / f"{number}.png")
        crop = centre_crop(KNN, "bicubic")
        for image, _, readable, _ in EvaluationImages(folder_images(tmp_path), crop):
            assert readable and image.shape == (3, KNN.crop, KNN.crop)
            assert set(image.flatten().tolist()) == {9}

    def test_getitem__a_missing_file_is_unreadable(self, tmp_path: Path) -> None:
        files = ImageFiles(tmp_path, ["gone.png"])
        assert not EvaluationImages(files, v2.Identity())[0].readable


class TestFolderImages:
    def test_to_any_depth(self, tmp_path: Path) -> None:
        write_images(tmp_path / "b/c", 1)
        write_images(tmp_path / "a", 1)
        (tmp_path / "a/notes.txt").touch()
        assert folder_images(tmp_path).names == ["a/0000.png", "b/c/0000.png"]

    def test_nothing_there(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="no image below"):
            folder_images(tmp_path)


class TestCrops:
    @pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
    def test_centre_crop__as_the_protocol_says(self, interpolation: str) -> None:
        protocol = KNN.replace(resize=24, crop=16)
        noise = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
        cut = centre_crop(protocol, interpolation)(
            torch.from_numpy(noise).permute(2, 0, 1)
        )
        # By Pillow: shorter side to 24, centre 16.
        mode = getattr(Image.Resampling, interpolation.upper())
        whole = np.asarray(Image.fromarray(noise).resize((36, 24), mode))
        expected = torch.from_numpy(whole[4:20, 10:26].copy()).permute(2, 0, 1)
        assert (cut.int() - expected.int()).abs().max() <= 1

    def test_train_crop__scale_of_the_protocol(self) -> None:
        protocol = LINEAR_PAPER.replace(crop=8, train_scale=(0.2, 0.3))
        crop, flip = train_crop(protocol, "bilinear").transforms
        assert crop.size == (8, 8) and tuple(crop.scale) == (0.2, 0.3)
        assert crop.interpolation is InterpolationMode.BILINEAR and flip.p == 0.5
        image = torch.zeros(3, 40, 50, dtype=torch.uint8)
        assert train_crop(protocol, "bilinear")(image).shape == (3, 8, 8)
