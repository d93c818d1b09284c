from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from lightly.utils.scheduler import CosineWarmupScheduler

from lightly_ext.quick_start import deadline
from lightly_ext.quick_start.deadline import Deadline

STEPS = 20


def rates(
    monkeypatch: pytest.MonkeyPatch, per_step: float, seconds: float
) -> list[float]:
    """Learning rates of a run whose steps take so many seconds, until it ends."""
    now = [100.0]
    monkeypatch.setattr(deadline.time, "monotonic", lambda: now[0])
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = CosineWarmupScheduler(optimizer, 4, STEPS, end_value=0.01)
    trainer = SimpleNamespace(
        lr_scheduler_configs=[SimpleNamespace(scheduler=schedule)],
        should_stop=False,
        global_step=0,
    )
    continuation = SimpleNamespace(total_steps=lambda trainer: STEPS)
    callback = Deadline(now[0] + seconds)
    said: list[str] = []
    module = SimpleNamespace(continuation=continuation, print=said.append)
    callback.on_train_start(trainer, module)
    found = []
    while len(found) < STEPS and not trainer.should_stop:
        found.append(optimizer.param_groups[0]["lr"])
        now[0] += per_step
        optimizer.step()
        callback.on_train_batch_end(trainer, module)
        schedule.step()
    assert trainer.should_stop == bool(said)
    return found


def test_deadline__nothing_changes_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    found = rates(monkeypatch, per_step=1.0, seconds=STEPS)
    assert len(found) == STEPS
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = CosineWarmupScheduler(optimizer, 4, STEPS, end_value=0.01)
    assert found == [schedule.scale_lr(step) for step in range(STEPS)]


def test_deadline__slow_run_ends_cooled_down(monkeypatch: pytest.MonkeyPatch) -> None:
    found = rates(monkeypatch, per_step=2.0, seconds=STEPS)
    assert len(found) == STEPS // 2
    assert found[0] == 0.25  # of four steps of warm-up
    assert found[1] == 0.75  # half of the warm-up's time is gone
    assert found[2] == 1.0
    # Every second rate of the whole schedule: the last is the last but one of it.
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = CosineWarmupScheduler(optimizer, 4, STEPS, end_value=0.01)
    assert found == pytest.approx([schedule.scale_lr(2 * i) for i in range(10)])
    assert found[-1] < 0.05
