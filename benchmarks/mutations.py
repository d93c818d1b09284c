"""Images of many formats, and broken ones made of them."""

from __future__ import annotations

import io
import random
import re
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image, features

SIZE = (96, 64)


def originals() -> dict[str, bytes]:
    """Whole images, by "suffix kind"."""
    smooth = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    rgb = Image.fromarray(smooth).resize(SIZE, Image.Resampling.BICUBIC)
    gray, bilevel, palette = rgb.convert("L"), rgb.convert("1"), rgb.convert("P")
    deep = Image.fromarray(np.array(gray).astype(np.uint16) * 257)
    exif = Image.Exif()
    exif.update({0x0112: 6, 0x010F: "maker"})
    turned = rgb.transpose(Image.Transpose.FLIP_TOP_BOTTOM)

    def frames() -> dict[str, Any]:
        # Copies: Pillow keeps what it saved with in the image.
        return {"save_all": True, "append_images": [turned.copy(), rgb.copy()]}

    made: dict[str, tuple[Image.Image, str, dict[str, Any]]] = {
        "jpg baseline": (rgb, "JPEG", {}),
        "jpg progressive": (rgb, "JPEG", {"progressive": True}),
        "jpg 4:4:4, restarts": (
            rgb,
            "JPEG",
            {"subsampling": 0, "restart_marker_rows": 1},
        ),
        "jpg CMYK": (rgb.convert("CMYK"), "JPEG", {}),
        "jpg gray": (gray, "JPEG", {}),
        "jpg EXIF": (rgb, "JPEG", {"exif": exif}),
        "jpg MPO": (rgb, "MPO", frames()),
        "png RGB": (rgb, "PNG", {}),
        "png RGBA": (rgb.convert("RGBA"), "PNG", {"exif": exif}),
        "png 1 bit": (bilevel, "PNG", {}),
        "png 16 bits": (deep, "PNG", {}),
        "png palette": (palette, "PNG", {"transparency": 3}),
        "png animated": (rgb, "PNG", frames()),
        "gif": (palette, "GIF", {}),
        "gif animated": (rgb, "GIF", frames()),
        "bmp": (rgb, "BMP", {}),
        "bmp palette": (palette, "BMP", {}),
        "webp lossy": (rgb, "WEBP", {"exif": exif}),
        "webp lossless": (rgb, "WEBP", {"lossless": True}),
        "webp animated": (rgb, "WEBP", frames()),
        "tif raw": (rgb, "TIFF", {"exif": exif}),
        "tif LZW": (rgb, "TIFF", {"compression": "tiff_lzw"}),
        "tif deflate": (palette, "TIFF", {"compression": "tiff_adobe_deflate"}),
        "tif JPEG": (rgb, "TIFF", {"compression": "jpeg"}),
        "tif packbits": (gray, "TIFF", {"compression": "packbits"}),
        "tif group 4": (bilevel, "TIFF", {"compression": "group4"}),
        "tif 16 bits": (deep, "TIFF", {}),
        "tif pages": (rgb, "TIFF", frames()),
        "ppm": (rgb, "PPM", {}),
        "pgm": (gray, "PPM", {}),
        "pbm": (bilevel, "PPM", {}),
    }
    if features.check("avif"):
        made["avif"] = (rgb, "AVIF", {"exif": exif})
        made["avif animated"] = (rgb, "AVIF", frames())
    if features.check("jpg_2000"):
        made["jp2"] = (rgb, "JPEG2000", {})
        made["j2k tiles"] = (rgb, "JPEG2000", {"no_jp2": True, "tile_size": (32, 32)})
    files = {"png interlaced": _interlaced(np.array(rgb))}
    for name, (image, format_name, options) in made.items():
        buffer = io.BytesIO()
        image.copy().save(buffer, format_name, **options)
        files[name] = buffer.getvalue()
    return files


def mutated(files: dict[str, bytes], seed: int, number: int) -> tuple[str, str, bytes]:
    """Makes a broken image.

    Args:
        files:
            Whole images, see `originals`.
        seed:
            Decides on all of them.
        number:
            Number of the image; formats take turns.

    Returns:
        Its format, its suffix and its bytes.
    """
    draw = random.Random(f"{seed}/{number}")
    name = list(files)[number % len(files)]
    suffix, data = name.split()[0], files[name]
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        data = draw.choice(MUTATIONS)(data, draw)
    if draw.random() < 0.1:
        data += draw.choice(list(files.values()))
    if data.startswith(b"\x89PNG") and draw.random() < 0.7:
        data = _with_checksums(data)
    if draw.random() < 0.1:
        suffix = draw.choice(list(files)).split()[0]
    return name, suffix, data


def _flip_bits(data: bytes, draw: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(draw.choice((1, 4, 16)) if data else 0):
        changed[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def _set_extremes(data: bytes, draw: random.Random) -> bytes:
    """Sets a number, most often in the header, to what nobody expects."""
    size = draw.choice((1, 2, 4))
    end = draw.choice((32, 200, len(data)))
    at = draw.randrange(max(1, min(end, len(data)) - size))
    ends = (b"\0" * size, b"\xff" * size, b"\x7f" + b"\xff" * (size - 1))
    values = (*ends, b"\0" * (size - 1) + b"\1", b"\x40" + b"\0" * (size - 1))
    value = draw.choice(values)[:: draw.choice((1, -1))]
    return data[:at] + value + data[at + size :]


def _set_numbers_of_text(data: bytes, draw: random.Random) -> bytes:
    """Sets a number that is written as text; PPM has no others."""
    value = draw.choice((b"0", b"1", b"-1", b"65535", b"20000", b"9" * 30))
    found = list(re.finditer(rb"\d+", data[:40]))
    if not found:
        return _set_extremes(data, draw)
    start, stop = draw.choice(found).span()
    return data[:start] + value + data[stop:]


def _truncate(data: bytes, draw: random.Random) -> bytes:
    return data[: draw.randrange(len(data) + 1)]


def _remove(data: bytes, draw: random.Random) -> bytes:
    start, stop = _piece(data, draw)
    return data[:start] + data[stop:]


def _repeat(data: bytes, draw: random.Random) -> bytes:
    start, stop = _piece(data, draw)
    return data[:stop] + data[start:stop] * draw.choice((1, 2, 50)) + data[stop:]


def _scramble(data: bytes, draw: random.Random) -> bytes:
    start, stop = _piece(data, draw)
    return data[:start] + draw.randbytes(stop - start) + data[stop:]


def _piece(data: bytes, draw: random.Random) -> tuple[int, int]:
    """A piece of any size, or one that starts where segments and chunks do."""
    marks = [m.start() for m in re.finditer(rb"\xff[\xc0-\xfe]|[A-Za-z]{4}", data)]
    if marks and draw.random() < 0.5:
        return tuple(sorted(draw.choices([*marks, len(data)], k=2)))  # type: ignore[return-value]
    start = draw.randrange(len(data) + 1)
    return start, min(len(data), start + draw.choice((1, 4, 12, 100, 1000)))


MUTATIONS: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    *(_flip_bits, _set_extremes, _set_extremes, _set_numbers_of_text),
    *(_truncate, _remove, _repeat, _scramble),
)


def _interlaced(image: np.ndarray) -> bytes:
    """A PNG file in Adam7's seven passes, which Pillow reads but does not write."""
    height, width = image.shape[:2]
    passes = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2))
    rows = b"".join(
        b"\0" + row.tobytes()
        for y, x, dy, dx in (*passes, (0, 1, 2, 2), (1, 0, 2, 1))
        for row in image[y::dy, x::dx]
    )
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 1)
    bodies = (b"IHDR" + header, b"IDAT" + zlib.compress(rows), b"IEND")
    return _with_checksums(
        b"\x89PNG\r\n\x1a\n"
        + b"".join(struct.pack(">I", len(b) - 4) + b + bytes(4) for b in bodies)
    )


def _with_checksums(data: bytes) -> bytes:
    """A PNG file whose chunks have the checksums they should have."""
    fixed, at = data[:8], 8
    while at + 12 <= len(data):
        stop = at + 8 + int.from_bytes(data[at : at + 4], "big")
        if stop + 4 > len(data):
            break
        body = data[at + 4 : stop]
        fixed += data[at : at + 4] + body + struct.pack(">I", zlib.crc32(body))
        at = stop + 4
    return fixed + data[at:]
