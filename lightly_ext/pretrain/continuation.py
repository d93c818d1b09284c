"""Where a run stands, and how Lightning goes on from there at the very next batch.

Lightning keeps many counters, and what it makes of those of a checkpoint depends on
the hook that saved it: batches are repeated, passed over or trained in addition. Here
they are made anew from what is certain.
"""

from __future__ import annotations

import math
import warnings
from typing import Any, NamedTuple

from pytorch_lightning import Callback, LightningModule, Trainer

from lightly_ext.data import StellarDataModule
from lightly_ext.pretrain.resume import changes, options


class Position(NamedTuple):
    """Where a run stands.

    Attributes:
        steps:
            Optimiser steps done.
        epoch:
            Number of the epoch.
        num_images:
            Images of all processes in the batches of this epoch that are behind the
            last step; later ones only have gradients, which checkpoints do not hold.
        whole:
            Whether no other batch follows in this epoch.
        ended:
            Whether validation and what else follows the last batch are done.

    """

    steps: int = 0
    epoch: int = 0
    num_images: int = 0
    whole: bool = False
    ended: bool = False


class Continuation(Callback):
    """Goes on at the very next batch of a checkpoint, or ends what was left to end.

    Checkpoints are written in `on_train_batch_end` or in `on_train_epoch_end`. Options
    that have changed are applied from there on.
    """

    def __init__(self) -> None:
        self._where = Position()
        self._checkpoint: dict[str, Any] | None = None
        self._added_steps = 0
        self._note = ""

    def total_steps(self, trainer: Trainer) -> int:
        """Optimiser steps of the whole run: those done and those that remain.

        Raises:
            ValueError: If the run has no end.
        """
        where, epochs = self._where, trainer.max_epochs
        steps: float = math.inf
        batches, at_once = trainer.num_training_batches, trainer.accumulate_grad_batches
        if epochs is not None and epochs >= 0 and batches != math.inf:
            left = math.ceil((batches - self._num_batches(trainer)) / at_once)
            more = math.ceil(batches / at_once) * (epochs - where.epoch - 1)
            steps = where.steps + max(0, left + more)
        if trainer.max_steps >= 0:
            steps = min(steps, self.max_steps(trainer))
        if steps == math.inf:
            raise ValueError(
                "The schedule of the learning rate needs an end: give "
                "--trainer.max_epochs or --trainer.max_steps."
            )
        return int(steps)

    def max_steps(self, trainer: Trainer) -> int:
        """Optimiser steps that were asked for, -1 for any number."""
        return trainer.max_steps - self._added_steps

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Adds where the run stands, and with which options."""
        where = _position(trainer)
        if 0 < self._where.steps == trainer.global_step:
            # Nothing is trained yet: batches that are made to be the last are not.
            epochs: Any = trainer.fit_loop.epoch_progress.current
            where = self._where._replace(ended=epochs.processed > self._where.epoch)
        checkpoint["position"] = where._asdict()
        checkpoint["options"] = options(trainer)

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Tells the data where to go on.

        Raises:
            ValueError: If more steps or epochs are done than asked for.
        """
        if not trainer.training:
            return
        where = Position(**checkpoint["position"])
        _refuse_less(trainer, where)
        if where.whole and where.ended:
            where = Position(where.steps, where.epoch + 1)
        data = trainer.datamodule  # type: ignore[attr-defined] # set by `fit`
        if isinstance(data, StellarDataModule):
            at_once = data.batch_size * trainer.world_size
            at_once *= trainer.accumulate_grad_batches
            seen, rest = where.num_images, -where.num_images % at_once
            if rest and not where.whole:
                where = where._replace(num_images=seen + rest)
                self._note = (
                    f" (where {rest} images are passed over, for whole batches)"
                )
            warnings.filterwarnings("ignore", ".* your dataloader is not resumable")
            data.continue_from(where.epoch, where.num_images)
        self._where, self._checkpoint = where, checkpoint

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Says what has changed, and rewrites what Lightning reads.

        That is the counters, and the options of the optimiser.
        """
        if self._checkpoint is None:
            return
        where = self._where
        pl_module.print(self._what_follows(trainer))
        num_batches = self._num_batches(trainer)
        began, done = num_batches > 0, 0 <= trainer.max_steps <= where.steps
        finished = began and not where.ended and done
        if finished:
            # Lightning would return at once, without validation and exported model.
            self._added_steps = where.steps + 1 - trainer.max_steps
            trainer.fit_loop.epoch_loop.max_steps += self._added_steps
        whole = finished or num_batches == trainer.num_training_batches
        _rewrite_loops(self._checkpoint["loops"]["fit_loop"], where, num_batches, whole)
        _rewrite_optimizer(self._checkpoint, trainer)
        self._checkpoint = None

    def on_train_start(self, trainer: Any, pl_module: LightningModule) -> None:
        """Completes the counters in mid-epoch, once Lightning has read them."""
        loop, epochs = trainer.fit_loop.epoch_loop, trainer.fit_loop.epoch_progress
        if epochs.current.ready == epochs.current.processed:
            return
        if loop._should_check_val_fx(trainer.fit_loop._data_fetcher):
            # Counted behind the validation, which belongs to the step before.
            loop._batches_that_stepped -= not loop._should_accumulate()
        elif loop.batch_progress.is_last_batch:
            # Without validation: Lightning would train another batch.
            loop.val_loop._has_run = True

    def on_train_epoch_start(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> None:
        """Starts an epoch as such, which Lightning would continue after a restart."""
        trainer.fit_loop.epoch_loop.restarting = False

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ends the run after its number of steps."""
        trainer.fit_loop.epoch_loop.max_steps -= self._added_steps
        self._added_steps = 0

    def teardown(self, trainer: Any, pl_module: LightningModule, stage: str) -> None:
        """Lets another run start from the beginning."""
        self._where, self._note = Position(), ""
        if isinstance(trainer.datamodule, StellarDataModule):
            trainer.datamodule.continue_from(0, 0)

    def _what_follows(self, trainer: Trainer) -> str:
        """Where the run goes on and what has changed, or that it is complete."""
        where = self._where
        reached = [
            f"--trainer.{name} ({limit})"
            for name, limit, done in (
                ("max_epochs", trainer.max_epochs, where.epoch),
                ("max_steps", trainer.max_steps, where.steps),
            )
            if limit == done
        ]
        if reached:
            return (
                f"The run is complete: {where.steps} steps are done. To train on, "
                f"raise {' and '.join(reached)}."
            )
        assert self._checkpoint is not None
        changed = changes(trainer, self._checkpoint)
        return (
            f"Goes on behind step {where.steps}, in epoch {where.epoch + 1}{self._note}"
            f"{', with ' if changed else ''}{changed}."
        )

    def _num_batches(self, trainer: Trainer) -> int:
        """Batches of the epoch in which the run goes on that are behind it."""
        if self._where.whole:
            return int(trainer.num_training_batches)
        seen = self._where.num_images // _at_once(trainer)
        return int(min(seen, trainer.num_training_batches))


def _refuse_less(trainer: Trainer, where: Position) -> None:
    """Refuses an end of the run that lies behind it."""
    epochs = where.epoch + (where.num_images > 0)
    for name, asked, done, are in (
        ("max_epochs", trainer.max_epochs, epochs, "epochs are begun or done"),
        ("max_steps", trainer.max_steps, where.steps, "steps are done"),
    ):
        if asked is not None and 0 <= asked < done:
            raise ValueError(
                f"--trainer.{name} {asked} is too small: {done} {are}. "
                f"Give {done} or more."
            )


def _position(trainer: Trainer) -> Position:
    """Where a run stands, in or after an epoch."""
    loop: Any = trainer.fit_loop
    epochs, batches = loop.epoch_progress.current, loop.epoch_loop.batch_progress
    num_batches, whole = batches.current.ready, batches.is_last_batch
    if not whole:
        num_batches -= num_batches % trainer.accumulate_grad_batches
    return Position(
        steps=trainer.global_step,
        epoch=epochs.ready - 1,
        num_images=num_batches * _at_once(trainer),
        whole=whole,
        ended=epochs.processed == epochs.ready,
    )


def _at_once(trainer: Trainer) -> int:
    """Images of all processes in a batch."""
    loader: Any = trainer.train_dataloader
    return int(loader.batch_size * trainer.world_size)


def _rewrite_loops(
    loops: dict[str, Any], where: Position, num_batches: int, whole: bool
) -> None:
    """Makes the state of a fit loop say: behind these steps, epochs and batches."""
    began = where.epoch + (num_batches > 0)
    epochs = {"ready": began, "started": began}
    epochs |= {"processed": where.epoch, "completed": where.epoch}
    loops["epoch_progress"] = {"total": {**epochs}, "current": {**epochs}}
    loops["epoch_loop.batch_progress"] = {
        "total": _all(loops["epoch_loop.batch_progress"]["total"]["ready"]),
        "current": _all(num_batches),
        "is_last_batch": whole,
    }
    # A validation that is due is done, or done again.
    loops["epoch_loop.val_loop.batch_progress"] = {
        "total": {**_all(0), "ready": 1, "started": 1},
        "current": _all(0),
        "is_last_batch": False,
    }
    loops["epoch_loop.state_dict"]["_batches_that_stepped"] = where.steps


def _rewrite_optimizer(checkpoint: dict[str, Any], trainer: Trainer) -> None:
    """Leaves of the state of optimiser and schedule what options do not decide."""
    (optimizer,), (config,) = trainer.optimizers, trainer.lr_scheduler_configs
    schedule: Any = config.scheduler
    step = checkpoint["lr_schedulers"][0]["last_epoch"]
    rates = [lr * schedule.scale_lr(step) for lr in schedule.base_lrs]
    state = {**schedule.state_dict(), "last_epoch": step, "_step_count": step + 1}
    checkpoint["lr_schedulers"] = [{**state, "_last_lr": rates}]
    saved = checkpoint["optimizer_states"][0]["param_groups"]
    for old, new, lr in zip(saved, optimizer.param_groups, rates, strict=True):
        old.update({k: v for k, v in new.items() if k != "params"}, lr=lr)


def _all(count: int) -> dict[str, int]:
    return dict.fromkeys(("ready", "started", "processed", "completed"), count)
