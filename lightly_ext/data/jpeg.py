"""The decoder of JPEG files: the fastest that is installed and works."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

import torch
import torchvision
from PIL import Image
from torch import Tensor

# Its name beside versions: pixels differ by rounding.
JPEG_DECODER = "JPEG decoder"


class JpegDecoder(NamedTuple):
    """What decodes JPEG files.

    Attributes:
        package:
            Name of the package.
        decode:
            Returns a uint8 RGB tensor with shape (3, H, W), turned by its EXIF
            orientation, of the bytes of a file, a uint8 tensor with shape (n,). Raises
            RuntimeError if it cannot. None for Pillow, which reads what the others
            cannot.
    """

    package: str
    decode: Callable[[Tensor], Tensor] | None

    def __str__(self) -> str:
        """Name and, where it is told, version."""
        try:
            return f"{self.package} {version(self.package)}"
        except PackageNotFoundError:  # installed under another name, as pillow-simd is
            return self.package

    def works(self) -> bool:
        """Whether it is installed and decodes."""
        try:
            return self.decode is None or self.decode(_small_jpeg()).shape == (3, 8, 8)
        except Exception:  # broken installations raise anything
            return False


@functools.cache
def jpeg_decoder() -> JpegDecoder:
    """Returns the first of `DECODERS` that works."""
    return next(decoder for decoder in DECODERS if decoder.works())


def _by_torchcodec(data: Tensor) -> Tensor:
    from torchcodec.decoders import decode_jpeg  # takes a moment

    return decode_jpeg(data)  # type: ignore[return-value] # of one file


def _by_torchvision(data: Tensor) -> Tensor:
    return torchvision.io.decode_jpeg(data, mode="RGB", apply_exif_orientation=True)


def _small_jpeg() -> Tensor:
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "JPEG")
    return torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)


# Their pixels are equal within rounding. torchcodec decodes images from 0.16 on,
# torchvision announces the removal of its decoders.
DECODERS = (
    JpegDecoder("torchcodec", _by_torchcodec),
    JpegDecoder("torchvision", _by_torchvision),
    JpegDecoder("pillow", None),
)
