"""Random crops of a few photos: what the small model of the pictures learns from.

    python -m docs.figures.crops --photos '[A.png, B.png]' --output FOLDER --side 128

draws the same windows for any side.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from jsonargparse import auto_cli
from PIL import Image

# Of the shorter side of a photo.
LEAST = 0.7


def main(
    photos: list[str], output: str, side: int, number: int = 128, seed: int = 0
) -> None:
    """Writes square crops of every photo.

    Args:
        photos: Files.
        output: Folder that the crops are written to.
        side: Of a crop in px.
        number: Crops of each photo.
        seed: Of what is drawn.
    """
    rng = np.random.default_rng(seed)
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    for path in map(Path, photos):
        with Image.open(path) as opened:
            photo = opened.convert("RGB")
        for i in range(number):
            cut = int(rng.uniform(LEAST, 1) * min(photo.size))
            x, y = (int(rng.integers(0, length - cut + 1)) for length in photo.size)
            crop = photo.crop((x, y, x + cut, y + cut))
            crop = crop.resize((side, side), Image.Resampling.BICUBIC)
            crop.save(folder / f"{path.stem}_{i:03d}.jpg", quality=92)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
