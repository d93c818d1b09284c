"""Whether an exported file computes what the model does, on images."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from stellar_plugin.encoder import StellarEncoder
from stellar_plugin.image_transform import ImageTransform
from stellar_plugin.onnx import outputs_of

logger = logging.getLogger(__name__)

# Largest difference that passes, as a share of the largest value of an output.
TOLERANCE = 1e-4
HALF_TOLERANCE = 1e-2
MAX_IMAGES = 8
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
# Height and width in px of the photos that are made up.
MADE_UP = ((480, 640), (640, 480), (512, 512), (300, 800))


class Difference(NamedTuple):
    """How far an output of the file is from the model's.

    Attributes:
        size: Height and width of the images in px.
        output: Its name.
        largest: Largest difference, of absolute values.
        mean: Mean difference.
        share: Largest difference over the largest value of the output.
    """

    size: tuple[int, int]
    output: str
    largest: float
    mean: float
    share: float


def check_onnx(
    path: Path,
    encoder: StellarEncoder,
    photos: Sequence[Image.Image],
    sizes: Sequence[tuple[int, int]],
    mean: Sequence[float],
    std: Sequence[float],
) -> list[Difference]:
    """Compares a file with the encoder that it was made of, on a CPU in float32.

    Args:
        path:
            What `export_onnx` wrote.
        encoder:
            The encoder in evaluation mode.
        photos:
            Images of any size.
        sizes:
            Heights and widths that they are brought to.
        mean:
            Per-channel mean that the encoder expects, of [0, 1] intensities.
        std:
            Per-channel standard deviation.

    Returns:
        A row per size and output.

    Raises:
        ImportError: If onnxruntime is missing.
        RuntimeError: If the file does not run.
    """
    if find_spec("onnxruntime") is None:
        raise ImportError(
            "Checking a file needs onnxruntime: pip install 'stellar-plugin[export]'"
        )
    import onnxruntime

    try:
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    except Exception as error:  # of many classes, which have no common one
        raise RuntimeError(f"onnxruntime does not read '{path}': {error}") from error
    names = [output.name for output in session.get_outputs()]
    rows = []
    for size in sizes:
        transform = ImageTransform(size, mean, std)
        images = torch.stack([transform(photo) for photo in photos])
        values = session.run(names, {"images": images.numpy()})
        with torch.no_grad():
            expected = outputs_of(encoder, images)
        for name, value in zip(names, values, strict=True):
            rows.append(
                _difference(size, name, torch.from_numpy(value), expected[name])
            )
    return rows


def _difference(
    size: tuple[int, int], name: str, value: Tensor, expected: Tensor
) -> Difference:
    apart = (value - expected).abs()
    largest = apart.max().item()
    share = largest / expected.abs().max().item()
    return Difference(size, name, largest, apart.mean().item(), share)


def sizes_to_check(
    encoder: StellarEncoder, dynamic_size: bool
) -> list[tuple[int, int]]:
    """Heights and widths in px: that of the encoder, and others if it may have any."""
    (rows, columns), patch = encoder.grid_size, encoder.patch_size
    grids = [(rows, columns)]
    if dynamic_size:
        halves = max(1, rows // 2), max(1, columns // 2)
        grids += [halves, (halves[0], columns), (rows + 1, columns + 3)]
        grids += [(2 * rows, columns), (1, 1)]
    return [(h * patch, w * patch) for h, w in dict.fromkeys(grids)]


def read_photos(folder: Path) -> list[Image.Image]:
    """Some photos of a folder, spread evenly over the names below it.

    Raises:
        FileNotFoundError: If there are none that can be read.
    """
    found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)
    photos = []
    for path in found[:: max(1, len(found) // MAX_IMAGES)][:MAX_IMAGES]:
        try:
            with Image.open(path) as image:
                photos.append(image.convert("RGB"))
        except (OSError, ValueError) as error:
            logger.warning("Skipping unreadable image %s (%s).", path, error)
    if not photos:
        raise FileNotFoundError(
            f"There is no image that can be read in '{folder}'; leave --images out for "
            "images that are made up."
        )
    return photos


def made_up_photos() -> list[Image.Image]:
    """Images with the coarse and fine structure of photos, the same every time."""
    generator = torch.Generator().manual_seed(0)
    photos = []
    for size in MADE_UP:
        pixels = torch.zeros(1, 3, *size)
        for cells in (2, 4, 8, 16, 32, 64, 128):
            noise = torch.randn(1, 3, cells, cells, generator=generator)
            noise += torch.randn(
                1, 1, cells, cells, generator=generator
            )  # of all colours
            pixels += F.interpolate(noise, size, mode="bicubic") / cells**0.7
        pixels = (pixels * 60 + 128).clamp(0, 255).to(torch.uint8)[0]
        photos.append(Image.fromarray(np.array(pixels.permute(1, 2, 0))))
    return photos


def report(rows: Sequence[Difference], tolerance: float) -> str:
    """The differences as a table, with what passes."""
    lines = [f"{'size':>11}  {'output':12}  {'largest':>9}  {'mean':>9}  {'share':>9}"]
    for row in rows:
        size = f"{row.size[0]} x {row.size[1]}"
        verdict = "" if passes(row, tolerance) else "  differs"
        lines.append(
            f"{size:>11}  {row.output:12}  {row.largest:9.2e}  {row.mean:9.2e}  "
            f"{row.share:9.2e}{verdict}"
        )
    return "\n".join(
        [
            *lines,
            "share is the largest difference over the largest value of the output; up "
            f"to {tolerance:g} passes.",
        ]
    )


def passes(row: Difference, tolerance: float) -> bool:
    """Whether an output is the same; what is not a number is not."""
    return row.share <= tolerance
