"""The stored result of a segmentation run, with its protocol and its provenance."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.runner import BaseLoop, Runner
from mmseg.evaluation import IoUMetric
from mmseg.registry import HOOKS

from stellar_plugin.mmseg.card.built import (
    accumulative_counts,
    built_datasets,
    compared_with_original,
    heads,
    num_label_classes,
    other_heads,
    unscored,
)
from stellar_plugin.mmseg.card.card import (
    differences,
    make_card,
    read_evaluation,
    read_training,
)
from stellar_plugin.mmseg.card.model import check_settings, settings_of
from stellar_plugin.mmseg.card.names import data_name, evaluation_names, model_name
from stellar_plugin.mmseg.card.provenance import (
    UNKNOWN_WEIGHTS,
    read_images,
    read_run,
    tested_weights,
    weights_origin,
)
from stellar_plugin.mmseg.card.reading import Readings, read
from stellar_plugin.mmseg.card.stages import (
    TRAINING_FIELDS,
    of_training,
    reached,
    resumed,
)
from stellar_plugin.mmseg.classes import check_names, check_trained_names
from stellar_plugin.mmseg.labels import (
    check_batch,
    check_datasets,
    check_first,
    check_heads,
)
from stellar_plugin.mmseg.metric import BatchJaccard, CountedIoUMetric
from stellar_plugin.mmseg.pipeline import name_files
from stellar_plugin.mmseg.stored import (
    as_json,
    as_stored,
    class_counts,
    make_result,
    read_scores,
    write_result,
)
from stellar_plugin.mmseg.weights import (
    check_checkpoint,
    check_file,
    checkpoint_name,
    inner,
    not_finite,
)
from stellar_plugin.protocols import NOT_TOLD
from stellar_plugin.state_dict import shown

RESULT_NAME = "result.json"
META_KEY = "stellar"
# What mmengine itself writes beside the weights.
META_NAMES = {"seed": "seed", "iterations": "iter"}
# Metrics that give these scores in percent; a subclass may give anything.
IN_PERCENT = (IoUMetric, CountedIoUMetric, BatchJaccard)
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
        self._called: str | None = None  # as its training called the model
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
            rule = resumed(self._before, self._training, runner.iter)
            self._training["rule"] = rule
        if not self._origin:
            self._origin = self._noted(
                runner, read({tuple(UNKNOWN_WEIGHTS): lambda: weights_origin(runner)})
            )
        self._origin |= self._noted(runner, read_run(runner))
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
        self._check(runner, "labels", _check_batch, runner, data_batch, mode)

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
            "model": evaluation_names(runner)[0].get("model"),
            **self._noted(runner, _read_settings(runner)),
        }
        meta[META_KEY] = as_stored(stored)  # torch loads nothing but plain values

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Checks the weights; takes the training's part of card and provenance."""
        self._check(runner, "weights", check_checkpoint, runner, checkpoint)
        meta = checkpoint.get("meta", {})
        trained = meta.get(META_KEY, {})
        if runner._resume or not isinstance(runner._train_loop, BaseLoop):
            self._check(runner, "checkpoint", _check_trained, runner, meta, trained)
            self._called = trained.get("model")
            self._names(runner)
        if not isinstance(runner._train_loop, BaseLoop):
            card = trained.get("card")
            self._training = None if card is None else of_training(card)
            known = {name: meta.get(key, NOT_TOLD) for name, key in META_NAMES.items()}
            foreign = {"checkpoint": str(runner._load_from), **known}
            self._origin = dict(trained.get("provenance", foreign))
        elif runner._resume:
            known = trained.get("provenance", {})
            names = (*UNKNOWN_WEIGHTS, "weights")
            self._origin = UNKNOWN_WEIGHTS | {n: known[n] for n in names if n in known}
            self._before = trained.get("asked", {})

    def after_val_epoch(
        self, runner: Runner, metrics: Mapping[str, Any] | None = None
    ) -> None:
        """Keeps the scores of the latest validation; alone, it is a test."""
        if isinstance(runner._train_loop, BaseLoop):
            metrics = self._finite(runner, metrics or {})
            self._validation = Validation(metrics, runner.iter, runner.epoch)
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
            metrics = self._finite(runner, metrics)
            names = ("tested", "tested_sha256")
            tested = self._noted(runner, read({names: lambda: tested_weights(runner)}))
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
        scores = self._noted(runner, read_scores(metrics, _in_percent(loop)))
        if not scores:
            self._warn(runner, f"no result is stored: no score in {sorted(metrics)}")
            return
        card = self._card(runner, loop, training)
        images = read_images(runner, loop, trained=origin.get("precision"))
        provenance = {
            **origin,
            **self._noted(runner, images),
            **self._noted(runner, _read_settings(runner)),
            "published_and_here": differences(runner, card),
            "num_classes_in_mean": class_counts(metrics),
        }
        result = make_result(self._names(runner), scores, card, provenance)
        self._write(runner, result)

    def _names(self, runner: Runner) -> dict[str, Any]:
        """What model and data are called: weights keep the name of their training."""
        readings = read(
            {"model": lambda: model_name(runner), "data": lambda: data_name(runner)}
        )
        names = self._noted(runner, readings)
        if self._called in (None, names["model"]):
            return names
        self._warn(
            runner,
            f"'{checkpoint_name(runner)}' was trained as model '{self._called}', and "
            f"is stored as that: this config's is '{names['model']}'",
        )
        return {**names, "model": self._called}

    def _finite(self, runner: Runner, metrics: Mapping[str, Any]) -> Mapping[str, Any]:
        """The scores; none where the weights are no numbers."""
        wrong = not_finite(inner(runner.model).state_dict())
        if not wrong:
            return metrics
        self._warn(
            runner,
            f"weights are not finite, in {shown(wrong)}: the training diverged, and "
            "its scores are stored as null",
        )
        return dict.fromkeys(metrics, math.nan)

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
        done = read(
            {"steps": lambda: math.ceil(iteration / accumulative_counts(runner))}
        )
        steps = self._noted(runner, done)["steps"]
        return reached(self._training or {}, steps, epoch)

    def _show(self, runner: Runner, card: Mapping[str, Any]) -> None:
        lines = [f"  {name}: {value}" for name, value in card.items()]
        changed = differences(runner, card)
        lines += ["Published, and different here:"] if changed else []
        lines += [f"  {n}: {old}, here {new}" for n, (old, new) in changed.items()]
        runner.logger.info("\n".join(["Protocol:", *lines]))

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


def _read_settings(runner: Runner) -> Readings:
    return read({"settings": lambda: settings_of(inner(runner.model))})


def _in_percent(loop: BaseLoop) -> set[str]:
    """Names of the scores that are known to be in percent."""
    metrics = getattr(loop.evaluator, "metrics", ())
    known = [m for m in metrics if type(m) in IN_PERCENT]
    return {f"{m.prefix}/{n}" if m.prefix else n for m in known for n in PERCENT}


def _check_labels(runner: Runner) -> None:
    datasets = built_datasets(runner)
    name_files(datasets.values())
    head = heads(runner.model)[-1]
    check_names(datasets)
    num_classes = num_label_classes(head)
    if "train" in datasets:
        others = [num_label_classes(other) for other in other_heads(runner.model)]
        check_heads(others, num_classes)
    written = unscored(runner)
    check_datasets(datasets, num_classes, head.ignore_index, written)
    for split in datasets.keys() - {"train", *written}:
        original = compared_with_original(runner, split)
        check_first(datasets[split], num_classes, head.ignore_index, original)


def _check_trained(
    runner: Runner, meta: Mapping[str, Any], trained: Mapping[str, Any]
) -> None:
    path = checkpoint_name(runner)
    check_trained_names(path, meta, built_datasets(runner))
    settings = trained.get("settings", NOT_TOLD)
    if settings != NOT_TOLD:
        check_settings(path, inner(runner.model), settings)


def _check_batch(runner: Runner, batch: Any, split: str) -> None:
    head = heads(runner.model)[-1]
    original = compared_with_original(runner, split)
    check_batch(batch, num_label_classes(head), head.ignore_index, original)
