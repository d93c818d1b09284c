"""The stored result of a segmentation run, with its protocol and its provenance."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.runner import BaseLoop, Runner
from mmseg.evaluation import IoUMetric
from mmseg.registry import HOOKS

from stellar_plugin.mmseg.card.built import accumulative_counts, heads
from stellar_plugin.mmseg.card.card import (
    TRAINING_FIELDS,
    Readings,
    differences,
    make_card,
    read_evaluation,
    read_training,
)
from stellar_plugin.mmseg.card.names import data_name, model_name
from stellar_plugin.mmseg.card.provenance import (
    UNKNOWN_TEST,
    UNKNOWN_WEIGHTS,
    images_sha256,
    normalisation,
    parameter_precision,
    parameters,
    tested_weights,
    training_precision,
    versions,
    weights_origin,
)
from stellar_plugin.mmseg.datasets import name_files
from stellar_plugin.mmseg.labels import check_batch, check_datasets
from stellar_plugin.mmseg.metric import NUM_CLASSES, BatchJaccard
from stellar_plugin.mmseg.stored import as_json, read_scores, write_result
from stellar_plugin.mmseg.weights import check_checkpoint, check_file
from stellar_plugin.protocols import NOT_TOLD

RESULT_NAME = "result.json"
META_KEY = "stellar"
# What decides beside the card, the weights and the images.
OPTIONS = ("seed", "precision", "mean", "std", "num_train_images")
# What mmengine itself writes beside the weights.
META_NAMES = {"seed": "seed", "iterations": "iter"}
# Scores that mmsegmentation's metric and ours give in percent.
PERCENT = ("aAcc", "mIoU", "mAcc", "mDice", "mFscore", "mPrecision", "mRecall")


class Validation(NamedTuple):
    """Scores and how far training was."""

    metrics: Mapping[str, Any]
    iteration: int
    epoch: int


@HOOKS.register_module()
class SegmentationResultHook(Hook):
    """Checks the classes, shows the protocol, stores the result.

    Before training or test the classes of model and data are compared, and the protocol
    card, read from what mmengine built, goes to the log with its differences from the
    published protocol. After training (scores of the last validation) and after a test,
    `result.json` in the work directory holds the scores (fractions), the card and where
    the numbers come from; the report command makes tables of such files. A result of
    something else that is already there is moved to a folder beside it. Checkpoints
    carry the card and the provenance of their training, so that a test by `mim test`
    knows them.

    Only labels that cannot be right end a run. What cannot be read or written is a
    warning, and "not told" in the card.

    A config says by `evaluation = dict(model=..., data=..., protocol=...)` what the
    result is called; see `stellar_plugin.mmseg.card.card.make_card`.
    """

    def __init__(self) -> None:
        self._training: dict[str, Any] | None = None
        self._origin: dict[str, Any] = {}
        self._before: dict[str, Any] | None = None
        self._validation: Validation | None = None
        self._warned: set[str] = set()

    def before_run(self, runner: Runner) -> None:
        """Checks checkpoint file and data sets."""
        self._check(runner, "checkpoint file", check_file, runner)
        self._check(runner, "labels", _check_labels, runner)

    def before_train(self, runner: Runner) -> None:
        """Reads what is trained, and on which weights, and shows the card."""
        self._training = self._noted(runner, read_training(runner))
        if self._before is not None:
            rule = _resumed(self._before, self._training, runner.iter)
            self._training["rule"] = rule
        if not self._origin:
            told = self._told(runner, "weights", weights_origin, runner)
            self._origin = UNKNOWN_WEIGHTS if told == NOT_TOLD else told
        told = self._told(runner, "parameters", parameters, runner)
        self._origin = {
            **self._origin,
            **({"trained_parameters": told} if told == NOT_TOLD else told),
            "seed": runner.seed,
            "precision": self._told(runner, "precision", training_precision, runner),
            "num_train_images": self._told(
                runner, "num_train_images", lambda: len(runner.train_dataloader.dataset)
            ),
        }
        if isinstance(runner._val_loop, BaseLoop):
            self._show(runner, self._card(runner, runner.val_loop, self._training))

    def before_test(self, runner: Runner) -> None:
        """Shows the card."""
        self._show(runner, self._card(runner, runner.test_loop, self._training))

    def _before_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: Any = None,
        mode: str = "train",
    ) -> None:
        """Checks the label values of a batch of training, validation or test."""
        self._check(runner, "labels", _check_batch, runner, data_batch)

    def before_save_checkpoint(
        self, runner: Runner, checkpoint: dict[str, Any]
    ) -> None:
        """Writes the card and the provenance of training beside the weights."""
        meta = checkpoint["meta"]
        iteration, epoch = meta["iter"], meta["epoch"]
        stored = {
            "card": self._reached(runner, iteration, epoch),
            "asked": self._training,
            "provenance": {**self._origin, "iterations": iteration},
        }
        # Of plain values alone: torch loads nothing else.
        meta[META_KEY] = json.loads(as_json(stored))

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Checks the weights; takes the training's part of card and provenance."""
        self._check(runner, "weights", check_checkpoint, runner, checkpoint)
        meta = checkpoint.get("meta", {})
        trained = meta.get(META_KEY, {})
        if not isinstance(runner._train_loop, BaseLoop):
            card = trained.get("card")
            self._training = None if card is None else _of_training(card)
            known = {name: meta.get(key, NOT_TOLD) for name, key in META_NAMES.items()}
            foreign = {"checkpoint": str(runner._load_from), **known}
            self._origin = dict(trained.get("provenance", foreign))
        elif runner._resume:
            known = trained.get("provenance", UNKNOWN_WEIGHTS)
            of_weights = {
                n: known[n] for n in (*UNKNOWN_WEIGHTS, "weights") if n in known
            }
            self._origin = {**UNKNOWN_WEIGHTS, **of_weights}
            self._before = trained.get("asked", {})

    def after_val_epoch(
        self, runner: Runner, metrics: Mapping[str, Any] | None = None
    ) -> None:
        """Keeps the scores of the latest validation; alone, it is a test."""
        if isinstance(runner._train_loop, BaseLoop):
            self._validation = Validation(metrics or {}, runner.iter, runner.epoch)
        else:
            self._store_test(runner, metrics or {}, runner.val_loop)

    def after_train(self, runner: Runner) -> None:
        """Stores the scores of the last validation."""
        if self._validation is None:
            self._warn(runner, "no result is stored: the run was never validated")
            return
        metrics, iteration, epoch = self._validation
        self._origin["iterations"] = iteration
        reached = self._reached(runner, iteration, epoch)
        if is_main_process():
            self._store(runner, metrics, runner.val_loop, reached, self._origin)

    def after_test_epoch(
        self, runner: Runner, metrics: Mapping[str, Any] | None = None
    ) -> None:
        """Stores the scores of a test."""
        self._store_test(runner, metrics or {}, runner.test_loop)

    def _store_test(
        self, runner: Runner, metrics: Mapping[str, Any], loop: BaseLoop
    ) -> None:
        if is_main_process():
            tested = self._told(runner, "tested weights", tested_weights, runner)
            tested = UNKNOWN_TEST if tested == NOT_TOLD else tested
            unknown = {"checkpoint": NOT_TOLD, "sha256": tested["tested_sha256"]}
            origin = {**unknown, **self._origin, **tested}
            self._store(runner, metrics, loop, self._training, origin)

    def _store(
        self,
        runner: Runner,
        metrics: Mapping[str, Any],
        loop: BaseLoop,
        training: Mapping[str, Any] | None,
        origin: Mapping[str, Any],
    ) -> None:
        percent = self._told(runner, "metrics", _in_percent, loop)
        counted = {n for n in metrics if n.rpartition("/")[2] == NUM_CLASSES}
        read = read_scores(
            {n: value for n, value in metrics.items() if n not in counted},
            set() if percent == NOT_TOLD else percent,
        )
        scores = self._noted(runner, read)
        counts = [metrics[name] for name in sorted(counted)]
        if not scores:
            self._warn(runner, f"no result is stored: no score in {sorted(metrics)}")
            return
        card = self._card(runner, loop, training)
        of = self._provenance(runner, loop, card, origin)
        result = {
            "task": "segmentation",
            "model": self._told(runner, "model", model_name, runner),
            "data": self._told(runner, "data", data_name, runner),
            "scores": scores,
            "protocol": card,
            "provenance": {
                **of,
                "num_classes_in_mean": counts[0] if len(counts) == 1 else counts,
            },
            "identity": {
                "model": {"sha256": of["sha256"]},
                "options": {name: of.get(name, NOT_TOLD) for name in OPTIONS},
                "inputs": {"images": of["images_sha256"]},
            },
        }
        self._write(runner, result)

    def _provenance(
        self,
        runner: Runner,
        loop: BaseLoop,
        card: Mapping[str, Any],
        origin: Mapping[str, Any],
    ) -> dict[str, Any]:
        def dataset() -> Any:
            return loop.dataloader.dataset

        normal = self._told(runner, "mean and std", normalisation, runner)
        told = {
            "num_images": lambda: len(dataset()),
            "images_sha256": lambda: images_sha256(dataset()),
            "precision": lambda: _precision(origin.get("precision"), loop, runner),
            "published_and_here": lambda: differences(runner, card),
            "versions": versions,
        }
        return {
            **origin,
            **({"mean": normal, "std": normal} if normal == NOT_TOLD else normal),
            **{name: self._told(runner, name, read) for name, read in told.items()},
        }

    def _write(self, runner: Runner, result: dict[str, Any]) -> None:
        path = Path(runner.work_dir) / RESULT_NAME
        text = as_json(result)
        try:
            moved = write_result(path, text)
        except OSError as error:
            self._warn(runner, f"no result is stored: {error}; it is\n{text}")
            return
        if moved:
            runner.logger.info(f"The result of another run is now '{moved}'.")
        runner.logger.info(f"Result stored in '{path}'.")

    def _card(
        self, runner: Runner, loop: BaseLoop, training: Mapping[str, Any] | None
    ) -> dict[str, Any]:
        if training is None:
            training = dict.fromkeys((*TRAINING_FIELDS, "split"), NOT_TOLD)
        evaluation = read_evaluation(runner, loop)
        return self._noted(runner, make_card(runner, training, evaluation))

    def _reached(self, runner: Runner, iteration: int, epoch: int) -> dict[str, Any]:
        """The training's card at some iteration."""
        counts = self._told(runner, "gathered gradients", accumulative_counts, runner)
        steps = iteration if counts == NOT_TOLD else math.ceil(iteration / counts)
        return _reached(self._training or {}, steps, epoch)

    def _show(self, runner: Runner, card: Mapping[str, Any]) -> None:
        lines = [f"  {name}: {value}" for name, value in card.items()]
        told = self._told(runner, "differences", differences, runner, card)
        changed = {} if told == NOT_TOLD else told
        lines += ["Published, and different here:"] if changed else []
        lines += [f"  {n}: {old}, here {new}" for n, (old, new) in changed.items()]
        runner.logger.info("\n".join(["Protocol:", *lines]))

    def _told(
        self, runner: Runner, what: str, read: Callable[..., Any], *args: Any
    ) -> Any:
        """What a function reads, or "not told" with a warning that says why."""
        try:
            return read(*args)
        # Of somebody else's classes anything may be missing.
        except Exception as error:
            self._warn(runner, f"{what} not told: {error!r}")
            return NOT_TOLD

    def _check(
        self, runner: Runner, what: str, check: Callable[..., None], *args: Any
    ) -> None:
        """Stops at what is wrong; says what cannot be checked."""
        try:
            check(*args)
        except (ValueError, FileNotFoundError):
            raise
        except Exception as error:
            self._warn(runner, f"{what} not checked: {error!r}")

    def _noted(self, runner: Runner, readings: Readings) -> dict[str, Any]:
        for note in readings.notes:
            self._warn(runner, note)
        return readings.fields

    def _warn(self, runner: Runner, message: str) -> None:
        """Warns once."""
        if message not in self._warned:
            self._warned.add(message)
            runner.logger.warning(f"Segmentation result: {message}.")


def _in_percent(loop: BaseLoop) -> set[str]:
    """Names of the scores that are known to be in percent."""
    known = [
        m for m in loop.evaluator.metrics if isinstance(m, IoUMetric | BatchJaccard)
    ]
    return {f"{m.prefix}/{n}" if m.prefix else n for m in known for n in PERCENT}


def _of_training(card: Mapping[str, Any]) -> dict[str, Any]:
    """What training decided on; of the split its part."""
    fields = {k: card[k] for k in (*TRAINING_FIELDS, "limit") if k in card}
    return {**fields, "split": str(card.get("split", NOT_TOLD)).partition(" / ")[0]}


def _resumed(
    before: Mapping[str, Any], now: Mapping[str, Any], iteration: int
) -> str | None:
    """The rule of a run that was resumed, with what was other before."""
    if not before:
        told = "how it was trained before is not told"
    else:
        now = json.loads(as_json(now))
        names = [n for n in TRAINING_FIELDS if before.get(n) != now.get(n)]
        told = ", ".join(f"before it {n} {before.get(n)}" for n in names)
    rule = now.get("rule")
    if not told:
        return rule
    return f"{f'{rule}; ' if rule else ''}resumed at iteration {iteration}, {told}"


def _reached(card: Mapping[str, Any], steps: int, epochs: int) -> dict[str, Any]:
    """The card of training that may be cut short."""
    reached = {"iterations": steps, "epochs": epochs}
    card = dict(card)
    for name, done in reached.items():
        asked = card.get(name)
        if isinstance(asked, int) and done < asked:
            card["schedule"] = f"{card['schedule']}, stopped after {done} of {asked}"
            card[name] = done
    return card


def _precision(trained: str | None, loop: Any, runner: Runner) -> str:
    tested = "16-mixed" if getattr(loop, "fp16", False) else parameter_precision(runner)
    return tested if trained in (tested, None) else f"{tested}, trained in {trained}"


def _check_labels(runner: Runner) -> None:
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
    head = heads(runner.model)[-1]
    check_datasets(datasets, head.num_classes, head.ignore_index)


def _check_batch(runner: Runner, batch: Any) -> None:
    head = heads(runner.model)[-1]
    check_batch(batch, head.num_classes, head.ignore_index)
