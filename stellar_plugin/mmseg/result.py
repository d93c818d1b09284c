"""The stored result of a segmentation run, with its protocol and its provenance."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mmengine
import mmseg
import torch
from mmengine.dist import get_world_size, is_main_process
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import BaseLoop, Runner
from mmseg.registry import HOOKS

from stellar_plugin.hashes import file_sha256
from stellar_plugin.mmseg.card import TRAINING_FIELDS, run_protocol, smallest
from stellar_plugin.mmseg.labels import check_batch, check_datasets
from stellar_plugin.mmseg.metric import NUM_CLASSES
from stellar_plugin.mmseg.pipeline import name_files
from stellar_plugin.mmseg.weights import check_checkpoint, check_file

RESULT_NAME = "result.json"
META_KEY = "stellar"


@HOOKS.register_module()
class SegmentationResultHook(Hook):
    """Checks the classes, shows the protocol, stores the result.

    Before training or test the classes of model and data are compared and the protocol
    card goes to the log. After the last validation, and after a test, `result.json` in
    the work directory holds the scores (fractions), the card and where the numbers come
    from; the report command makes tables of such files. Checkpoints carry card and
    provenance of their training, so that a test by `mim test` knows them.

    A config says by `evaluation = dict(model=..., data=..., protocol=...)` what the
    result is called; see `stellar_plugin.mmseg.card.run_protocol`.
    """

    def __init__(self) -> None:
        self._card: dict[str, Any] = {}
        self._origin: dict[str, Any] = {}
        self._metrics: Mapping[str, float] | None = None

    def before_run(self, runner: Runner) -> None:
        """Checks checkpoint file and data sets, and prints the protocol card."""
        check_file(runner)
        head = _model(runner).decode_head
        loops = {
            "train": runner._train_loop,
            "val": runner._val_loop,
            "test": runner._test_loop,
        }
        datasets = {
            name: loop.dataloader.dataset
            for name, loop in loops.items()
            if isinstance(loop, BaseLoop)
        }
        name_files(datasets.values())
        check_datasets(datasets, head.num_classes, head.ignore_index)
        testing = isinstance(runner._test_loop, BaseLoop)
        part = "test" if testing else "val"
        self._card = run_protocol(runner.cfg, part, get_world_size()).card()
        if not testing:
            _show(runner, self._card)

    def before_train(self, runner: Runner) -> None:
        """Remembers which weights are probed."""
        self._origin = _origin(runner, runner.cfg["model"]["backbone"])

    def _before_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: Any = None,
        mode: str = "train",
    ) -> None:
        """Checks the label values of a batch of training, validation or test."""
        head = _model(runner).decode_head
        check_batch(data_batch, head.num_classes, head.ignore_index)

    def before_save_checkpoint(
        self, runner: Runner, checkpoint: dict[str, Any]
    ) -> None:
        """Writes card and provenance beside the weights."""
        meta = checkpoint["meta"]
        meta[META_KEY] = {
            "card": _reached(self._card, meta["iter"], meta["epoch"]),
            "provenance": {**self._origin, "iterations": meta["iter"]},
        }

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Checks the weights; takes the training's part of card and provenance."""
        check_checkpoint(runner, checkpoint)
        if isinstance(runner._train_loop, BaseLoop):
            return  # resumed: the config of this run says what is trained
        trained = checkpoint.get("meta", {}).get(META_KEY)
        if trained is None:
            path = Path(runner._load_from)
            self._origin = {"checkpoint": str(path), "sha256": sha256(path)}
        else:
            self._origin = trained["provenance"]
            self._card = _tested(self._card, trained["card"])
        self._origin["tested"] = str(runner._load_from)
        _show(runner, self._card)

    def after_val_epoch(
        self, runner: Runner, metrics: Mapping[str, float] | None = None
    ) -> None:
        """Keeps the scores of the latest validation."""
        self._metrics = metrics

    def after_train(self, runner: Runner) -> None:
        """Stores the scores of the last validation."""
        if self._metrics is not None:
            self._origin["iterations"] = runner.iter
            self._store(runner, self._metrics, runner.val_loop)

    def after_test_epoch(
        self, runner: Runner, metrics: Mapping[str, float] | None = None
    ) -> None:
        """Stores the scores of a test."""
        if metrics:
            self._store(runner, metrics, runner.test_loop)

    def _store(
        self, runner: Runner, metrics: Mapping[str, float], loop: BaseLoop
    ) -> None:
        if not is_main_process():
            return
        # "paper/mIoU" is called mIoU too: the protocol tells them apart.
        scores = {k.rpartition("/")[2]: v for k, v in metrics.items()}
        num_classes = scores.pop(NUM_CLASSES, None)
        result = {
            "task": "segmentation",
            "model": runner.cfg["evaluation"]["model"],
            "data": runner.cfg["evaluation"]["data"],
            "scores": {name: fraction(value) for name, value in scores.items()},
            "protocol": self._card,
            "provenance": {
                **self._origin,
                "seed": runner.seed,
                "num_images": len(loop.dataloader.dataset),
                "num_classes_in_mean": num_classes,
                "precision": runner.cfg["optim_wrapper"]["type"],
                "versions": _versions(),
            },
        }
        path = Path(runner.work_dir) / RESULT_NAME
        path.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n")
        runner.logger.info(f"Result stored in '{path}'.")


def fraction(percent: float) -> float | None:
    """A score in 0 to 1; None, null in JSON, where there is none."""
    return round(float(percent) / 100, 6) if math.isfinite(percent) else None


def sha256(path: Path) -> str | None:
    """Hash of a file, None where there is none."""
    return file_sha256(path) if path.is_file() else None


def _model(runner: Runner) -> Any:
    return runner.model.module if is_model_wrapper(runner.model) else runner.model


def _origin(runner: Runner, backbone: Mapping[str, Any]) -> dict[str, Any]:
    named = (backbone.get("init_cfg") or {}).get("checkpoint", "random weights")
    path = getattr(_model(runner).backbone, "weights_path", None)
    return {"checkpoint": str(named), "sha256": sha256(path) if path else None}


def _reached(card: Mapping[str, Any], iterations: int, epochs: int) -> dict[str, Any]:
    """The card of training that may be cut short."""
    reached = {"iterations": iterations, "epochs": epochs}
    card = dict(card)
    for name in reached.keys() & card.keys():
        if reached[name] < card[name]:
            card["schedule"] += f", stopped after {reached[name]} of {card[name]}"
            card[name] = reached[name]
    return card


def _tested(card: Mapping[str, Any], trained: Mapping[str, Any]) -> dict[str, Any]:
    """The card of a test: training as it was, the rest as the config says now."""
    fields = {k: v for k, v in card.items() if k not in TRAINING_FIELDS}
    fields |= {k: trained[k] for k in TRAINING_FIELDS if k in trained}
    limit = smallest(card.get("limit"), trained.get("limit"))
    return fields if limit is None else {**fields, "limit": limit}


def _show(runner: Runner, card: Mapping[str, Any]) -> None:
    lines = [f"  {name}: {value}" for name, value in card.items()]
    runner.logger.info("\n".join(["Protocol:", *lines]))


def _versions() -> dict[str, str]:
    return {
        "torch": torch.__version__,
        "mmseg": mmseg.__version__,
        "mmengine": mmengine.__version__,
    }
