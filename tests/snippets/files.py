"""What the commands and code of README and docs find: small files under their names."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from lightly_ext.pretrain import StellarPretraining
from stellar_plugin import Stellar
from stellar_plugin.checkpoints.export import to_official
from stellar_plugin.checkpoints.files import OFFICIAL_REPO, OFFICIAL_VARIANTS
from tests import published_vits
from tests.lightly_ext.data.streams.shard_files import (
    encoded_images,
    write_parquet,
    write_tar,
)
from tests.lightly_ext.evaluate.small import write_classes, write_scenes
from tests.lightly_ext.evaluate.test_datasets import (
    write_food,
    write_glas,
    write_imagenet,
    write_pets,
    write_places,
)
from tests.mm_configs.test_own_data import write_masks
from tests.snippets.blocks import ROOT
from tests.stellar_plugin.mmseg.mmseg_sets import (
    write_ade20k,
    write_digit_boards,
    write_voc,
)

SIDE = 64
# The narrowest width whose number of heads published files need not tell.
MODEL = {
    "model_name": "stellar_vit_tiny_patch16_224",
    "img_size": SIDE,
    "patch_size": 16,
    "embed_dim": 192,
    "depth": 1,
    "num_heads": 3,
    "num_queries": 4,
    "decoder_dim": 192,
    "decoder_depth": 1,
    "decoder_num_heads": 3,
}
HEAD = {"hidden_dim": 16, "output_dim": 8, "num_prototypes": 12}
# What commands and code take from a checkout.
CHECKOUT = ("mm_configs", "hubconf.py")
RUNS = ("my_run", "photos", "photos_prior", "try")
PHOTOS = ("path/to/images", "path/to/photos", "photos", "train")
SETS = ("path/to/set", "labelled", "runs/demo/boards/single")


KNOWN_SETS = {
    "imagenet": write_imagenet,
    "oxford-iiit-pet": write_pets,
    "food-101": write_food,
    "glas": write_glas,
    "places365": write_places,
}


def write_files(folder: Path) -> None:
    """Writes data sets, photos, weights and runs.

    Args:
        folder:
            Where the commands run.
    """
    for name in CHECKOUT:
        (folder / name).symlink_to(ROOT / name)
    (folder / "docs").mkdir()
    (folder / "docs/figures").symlink_to(ROOT / "docs/figures")
    shutil.copy(ROOT / "docs/evaluation.md", folder / "docs")  # a command writes to it
    _write_images(folder)
    _write_weights(folder)


def write_hub(cache: Path) -> None:
    """Makes of a folder the cache of the hub, with the released models.

    Args:
        cache:
            What HF_HUB_CACHE names.
    """
    repository = cache / f"models--{OFFICIAL_REPO.replace('/', '--')}"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(snapshot.name)
    torch.manual_seed(0)
    for variant, num_queries in zip(OFFICIAL_VARIANTS, (2, 4, 6, 4, 4), strict=True):
        state = to_official(Stellar(**{**MODEL, "num_queries": num_queries}))
        save_file(state, snapshot / f"stellar-{variant}.safetensors")


def _write_images(folder: Path) -> None:
    for name in PHOTOS:
        write_photos(folder / name)
    for i in range(200):  # no run takes fewer
        shutil.copy(folder / f"photos/cat/{i % 6}.jpg", folder / f"photos/dog/_{i}.jpg")
    for name in SETS:
        write_classes(folder / name)
    photo = Image.open(folder / "photos/cat/0.jpg").resize((240, 200))
    for name in ("photo.jpg", "new.jpg"):
        photo.save(folder / name)
    write_ade20k(folder / "data/ade/ADEChallengeData2016")
    write_digit_boards(folder / "runs/demo/ade20k")
    voc = write_voc(folder / "VOCdevkit/VOC2012")
    shutil.copytree(voc / "SegmentationClass", voc / "SegmentationObject")
    write_voc(folder / "data/VOCdevkit/VOC2012")
    _write_shards(folder)
    write_photos(folder / "photos/val")
    boxes = ["file,label,x0,y0,x1,y1"]
    boxes += [f"{k}/{i}.jpg,{k},8,8,40,48" for k in ("cat", "dog") for i in range(6)]
    for name in ("photos/boxes.csv", "boxes.csv"):
        (folder / name).write_text("\n".join(boxes))
    for name in ("my_scenes", "my/set"):
        write_scenes(folder / name)
    for split in ("train", "val"):
        write_masks(folder / "data/my_data", split)


def _write_shards(folder: Path) -> None:
    images = encoded_images(4)
    parts = [f"train-{number:03}" for number in range(128)]
    for name in [*parts, "val-000"]:
        files = {f"{name}_{i}.png": image for i, image in enumerate(images[:2])}
        classes = {f"{name}_{i}.cls": str(i).encode() for i in range(2)}
        write_tar(folder / f"shards/{name}.tar", files | classes)
    for name in ("photos.parquet", "photos/0.parquet"):
        write_parquet(folder / name, images)


def write_sets(folder: Path) -> None:
    """Writes the known sets of classes: all their classes, a few photos in many files.

    Args:
        folder:
            Where they lie beside each other.
    """
    write_photos(folder / "photos")
    photos = itertools.cycle(sorted((folder / "photos").rglob("*.jpg")))
    for name, write in KNOWN_SETS.items():
        write(folder / name)
        for path in (folder / name).rglob("*.*"):
            if path.is_file() and not path.stat().st_size:
                path.unlink()
                path.hardlink_to(next(photos))


def write_photos(folder: Path, number: int = 6) -> None:
    """Jpegs of coarse colours, two folders of classes."""
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        for i in range(number):
            coarse = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
            image = Image.fromarray(coarse).resize(
                (SIDE + 8, SIDE), Image.Resampling.BICUBIC
            )
            image.save(folder / name / f"{i}.jpg", quality=95)


def _write_weights(folder: Path) -> None:
    torch.manual_seed(0)
    module = StellarPretraining(model=MODEL, head=HEAD, augment={"gaussian_blur": 0.0})
    for run in RUNS:
        module.export(folder / "runs" / run / "model")
    boards = {**MODEL, "img_size": 60, "patch_size": 12}
    Stellar(**boards).save_pretrained(folder / "runs/demo/pretrain/model")
    (folder / "runs/base").mkdir()
    (folder / "runs/base/config.yaml").write_text("data: {path: train}")
    width, depth = MODEL["embed_dim"], MODEL["depth"]
    mae = published_vits.semmae(16, 14, width, depth)  # whose names are MAE's
    torch.save(mae, folder / "mae_pretrain_vit_base.pth")
    norm = published_vits.norm("norm", width, published_vits.random)
    dino = published_vits.vit(16, 14, width, depth) | norm
    torch.save(dino, folder / "dino_vitbase16_pretrain.pth")
