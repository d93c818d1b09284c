"""Tiny sets that scores are tested on, see `test_brute_force`."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lightly_ext.modules import STELLARProjectionHead
from stellar_plugin.checkpoints import save_heads
from stellar_plugin.protocols import EQUIVARIANCE_SHIFTS
from tests.lightly_ext.evaluate.small import (
    EMBED_DIM,
    IMAGE_SIZE,
    write_images,
    write_model,
    write_scenes,
)
from tests.lightly_ext.evaluate.text.small_text import write_tower

Array = np.ndarray
Factors = tuple[Array, Array]  # S and L of an image
Scores = dict[str, Any]
SIDE = IMAGE_SIZE  # of images that need no resizing
WINDOW = IMAGE_SIZE + max(EQUIVARIANCE_SHIFTS)
BROKEN = b"no image"
CLASSES = ("cat", "dog", "eel")
NUM_PROTOTYPES = 6


def write_sets(folder: Path) -> None:
    """Writes models, a text tower, and all sets."""
    write_model(folder / "model")
    head = STELLARProjectionHead(EMBED_DIM, 32, 8, NUM_PROTOTYPES)
    save_heads({"sparse_head": head.state_dict()}, folder / "model")
    write_model(folder / "other", num_queries=2)
    write_model(folder / "fine", patch_size=8)
    write_tower(folder / "tower")
    _write_mixed(folder / "mixed")
    _write_missing(folder / "missing")
    for part, num in (("train", 3), ("val", 1)):
        write_images(folder / "single" / part / "cat", num, (SIDE, SIDE))
    for name, side in (("photos", SIDE), ("large", WINDOW)):
        photos = write_images(folder / name, 21, (side, side), seed=5)
        _copy(photos, {"0003": "0010", "0004": "0010"})
        (photos / "0007.png").write_bytes(BROKEN)
    scenes = write_scenes(folder / "scenes", 21, 5, (SIDE, SIDE))
    (scenes / "images" / "train" / "0007.png").write_bytes(BROKEN)
    _write_masks(folder)
    _write_texts(folder)


def _copy(folder: Path, sources: dict[str, str]) -> None:
    for name, source in sources.items():
        (folder / f"{name}.png").write_bytes((folder / f"{source}.png").read_bytes())


def _write_mixed(root: Path) -> None:
    """Classes without a meaning, copies in several, an image of each part broken."""
    for seed, (part, name) in enumerate(itertools.product(("train", "val"), CLASSES)):
        write_images(root / part / name, 12 - seed, (SIDE, SIDE), seed=seed)
    copies = {"dog/0003": "cat/0003", "eel/0001": "cat/0001", "eel/0002": "cat/0001"}
    _copy(root / "train", {**copies, "dog/0005": "eel/0005"})
    _copy(root, {"val/dog/0000": "train/cat/0003", "val/eel/0002": "train/cat/0001"})
    for name in ("train/dog/0007", "val/cat/0002"):
        (root / f"{name}.png").write_bytes(BROKEN)


def _write_missing(root: Path) -> None:
    """No readable eel to train on, no readable dog to test on."""
    nums = {"train": (12, 12, 1), "val": (11, 1, 11)}
    for part, counts in nums.items():
        for i, (name, num) in enumerate(zip(CLASSES, counts, strict=True)):
            write_images(root / part / name, num, (SIDE, SIDE), i + 10 * len(part))
    for name in ("train/eel/0000.png", "val/dog/0000.png"):
        (root / name).write_bytes(BROKEN)


def _write_masks(folder: Path) -> None:
    """Background 0, four segments and 255, which counts nowhere; one has none."""
    (folder / "masks").mkdir()
    rng = np.random.default_rng(0)
    values = np.array([0, 0, 0, 1, 2, 3, 4, 255], dtype=np.uint8)
    for i in range(21):
        coarse = values[rng.integers(len(values), size=(5, 6))] * (i != 2)
        mask = Image.fromarray(coarse).resize((SIDE, SIDE), Image.Resampling.NEAREST)
        mask.save(folder / "masks" / f"{i:04d}.png")


def read(path: Path) -> Tensor | None:
    """uint8 image (3, height, width), None if it is broken."""
    if path.read_bytes() == BROKEN:
        return None
    return torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)


def readable_images(folder: Path) -> dict[str, Tensor]:
    """The readable images of a folder by name, sorted."""
    found = {p.name: read(p) for p in sorted(folder.iterdir())}
    return {name: image for name, image in found.items() if image is not None}


def labelled(root: Path, part: str) -> list[tuple[str, str, Tensor]]:
    """Name, class and pixels of the readable images, by class and name."""
    return [
        (f"{name}/{file}", name, image)
        for name in sorted(p.name for p in (root / part).iterdir())
        for file, image in readable_images(root / part / name).items()
    ]


def numbered(folder: Path) -> list[Tensor | None]:
    return [read(path) for path in sorted(folder.iterdir())]


def _write_texts(root: Path) -> None:
    """Sets of the photos, one of them broken; in each a pair of copies."""
    names = sorted(path.name for path in (root / "photos").iterdir())
    captions = [(name, f"thing {i // 2}") for i, name in enumerate(names)]
    captions += [(name, "a thing") for name in names[::3]]
    rows = [("image", "caption"), *captions]
    (root / "photos.csv").write_text("\n".join(",".join(row) for row in rows))
    pairs = [*zip(names[0:20:2], names[1:20:2], strict=True), (names[3], names[4])]
    for folder in (root / "winoground/images", root / "mmvp/MLLM_VLM Images/shape"):
        folder.mkdir(parents=True)
    lines, questions = [], ["Question ID,Type,Statement"]
    for i, pair in enumerate(pairs):
        line = {}
        for j, name in enumerate(pair):
            image = (root / "photos" / name).read_bytes()
            (root / f"winoground/images/{i}_{j}.png").write_bytes(image)
            number = 2 * i + j + 1
            path = root / f"mmvp/MLLM_VLM Images/shape/{number}.jpg"
            path.write_bytes(image)
            line |= {f"image_{j}": f"{i}_{j}", f"caption_{j}": f"{'ab'[j]} {i}"}
            questions.append(f"{number},shape,{'ab'[j]} {i}")
        lines.append(json.dumps(line))
    (root / "winoground/examples.jsonl").write_text("\n".join(lines))
    (root / "mmvp/Questions.csv").write_text("\n".join(questions))
