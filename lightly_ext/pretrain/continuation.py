"""Where a run stands, and how Lightning goes on from there at the very next batch.

Lightning keeps many counters, and what it makes of those of a checkpoint depends on
the hook that saved it: batches are repeated, passed over or trained in addition. Here
they are made anew from what is certain.
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

from pytorch_lightning import Callback, LightningModule, Trainer

from lightly_ext.data import StellarDataModule


class Position(NamedTuple):
    """Where a run stands.

    Attributes:
        epoch:
            Number of the epoch.
        num_batches:
            Batches of this epoch that are behind the last optimiser step; later ones
            only have gradients, which checkpoints do not hold.
        batch_size:
            Images of all processes in a batch.
        whole:
            Whether no other batch follows in this epoch.
        ended:
            Whether validation and what else follows the last batch are done.

    """

    epoch: int
    num_batches: int
    batch_size: int
    whole: bool
    ended: bool


class Continuation(Callback):
    """Goes on at the very next batch of a checkpoint, or ends what was left to end.

    Checkpoints are written in `on_train_batch_end` or in `on_train_epoch_end`.
    """

    def __init__(self) -> None:
        self._finished_steps: int | None = None
        self._max_steps = -1

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Adds where the run stands."""
        checkpoint["position"] = _position(trainer)._asdict()

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Rewrites Lightning's counters, and tells the data where to go on."""
        if not trainer.training:
            return
        steps, where = checkpoint["global_step"], Position(**checkpoint["position"])
        if where.whole and where.ended:
            where = Position(where.epoch + 1, 0, where.batch_size, False, False)
        elif not where.ended and 0 <= trainer.max_steps <= steps:
            self._finished_steps = steps
            where = where._replace(whole=True)  # no other batch follows
        _rewrite(checkpoint["loops"]["fit_loop"], where, steps)
        data = trainer.datamodule  # type: ignore[attr-defined] # set by `fit`
        if isinstance(data, StellarDataModule):
            warnings.filterwarnings("ignore", ".* your dataloader is not resumable")
            data.continue_from(where.epoch, where.num_batches * where.batch_size)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lets a run whose steps are done end its last epoch.

        Lightning would return at once, without validation and exported model.
        """
        self._max_steps = trainer.max_steps
        if self._finished_steps is not None:
            trainer.fit_loop.epoch_loop.max_steps = self._finished_steps + 1

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
        trainer.fit_loop.epoch_loop.max_steps = self._max_steps


def _position(trainer: Trainer) -> Position:
    """Where a run stands, in or after an epoch."""
    loop: Any = trainer.fit_loop
    loader: Any = trainer.train_dataloader
    epochs, batches = loop.epoch_progress.current, loop.epoch_loop.batch_progress
    num_batches, whole = batches.current.ready, batches.is_last_batch
    if not whole:
        num_batches -= num_batches % trainer.accumulate_grad_batches
    return Position(
        epoch=epochs.ready - 1,
        num_batches=num_batches,
        batch_size=loader.batch_size * trainer.world_size,
        whole=whole,
        ended=epochs.processed == epochs.ready,
    )


def _rewrite(loops: dict[str, Any], where: Position, steps: int) -> None:
    """Makes the state of a fit loop say: behind this position and these steps."""
    began = where.epoch + (where.num_batches > 0)
    epochs = {"ready": began, "started": began}
    epochs |= {"processed": where.epoch, "completed": where.epoch}
    loops["epoch_progress"] = {"total": {**epochs}, "current": {**epochs}}
    loops["epoch_loop.batch_progress"] = {
        "total": _all(loops["epoch_loop.batch_progress"]["total"]["ready"]),
        "current": _all(where.num_batches),
        "is_last_batch": where.whole,
    }
    # A validation that is due is done, or done again.
    loops["epoch_loop.val_loop.batch_progress"] = {
        "total": {**_all(0), "ready": 1, "started": 1},
        "current": _all(0),
        "is_last_batch": False,
    }
    loops["epoch_loop.state_dict"]["_batches_that_stepped"] = steps


def _all(count: int) -> dict[str, int]:
    return dict.fromkeys(("ready", "started", "processed", "completed"), count)
