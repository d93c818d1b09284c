from __future__ import annotations

import io
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from rich.console import Console

from lightly_ext.pretrain.progress import LogInterval, StellarProgress


class Clock:
    """Ten seconds pass with every step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr("time.monotonic", lambda: self.now)


def module_of(total: int) -> Mock:
    """A module whose run has so many steps."""
    return Mock(**{"continuation.total_steps.return_value": total})


def trained(
    progress: StellarProgress,
    clock: Clock,
    start: int,
    stop: int,
    total: int,
    **values: Any,
) -> None:
    trainer = Mock(**{"max_epochs": -1, "log_every_n_steps": 2, **values})
    trainer.global_step = start
    progress.on_train_start(trainer, module_of(total))
    for step in range(start + 1, stop + 1):
        clock.now += 10
        trainer.global_step = step
        trainer.current_epoch = (step - 1) // 4
        trainer.callback_metrics = {"loss": torch.tensor(step / 4)}
        progress.on_train_batch_end(trainer, Mock())
    progress.on_train_end(trainer, Mock())


class TestLogInterval:
    def test_init__negative(self) -> None:
        with pytest.raises(ValueError, match=r"log_every_n_steps must be 0 .* got -1"):
            LogInterval(-1)

    @pytest.mark.parametrize(
        ("total", "chosen", "interval"),
        [
            (3, None, 1),
            (250, None, 2),
            (2000, None, 20),
            (10**6, None, 50),
            (3, 7, 7),
        ],
    )
    def test_on_train_start(
        self, total: int, chosen: int | None, interval: int
    ) -> None:
        trainer, callback = Mock(global_step=0), LogInterval(chosen)
        callback.on_train_start(trainer, module_of(total))
        assert trainer.log_every_n_steps == interval
        for step in range(3):
            trainer.global_step = step
            callback.on_train_batch_start(trainer)
            last = step == total - 1
            assert trainer.log_every_n_steps == (1 if last else interval)


class TestStellarProgress:
    def test_lines__now_and_then_and_the_last(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        out, clock = io.StringIO(), Clock(monkeypatch)
        progress = StellarProgress(Console(file=out), seconds=30)
        trained(progress, clock, 0, 11, total=11)
        # Every second step is logged; 30 s are three steps.
        assert out.getvalue().splitlines() == [
            "Step 2 of 11, loss 0.5, 0:01:30 left",
            "Step 6 of 11, loss 1.5, 0:00:50 left",
            "Step 10 of 11, loss 2.5, 0:00:10 left",
            "Step 11 of 11, loss 2.5",
        ]

    def test_lines__epochs_and_a_resumed_run(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        out, clock = io.StringIO(), Clock(monkeypatch)
        progress = StellarProgress(Console(file=out), seconds=15)
        trained(progress, clock, 7, 10, total=12, max_epochs=3)
        assert out.getvalue().splitlines() == [
            "Step 8 of 12, epoch 2 of 3, loss 2, 0:00:40 left",
            "Step 10 of 12, epoch 3 of 3, loss 2.5, 0:00:20 left",
        ]

    def test_bar__on_a_terminal(self, monkeypatch: pytest.MonkeyPatch) -> None:
        out, clock = io.StringIO(), Clock(monkeypatch)
        console = Console(
            file=out,
            force_terminal=True,
            force_interactive=True,
            width=120,
            color_system=None,
        )
        progress = StellarProgress(console)
        trained(progress, clock, 3, 10, total=12, max_epochs=3)
        last = out.getvalue().splitlines()[-2]
        assert "Step 10/12 " in last and last.rstrip().endswith("of 3, loss 2.5")

    def test_disable__other_processes_are_silent(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        out, clock = io.StringIO(), Clock(monkeypatch)
        progress = StellarProgress(Console(file=out))
        progress.disable()
        trained(progress, clock, 0, 4, total=4)
        assert out.getvalue() == ""
