"""What the page reads: numbers in scripts, which a page may load from a folder."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lightly_ext.evaluate.atlas.part_table import PartTable
from lightly_ext.evaluate.atlas.sheets import SHEET


def base64_of(values: NDArray[np.generic]) -> str:
    """Numbers as text, the smallest byte of each first."""
    ordered = values.astype(values.dtype.newbyteorder("<"))
    return base64.b64encode(ordered.tobytes()).decode()


def write_script(path: Path, function: str, *values: Any) -> None:
    """Writes a script that calls a function with values; ASCII, whatever is in them."""
    texts = (json.dumps(value, separators=(",", ":")) for value in values)
    path.write_text(f"{function}({','.join(texts)});\n", encoding="ascii")


def write_maps(folder: Path, table: PartTable) -> None:
    """Writes the maps of the images of each sheet, as maps-0000.js and so on.

    Args:
        folder:
            Where to.
        table:
            Has them.
    """
    count = SHEET**2
    for number, start in enumerate(range(0, len(table.rows), count)):
        images = np.arange(start, min(start + count, len(table.rows)))
        packed = packed_maps(table, images)
        name = f"maps-{number:04d}"
        write_script(folder / f"{name}.js", "ATLAS.loaded", name, base64_of(packed))


def packed_maps(table: PartTable, images: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Maps of some images in 4 bits, and the part that has most of each patch.

    Args:
        table:
            Has them.
        images:
            Numbers of the images.

    Returns:
        uint8 array with a row per image: its maps in fifteenths of the maximum of each,
        two in a byte, the first in the higher bits; then a number of a part per patch.
    """
    maps = table.maps_of(images).masked_fill(~table.present[images, :, None], 0)
    strongest = maps.argmax(dim=1).byte().numpy()
    peaks = maps.amax(dim=2, keepdim=True).clamp(min=torch.finfo().tiny)
    steps = (maps / peaks * 15).round().byte().flatten(1).numpy()
    if steps.shape[1] % 2:
        steps = np.pad(steps, ((0, 0), (0, 1)))
    return np.concatenate([steps[:, ::2] << 4 | steps[:, 1::2], strongest], axis=1)


def concept_entries(concepts: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Concepts as the page has them: maps relative to their maxima, as bytes."""
    entries = []
    for concept in concepts:
        mean = np.array(concept["mean_map"])
        heat = (mean / mean.max() * 255).round().astype(np.uint8)
        entries.append({**concept, "mean_map": base64_of(heat)})
    return entries
