"""What the commands and code of README and docs find: small files under their names."""

from __future__ import annotations

import itertools
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
from tests.lightly_ext.evaluate.small import write_classes, write_scenes
from tests.lightly_ext.evaluate.test_datasets import write_imagenet
from tests.snippets.blocks import ROOT
from tests.stellar_plugin.mmseg.mmseg_sets import write_ade20k, write_voc

SIDE = 32
# Widths of whole heads of 64: published files do not tell the number of heads.
MODEL = {
    "model_name": "stellar_vit_tiny_patch16_224",
    "img_size": SIDE,
    "patch_size": 8,
    "embed_dim": 64,
    "depth": 2,
    "num_heads": 1,
    "num_queries": 4,
    "decoder_dim": 64,
    "decoder_depth": 1,
    "decoder_num_heads": 1,
}
HEAD = {"hidden_dim": 16, "output_dim": 8, "num_prototypes": 12}
RUNS = ("my_run", "photos", "try", "demo/pretrain")
FOLDERS_OF_CLASSES = ("path/to/images", "photos", "train", "path/to/photos")


def write_files(folder: Path) -> None:
    """Writes data sets, photos, weights and runs.

    Args:
        folder:
            Where the commands run.
    """
    for name in ("mm_configs", "docs"):
        (folder / name).symlink_to(ROOT / name)
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
    state = to_official(Stellar(**{**MODEL, "patch_size": 16, "img_size": 64}))
    for variant in OFFICIAL_VARIANTS:
        save_file(state, snapshot / f"stellar-{variant}.safetensors")


def _write_images(folder: Path) -> None:
    for name in FOLDERS_OF_CLASSES:
        write_photos(folder / name)
    write_classes(folder / "path/to/set")
    photo = folder / "path/to/images/cat/0.jpg"
    large = Image.open(photo).resize((240, 200))
    for name in ("photo.jpg", "new.jpg"):
        large.save(folder / name)
    write_ade20k(folder / "data/ade/ADEChallengeData2016")
    write_voc(folder / "VOCdevkit/VOC2012")
    write_scenes(folder / "my_scenes")
    write_imagenet(folder / "path/to/imagenet")
    _fill(folder / "path/to/imagenet", folder / "path/to/images")
    (folder / "runs/base").mkdir(parents=True)
    (folder / "runs/base/config.yaml").write_text("data: {path: train}")


def _fill(folder: Path, photos: Path) -> None:
    """Puts photos in the place of empty files."""
    sources = itertools.cycle(sorted(photos.rglob("*.jpg")))
    for path in folder.rglob("*.*"):
        if path.is_file() and not path.stat().st_size:
            path.unlink()
            path.hardlink_to(next(sources))


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
    torch.manual_seed(0)
    state = published_vits.vit(16, 14) | published_vits.norm(
        "norm", published_vits.WIDTH, published_vits.random
    )
    torch.save({"model": state}, folder / "mae_pretrain_vit_base.pth")
    torch.save(state, folder / "dino_vitbase16_pretrain.pth")
