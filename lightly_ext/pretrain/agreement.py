"""What several processes decide together, without waiting for a device."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist


class Agreement:
    """The same decision in every process, at the same step.

    Each process says a number; all learn the largest. Steps of several processes
    exchange it on the CPU while the next step runs, and learn a step later what was
    said. A single process learns it at once.

    Args:
        timeout:
            How long one waits for another. None is torch's.

    Raises:
        RuntimeError: If processes cannot reach each other with gloo.
    """

    def __init__(self, timeout: timedelta | None = None) -> None:
        self._group: Any = None
        if dist.is_available() and dist.is_initialized():
            self._group = dist.new_group(backend="gloo", timeout=timeout)
        self._said = torch.zeros(1, dtype=torch.int64)
        self._work: Any = None

    def later(self, number: int) -> int:
        """Says a number; returns the largest of the time before."""
        if self._group is None:
            return number
        largest = self._learn()
        self._said.fill_(number)
        self._work = dist.all_reduce(
            self._said, dist.ReduceOp.MAX, self._group, async_op=True
        )
        return largest

    def now(self, number: int) -> int:
        """Waits for all; returns the largest of what is said now and was before."""
        if self._group is None:
            return number
        before = self._learn()
        self._said.fill_(number)
        dist.all_reduce(self._said, dist.ReduceOp.MAX, self._group)
        return max(before, int(self._said))

    def _learn(self) -> int:
        if self._work is None:
            return 0
        self._work.wait()
        self._work = None
        return int(self._said)
