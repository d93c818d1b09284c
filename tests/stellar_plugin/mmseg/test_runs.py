"""Whole runs of configs on tiny sets, in this process: train, store, test."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.runner import Runner
from timm import create_model
from torch import Tensor

from stellar_plugin.hashes import file_sha256
from stellar_plugin.protocols import (
    SEGMENTATION_FINETUNE_ADE20K,
    SEGMENTATION_PAPER_CITYSCAPES,
    SEGMENTATION_VOC,
)
from tests.stellar_plugin.mmseg.mmseg_sets import (
    VIT,
    WRITERS,
    tiny,
    write_checkpoint,
)
from tests.stellar_plugin.mmseg.runners import load, named, plain, quick_runner

pytestmark = pytest.mark.slow

Build = Callable[..., Runner]


@pytest.fixture
def build(tmp_path: Path, cpu: None) -> Build:
    """Makes the runner of a config."""

    def build(name: str, options: dict[str, Any], folder: str = "work") -> Runner:
        cfg = copy.deepcopy(load(name))
        cfg.merge_from_dict({k: plain(v) for k, v in options.items()})
        return quick_runner(named(cfg, tmp_path / folder))

    return build


def result(tmp_path: Path, folder: str = "work") -> dict[str, Any]:
    return json.loads((tmp_path / folder / "result.json").read_text())


def weights(path: Path) -> dict[str, Tensor]:
    return torch.load(path, map_location="cpu", weights_only=False)["state_dict"]


def test_paper__train_then_test(build: Build, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "stellar")
    options = tiny(checkpoint, WRITERS["cityscapes"](tmp_path / "data"))
    options["train_cfg.max_epochs"] = 2
    build("stellar_cityscapes_paper", options).train()
    trained = result(tmp_path)

    expected = SEGMENTATION_PAPER_CITYSCAPES.replace(epochs=2, batch_sizes=(2,)).card()
    assert trained["protocol"] == expected
    names = [trained[name] for name in ("task", "model", "data")]
    assert names == ["segmentation", "STELLAR ViT-B", "Cityscapes"]
    assert list(trained["scores"]) == ["mIoU"]
    assert 0 <= trained["scores"]["mIoU"] <= 1
    provenance = trained["provenance"]
    assert provenance["sha256"] == file_sha256(checkpoint / "model.safetensors")
    assert provenance["checkpoint"] == str(checkpoint)
    assert provenance["iterations"] == 4  # two epochs of three images in twos
    assert (provenance["seed"], provenance["num_images"]) == (0, 3)
    assert set(provenance["versions"]) == {"torch", "mmseg", "mmengine"}

    # Neither the file trained from nor the length of the run are told again.
    options["model.backbone.init_cfg.checkpoint"] = "nowhere"
    del options["train_cfg.max_epochs"]
    saved = tmp_path / "work/epoch_2.pth"
    build("stellar_cityscapes_paper", {**options, "load_from": saved}, "test").test()
    tested = result(tmp_path, "test")
    assert tested["scores"] == trained["scores"]
    assert tested["protocol"] == trained["protocol"]
    assert tested["provenance"].pop("tested") == str(saved)
    assert tested["provenance"].pop("tested_sha256") == file_sha256(saved)
    assert tested["provenance"] == trained["provenance"]

    # Features that the head has never seen, in the same number of channels.
    options |= {"load_from": saved, "model.backbone.feature": "lowrank"}
    with pytest.raises(ValueError, match=r"backbone\.feature is lowrank, was dense"):
        build("stellar_cityscapes_paper", options, "other").test()
    assert not (tmp_path / "other/result.json").exists()


def test_baseline__part_of_the_run(build: Build, tmp_path: Path) -> None:
    vit = {**VIT, "img_size": 70, "patch_size": 14, "init_values": 1.0}
    torch.manual_seed(0)
    encoder = create_model("vit_tiny_patch16_224", num_classes=0, **vit)
    torch.save(encoder.state_dict(), tmp_path / "dinov2.pth")
    options = {
        **tiny(tmp_path / "dinov2.pth", WRITERS["voc"](tmp_path / "data")),
        **{f"model.backbone.{name}": value for name, value in vit.items()},
        "model.backbone.model_name": "vit_tiny_patch16_224",
        "model.backbone.num_queries": 0,
        # What nothing tells of a file of timm's names alone.
        "model.backbone.pos_antialias": True,
        "train_cfg.max_iters": 3,
        "default_hooks.checkpoint.interval": 1,
        "default_hooks.checkpoint.max_keep_ckpts": -1,
    }
    runner = build("dinov2_voc", options)
    runner.train()
    # Validated once, at the end; the decay ends with the run.
    assert [s.end for s in runner.param_schedulers] == [3, 2]
    card = SEGMENTATION_VOC.replace(iterations=3, warmup=0, batch_sizes=(2,)).card()
    assert result(tmp_path)["protocol"] == card
    assert result(tmp_path)["model"] == "DINOv2 ViT-B"

    saved = tmp_path / "work/iter_1.pth"
    build("dinov2_voc", {**options, "load_from": saved}, "test").test()
    schedule = f"{SEGMENTATION_VOC.schedule}, stopped after 1 of 3"
    tested = result(tmp_path, "test")
    assert tested["protocol"] == {**card, "iterations": 1, "schedule": schedule}
    assert tested["provenance"]["iterations"] == 1


def test_finetune__trains_the_backbone(build: Build, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "stellar")
    options = {
        **tiny(checkpoint, WRITERS["ade20k"](tmp_path / "data")),
        "train_cfg.max_epochs": 1,
    }
    runner = build("stellar_ade20k_finetune", options)
    runner.train()
    card = SEGMENTATION_FINETUNE_ADE20K.replace(epochs=1, batch_sizes=(2,)).card()
    assert result(tmp_path)["protocol"] == card
    fresh = build("stellar_ade20k_finetune", options, "fresh").model
    fresh.init_weights()
    before, after = fresh.state_dict(), weights(tmp_path / "work/epoch_1.pth")
    name = "backbone.encoder.vit.blocks.0.attn.qkv.weight"
    change = (before[name] - after[name]).abs().max().item()
    assert 0 < change < 1e-3  # two steps of 1e-4
