"""A tiny text tower, and tiny images with captions, for tests of alignment."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from itertools import permutations
from pathlib import Path

import numpy as np
import open_clip
import safetensors.torch
import torch
from PIL import Image

TEXT_DIM = 32
TOWER_CONFIG = {
    "embed_dim": TEXT_DIM,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
    "text_cfg": {
        "context_length": 16,
        "vocab_size": 49408,
        "width": 32,
        "heads": 2,
        "layers": 1,
    },
}
COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 200, 40),
    "blue": (30, 40, 220),
    "yellow": (230, 220, 30),
    "white": (245, 245, 245),
    "black": (10, 10, 10),
}


def write_tower(folder: Path, seed: int = 0) -> str:
    """Saves a tiny CLIP with random weights in open_clip's layout of a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    model = open_clip.CLIP(**TOWER_CONFIG)
    # As drawn, all texts are nearly the same to the tower.
    torch.nn.init.normal_(model.token_embedding.weight, std=1.0)
    state = {k: v.contiguous() for k, v in model.state_dict().items()}
    safetensors.torch.save_file(state, folder / "open_clip_model.safetensors")
    text = json.dumps({"model_cfg": TOWER_CONFIG, "preprocess_cfg": {}})
    (folder / "open_clip_config.json").write_text(text)
    return f"local-dir:{folder}"


def write_image(path: Path, left: str, right: str, seed: int) -> None:
    """Writes a noisy image, 32 x 32 px, with a colour on each side."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = np.zeros((32, 32, 3))
    image[:, :16], image[:, 16:] = COLOURS[left], COLOURS[right]
    image += np.random.default_rng(seed).normal(0, 4, image.shape)
    Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(path)


def write_pairs(
    folder: Path,
    copies: int = 2,
    seed: int = 0,
    colours: Sequence[str] = tuple(COLOURS),
) -> Path:
    """Writes images of two colours with two captions each, as a CSV file."""
    rows = []
    for left, right in permutations(colours, 2):
        for copy in range(copies):
            name = f"images/{left}_{right}_{copy}.png"
            write_image(folder / name, left, right, seed + len(rows))
            rows.append((name, f"{left} on the left and {right} on the right"))
            rows.append((name, f"a {left} area beside a {right} one"))
    path = folder / "pairs.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("image", "caption"), *rows])
    return path
