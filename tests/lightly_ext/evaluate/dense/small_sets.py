"""Tiny sets with label maps, whose scores are known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

SIDE = 32
# Red, green, blue: far apart, and their patches equally long once normalised.
COLOURS = np.uint8([[255, 0, 0], [0, 255, 0], [0, 0, 255]])
NAMES = ("red", "green", "blue")


def write_halves(
    root: Path,
    num: int = 6,
    values: tuple[int, ...] = (0, 1, 2),
    names: tuple[str, ...] = NAMES,
) -> Path:
    """Writes images whose halves have a colour each, and maps of these colours.

    Left and right are never the same, and all colours are as frequent, for `num` a
    multiple of 6.

    Args:
        root:
            Folder of the set.
        num:
            Number of images of each part.
        values:
            Label of each colour.
        names:
            Names of the labels.
    """
    for part in ("train", "val"):
        for kind in ("images", "masks"):
            (root / kind / part).mkdir(parents=True)
        for i in range(num):
            left, right = i % 3, (i % 3 + 1 + i // 3 % 2) % 3
            numbers = np.full((SIDE, SIDE), left)
            numbers[:, SIDE // 2 :] = right
            labels = np.uint8(values)[numbers]
            Image.fromarray(COLOURS[numbers]).save(root / f"images/{part}/{i:03d}.png")
            Image.fromarray(labels).save(root / f"masks/{part}/{i:03d}.png")
    (root / "classes.txt").write_text("\n".join(names))
    return root
