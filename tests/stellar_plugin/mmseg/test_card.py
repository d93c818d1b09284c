from __future__ import annotations

import copy
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from mmengine.config import Config

import stellar_plugin.mmseg  # noqa: F401
from stellar_plugin.mmseg.card import run_protocol
from stellar_plugin.protocols import SEGMENTATION_VOC

CONFIGS = Path(__file__).parents[3] / "mm_configs"


@lru_cache
def load(name: str) -> Config:
    return Config.fromfile(CONFIGS / f"{name}.py")


def changed(options: dict[str, Any], name: str = "stellar_voc") -> Config:
    """A config as --cfg-options changes it."""
    cfg = copy.deepcopy(load(name))
    cfg.merge_from_dict(options)
    return cfg


class TestRunProtocol:
    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            ({"train_cfg.max_iters": 400}, {"iterations": 400, "warmup": 15}),
            ({"train_dataloader.batch_size": 4}, {"batch_sizes": [4]}),
            ({"optim_wrapper.accumulative_counts": 2}, {"batch_sizes": [32]}),
            ({"optim_wrapper.optimizer.lr": 0.1}, {"lrs": [0.1]}),
            ({"optim_wrapper.optimizer.weight_decay": 0}, {"weight_decay": 0}),
            ({"model.backbone.feature": "lowrank"}, {"features": "lowrank"}),
            ({"model.backbone.frozen": False}, {"backbone": "trained"}),
            ({"model.test_cfg.stride": (100, 100)}, {"stride": 100}),
            ({"train_dataloader.dataset.indices": 30}, {"limit": 30}),
            ({"val_dataloader.dataset.indices": [0, 7]}, {"limit": 2}),
            (
                {
                    "train_dataloader.dataset.indices": 9,
                    "val_dataloader.dataset.indices": 3,
                },
                {"limit": 3},
            ),
            ({"optim_wrapper.clip_grad": {"max_norm": 5.0}}, {"clip": 5.0}),
            ({"model.test_cfg.crop_size": (640, 640)}, {"crop": 640}),
            ({"model.decode_head.type": "FCNHead"}, {"head": "FCNHead"}),
            (
                {"model.decode_head.loss_decode.type": "FocalLoss"},
                {"loss": "FocalLoss"},
            ),
            ({"evaluation.data": "Mine"}, {"data": "Mine"}),
            ({"evaluation.changes": {"classes": "two"}}, {"classes": "two"}),
        ],
    )
    def test_options__show_in_the_card(
        self, options: dict[str, Any], expected: dict[str, Any]
    ) -> None:
        card = run_protocol(changed(options)).card()
        assert card == {**SEGMENTATION_VOC.card(), **expected}

    def test_whole_inference(self) -> None:
        card = run_protocol(changed({"model.test_cfg.mode": "whole"})).card()
        expected = {**SEGMENTATION_VOC.card(), "inference": "whole image"}
        del expected["stride"]
        assert card == expected

    def test_processes__batch_of_all(self) -> None:
        cfg = changed({"train_dataloader.batch_size": 2})
        assert run_protocol(cfg, world_size=8) == run_protocol(changed({}))

    def test_paper__evaluation_batch_of_the_part(self) -> None:
        options = {"test_evaluator.batch_size": 5, "train_cfg.max_epochs": 3}
        cfg = changed(options, "stellar_voc_paper")
        assert run_protocol(cfg).evaluation_batch == 2048
        assert run_protocol(cfg, "test").evaluation_batch == 5
        assert run_protocol(cfg).epochs == 3

    def test_several_metrics(self) -> None:
        cfg = changed({}, "stellar_voc_paper")
        cfg.val_evaluator = [{"type": "IoUMetric"}, cfg.val_evaluator]
        assert run_protocol(cfg).evaluation_batch == 2048

    @pytest.mark.parametrize("wrapper", ["ConcatDataset", "RepeatDataset"])
    def test_wrapped_set__its_pipeline(self, wrapper: str) -> None:
        cfg = changed({})
        inner = cfg.train_dataloader.dataset
        field = {"datasets": [inner, inner], "dataset": inner}
        name = "datasets" if wrapper == "ConcatDataset" else "dataset"
        cfg.train_dataloader.dataset = {"type": wrapper, name: field[name]}
        assert run_protocol(cfg).card() == SEGMENTATION_VOC.card()

    def test_unknown_protocol(self) -> None:
        cfg = changed({"evaluation.protocol": "SEGMENTATION_MOON"})
        with pytest.raises(ValueError, match="'SEGMENTATION_MOON', which is no prot"):
            run_protocol(cfg)

    @pytest.mark.parametrize("name", ["model", "data"])
    def test_no_name(self, name: str) -> None:
        with pytest.raises(ValueError, match="Name model and data of the result"):
            run_protocol(changed({f"evaluation.{name}": ""}))
