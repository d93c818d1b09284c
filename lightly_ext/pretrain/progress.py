"""How far a pretraining is: a bar on a terminal, lines now and then elsewhere."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import ProgressBar
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class LogInterval(Callback):
    """Logs the last step of a run, and short runs more often.

    Attributes:
        every_n_steps:
            Steps from one that is logged to the next. None chooses a hundredth of the
            run, at most `LONGEST`.
    """

    LONGEST = 50

    def __init__(self, every_n_steps: int | None) -> None:
        if every_n_steps is not None and every_n_steps < 0:
            raise ValueError(
                f"--trainer.log_every_n_steps must be 0 or more, got {every_n_steps}."
            )
        self.every_n_steps = every_n_steps
        self._total = 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Chooses the interval, which everything that logs reads from the trainer."""
        self._total = pl_module.continuation.total_steps(trainer)
        chosen = max(1, min(self._total // 100, self.LONGEST))
        trainer.log_every_n_steps = self.every_n_steps or chosen

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        """Makes the last step one that is logged."""
        if trainer.global_step + 1 == self._total:
            trainer.log_every_n_steps = 1


class StellarProgress(ProgressBar):
    """Steps of the optimiser done, of how many, with the numbers of logged steps.

    The host has to wait for the device to read a number: they are read in steps that
    are logged.

    Attributes:
        console:
            Where to print. If it is no terminal, lines take the place of the bar.
        seconds:
            Time from one line to the next, at least.
    """

    NAMES = ("loss", "images_per_s", "knn_top1")

    def __init__(self, console: Console | None = None, seconds: float = 30.0) -> None:
        super().__init__()
        self.console = console or Console()
        self.seconds = seconds
        self.is_enabled = True
        self._bar: Progress | None = None
        self._total = 0
        self._begin = (0, 0.0)  # step and time
        self._next_line = 0.0
        self._numbers = ""

    def disable(self) -> None:
        """Shows nothing, in processes but the first; Lightning calls it."""
        self.is_enabled = False

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Finds out how many steps there are and were."""
        self._total = pl_module.continuation.total_steps(trainer)
        self._begin = (trainer.global_step, time.monotonic())
        if self.is_enabled and self.console.is_interactive:
            self._bar = _bar(self.console)
            step = trainer.global_step
            self._bar.add_task("", total=self._total, completed=step, numbers="")
            self._bar.start()

    def on_train_batch_end(
        self, trainer: Any, pl_module: LightningModule, *_: Any
    ) -> None:
        """Shows the step."""
        if not self.is_enabled:
            return
        step = trainer.global_step
        logged = step % trainer.log_every_n_steps == 0
        if logged:
            self._numbers = _numbers(trainer.callback_metrics, self.NAMES)
        if self._bar is not None:
            text = f"{_epoch(trainer)}{self._numbers}".removesuffix(", ")
            self._bar.update(self._bar.task_ids[0], completed=step, numbers=text)
        elif step == self._total or (logged and time.monotonic() >= self._next_line):
            self._next_line = time.monotonic() + self.seconds
            self.print(self._line(trainer, step))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leaves the last state of the bar on the terminal."""
        self._stop()

    def on_exception(self, *_: Any) -> None:
        """The same."""
        self._stop()

    def print(self, *args: Any, **_: Any) -> None:
        """Prints above the bar; `LightningModule.print` comes here."""
        if self.is_enabled:
            text = " ".join(map(str, args))
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _line(self, trainer: Any, step: int) -> str:
        line = f"Step {step} of {self._total}, {_epoch(trainer)}{self._numbers}"
        first, start = self._begin
        if first < step < self._total:
            left = (time.monotonic() - start) / (step - first) * (self._total - step)
            line += f"{timedelta(seconds=round(left))} left"
        return line.removesuffix(", ")


def _bar(console: Console) -> Progress:
    return Progress(
        TextColumn("Step"),
        MofNCompleteColumn(),
        BarColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[numbers]}"),
        console=console,
        refresh_per_second=2,
    )


def _epoch(trainer: Any) -> str:
    if trainer.max_epochs in (None, -1):
        return ""
    return f"epoch {trainer.current_epoch + 1} of {trainer.max_epochs}, "


def _numbers(metrics: dict[str, Any], names: tuple[str, ...]) -> str:
    found = ((name, metrics[name].item()) for name in names if name in metrics)
    return "".join(f"{name} {value:.4g}, " for name, value in found)
