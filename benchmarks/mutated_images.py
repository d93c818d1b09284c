"""Does any broken image end, hang or bloat the reading of a folder?

Makes images of many formats, breaks them (flipped bits, truncation, lost and repeated
pieces, extremes in headers, concatenations, wrong suffixes) and reads each through
`ImageFolderDataset` with the views of pretraining, in a process that may crash. Right
is an image that is read, or skipped with a warning that names it. Prints a Markdown
table per format, the slowest and the largest. The same count and seed make the same
files. Run with `python benchmarks/mutated_images.py --count 10000 --seed 0`.
"""

from __future__ import annotations

import argparse
import io
import multiprocessing
import random
import re
import struct
import sys
import tempfile
import time
import warnings
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, features

from lightly_ext.data import ImageFolderDataset
from lightly_ext.transforms import STELLARTransform

SECONDS = 60.0
MEGABYTES = 3000.0  # an image of 178 million pixels and what is made of it
SIZE = (96, 64)


@dataclass(frozen=True)
class Outcome:
    """What became of one file.

    Attributes:
        number: Number of the file.
        format: Format that was broken.
        result: "read", an exception's name if it was skipped, or "WRONG: ...".
        seconds: How long it took.
        megabytes: How much memory it took beyond what the process has.
    """

    number: int
    format: str
    result: str
    seconds: float
    megabytes: float

    @property
    def right(self) -> bool:
        """Whether it was read or skipped as promised."""
        return not self.result.startswith("WRONG")


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


def read_all(seed: int, count: int) -> Iterator[Outcome]:
    """Reads mutated images, in a process that may crash or hang."""
    files = originals()
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        worker, pipe = _start(context, Path(folder))
        for number in range(count):
            name, suffix, data = mutated(files, seed, number)
            start = time.perf_counter()
            pipe.send((suffix, data))
            try:
                if not pipe.poll(SECONDS):
                    raise TimeoutError
                result, megabytes = pipe.recv()
            except (EOFError, TimeoutError) as error:
                worker.kill()
                worker.join()
                hung = isinstance(error, TimeoutError)
                ended = f"no end in {SECONDS} s" if hung else f"exit {worker.exitcode}"
                result, megabytes = f"WRONG: {ended}", 0.0
                worker, pipe = _start(context, Path(folder))
            if megabytes > MEGABYTES:
                result = f"WRONG: took {megabytes:.0f} MB"
            yield Outcome(number, name, result, time.perf_counter() - start, megabytes)
        pipe.send(None)
        worker.join()


def _start(context: Any, folder: Path) -> tuple[Any, Connection]:
    ours, theirs = context.Pipe()
    worker = context.Process(target=_work, args=(theirs, folder), daemon=True)
    worker.start()
    theirs.close()
    return worker, ours


def _work(pipe: Connection, folder: Path) -> None:
    torch.set_num_threads(1)
    transform = STELLARTransform()
    while (job := pipe.recv()) is not None:
        for path in folder.iterdir():
            path.unlink()
        suffix, data = job
        (folder / f"a.{suffix}").write_bytes(data)
        Image.new("RGB", (8, 8)).save(folder / "good.png")
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
        before = _peak_megabytes()
        result = _read(ImageFolderDataset(folder, transform))
        pipe.send((result, _peak_megabytes() - before))


def _read(dataset: ImageFolderDataset) -> str:
    with warnings.catch_warnings(record=True) as record:
        try:
            views, index = dataset[0]
        except BaseException as error:
            return f"WRONG: raised {type(error).__name__}: {error}"
    if {view.dtype for view in views} != {torch.uint8} or len(views) != 16:
        return "WRONG: no views"
    said = [str(w.message) for w in record]
    if index == 0:
        return f"WRONG: said {said[0]}" if said else "read"
    found = re.fullmatch(
        rf"Skipping unreadable image {dataset.file(0)} \((\w+): .*\)\.", said[0]
    )
    return found[1] if found and len(said) == 1 else f"WRONG: said {said}"


def _peak_megabytes() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


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


def table(outcomes: list[Outcome]) -> str:
    """Markdown of what became of all of them."""
    groups = defaultdict(list)
    for outcome in outcomes:
        groups[outcome.format].append(outcome)
    lines = [
        "| format | tried | right | read | slowest (s) | largest (MB) |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, group in [*groups.items(), ("all", outcomes)]:
        right, read = (
            sum(o.right for o in group),
            sum(o.result == "read" for o in group),
        )
        slowest, largest = (
            max(o.seconds for o in group),
            max(o.megabytes for o in group),
        )
        cells = (name, len(group), right, read, f"{slowest:.2f}", f"{largest:.0f}")
        lines.append(f"| {' | '.join(map(str, cells))} |")
    results = Counter(o.result for o in outcomes if o.right)
    lines += ["", ", ".join(f"{n} {result}" for result, n in results.most_common())]
    for what, key in (("Slowest", "seconds"), ("Largest", "megabytes")):
        last = sorted(outcomes, key=lambda o: -getattr(o, key))[:3]
        lines += [f"{what}: {o}" for o in last]
    return "\n".join([*lines, *(f"Not right: {o}" for o in outcomes if not o.right)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    outcomes = []
    for outcome in read_all(arguments.seed, arguments.count):
        outcomes.append(outcome)
        if not outcome.right:
            print(outcome, file=sys.stderr, flush=True)
    print(table(outcomes))
    sys.exit(not all(outcome.right for outcome in outcomes))


if __name__ == "__main__":
    main()
