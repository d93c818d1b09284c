"""A training that ends in time, cooled down."""

from __future__ import annotations

import time
from typing import Any

from pytorch_lightning import Callback


class Deadline(Callback):
    """Ends a run after a time, with its learning rate where it ends in any case.

    Where steps are as fast as planned, it changes nothing. Where they are slower, the
    schedule follows the time that is gone in place of the steps that are done: a run
    that was only cut off would stop at a high learning rate, which is worth less.

    Attributes:
        seconds:
            Time from the first step to the end; what is validated then comes on top.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._start = 0.0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Lets the schedule follow the time."""
        self._start = time.monotonic()
        schedule = trainer.lr_scheduler_configs[0].scheduler
        total = pl_module.continuation.total_steps(trainer)

        def scale(step: int) -> float:
            return schedule.scale_lr(min(total, max(step, total * self.share)))

        schedule.lr_lambdas = [scale] * len(schedule.lr_lambdas)

    @property
    def share(self) -> float:
        """Part of the time that is gone, from 0 on."""
        return (time.monotonic() - self._start) / self.seconds

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        """Ends the run if the time is over."""
        if self.share >= 1:
            trainer.should_stop = True
