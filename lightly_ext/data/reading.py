"""Reading of image files, of which any may be broken or not what it says."""

from __future__ import annotations

import contextlib
import io
import os
import stat
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor

from lightly_ext.data.jpeg import jpeg_decoder
from lightly_ext.data.listing import printable
from stellar_plugin.image_conversion import to_uint8_rgb

# Pillow's own limit.
MAX_PIXELS = 178_956_970
# Images have thousands; millions look for one, byte by byte, in terabytes of zeros.
_MAX_READS = 2**20
# What lies behind is no part of the image, and a sparse file may have terabytes.
_MAX_JPEG_BYTES = 2**28
# No others: Pillow starts Ghostscript for an EPS file, whatever its name is.
_FORMATS = (
    "JPEG",
    "PNG",
    "BMP",
    "DIB",
    "GIF",
    "WEBP",
    "TIFF",
    "PPM",
    "AVIF",
    "JPEG2000",
)
Image.init()
FORMATS = [name for name in _FORMATS if name in Image.OPEN]  # Pillow lacks some

# A process has one standard error.
_LOCK = threading.Lock()

# Corrupt metadata of images that are read all the same: a warning for each of them.
for category in (UserWarning, Image.DecompressionBombWarning):
    warnings.filterwarnings("ignore", category=category, module=r"PIL\.")


def read_image(source: Path | bytes, max_pixels: int = MAX_PIXELS) -> Tensor:
    """Reads an image of the formats that `FORMATS` lists, whatever its suffix.

    The EXIF orientation is applied, transparency is dropped, 16 bits become 8, of an
    animation the first frame is taken.

    Args:
        source:
            The file, or what is in one.
        max_pixels:
            Images that say to be larger are not decoded.

    Returns:
        uint8 RGB tensor with shape (3, H, W).

    Raises:
        ValueError: If the image has more than `max_pixels`.
        Exception: Whatever the decoders raise when the file is broken.

    """
    with _opened(source, max_pixels) as (file, image):
        is_jpeg = image.format in ("JPEG", "MPO")
        if is_jpeg and (decode := jpeg_decoder().decode) is not None:
            file.seek(0)
            data = torch.frombuffer(
                bytearray(file.read(_MAX_JPEG_BYTES)), dtype=torch.uint8
            )
            # Pillow reads more kinds of files than the others.
            with contextlib.suppress(RuntimeError):
                return decode(data)
        ImageOps.exif_transpose(image, in_place=True)
        return to_uint8_rgb(image)


def image_size(
    source: Path | bytes, max_pixels: int = MAX_PIXELS
) -> tuple[int, int] | None:
    """Width and height of an image, by its header; None if it cannot be read.

    Args:
        source:
            The file, or what is in one.
        max_pixels:
            Images that say to be larger are not read.
    """
    try:
        with _opened(source, max_pixels) as (_, image):
            return image.size
    except Exception:  # decoders raise anything on broken files
        return None


@contextlib.contextmanager
def _opened(
    source: Path | bytes, max_pixels: int
) -> Iterator[tuple[_Reader, Image.Image]]:
    """A file and the image in it, of which only the header is read."""
    raw: Any
    if isinstance(source, bytes):
        raw = io.BytesIO(source)
    elif stat.S_ISREG(os.stat(source).st_mode):
        raw = io.FileIO(source)
    else:  # opening a pipe would wait
        raise OSError(f"{printable(source)} is no regular file.")
    if max_pixels > MAX_PIXELS:  # Pillow's has to follow
        Image.MAX_IMAGE_PIXELS = max_pixels
    with (
        _Reader(raw) as file,
        _silent_decoders(),
        Image.open(file, formats=FORMATS) as image,
    ):
        width, height = image.size
        if width * height > max_pixels:
            raise ValueError(
                f"{width} x {height} pixels are more than max_pixels={max_pixels}."
            )
        yield file, image


class _Reader(io.BufferedReader):
    """A file that is not read forever."""

    reads = 0

    def read(self, size: int | None = -1, /) -> bytes:
        self.reads += 1
        if self.reads > _MAX_READS:
            raise OSError(f"There is no image in the first {self.tell()} bytes.")
        return super().read(size)

    def __repr__(self) -> str:  # in messages of Pillow
        name = getattr(self.raw, "name", None)
        shown = f"'{printable(name)}' " if name else ""
        return f"{shown}of {self.seek(0, io.SEEK_END)} bytes"


@contextlib.contextmanager
def _silent_decoders() -> Iterator[None]:
    """Libraries in C print a line for each broken one of an image."""
    with _LOCK, open(os.devnull, "wb") as nowhere:
        kept = os.dup(2)
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
