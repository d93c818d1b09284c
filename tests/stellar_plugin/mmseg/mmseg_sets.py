"""Tiny segmentation sets in the standard folder layouts, and a tiny model for them."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import stellar_plugin
from stellar_plugin.mmseg.train import find_tool
from tests.distributed import run_script

REPOSITORY = Path(__file__).parents[3]
# Height and width of the images: mixed, not square, odd.
SIZES = [(96, 130), (121, 80), (64, 64)]

VIT = {"img_size": 64, "embed_dim": 48, "depth": 2, "num_heads": 3}
MODEL_NAME = "stellar_vit_tiny_patch16_224"
NUM_QUERIES = 4


def write_checkpoint(folder: Path, **kwargs: object) -> Path:
    """Saves a tiny STELLAR model with random weights, others than those of seed 0."""
    torch.manual_seed(1)
    decoder = {"decoder_dim": 32, "decoder_depth": 1, "decoder_num_heads": 2}
    sizes = {"num_queries": NUM_QUERIES, **decoder, **VIT, **kwargs}
    stellar_plugin.Stellar(MODEL_NAME, **sizes).save_pretrained(folder)
    return folder


def write_ade20k(root: Path) -> Path:
    for split in ("training", "validation"):
        for i in range(len(SIZES)):
            _write_pair(
                root / f"images/{split}/{i}.jpg",
                root / f"annotations/{split}/{i}.png",
                i,
                labels=range(0, 151),
            )
    return root


def write_cityscapes(root: Path) -> Path:
    for split in ("train", "val"):
        for i in range(len(SIZES)):
            stem = f"{split}/town/town_{i:06d}"
            for kind, labels in (
                ("labelTrainIds", [*range(19), 255]),
                ("labelIds", range(34)),
            ):
                _write_pair(
                    root / f"leftImg8bit/{stem}_leftImg8bit.png",
                    root / f"gtFine/{stem}_gtFine_{kind}.png",
                    i,
                    labels=labels,
                )
    return root


def write_voc(root: Path) -> Path:
    for i in range(2 * len(SIZES)):
        _write_pair(
            root / f"JPEGImages/{i}.jpg",
            root / f"SegmentationClass/{i}.png",
            i % len(SIZES),
            labels=[*range(21), 255],
        )
    lists = root / "ImageSets/Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("0\n1\n2\n")
    (lists / "val.txt").write_text("3\n4\n5\n")
    return root


def write_digit_boards(root: Path) -> Path:
    for split in ("training", "validation"):
        for i in range(4):
            _write_pair(
                root / f"images/{split}/{i}.png",
                root / f"annotations/{split}/{i}.png",
                i,
                labels=range(1, 12),
                size=(60, 60),
            )
    return root


WRITERS: dict[str, Callable[[Path], Path]] = {
    "ade20k": write_ade20k,
    "cityscapes": write_cityscapes,
    "voc": write_voc,
}


def tiny(checkpoint: Path, data_root: Path, **sizes: object) -> dict[str, object]:
    """Overrides of a config: a tiny model and this data.

    Args:
        checkpoint:
            Weights of the backbone.
        data_root:
            Data set that one of the writers made.
        sizes:
            More arguments of the backbone.
    """
    backbone = {"model_name": MODEL_NAME, "num_queries": NUM_QUERIES, **VIT, **sizes}
    splits = ("train", "val", "test")
    return {
        "model.backbone.init_cfg.checkpoint": checkpoint,
        **{f"model.backbone.{name}": value for name, value in backbone.items()},
        "model.decode_head.in_channels": VIT["embed_dim"],
        **{f"{s}_dataloader.dataset.data_root": data_root for s in splits},
        **{f"{s}_dataloader.num_workers": 0 for s in splits},
        **{f"{s}_dataloader.persistent_workers": False for s in splits},
        "train_dataloader.batch_size": 2,
        "default_hooks.logger.interval": 1,
    }


def tiny_options(checkpoint: Path, data_root: Path) -> list[str]:
    """The same for --cfg-options of a config of the community, two iterations."""
    options = {
        **tiny(checkpoint, data_root),
        "train_cfg.max_iters": 2,
        "train_cfg.val_interval": 2,
        "default_hooks.checkpoint.interval": 2,
    }
    return [f"{name}={value}" for name, value in options.items()]


def run(command: Sequence[str | Path], folder: Path) -> str:
    """Runs a command as a user would, in `folder`; returns all that it printed."""
    # Without CUDA: the commands are those for a machine without a GPU.
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    env["PYTHONPATH"] = str(REPOSITORY)
    done = subprocess.run(
        [str(part) for part in command],
        cwd=folder,
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    return done.stdout


def mim(command: Path, task: str, *arguments: str | Path, folder: Path) -> str:
    """Runs `mim train mmseg ...` or `mim test mmseg ...`."""
    if task == "train":
        arguments = (*arguments, "--gpus", "0")
    return run([command, task, "mmseg", *arguments], folder)


def tool(task: str, *arguments: str | Path, folder: Path) -> str:
    """Runs the tool that `mim` runs, in a fork of a process that has imported it."""
    words = [str(word) for word in arguments if word != "--checkpoint"]
    script = find_tool(f"{task}.py")
    return run_script(script, words, folder, CUDA_VISIBLE_DEVICES="")


def train_resume_test(
    command: Callable[..., str], config: Path, options: list[str], folder: Path
) -> None:
    """The three commands of a user; the last without the file trained from.

    Args:
        command:
            Runs a task with arguments: `mim` or `tool`.
        config:
            The config.
        options:
            For --cfg-options.
        folder:
            Where the commands run.
    """

    def task(name: str, *arguments: str, more: Sequence[str]) -> str:
        changed = ("--cfg-options", *options, *more)
        return command(name, config, *arguments, *changed, folder=folder)

    output = task("train", more=[])
    assert "StellarViT weights: " in output
    assert "Iter(train) [2/2]" in output

    output = task("train", "--resume", more=["train_cfg.max_iters=4"])
    assert "resumed epoch: 0, iter: 2" in output
    assert "iteration 2; changed: train_cfg.max_iters 2 -> 4. From" in output
    assert "Iter(train) [1/4]" not in output
    assert "Iter(train) [4/4]" in output
    validated = miou(output)

    saved = ("--checkpoint", f"work_dirs/{config.stem}/iter_4.pth")
    output = task("test", *saved, more=["model.backbone.init_cfg.checkpoint=nowhere"])
    assert miou(output) == validated


def miou(output: str) -> float:
    """The last mean IoU that a run printed, in percent."""
    return float(re.findall(r"mIoU: ([\d.]+)", output)[-1])


def _write_pair(
    image: Path,
    annotation: Path,
    index: int,
    labels: Sequence[int],
    size: tuple[int, int] | None = None,
) -> None:
    """An image of coloured blocks and the block's classes, drawn from `labels`."""
    height, width = size or SIZES[index % len(SIZES)]
    rng = np.random.default_rng(index)
    blocks = rng.choice(np.asarray(labels), size=(4, 4))
    rows, columns = np.arange(height) * 4 // height, np.arange(width) * 4 // width
    classes = blocks[rows][:, columns].astype(np.uint8)
    colours = rng.integers(0, 256, size=(256, 3), dtype=np.uint8)
    for path, array in ((image, colours[classes]), (annotation, classes)):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(path)
