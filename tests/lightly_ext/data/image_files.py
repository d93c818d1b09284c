"""Image files for tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def write_image(path: Path, value: int = 128, size: tuple[int, int] = (40, 30)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, value // 2, 255 - value)).save(path)
    return path


def write_folder(path: Path, count: int = 8) -> Path:
    for number in range(count):
        write_image(path / f"{number:03}.png", value=number)
    return path


def write_noise(path: Path, mode: str = "RGB", **options: object) -> np.ndarray:
    values = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    image = Image.fromarray(values).convert(mode)
    image.save(path, **options)
    return np.array(image.convert("RGB"))
