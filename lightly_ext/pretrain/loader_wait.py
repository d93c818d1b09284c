"""How much of a training the device waits for images, and what to change."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

import torch

# Share of the time beyond which it is said.
LIMIT = 0.1
# Steps at least on which that is decided.
MEASURED = 50
# Steps of a session that decide on nothing: workers start, files come from a cold disk.
WARM_UP = 10
# Steps at most from one reading to the next that are measured, the last ones.
HISTORY = 50


class LoaderWait:
    """Measures the share of the time in which the device has no batch.

    The time from the end of a step's work to the start of the next one's is a wait;
    the time of checkpoints, validations and of the first batch of an epoch is not.
    """

    def __init__(self) -> None:
        self._steps: deque[tuple[_Mark, _Mark, _Mark]] = deque(maxlen=HISTORY)
        self._wait: tuple[_Mark, ...] = ()  # its begin and, if it is over, its end
        self._seen = 0
        self._warm = self._said = False
        self._waited = self._seconds = 0.0  # of so many steps that decide
        self._counted = 0

    def begin(self, device: torch.device) -> None:
        """Begins to wait for a batch."""
        self._wait = (_Mark(device),)

    def forget(self) -> None:
        """Lets the time until the next batch be no wait."""
        self._wait = ()

    def batch_came(self, device: torch.device) -> None:
        """Ends the wait."""
        if self._wait:
            self._wait = (self._wait[0], _Mark(device))

    def step_ended(self, device: torch.device) -> None:
        """Ends the step, and begins to wait for the next batch."""
        self._seen += 1
        mark = _Mark(device)
        if len(self._wait) == 2:
            self._steps.append((*self._wait, mark))
        self._wait = (mark,)

    def share(self) -> float | None:
        """Share of the waits in the steps since the last call; waits for the device."""
        steps, warm = list(self._steps), self._warm
        self._steps.clear()
        self._warm = self._seen >= WARM_UP
        if not steps:
            return None
        waits = sum(begin.seconds_to(start) for begin, start, _ in steps)
        seconds = sum(begin.seconds_to(end) for begin, _, end in steps)
        if warm:
            self._waited += waits
            self._seconds += seconds
            self._counted += len(steps)
        return waits / seconds

    def too_long(self) -> float | None:
        """The share of `MEASURED` steps or more if it is beyond the limit; once."""
        if self._said or self._counted < MEASURED:
            return None
        share = self._waited / self._seconds
        self._waited, self._seconds, self._counted = 0.0, 0.0, 0
        self._said = share > LIMIT
        return share if self._said else None


def advice(workers: int, cores: int, on_cpu: bool) -> str:
    """What to change when the loader is too slow.

    Args:
        workers:
            Processes that load images, for each training process.
        cores:
            CPU cores that each training process has for itself and its workers.
        on_cpu:
            Whether the model takes the same cores.
    """
    # Without workers the process itself loads; on a CPU it keeps a core.
    if workers < cores and not (on_cpu and cores == 1):
        return (
            f"Raise --data.num_workers from {workers} to {cores}, the number of CPU "
            "cores for each training process."
        )
    shared = ", which the model computes on, too" if on_cpu else ""
    return (
        f"More workers than these {workers} would not help: there is no CPU core left "
        f"({cores} for each training process{shared}). Store smaller images (large "
        "photos take most of the time to decode), many small files as tars "
        "(--data.path 'shards/*.tar'), or make fewer views of an image (docs/"
        "performance.md, Loading images)."
    )


class _Mark:
    """A point in the work of the device: a CUDA event, or the time elsewhere.

    A host that is ahead of its device may wait for data while the device has work.
    """

    def __init__(self, device: torch.device) -> None:
        self.event: Any = None
        self.time = time.perf_counter()
        if device.type == "cuda":
            self.event = torch.cuda.Event(enable_timing=True)
            self.event.record()

    def seconds_to(self, later: _Mark) -> float:
        """Seconds until another mark; waits for the device."""
        if self.event is None:
            return later.time - self.time
        later.event.synchronize()
        milliseconds: float = self.event.elapsed_time(later.event)
        return milliseconds / 1000
