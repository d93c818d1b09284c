from __future__ import annotations

from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import PARAM_SCHEDULERS, DefaultScope
from mmseg.registry import MODELS

import stellar_plugin.mmseg  # noqa: F401

CONFIGS = Path(__file__).parents[2] / "mm_configs"
NUM_CLASSES = {
    "stellar_ade20k": 150,
    "stellar_cityscapes": 19,
    "stellar_voc": 21,
    "stellar_digit_boards": 11,
}
PROTOCOL = ["stellar_ade20k", "stellar_cityscapes", "stellar_voc"]


def load(name: str) -> Config:
    return Config.fromfile(CONFIGS / f"{name}.py")


def transform(cfg: Config, name: str) -> dict[str, object]:
    pipeline = cfg.train_dataloader.dataset.pipeline
    return next(step for step in pipeline if step["type"] == name)


def learning_rates(cfg: Config) -> list[float]:
    """The learning rate of every iteration, by mmengine's own schedulers."""
    optimizer = torch.optim.SGD(
        [torch.zeros(1, requires_grad=True)], lr=cfg.optim_wrapper.optimizer.lr
    )
    schedulers = [
        PARAM_SCHEDULERS.build({**s, "optimizer": optimizer})
        for s in cfg.param_scheduler
    ]
    rates = []
    for _ in range(cfg.train_cfg.max_iters):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        for scheduler in schedulers:
            scheduler.step()
    return rates


def test_all_configs_are_listed() -> None:
    assert {path.stem for path in CONFIGS.glob("*.py")} == NUM_CLASSES.keys()


@pytest.mark.parametrize("name", NUM_CLASSES)
class TestEveryConfig:
    def test_model__builds(self, name: str) -> None:
        cfg = load(name)
        with (
            DefaultScope.overwrite_default_scope(cfg.default_scope),
            torch.device("meta"),
        ):
            model = MODELS.build(cfg.model)
        assert model.num_classes == model.decode_head.conv_seg.out_channels
        assert model.num_classes == NUM_CLASSES[name]
        assert model.decode_head.in_channels == model.backbone.encoder.embed_dim
        assert type(model.decode_head.norm) is torch.nn.BatchNorm2d
        trainable = [n for n, p in model.named_parameters() if p.requires_grad]
        assert sorted(trainable) == [
            "decode_head.conv_seg.bias",
            "decode_head.conv_seg.weight",
            "decode_head.norm.bias",
            "decode_head.norm.weight",
        ]

    def test_images__normalised_as_in_pretraining(self, name: str) -> None:
        cfg = load(name)
        preprocessor = MODELS.build(cfg.model.data_preprocessor)
        mean = torch.tensor([0.485, 0.456, 0.406])
        std = torch.tensor([0.229, 0.224, 0.225])
        # OpenCV's order of channels, intensities up to 255.
        bgr = torch.tensor([255, 0, 51], dtype=torch.uint8)
        sample = {"inputs": [bgr[:, None, None].expand(3, 60, 60)], "data_samples": []}
        (normalised,) = preprocessor(sample)["inputs"]
        expected = (torch.tensor([0.2, 0.0, 1.0]) - mean) / std
        torch.testing.assert_close(normalised[:, 0, 0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["stellar_ade20k", "stellar_digit_boards"])
class TestOwnAndInheritedSchedule:
    def test_saved_by_the_runner__stands_alone(self, name: str, tmp_path: Path) -> None:
        cfg = load(name)
        cfg.dump(tmp_path / "dumped.py")
        again = Config.fromfile(tmp_path / "dumped.py")
        assert again.model == cfg.model
        assert list(again.custom_imports.imports) == ["stellar_plugin.mmseg"]

    def test_learning_rate__warm_up_then_to_zero(self, name: str) -> None:
        cfg = load(name)
        warmup = 30 if name == "stellar_digit_boards" else 1500
        peak, last = cfg.optim_wrapper.optimizer.lr, cfg.train_cfg.max_iters - 1
        rates = learning_rates(cfg)
        for t in (0, 1, warmup // 2, warmup - 1, warmup, last // 2, last):
            factor = 1e-6 + (1 - 1e-6) * min(1, t / (warmup - 1))
            assert rates[t] == pytest.approx(peak * (1 - t / last) * factor, abs=1e-15)


@pytest.mark.parametrize("name", PROTOCOL)
class TestCommunityProtocol:
    def test_schedule(self, name: str) -> None:
        cfg = load(name)
        optimizer = cfg.optim_wrapper.optimizer
        assert (optimizer.type, optimizer.lr) == ("AdamW", 1e-3)
        assert optimizer.weight_decay == 1e-4
        assert cfg.train_cfg.max_iters == 40000
        assert cfg.param_scheduler == load("stellar_ade20k").param_scheduler
        assert cfg.train_dataloader.batch_size == 16
        assert cfg.sync_bn == "torch"
        assert cfg.model.decode_head.loss_decode.type == "CrossEntropyLoss"

    def test_views(self, name: str) -> None:
        cfg = load(name)
        assert tuple(transform(cfg, "RandomResize")["ratio_range"]) == (0.5, 2.0)
        assert tuple(transform(cfg, "RandomCrop")["crop_size"]) == (512, 512)
        assert tuple(cfg.model.data_preprocessor.size) == (512, 512)
        assert cfg.model.test_cfg.mode == "slide"
        assert tuple(cfg.model.test_cfg.crop_size) == (512, 512)
        assert tuple(cfg.model.test_cfg.stride) == (341, 341)


class TestVoc:
    def test_training_split__without_the_augmented_set(self) -> None:
        dataset = load("stellar_voc").train_dataloader.dataset
        assert dataset.type == "PascalVOCDataset"
        assert dataset.ann_file == "ImageSets/Segmentation/train.txt"
