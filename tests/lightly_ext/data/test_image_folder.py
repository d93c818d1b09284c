from __future__ import annotations

import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from lightly_ext.data import ImageFolderDataset, read_image
from lightly_ext.transforms import STELLARTransform
from tests.lightly_ext.data.image_files import write_folder, write_image, write_noise


def _break(path: Path) -> Path:
    path.write_bytes(b"not an image")
    return path


class TestReadImage:
    @pytest.mark.parametrize("suffix", ["png", "bmp", "webp", "tif", "ppm", "TIFF"])
    def test_read_image__lossless_formats(self, tmp_path: Path, suffix: str) -> None:
        options = {"lossless": True} if suffix == "webp" else {}
        expected = write_noise(tmp_path / f"image.{suffix}", **options)
        actual = read_image(tmp_path / f"image.{suffix}")
        assert np.array_equal(actual.permute(1, 2, 0).numpy(), expected)

    @pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
    def test_read_image__jpeg_as_pillow_reads_it(
        self, tmp_path: Path, mode: str
    ) -> None:
        write_noise(tmp_path / "image.jpg", mode=mode, quality=90)
        expected = np.array(Image.open(tmp_path / "image.jpg").convert("RGB"))
        actual = read_image(tmp_path / "image.jpg").permute(1, 2, 0).numpy()
        assert np.abs(actual.astype(int) - expected).max() <= 1

    def test_read_image__without_torchvision_decoder(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write_noise(tmp_path / "image.jpg")
        expected = read_image(tmp_path / "image.jpg")
        monkeypatch.delattr("torchvision.io.decode_jpeg")
        actual = read_image(tmp_path / "image.jpg")
        assert int((actual.int() - expected.int()).abs().max()) <= 1

    @pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1"])
    def test_read_image__other_modes(self, tmp_path: Path, mode: str) -> None:
        expected = write_noise(tmp_path / "image.png", mode=mode)
        actual = read_image(tmp_path / "image.png").permute(1, 2, 0).numpy()
        assert np.array_equal(actual, expected)

    @pytest.mark.parametrize("suffix", ["png", "tif"])
    def test_read_image__sixteen_bits(self, tmp_path: Path, suffix: str) -> None:
        values = np.array([[0, 256, 65535], [511, 32768, 4096]], dtype=np.uint16)
        Image.fromarray(values).save(tmp_path / f"image.{suffix}")
        image = read_image(tmp_path / f"image.{suffix}")
        assert image.tolist() == [[[0, 1, 255], [1, 128, 16]]] * 3

    def test_read_image__first_frame_of_animation(self, tmp_path: Path) -> None:
        frames = [Image.new("RGB", (6, 4), color) for color in ("red", "blue")]
        frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
        image = read_image(tmp_path / "a.gif")
        assert image.shape == (3, 4, 6)
        assert image[:, 0, 0].tolist() == [255, 0, 0]

    @pytest.mark.parametrize("suffix", ["jpg", "png"])
    def test_read_image__exif_orientation(self, tmp_path: Path, suffix: str) -> None:
        values = np.zeros((32, 64, 3), dtype=np.uint8)
        values[:, :32] = 255  # the left half is white
        exif = Image.Exif()
        exif[0x0112] = 6  # to be turned by a quarter, clockwise
        Image.fromarray(values).save(tmp_path / f"a.{suffix}", exif=exif)
        image = read_image(tmp_path / f"a.{suffix}")
        assert image.shape == (3, 64, 32)
        assert float(image[:, :30].float().mean()) > 250
        assert float(image[:, 34:].float().mean()) < 5

    @pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
    @pytest.mark.parametrize("kept", [0.0, 0.01, 0.5])
    def test_read_image__truncated(
        self, tmp_path: Path, suffix: str, kept: float
    ) -> None:
        path = tmp_path / f"image.{suffix}"
        write_noise(path)
        assert read_image(path).shape[0] == 3  # as long as it is whole
        data = path.read_bytes()
        path.write_bytes(data[: int(kept * len(data))])
        with pytest.raises(Exception):  # noqa: B017 - whatever the decoder raises
            read_image(path)


class TestImageFolderDataset:
    def test_init__lists_nested_images_in_order(self, tmp_path: Path) -> None:
        names = ["b/x.JPG", "a/deep/er/1.png", "z.Jpeg", "a/0.bmp", "a/9.tiff"]
        for name in names:
            write_image(tmp_path / name)
        for other in ("notes.txt", ".hidden.png", ".cache/1.png", "c.npy"):
            (tmp_path / other).parent.mkdir(exist_ok=True)
            (tmp_path / other).write_bytes(b"")
        dataset = ImageFolderDataset(tmp_path)
        files = [dataset.file(i) for i in range(len(dataset))]
        expected = ["a/0.bmp", "a/9.tiff", "a/deep/er/1.png", "b/x.JPG", "z.Jpeg"]
        assert files == [tmp_path / name for name in expected]

    def test_init__follows_links_but_not_in_circles(self, tmp_path: Path) -> None:
        write_image(tmp_path / "elsewhere/1.png")
        write_image(tmp_path / "images/0.png")
        os.symlink(tmp_path / "elsewhere", tmp_path / "images/linked")
        os.symlink(tmp_path / "images", tmp_path / "images/circle")
        assert len(ImageFolderDataset(tmp_path / "images")) == 2

    def test_init__names_beyond_ascii(self, tmp_path: Path) -> None:
        write_image(tmp_path / "été/画像 1.png", value=7)
        image, index = ImageFolderDataset(tmp_path)[0]
        assert (int(image[0, 0, 0]), index) == (7, 0)

    def test_init__missing_folder(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"There is no folder .*nowhere"):
            ImageFolderDataset(tmp_path / "nowhere")

    def test_init__empty_folder(self, tmp_path: Path) -> None:
        (tmp_path / "readme.txt").write_text("no images")
        with pytest.raises(ValueError, match=r"no image below .*\.jpg, \.jpeg"):
            ImageFolderDataset(tmp_path)

    def test_getitem__index_or_label(self, tmp_path: Path) -> None:
        for number, name in enumerate(["cat/a/1.png", "dog/1.png", "cat/2.png"]):
            write_image(tmp_path / name, value=number)
        unlabelled = ImageFolderDataset(tmp_path)
        labelled = ImageFolderDataset(tmp_path, labelled=True)
        # Order: cat/2.png, cat/a/1.png, dog/1.png.
        values = [(int(image[0, 0, 0]), number) for image, number in unlabelled]
        assert values == [(2, 0), (0, 1), (1, 2)]
        assert labelled.classes == ["cat", "dog"]
        assert [label for _, label in labelled] == [0, 0, 1]
        assert labelled.labels is not None
        assert labelled.labels.tolist() == [0, 0, 1]

    def test_getitem__applies_transform(self, tmp_path: Path) -> None:
        transform = STELLARTransform(2, 3, global_crop_size=24, local_crop_size=12)
        dataset = ImageFolderDataset(write_folder(tmp_path), transform)
        views, index = dataset[3]
        assert index == 3
        assert [view.shape[-1] for view in views] == [24, 24, 12, 12, 12]
        assert {int(view[0].max()) for view in views} == {3}

    def test_getitem__errors_of_the_transform_are_not_hidden(
        self, tmp_path: Path
    ) -> None:
        def fail(image: Tensor) -> Tensor:
            raise RuntimeError("bug")

        dataset = ImageFolderDataset(write_folder(tmp_path), transform=fail)
        with pytest.raises(RuntimeError, match="bug"):
            dataset[0]
        assert dataset.num_unreadable == 0

    def test_getitem__outside(self, tmp_path: Path) -> None:
        dataset = ImageFolderDataset(write_folder(tmp_path))
        for index in (-1, 8):
            with pytest.raises(IndexError, match="among 8"):
                dataset[index]

    def test_init__image_outside_of_class(self, tmp_path: Path) -> None:
        write_image(tmp_path / "cat/1.png")
        write_image(tmp_path / "stray.png")
        with pytest.raises(ValueError, match=r"stray\.png does not"):
            ImageFolderDataset(tmp_path, labelled=True)

    def test_getitem__next_readable_takes_the_place(self, tmp_path: Path) -> None:
        dataset = ImageFolderDataset(write_folder(tmp_path))
        broken = [_break(dataset.file(i)) for i in (3, 4, 7)]
        with pytest.warns(UserWarning, match=r"unreadable image .*003\.png"):
            assert dataset[3][1] == 5
        with pytest.warns(UserWarning, match=r"007\.png"):
            assert dataset[7][1] == 0  # the first one follows the last one
        assert dataset.num_unreadable == 3
        assert dataset.unreadable_files() == broken

    def test_getitem__reads_a_broken_file_once(self, tmp_path: Path) -> None:
        dataset = ImageFolderDataset(write_folder(tmp_path))
        _break(dataset.file(2))
        with pytest.warns(UserWarning):
            assert dataset[2][1] == 3
        write_image(dataset.file(2))  # would be readable now
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert dataset[2][1] == 3
        assert dataset.num_unreadable == 1

    def test_getitem__counts_across_workers(self, tmp_path: Path) -> None:
        dataset = ImageFolderDataset(write_folder(tmp_path, 40))
        broken = [_break(dataset.file(i)) for i in (0, 1, 13, 26, 39)]
        loader = DataLoader(dataset, batch_size=4, num_workers=2)
        for _ in range(2):
            indices = torch.cat([index for _, index in loader])
            assert len(indices) == 40
            assert not {0, 1, 13, 26, 39} & set(indices.tolist())
            assert dataset.num_unreadable == 5
        assert dataset.unreadable_files() == broken

    def test_getitem__all_broken(self, tmp_path: Path) -> None:
        dataset = ImageFolderDataset(write_folder(tmp_path, 3))
        for index in range(3):
            _break(dataset.file(index))
        with (
            pytest.warns(UserWarning),
            pytest.raises(RuntimeError, match=r"3 of 3 images below .*unreadable"),
        ):
            dataset[0]
        with pytest.raises(RuntimeError, match="None of the 3 images"):
            dataset[1]

    @pytest.mark.parametrize(("size", "tolerated"), [(150, 100), (2400, 120)])
    def test_getitem__too_many_broken(
        self, tmp_path: Path, size: int, tolerated: int
    ) -> None:
        write_image(tmp_path / "image.png")
        for number in range(size - 1):
            (tmp_path / f"{number:04}.png").write_bytes(b"")
        dataset = ImageFolderDataset(tmp_path)
        with (
            pytest.warns(UserWarning) as record,
            pytest.raises(RuntimeError, match=f"{tolerated + 1} of {size} images"),
        ):
            dataset[0]
        assert len(record) == tolerated

    def test_getitem__unreachable_files_are_unreadable(self, tmp_path: Path) -> None:
        dataset = ImageFolderDataset(write_folder(tmp_path))
        dataset.file(0).unlink()
        with pytest.warns(UserWarning, match="FileNotFoundError"):
            assert dataset[0][1] == 1
