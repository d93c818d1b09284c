"""A training that ends in time, cooled down."""

from __future__ import annotations

import time
from typing import Any

from pytorch_lightning import Callback


class Deadline(Callback):
    """Ends a run after a time, with its learning rate where it ends in any case.

    The schedule follows the time that is gone where that is further than the steps that
    are done: a run that was only cut off would stop at a high learning rate, which is
    worth less. Where all steps fit into the time, it changes nothing.

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

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        """Ends the run if the time is over."""
        if self.share >= 1 and not trainer.should_stop:
            trainer.should_stop = True
            pl_module.print(
                f"The time is over behind step {trainer.global_step}, and so is the "
                "schedule of the learning rate."
            )
