from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from importlib.metadata import version
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from benchmarks.mutations import mutated, originals
from lightly_ext.data import ImageFolderDataset, jpeg_decoder, read_image, reading
from lightly_ext.data.jpeg import DECODERS, JpegDecoder
from tests.lightly_ext.data.image_files import write_noise


@pytest.fixture(autouse=True)
def chosen_anew() -> Iterator[None]:
    jpeg_decoder.cache_clear()
    yield
    jpeg_decoder.cache_clear()


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Smooth colours with edges, as photos have them."""
    shape = (-(-height // 6), -(-width // 6), 3)
    values = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    image = Image.fromarray(values).resize((width, height), Image.Resampling.BICUBIC)
    return image.convert(mode)


def encoded(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(picture(61, 43), exif=exif)


FILES = {
    "colour": encoded(picture(96, 64)),
    "gray": encoded(picture(96, 64, "L")),
    "CMYK": encoded(picture(96, 64, "CMYK")),
    "progressive": encoded(picture(96, 64), progressive=True),
    "coarse colours": encoded(picture(96, 64), quality=20, subsampling=2),
    "restarts": encoded(picture(96, 64), restart_marker_blocks=3),
    "odd": encoded(picture(61, 43), subsampling=2),
    "one pixel": encoded(picture(1, 1)),
    "MPO": encoded(
        picture(96, 64), "MPO", save_all=True, append_images=[picture(48, 32)]
    ),
    **{f"orientation {number}": turned(number) for number in range(1, 9)},
}


class TestDecoders:
    @pytest.mark.parametrize("decoder", DECODERS, ids=str)
    @pytest.mark.parametrize("name", FILES)
    def test_decoders__equal(
        self, name: str, decoder: JpegDecoder, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(reading, "jpeg_decoder", lambda: decoder)
        image = Image.open(io.BytesIO(FILES[name]))
        expected = np.array(ImageOps.exif_transpose(image).convert("RGB"))
        actual = read_image(FILES[name])
        assert actual.dtype == torch.uint8
        # Libraries of other versions round otherwise; here they agree bit by bit.
        difference = actual.permute(1, 2, 0).numpy().astype(int) - expected
        assert np.abs(difference).max() <= 1

    @pytest.mark.parametrize("decoder", DECODERS, ids=str)
    @pytest.mark.parametrize("kept", [20, 300, -200])
    def test_decoders__refuse_what_is_cut_off(
        self, kept: int, decoder: JpegDecoder, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(reading, "jpeg_decoder", lambda: decoder)
        with pytest.raises(OSError):
            read_image(FILES["colour"][:kept])

    def test_decoders__pillow_reads_what_the_chosen_one_refuses(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(data: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("no")

        decoder = JpegDecoder("torchcodec", refuse)
        monkeypatch.setattr(reading, "jpeg_decoder", lambda: decoder)
        expected = np.array(Image.open(io.BytesIO(FILES["colour"])))
        actual = read_image(FILES["colour"])
        assert np.array_equal(actual.permute(1, 2, 0).numpy(), expected)

    def test_decoders__read_the_same_broken_files(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        whole = {k: v for k, v in originals().items() if k.startswith("jpg")}
        del whole["jpg EXIF"]  # Pillow may turn what the others do not
        files = [mutated(whole, 0, number)[2] for number in range(100)]
        found: list[list[torch.Tensor | None]] = []
        for decoder in DECODERS:
            monkeypatch.setattr(reading, "jpeg_decoder", lambda d=decoder: d)
            found.append([image_or_none(data) for data in files])
        read = [image is not None for image in found[0]]
        assert 20 < sum(read) < 80
        for images in found:
            assert [image is not None for image in images] == read
            for a, b in zip(images, found[0], strict=True):
                if a is not None and b is not None:
                    assert int((a.int() - b.int()).abs().max()) <= 1


def image_or_none(data: bytes) -> torch.Tensor | None:
    try:
        return read_image(data, max_pixels=10**6)
    except Exception:  # decoders raise anything
        return None


class TestJpegDecoder:
    def test_jpeg_decoder__the_first_that_works(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert str(jpeg_decoder()) == f"torchcodec {version('torchcodec')}"
        monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
        assert jpeg_decoder().package == "torchcodec"  # chosen once
        jpeg_decoder.cache_clear()
        assert jpeg_decoder().package == "torchvision"
        monkeypatch.delattr("torchvision.io.decode_jpeg")
        jpeg_decoder.cache_clear()
        assert jpeg_decoder() == ("pillow", None)
        assert str(jpeg_decoder()) == f"pillow {version('pillow')}"

    @pytest.mark.parametrize("broken", [None, RuntimeError, OSError])
    def test_jpeg_decoder__old_or_broken_torchcodec(
        self, broken: type[Exception] | None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        module = ModuleType("torchcodec.decoders")  # as before 0.16
        if broken is not None:

            def __getattr__(name: str) -> Any:
                raise broken("libavutil.so: cannot open shared object file")

            module.__getattr__ = __getattr__
        monkeypatch.setitem(sys.modules, "torchcodec.decoders", module)
        assert jpeg_decoder().package == "torchvision"

    def test_str__under_another_name(self) -> None:
        assert str(JpegDecoder("pillow-of-nobody", None)) == "pillow-of-nobody"

    def test_jpeg_decoder__in_workers(self, tmp_path: Any) -> None:
        for number in range(4):
            write_noise(tmp_path / f"{number}.jpg", quality=90 - number)
        dataset = ImageFolderDataset(tmp_path)
        expected = [image for image, _ in dataset]
        loader = torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=2)
        found = [image for image, _ in loader]
        assert all(map(torch.equal, found, expected))
