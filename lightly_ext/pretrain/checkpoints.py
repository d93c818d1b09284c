"""The callback that saves a run."""

from __future__ import annotations

import contextlib
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import Checkpoint
from safetensors import SafetensorError

from lightly_ext.checkpoint_io import SHA256
from lightly_ext.durable import remove_partial, replace_link
from lightly_ext.pretrain.agreement import Agreement
from lightly_ext.pretrain.checkpoint_files import BEST, LAST, step_checkpoints
from lightly_ext.pretrain.export import export_model
from lightly_ext.pretrain.sharding import whole_states
from lightly_ext.pretrain.signals import Interrupted, StopSignals

# How many of the newest checkpoints are kept.
NUM_NEWEST = 2
# The accuracy of online kNN, which says what is best.
BEST_METRIC = "knn_top1"


class RunCheckpoint(Checkpoint):
    """Saves a run: the newest two checkpoints, the best, and the exported model.

    In `checkpoints/`, `last.ckpt` and `best.ckpt` are links to files such as
    `step_00001000-5e1f3a90c2d47b68.ckpt`. `model/` holds the weights of `last.ckpt` for
    `Stellar.from_pretrained`, with the projection heads. Both are written at the end
    of every epoch and of the run, and while an epoch lasts if that is asked for.

    Attributes:
        output:
            Folder of the run.
        every_steps:
            Steps after which to save, counted from the start of training. None for
            none.
        every_minutes:
            Minutes without a save after which to save. None for no limit.
    """

    def __init__(
        self,
        output: str | Path,
        every_steps: int | None = None,
        every_minutes: float | None = 30.0,
    ) -> None:
        for name, value in (("steps", every_steps), ("minutes", every_minutes)):
            if value is not None and value <= 0:
                raise ValueError(f"save_every_{name} must be positive, got {value}.")
        self.output = Path(output)
        self.every_steps = every_steps
        self.every_minutes = every_minutes
        self._best: float | None = None
        self._logged: dict[str, float] = {}
        self._score: float | None = None
        self._newest: list[Path] = []
        self._seen_step = -1
        self._saved = (-1, False)  # step, and whether its epoch had ended
        self._saved_at = 0.0

    @property
    def folder(self) -> Path:
        """Where the checkpoints are."""
        return self.output / "checkpoints"

    def state_dict(self) -> dict[str, Any]:
        """The accuracy of the best checkpoint, and what its last step is to log."""
        return {"best": self._best, "logged": self._logged}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues with them."""
        self._best, self._logged = state_dict["best"], state_dict["logged"]

    def setup(self, trainer: Any, pl_module: LightningModule, stage: str) -> None:
        """Takes the place of Lightning's signal handlers."""
        trainer._signal_connector = self._signals = StopSignals(trainer)
        # In several processes it reads a number from the device in every step.
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the clock, and goes on from the checkpoint that was loaded."""
        # Its group has a time-out of its own.
        self._agreement = Agreement(getattr(trainer.strategy, "_timeout", None))
        self._signal = 0
        self._saved_at = time.monotonic()
        self._seen_step = trainer.global_step
        if trainer.ckpt_path is None:
            return
        self._saved = (trainer.global_step, False)
        for logger in trainer.loggers if self._logged else ():
            logger.log_metrics(self._logged, step=trainer.global_step - 1)
        loaded = Path(trainer.ckpt_path).resolve()
        if loaded in step_checkpoints(self.folder.resolve()):
            self._newest = [loaded]
            if trainer.is_global_zero:
                replace_link(self.folder / LAST, loaded)

    def on_train_epoch_start(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> None:
        """Ends the run if a signal came."""
        self._end_if_signalled(trainer)

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        """Ends the run if a signal came."""
        self._end_if_signalled(trainer)

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        """Saves if it is time, or if the run ends inside of an epoch."""
        step = trainer.global_step
        if step == self._seen_step:
            return  # gradients are accumulated
        self._seen_step, self._score = step, None
        last = trainer.is_last_batch
        late = self._hear(self._agreement.later, not last and self._is_late())
        if last:
            return  # the end of the epoch follows
        asked = self.every_steps is not None and step % self.every_steps == 0
        stops = trainer.should_stop and trainer.fit_loop._can_stop_early
        ends = step == trainer.max_steps or stops
        if late or asked or ends or self._signal:
            # Lightning logs them behind this hook: after a kill they would be missing.
            self._save(trainer, _step_log(trainer))

    def on_validation_batch_start(self, trainer: Trainer, *_: Any) -> None:
        """Ends the run if a signal came; validation is repeated when it goes on."""
        if not trainer.sanity_checking:
            self._hear(self._agreement.later)
            self._end_if_signalled(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keeps the accuracy of the weights as they are, and these if they are best."""
        if trainer.sanity_checking:
            return
        score = trainer.callback_metrics.get(BEST_METRIC)
        # Only the first process has logged it.
        self._score = trainer.strategy.broadcast(
            None if score is None else float(score)
        )
        if self._is_best() and not trainer.is_last_batch:
            self._save(trainer)

    def on_train_epoch_end(self, trainer: Any, pl_module: LightningModule) -> None:
        """Saves at the end of whole epochs, and notices the best."""
        self._hear(self._agreement.now)
        if trainer.is_last_batch:
            self._save(trainer, ended=True)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Says how to go on after a signal."""
        if isinstance(exception, Interrupted) and trainer.is_global_zero:
            how = f"Go on with: {resume_command(self.output)}"
            if exception.requeued:
                how = "Slurm starts the job again, which goes on by itself."
            print(
                f"{exception.signal.name}: step {self._saved[0]} is saved in "
                f"'{self.folder / LAST}'. {how}",
                file=sys.stderr,
            )

    def _hear(self, hear: Callable[[int], int], late: bool = False) -> bool:
        """Learns of signals and of lateness in any process, in all at the same step."""
        received = self._signals.received
        heard = hear(received + 1 if received else int(late))
        if heard > 1:
            self._signal = heard - 1
        return heard == 1

    def _end_if_signalled(self, trainer: Any) -> None:
        if self._signal:
            self._save(trainer)
            first = trainer.is_global_zero
            requeued = first and self._signals.requeue(self._signal)
            raise Interrupted(self._signal, first, requeued)

    def _is_late(self) -> bool:
        """Whether much time has passed; said once, and heard by all a step later."""
        if self.every_minutes is None:
            return False
        now = time.monotonic()
        late = now - self._saved_at >= 60 * self.every_minutes
        if late:
            self._saved_at = now
        return late

    def _is_best(self) -> bool:
        score = self._score
        return score is not None and (self._best is None or score > self._best)

    def _save(
        self,
        trainer: Any,
        logged: dict[str, float] | None = None,
        ended: bool = False,
    ) -> None:
        """Saves, unless there is nothing new: no step, no end of an epoch, no best."""
        step, improved = trainer.global_step, self._is_best()
        saved_step, had_ended = self._saved
        if step == saved_step and had_ended >= ended and not improved:
            return
        trainer.lightning_module.nonfinite.settle()
        if improved:
            self._best = self._score
        self._logged = logged or {}
        with self._errors_everywhere(trainer):
            for logger in trainer.loggers:
                logger.save()
            self._write(trainer, improved)
        self._saved, self._saved_at = (step, ended), time.monotonic()

    def _write(self, trainer: Any, improved: bool) -> None:
        if trainer.is_global_zero:
            remove_partial(self.folder)
        path = self.folder / f"step_{trainer.global_step:08d}-{SHA256}.ckpt"
        weights = trainer.strategy.lightning_module_state_dict()
        try:
            trainer.save_checkpoint(path, weights_only=False)
        except Exception:
            # The others wait there for the process that writes.
            trainer.strategy.barrier("Trainer.save_checkpoint")
            raise
        if not trainer.is_global_zero:
            return
        written = trainer.strategy.checkpoint_io.written
        # A step that is saved again takes the place of its first file.
        if self._newest and trainer.global_step == self._saved[0]:
            self._newest.pop()
        self._newest = [*self._newest, written][-NUM_NEWEST:]
        replace_link(self.folder / LAST, written)
        if improved:
            replace_link(self.folder / BEST, written)
        with whole_states(trainer.lightning_module, weights):
            export_model(trainer.lightning_module, self.output / "model")
        self._remove_old()

    def _remove_old(self) -> None:
        kept = {path.name for path in self._newest}
        kept.add((self.folder / BEST).resolve().name)
        for path in step_checkpoints(self.folder):
            if path.name not in kept:
                path.unlink()

    @contextlib.contextmanager
    def _errors_everywhere(self, trainer: Any) -> Iterator[None]:
        """Ends every process where one fails, and says what is left."""
        failure = None
        try:
            yield
        except (OSError, RuntimeError, SafetensorError) as error:
            failure = self._explained(error, trainer.global_step)
        failure = trainer.strategy.broadcast(failure)
        if failure is not None:
            raise failure

    def _explained(self, error: Exception, step: int) -> Exception:
        intact = "There is no earlier checkpoint"
        if self._newest:
            intact = f"'{self._newest[-1]}' is intact, and so is last.ckpt"
        reason = getattr(error, "strerror", None) or str(error).rstrip(".")
        kind = OSError if isinstance(error, OSError) else RuntimeError
        return kind(
            f"Step {step} could not be saved to '{self.folder}': {reason}. {intact}. "
            "Once the cause is gone, go on with: " + resume_command(self.output)
        )


def _step_log(trainer: Any) -> dict[str, float]:
    """What Lightning is about to log of the step."""
    connector = trainer._logger_connector
    if not connector.should_update_logs:
        return {}
    metrics = {"epoch": trainer.current_epoch, **connector.metrics["log"]}
    return {name: float(value) for name, value in metrics.items()}


def resume_command(output: Path) -> str:
    """What to type to continue the run in a folder."""
    config = shlex.quote(str(output / "config.yaml"))
    return f"stellar pretrain --config {config} --resume"
