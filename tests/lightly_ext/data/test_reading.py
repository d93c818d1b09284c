from __future__ import annotations

import importlib
import os
import resource
import struct
import warnings
import zlib
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, UnidentifiedImageError

from lightly_ext.data import read_image, reading
from tests.lightly_ext.data.image_files import write_noise

HUGE = (30_000, 20_000)


def _png(size: tuple[int, int]) -> bytes:
    """A black image of which the first lines are there."""
    chunks = (
        b"IHDR" + struct.pack(">IIBBBBB", *size, 8, 2, 0, 0, 0),
        b"IDAT" + zlib.compress(bytes(2000)),
        b"IEND",
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c))
        for c in chunks
    )


def _says_huge(path: Path) -> None:
    """Writes a small file of the suffix that says to hold a huge image."""
    suffix = path.suffix[1:]
    if suffix == "png":
        path.write_bytes(_png(HUGE))
        return
    if suffix == "ppm":
        path.write_bytes(b"P6 30000 20000 255 " + bytes(100))
        return
    write_noise(path)
    data = path.read_bytes()
    small, huge = {
        "jpg": (struct.pack(">HH", 48, 64), struct.pack(">HH", *HUGE[::-1])),
        "bmp": (struct.pack("<ii", 64, 48), struct.pack("<ii", *HUGE)),
        "gif": (struct.pack("<HH", 64, 48), struct.pack("<HH", *HUGE)),
        "tif": (
            struct.pack("<HHIIHHII", 256, 4, 1, 64, 257, 4, 1, 48),
            struct.pack("<HHIIHHII", 256, 4, 1, HUGE[0], 257, 4, 1, HUGE[1]),
        ),
        "jp2": (struct.pack(">II", 48, 64), struct.pack(">II", *HUGE[::-1])),
        "avif": (struct.pack(">II", 64, 48), struct.pack(">II", *HUGE)),
    }[suffix]
    assert small in data
    path.write_bytes(data.replace(small, huge))


class TestReadImage:
    @pytest.mark.parametrize(
        "suffix", ["jpg", "png", "bmp", "gif", "tif", "ppm", "jp2", "avif"]
    )
    def test_read_image__says_to_be_huge(self, tmp_path: Path, suffix: str) -> None:
        path = tmp_path / f"image.{suffix}"
        _says_huge(path)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with pytest.raises(
            (ValueError, Image.DecompressionBombError, UnidentifiedImageError),
            match=r"600000000 pixels|cannot identify.*avif",
        ):
            read_image(path)
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        assert after - before < 50_000  # KiB; the image has 1.8 GB

    def test_read_image__no_image_says_what_was_read(self, tmp_path: Path) -> None:
        with pytest.raises(UnidentifiedImageError, match=r"file of 5 bytes$"):
            read_image(b"hello")
        (tmp_path / "a\nb.jpg").touch()
        with pytest.raises(UnidentifiedImageError, match=r"a\\nb.jpg' of 0 bytes$"):
            read_image(tmp_path / "a\nb.jpg")

    def test_read_image__limit_of_pixels(self, tmp_path: Path) -> None:
        for suffix in ("jpg", "png"):
            write_noise(tmp_path / f"image.{suffix}")
            path = tmp_path / f"image.{suffix}"
            assert read_image(path, max_pixels=64 * 48).shape == (3, 48, 64)
            with pytest.raises(ValueError, match=r"64 x 48 pixels .*max_pixels=3071"):
                read_image(path, max_pixels=64 * 48 - 1)

    def test_read_image__terabytes_behind_the_image(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("lightly_ext.data.reading._MAX_JPEG_BYTES", 2**20)
        write_noise(tmp_path / "image.jpg")
        expected = read_image(tmp_path / "image.jpg")
        with (tmp_path / "image.jpg").open("r+b") as file:
            file.truncate(2**42)
        assert torch.equal(read_image(tmp_path / "image.jpg"), expected)

    @pytest.mark.parametrize("start", [b"\xff\xd8\xff", b"P6 #"])
    def test_read_image__terabytes_without_image(
        self, tmp_path: Path, start: bytes
    ) -> None:
        (tmp_path / "image.jpg").write_bytes(start)
        os.truncate(tmp_path / "image.jpg", 2**42)
        with pytest.raises(OSError, match=r"no image in the first 104857\d bytes"):
            read_image(tmp_path / "image.jpg")

    def test_read_image__frame_larger_than_its_canvas(self, tmp_path: Path) -> None:
        path = tmp_path / "a.gif"
        Image.new("P", (4, 4)).save(path)
        data = path.read_bytes()
        place = data.index(b"\x2c\0\0\0\0") + 5
        path.write_bytes(data[:place] + struct.pack("<HH", *HUGE) + data[place + 4 :])
        with pytest.raises(Image.DecompressionBombError):
            read_image(path)

    def test_read_image__limit_above_that_of_pillow(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # an error beyond 2000
        monkeypatch.setattr("lightly_ext.data.reading.MAX_PIXELS", 2000)
        write_noise(tmp_path / "image.png")
        with pytest.raises(Image.DecompressionBombError):
            read_image(tmp_path / "image.png", max_pixels=2000)
        assert read_image(tmp_path / "image.png", max_pixels=4000).shape[0] == 3

    @pytest.mark.parametrize("name", ["image.png", "image.jpg"])
    def test_read_image__starts_no_program(self, tmp_path: Path, name: str) -> None:
        image = Image.new("RGB", (8, 8))
        image.save(tmp_path / name, format="EPS")
        with pytest.raises(UnidentifiedImageError):
            read_image(tmp_path / name)

    def test_read_image__corrupt_metadata_is_no_news(self, tmp_path: Path) -> None:
        path = tmp_path / "image.png"
        Image.new("RGB", (8, 8)).save(path, exif=b"Exif\0\0II*\0\x08\0\0\0\x09\0x")
        with warnings.catch_warnings(record=True) as record:
            warnings.simplefilter("always")
            assert read_image(path).shape == (3, 8, 8)
            assert len(record) > 0
            importlib.reload(reading)  # tests forget the filters of imports
            record.clear()
            assert reading.read_image(path).shape == (3, 8, 8)
        assert not record

    @pytest.mark.parametrize("suffix", ["tif", "jpg"])
    def test_read_image__decoders_are_silent(
        self,
        tmp_path: Path,
        suffix: str,
        capfd: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        path = tmp_path / f"image.{suffix}"
        if suffix == "tif":
            write_noise(path, mode="1", compression="group4")
            data = path.read_bytes()
            path.write_bytes(data[:300] + b"\xff" * 30 + data[330:])
        else:
            write_noise(path)
            data = path.read_bytes()
            path.write_bytes(data[:-2] + bytes(30) + data[-2:])
        for silent in (True, False):
            if not silent:
                monkeypatch.setattr(reading, "_silent_decoders", nullcontext)
            assert reading.read_image(path).shape == (3, 48, 64)
            heard = capfd.readouterr().err
            assert (heard == "") == silent
            os.write(2, b"what others say")
            assert capfd.readouterr().err == "what others say"

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
