"""Configs of networks of every kind, on small files as they are published."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.registry import DefaultScope
from mmengine.runner import Runner
from mmseg.apis import inference_model, init_model
from mmseg.registry import MODELS

from stellar_plugin.checkpoints import (
    Checkpoint,
    load_encoder,
    load_network,
    read_checkpoint,
)
from stellar_plugin.hashes import file_sha256
from tests.stellar_plugin.mmseg.runners import (
    load,
    named,
    plain,
    quick_runner,
    shared_set,
)
from tests.stellar_plugin.mmseg.small_files import KINDS

# A config of each kind, in both families and on all sets.
RUNS = {
    "byol_voc_paper": "BYOL RN-50",
    "simmim_ade20k_paper": "SimMIM Swin-B",
    "beit_cityscapes_paper": "BEiT ViT-B",
    "aim_600m_voc": "AIM 600M",
    "densecl_ade20k": "DenseCL RN-50",
}


def kind_of(name: str) -> str:
    (kind,) = (kind for kind in KINDS if name.startswith(f"{kind}_"))
    return kind


def config(name: str, checkpoint: Path | str, folder: Path, **options: Any) -> Any:
    """A config with a small file, on a tiny set."""
    _, channels, _ = KINDS[kind_of(name)]
    data = shared_set(name.removeprefix(f"{kind_of(name)}_").partition("_")[0])
    cfg = copy.deepcopy(load(name))
    options = {
        "model.backbone.init_cfg.checkpoint": checkpoint,
        "model.decode_head.in_channels": channels,
        "train_dataloader.batch_size": 2,
        **{f"train_cfg.{'max_epochs' if name.endswith('paper') else 'max_iters'}": 1},
        **options,
    }
    for split in ("train", "val", "test"):
        options[f"{split}_dataloader.dataset.data_root"] = data
        options[f"{split}_dataloader.num_workers"] = 0
        options[f"{split}_dataloader.persistent_workers"] = False
    cfg.merge_from_dict({k: plain(v) for k, v in options.items()})
    return named(cfg, folder)


def features(source: Path, images: torch.Tensor) -> torch.Tensor:
    """The dense features of a file, (batch_size, num_cells, channels)."""
    checkpoint: Checkpoint = read_checkpoint(source)
    loader = load_encoder if checkpoint.network is None else load_network
    with torch.no_grad():
        return loader(checkpoint)[0](images).dense


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "suffix", ["ade20k", pytest.param("voc_paper", marks=pytest.mark.slow)]
)
def test_forward(kind: str, suffix: str, tmp_path: Path) -> None:
    """What the head reads are the features of `stellar evaluate`, at any size."""
    write, channels, cell = KINDS[kind]
    checkpoint = write(tmp_path / "weights.pth")
    cfg = config(f"{kind}_{suffix}", checkpoint, tmp_path)
    with DefaultScope.overwrite_default_scope("mmseg"):
        model = MODELS.build(cfg.model)
    model.init_weights()
    model.train().backbone.requires_grad_(False)
    for rows, columns in ((4, 4), (3, 7)):
        images = torch.randn(2, 3, rows * cell, columns * cell)
        (maps,) = model.backbone(images)
        assert maps.shape == (2, channels, rows, columns)
        expected = features(checkpoint, images)
        torch.testing.assert_close(maps.flatten(2).mT, expected, rtol=0, atol=1e-5)
        with torch.no_grad():
            logits = model._forward(images)
        assert logits.shape == (2, model.num_classes, rows, columns)
    facts = model.backbone.weights_facts
    assert facts["maps"] == f"{channels} channels, cells of {cell} px"


def result(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "result.json").read_text())


def run(task: str, cfg: Any, **attributes: Any) -> Runner:
    for name, value in attributes.items():
        cfg[name] = value
    runner = quick_runner(cfg)
    getattr(runner, task)()
    return runner


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_train_test_infer_resume(name: str, tmp_path: Path, cpu: None) -> None:
    write, channels, cell = KINDS[kind_of(name)]
    checkpoint = write(tmp_path / "weights.pth")
    run("train", config(name, checkpoint, tmp_path / "work"))
    trained = result(tmp_path / "work")
    assert trained["model"] == RUNS[name]
    card, provenance = trained["protocol"], trained["provenance"]
    assert (card["features"], card["backbone"]) == ("dense", "frozen")
    cells = "" if cell == 16 else f"; cells of {cell} px"
    paper = f"patch grid, nearest{cells}"
    resolution = paper if name.endswith("paper") else "of the original image"
    assert card["label_resolution"] == resolution
    assert provenance["sha256"] == file_sha256(checkpoint)
    maps = f"{channels} channels, cells of {cell} px"
    assert provenance["weights"]["maps"] == maps
    method = RUNS[name].split()[0]
    assert provenance["weights"]["read as"].startswith(method)
    assert set(provenance["published_and_here"]) >= (
        {"label_resolution"} if name.endswith("paper") and cells else set()
    )

    # The network is the checkpoint's; the first file is not needed again.
    saved = next((tmp_path / "work").glob("*_1.pth"))
    run("test", config(name, "nowhere", tmp_path / "test"), load_from=str(saved))
    tested = result(tmp_path / "test")
    assert tested["scores"] == trained["scores"]
    assert tested["protocol"] == card
    assert tested["provenance"]["weights"] == provenance["weights"]

    cfg = config(name, "nowhere", tmp_path / "api")
    model = init_model(cfg, str(saved), device="cpu")
    image = np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8)
    classes = inference_model(model, image).pred_sem_seg.data
    assert classes.ndim == 3
    assert 0 <= classes.min() <= classes.max() < model.num_classes

    length = "max_epochs" if name.endswith("paper") else "max_iters"
    longer = config(name, checkpoint, tmp_path / "work", **{f"train_cfg.{length}": 2})
    resumed = run("train", longer, load_from=str(saved), resume=True)
    assert (resumed.epoch if length == "max_epochs" else resumed.iter) == 2


@pytest.mark.slow
def test_test__of_another_system(tmp_path: Path, cpu: None) -> None:
    """A ResNet's checkpoint under the configs of a BEiT, a ViT and a Swin."""
    checkpoint = KINDS["byol"][0](tmp_path / "byol.pth")
    run("train", config("byol_voc_paper", checkpoint, tmp_path / "work"))
    saved = str(tmp_path / "work/epoch_1.pth")
    for kind, message in (
        ("beit", r"network is BEiT, was ResNet"),
        ("aim_600m", r"missing: backbone\.encoder"),
        ("simmim", r"network is Swin, was ResNet"),
    ):
        write, *_ = KINDS[kind]
        own = write(tmp_path / f"{kind}.pth")
        cfg = config(f"{kind}_voc_paper", own, tmp_path / kind)
        with pytest.raises(ValueError, match=rf"epoch_1\.pth' is not .*{message}"):
            run("test", cfg, load_from=saved)
        assert not (tmp_path / kind / "result.json").exists()
