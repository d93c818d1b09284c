"""A tiny model and tiny image folders for tests of evaluation."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

import stellar_plugin
from lightly_ext.evaluate.devices import Devices
from lightly_ext.evaluate.features import FeatureCache
from lightly_ext.evaluate.fingerprints import Contents
from lightly_ext.evaluate.frozen_model import FrozenModel
from lightly_ext.evaluate.loading import load_frozen_model
from lightly_ext.evaluate.results import Results

IMAGE_SIZE = 32
NUM_QUERIES = 4
EMBED_DIM = 48
MODEL_NAME = "stellar_vit_tiny_patch16_224"
VIT = {"img_size": IMAGE_SIZE, "embed_dim": EMBED_DIM, "depth": 1, "num_heads": 3}
DECODER = {"decoder_dim": 32, "decoder_depth": 1, "decoder_num_heads": 2}
SIZES = {"resize": IMAGE_SIZE, "crop": IMAGE_SIZE}


class Given(NamedTuple):
    """What the command line gives to every command."""

    model: FrozenModel
    devices: Devices
    results: Results

    @property
    def cache(self) -> FeatureCache:
        return FeatureCache(*self[:2], Contents(self.devices, self.results.cache))


def make_given(tmp_path: Path, model: str | FrozenModel, **options: Any) -> Given:
    """Makes it of options as the command line has them, on the CPU."""

    def take(function: Callable[..., Any]) -> dict[str, Any]:
        names = inspect.signature(function).parameters
        return {name: options.pop(name) for name in names if name in options}

    options = {"output": str(tmp_path / "out"), "accelerator": "cpu", **options}
    options.setdefault("controls", False)  # twice the time
    devices = Devices(**{"batch_size": 8, "num_workers": 0, **take(Devices)})
    results = Results(devices, **take(Results))
    if isinstance(model, str):
        options["seed"] = devices.seed
        model = load_frozen_model(model, **take(load_frozen_model))
    assert not options, options
    return Given(model.to(devices.device), devices, results)


def write_model(folder: Path, **kwargs: Any) -> str:
    """Saves a tiny STELLAR model; patches of 16 of 32 px.

    Its weights are random, others than those of seed 0, from which evaluation starts.
    """
    torch.manual_seed(1)
    arguments = {"num_queries": NUM_QUERIES, **VIT, **DECODER, **kwargs}
    stellar_plugin.Stellar(MODEL_NAME, **arguments).save_pretrained(folder)
    return str(folder)


def write_images(
    folder: Path, num: int, size: tuple[int, int] = (40, 36), seed: int = 0
) -> Path:
    """Writes images of random coarse colours, height x width."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for i in range(num):
        coarse = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize(size[::-1], Image.Resampling.BICUBIC)
        image.save(folder / f"{i:04d}.png")
    return folder


def write_classes(
    root: Path,
    parts: Sequence[str] = ("train", "val"),
    classes: Sequence[str] = ("cat", "dog", "eel"),
    num: int = 8,
    size: tuple[int, int] = (40, 36),
) -> Path:
    """Writes an image folder whose classes differ in colour: root/part/class/*.png."""
    for p, part in enumerate(parts):
        for c, name in enumerate(classes):
            folder = root / part / name
            folder.mkdir(parents=True, exist_ok=True)
            rng = np.random.default_rng((p, c))
            for i in range(num):
                image = rng.integers(0, 100, (*size, 3), dtype=np.uint8)
                image[..., c % 3] += 120
                Image.fromarray(image).save(folder / f"{i:04d}.png")
    return root


def write_scenes(
    root: Path,
    num_train: int = 4,
    num_test: int = 2,
    size: tuple[int, int] = (40, 36),
    num_classes: int = 3,
) -> Path:
    """Writes images with label maps: each class has a colour, some px are ignored."""
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 200, (256, 3))
    for part, num in (("train", num_train), ("val", num_test)):
        for kind in ("images", "masks"):
            (root / kind / part).mkdir(parents=True, exist_ok=True)
        for i in range(num):
            classes = [*range(num_classes), 255]
            coarse = rng.choice(classes, (4, 5)).astype(np.uint8)
            mask = Image.fromarray(coarse).resize(size[::-1], Image.Resampling.NEAREST)
            mask.save(root / "masks" / part / f"{i:04d}.png")
            pixels = colours[np.array(mask)] + rng.integers(0, 56, (*size, 3))
            image = Image.fromarray(pixels.astype(np.uint8))
            image.save(root / "images" / part / f"{i:04d}.png")
    return root


def run_options(tmp_path: Path) -> list[str]:
    """Options of a command on tiny images."""
    return [
        *("--output", str(tmp_path / "out"), "--accelerator", "cpu"),
        *("--batch_size", "8", "--num_workers", "0", "--controls", "false"),
        *("--resize", str(IMAGE_SIZE), "--crop", str(IMAGE_SIZE)),
    ]
