"""Runners of small configs, built as for training but not trained."""

from __future__ import annotations

import copy
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any
from unittest import mock

from mmengine.config import Config
from mmengine.runner import Runner

from tests.stellar_plugin.mmseg.mmseg_sets import REPOSITORY, WRITERS, tiny

SETS = tempfile.TemporaryDirectory()


@lru_cache
def load(name: str) -> Config:
    """A config of mm_configs."""
    return Config.fromfile(REPOSITORY / f"mm_configs/{name}.py")


@lru_cache
def shared_set(name: str) -> Path:
    """A tiny set, written once; do not change it."""
    return WRITERS[name](Path(SETS.name) / name)


def tiny_config(name: str, folder: Path, options: dict[str, Any] | None = None) -> Any:
    """A config of mm_configs with a tiny encoder of random weights, on a tiny set.

    Args:
        name:
            Name of the config, its second word that of the data.
        folder:
            Where the work directory is.
        options:
            More changes, as of --cfg-options.
    """
    data = shared_set(name.split("_")[1])
    cfg = copy.deepcopy(load(name))
    batch_size = cfg.train_dataloader.batch_size
    tiny_options = {k: plain(v) for k, v in tiny("nowhere", data).items()}
    cfg.merge_from_dict({**tiny_options, "train_dataloader.batch_size": batch_size})
    cfg.model.backbone.init_cfg = None
    cfg.merge_from_dict(options or {})
    return named(cfg, folder / "work")


def resnet_config(folder: Path, options: dict[str, Any] | None = None) -> Any:
    """An ordinary config of mmsegmentation: ResNet-18, FCN head, whole images."""
    data = shared_set("ade20k")
    read = [{"type": "LoadImageFromFile"}, {"type": "LoadAnnotations"}]
    pack = [{"type": "PackSegInputs"}]
    dataset = {"type": "ADE20KDataset", "data_root": str(data)}

    def loader(split: str, steps: list[dict[str, Any]]) -> dict[str, Any]:
        folders = {
            "img_path": f"images/{split}",
            "seg_map_path": f"annotations/{split}",
        }
        return {
            "batch_size": 2 if split == "training" else 1,
            "num_workers": 0,
            "sampler": {"type": "DefaultSampler", "shuffle": split == "training"},
            "dataset": dict(**dataset, data_prefix=folders, pipeline=steps),
        }

    crop = {"type": "RandomCrop", "crop_size": (64, 64)}
    cfg = Config(
        {
            "default_scope": "mmseg",
            "custom_imports": {"imports": ["stellar_plugin.mmseg"]},
            "custom_hooks": [{"type": "SegmentationResultHook"}],
            "model": {
                "type": "EncoderDecoder",
                "data_preprocessor": {
                    "type": "SegDataPreProcessor",
                    "mean": [123.675, 116.28, 103.53],
                    "std": [58.395, 57.12, 57.375],
                    "pad_val": 0,
                    "seg_pad_val": 255,
                    "size": (64, 64),
                },
                "backbone": {"type": "ResNet", "depth": 18},
                "decode_head": {
                    "type": "FCNHead",
                    "in_channels": 512,
                    "in_index": 3,
                    "channels": 8,
                    "num_convs": 1,
                    "concat_input": False,
                    "num_classes": 150,
                    "norm_cfg": {"type": "BN"},
                    "loss_decode": {"type": "CrossEntropyLoss"},
                },
                "train_cfg": {},
                "test_cfg": {"mode": "whole"},
            },
            "train_dataloader": loader("training", [*read, crop, *pack]),
            "val_dataloader": loader("validation", [read[0], read[1], *pack]),
            "test_dataloader": loader("validation", [read[0], read[1], *pack]),
            "val_evaluator": {"type": "IoUMetric"},
            "test_evaluator": {"type": "IoUMetric"},
            "optim_wrapper": {
                "type": "OptimWrapper",
                "optimizer": {"type": "SGD", "lr": 0.01, "momentum": 0.9},
                "clip_grad": None,
            },
            "param_scheduler": [],
            "train_cfg": {
                "type": "IterBasedTrainLoop",
                "max_iters": 2,
                "val_interval": 2,
            },
            "val_cfg": {"type": "ValLoop"},
            "test_cfg": {"type": "TestLoop"},
            "default_hooks": {
                "logger": {"type": "LoggerHook", "interval": 1},
                "checkpoint": {
                    "type": "CheckpointHook",
                    "by_epoch": False,
                    "interval": 1,
                },
            },
        }
    )
    cfg.merge_from_dict(options or {})
    return named(cfg, folder / "work")


def named(cfg: Any, work_dir: Path) -> Any:
    """A config with its own work directory, experiment and seed."""
    cfg.work_dir = str(work_dir)
    cfg.experiment_name = f"{work_dir.parent.name}_{work_dir.name}"
    cfg.randomness = {"seed": 0}
    for split in ("train", "val", "test"):
        # Saves seconds of garbage collection.
        cfg[f"{split}_dataloader"].dataset.serialize_data = False
    return cfg


def quick_runner(cfg: Any) -> Runner:
    """A runner that does not spend seconds on writing down config and machine."""
    with (
        mock.patch.object(Config, "pretty_text", ""),
        mock.patch.object(Runner, "_log_env"),
        mock.patch.object(Runner, "dump_config"),
    ):
        return Runner.from_cfg(cfg)


def built(cfg: Any) -> Runner:
    """A runner whose parts are built, in the order of `Runner.train`."""
    runner = quick_runner(cfg)
    runner._train_loop = runner.build_train_loop(runner._train_loop)
    runner.optim_wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
    if runner.param_schedulers is not None:
        runner.param_schedulers = runner.build_param_scheduler(runner.param_schedulers)
    if runner._val_loop is not None:
        runner._val_loop = runner.build_val_loop(runner._val_loop)
    if runner._test_loop is not None:
        runner._test_loop = runner.build_test_loop(runner._test_loop)
    return runner


def plain(value: Any) -> Any:
    """A value as --cfg-options have it: paths as text."""
    return str(value) if isinstance(value, Path) else value
