"""A training that ends in time, cooled down."""

from __future__ import annotations

import time
from typing import Any

from pytorch_lightning import Callback

# A run whose start was too slow takes a step or a few.
MIN_SECONDS = 1.0


class Deadline(Callback):
    """Ends a run at a time, with its learning rate where it ends in any case.

    The schedule follows the time that is gone where that is further than the steps that
    are done: a run that was only cut off would stop at a high learning rate, which is
    worth less. Where all steps fit into the time, it changes nothing.

    Attributes:
        end:
            When the last step ends, by `time.monotonic`, to half a step; what is
            validated then comes on top.
    """

    def __init__(self, end: float) -> None:
        self.end = end
        self._start = self._last = 0.0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Lets the schedule follow the time."""
        self._start = self._last = time.monotonic()
        schedule = trainer.lr_scheduler_configs[0].scheduler
        total = pl_module.continuation.total_steps(trainer)

        def scale(step: int) -> float:
            share = (time.monotonic() - self._start) / self._seconds
            return schedule.scale_lr(min(total, max(step, total * share)))

        schedule.lr_lambdas = [scale] * len(schedule.lr_lambdas)

    @property
    def _seconds(self) -> float:
        return max(self.end - self._start, MIN_SECONDS)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        """Ends the run if the time is over."""
        now = time.monotonic()
        half, self._last = (now - self._last) / 2, now
        if now + half >= self._start + self._seconds and not trainer.should_stop:
            trainer.should_stop = True
            pl_module.print(
                f"The time is over behind step {trainer.global_step}, and so is the "
                "schedule of the learning rate."
            )
