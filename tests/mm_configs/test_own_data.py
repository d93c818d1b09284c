"""The template for own data, from a folder of images and masks to a score."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.runner import Runner
from mmseg.apis import MMSegInferencer, inference_model, init_model
from mmseg.registry import HOOKS
from PIL import Image

import mm_configs
from stellar_plugin.mmseg.result import SegmentationResultHook
from tests.stellar_plugin.mmseg.mmseg_sets import VIT, write_checkpoint

# Height and width: no two alike, no side a multiple of a patch.
SIZES = [(70, 90), (90, 75), (100, 70), (81, 83)]


def write_masks(root: Path, split: str) -> None:
    """Bright rectangles on a dark ground, and masks of 0 and 255."""
    rng = np.random.default_rng(len(split))
    for number, (height, width) in enumerate(SIZES):
        mask = np.zeros((height, width), bool)
        top, left = rng.integers(5, 35, size=2)
        mask[top : top + 40, left : left + 30] = True
        image = np.where(mask, 200, 40)[..., None] + rng.integers(
            -30, 30, (height, width, 3)
        )
        for folder, array, suffix in (
            ("images", image.astype(np.uint8), "jpg"),
            ("labels", np.uint8(mask * 255), "png"),
        ):
            path = root / folder / split / f"{number}.{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(path)


def copy_template(path: Path, **changes: object) -> None:
    """Copies the template and changes what stands in it, as an editor would."""
    text = Path(mm_configs.path("stellar_own_data")).read_text()
    for name, value in changes.items():
        text, count = re.subn(
            rf"^{name} = .*$", f"{name} = {value!r}", text, flags=re.MULTILINE
        )
        assert count == 1, name
    path.write_text(text)


def mean_iou(predictions: list[np.ndarray], masks: list[np.ndarray]) -> float:
    """Over all pixels of the set, by hand."""
    ious = []
    for c in (0, 1):
        pairs = [(p == c, m == c) for p, m in zip(predictions, masks, strict=True)]
        intersection = sum(int((p & m).sum()) for p, m in pairs)
        ious.append(intersection / sum(int((p | m).sum()) for p, m in pairs))
    return sum(ious) / 2


@pytest.mark.slow
def test_from_a_folder_to_a_score(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for split in ("train", "val"):
        write_masks(tmp_path / "data", split)
    checkpoint = write_checkpoint(tmp_path / "stellar")
    copy_template(
        tmp_path / "my_data.py",
        data_root=str(tmp_path / "data"),
        short_side=64,
        window=64,
        checkpoint=str(checkpoint),
    )
    cfg = Config.fromfile(tmp_path / "my_data.py")
    cfg.merge_from_dict(
        {
            "model.decode_head.in_channels": VIT["embed_dim"],
            **{f"{s}_dataloader.num_workers": 0 for s in ("train", "val", "test")},
            **{f"{s}_dataloader.persistent_workers": False for s in ("train", "val")},
            "test_dataloader.persistent_workers": False,
            "train_dataloader.batch_size": 4,
            "optim_wrapper.optimizer.lr": 1e-2,
            "train_cfg.max_iters": 40,
        }
    )
    work = tmp_path / "work"
    cfg.work_dir, cfg.randomness = str(work), {"seed": 0}
    runner = Runner.from_cfg(cfg)
    runner.train()
    result = json.loads((work / "result.json").read_text())
    assert (result["model"], result["data"]) == ("STELLAR ViT-B", "my data")
    assert result["provenance"]["num_classes_in_mean"] == 2
    assert result["scores"]["mIoU"] > 0.6

    # mmsegmentation's interface for inference, on files without labels.
    config, saved = (
        str(tmp_path / "work/my_data.py"),
        str(tmp_path / "work/iter_40.pth"),
    )
    images = [str(tmp_path / f"data/images/val/{i}.jpg") for i in range(len(SIZES))]
    masks = [
        np.asarray(Image.open(tmp_path / f"data/labels/val/{i}.png")) // 255
        for i in range(len(SIZES))
    ]
    model = init_model(config, saved, device="cpu")
    predictions = [
        inference_model(model, image).pred_sem_seg.data[0].numpy() for image in images
    ]
    assert result["scores"]["mIoU"] == pytest.approx(
        mean_iou(predictions, masks), abs=6e-5
    )
    inferencer = MMSegInferencer(config, weights=saved, device="cpu")
    inferred = inferencer(images, show=False)["predictions"]
    for prediction, again in zip(predictions, inferred, strict=True):
        np.testing.assert_array_equal(prediction, again)


def test_sizes__and_labels_stand_in_every_place(tmp_path: Path) -> None:
    values, ignored = [[0, 0, 0], [9, 9, 9], [255, 0, 0]], [[1, 1, 1]]
    copy_template(
        tmp_path / "my_data.py",
        short_side=300,
        window=180,
        classes=["a", "b", "c"],
        values=values,
        ignored=ignored,
    )
    cfg = Config.fromfile(tmp_path / "my_data.py")
    assert cfg.model.decode_head.num_classes == 3
    assert cfg.model.data_preprocessor.size == (180, 180)
    assert cfg.model.test_cfg.crop_size == (180, 180)
    assert cfg.model.test_cfg.stride == (120, 120)
    for part in ("train", "val", "test"):
        dataset = cfg[f"{part}_dataloader"].dataset
        assert dataset.metainfo.classes == ["a", "b", "c"]
        steps = {step["type"]: step for step in dataset.pipeline}
        resize = steps["RandomResize" if part == "train" else "Resize"]
        assert resize.scale == (1200, 300)
        loader = steps["LoadConvertedAnnotations"]
        assert (loader["values"], loader["ignored"]) == (values, ignored)
    assert cfg.test_pipeline == cfg.test_dataloader.dataset.pipeline
    assert cfg.tta_model.type == "SegTTAModel"
    sizes, flips, (loader,), _ = cfg.tta_pipeline[1]["transforms"]
    shorter = [150, 225, 300, 375, 450, 525]
    assert [step["scale"] for step in sizes] == [(4 * n, n) for n in shorter]
    assert [step["prob"] for step in flips] == [0.0, 1.0]
    assert (loader["values"], loader["ignored"]) == (values, ignored)


def test_hook_in_any_config__as_documented(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs/segmentation.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    (block,) = (b for b in blocks if "SegmentationResultHook" in b)
    (tmp_path / "fcn.py").write_text(block)
    cfg = Config.fromfile(tmp_path / "fcn.py")
    assert cfg.model.decode_head.type == "FCNHead"
    assert cfg.custom_imports.imports == ["stellar_plugin.mmseg"]
    assert isinstance(HOOKS.build(cfg.custom_hooks[0]), SegmentationResultHook)
