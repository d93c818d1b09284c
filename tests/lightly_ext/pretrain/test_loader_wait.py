"""The wait for images, by a clock that the tests set."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

from lightly_ext.pretrain import health, loader_wait
from lightly_ext.pretrain.health import HealthMonitor
from lightly_ext.pretrain.loader_wait import MEASURED, WARM_UP, advice
from tests.pretraining import Views, tiny, trainer

CPU = torch.device("cpu")


class Clock:
    """Time that passes where a test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 10.0
        monkeypatch.setattr("time.perf_counter", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


class Run:
    """Steps of a training with a monitor, and what it logs and says."""

    def __init__(self, clock: Clock, workers: int = 1) -> None:
        self.clock, self.monitor = clock, HealthMonitor()
        self.logged: list[float] = []
        self.said: list[str] = []
        self.module = Mock(device=CPU, global_step=0, print=self.said.append)
        self.module.log = lambda name, value: self.logged.append(value)
        self.module.trainer.callbacks = []
        self.module.trainer.num_devices = 1
        self.module.trainer.train_dataloader.num_workers = workers
        self.monitor.on_train_epoch_start(Mock(), self.module)

    def steps(self, *waits: float, seconds: float = 2.0, logged: bool = True) -> None:
        """Steps behind these waits; the last one is logged."""
        for number, wait in enumerate(waits, start=1):
            self.clock.now += wait
            self.monitor.on_train_batch_start(Mock(), self.module, None, 0)
            self.clock.now += seconds
            self.module.global_step += 1
            if logged and number == len(waits):
                self.monitor.note({"gradient_norm": torch.tensor(1.0)})
            self.monitor.step_ended(self.module)


class TestShare:
    def test_share__waits_as_part_of_the_time(self, clock: Clock) -> None:
        run = Run(clock)
        # The first batch of an epoch does not count.
        run.steps(100.0, 1.0, 3.0)
        assert run.logged == [(1 + 3) / (1 + 2 + 3 + 2)]
        run.steps(2.0)
        assert run.logged[1:] == [2 / 4]

    def test_share__without_validations_and_epochs(self, clock: Clock) -> None:
        run = Run(clock)
        run.steps(0.0, 1.0, logged=False)
        clock.now += 1000
        run.monitor.on_validation_end(Mock(), run.module)
        run.steps(7.0, 1.0, logged=False)
        run.monitor.on_train_epoch_start(Mock(), run.module)
        run.steps(50.0, 4.0)
        assert run.logged == [(1 + 1 + 4) / (3 + 3 + 6)]
        run.monitor.on_validation_end(Mock(), run.module)
        run.steps(9.0)
        assert len(run.logged) == 1  # nothing was measured

    def test_share__without_reading_the_figures(self, clock: Clock) -> None:
        run = Run(clock)

        def log(name: str, value: float) -> None:
            clock.now += 5.0
            run.logged.append(value)

        run.module.log = log
        run.steps(1.0, 1.0)
        run.steps(1.0)
        assert run.logged == [1 / 3, 1 / 3]


class TestTooLong:
    def test_too_long__said_once(self, clock: Clock) -> None:
        run = Run(clock, workers=0)
        for _ in range(3 * (WARM_UP + MEASURED)):
            run.steps(0.5)
        (line,) = run.said
        # Of one step at a time those behind the warm-up decide.
        step = WARM_UP + MEASURED
        assert line.startswith(
            f"Warning at step {step - 1}: training waits for images 20% of the time "
            "(health/loader_wait). "
        )

    @pytest.mark.parametrize("wait, said", [(0.20, 0), (0.25, 1)])
    def test_too_long__beyond_a_tenth(
        self, wait: float, said: int, clock: Clock
    ) -> None:
        run = Run(clock)
        for _ in range(4):  # of many steps at a time the first do not decide
            run.steps(*[wait] * 50)
            assert len(run.said) == (said if run.module.global_step >= 100 else 0)

    def test_too_long__not_in_the_warm_up(self, clock: Clock) -> None:
        run = Run(clock)
        for number in range(300):
            run.steps(30.0 if number < WARM_UP else 0.1)
        assert run.said == []

    def test_too_long__later(self, clock: Clock) -> None:
        # Well steps before do not hide it.
        run = Run(clock)
        for _ in range(1000):
            run.steps(0.0)
        for _ in range(2 * MEASURED):
            run.steps(1.0)
        assert len(run.said) == 1


class TestAdvice:
    @pytest.mark.parametrize(
        "workers, cores, on_cpu, raised",
        [
            *((4, 16, False, 16), (0, 1, False, 1), (16, 16, False, None)),
            *((20, 16, False, None), (0, 2, True, 2), (1, 2, True, 2)),
            # On a CPU the workers of a single core would take it from the model.
            *((0, 1, True, None), (2, 2, True, None)),
        ],
    )
    def test_advice__more_workers_where_cores_are_free(
        self, workers: int, cores: int, on_cpu: bool, raised: int | None
    ) -> None:
        text = advice(workers, cores, on_cpu)
        if raised is not None:
            assert text.startswith(
                f"Raise --data.num_workers from {workers} to {raised}"
            )
            return
        assert "Raise" not in text and "Store smaller images" in text
        assert ("which the model computes on, too" in text) == on_cpu

    def test_advice__of_the_processes_of_this_machine(
        self, clock: Clock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(health, "num_cpus", lambda: 16)
        run = Run(clock, workers=2)
        run.module.trainer.num_devices = 4
        for _ in range(WARM_UP + MEASURED):
            run.steps(1.0)
        assert "Raise --data.num_workers from 2 to 4," in run.said[0]


@pytest.mark.slow
def test_fit__slow_loader(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(loader_wait, "WARM_UP", 2)
    monkeypatch.setattr(loader_wait, "MEASURED", 4)

    class SlowViews(Views):
        def __getitem__(self, index: int) -> tuple[Tensor, ...]:
            time.sleep(0.1)
            return super().__getitem__(index)

    data = torch.utils.data.DataLoader(SlowViews(length=16), 4)
    options: dict[str, Any] = {"max_steps": 11, "max_epochs": -1}
    run = trainer(tmp_path, log_every_n_steps=1, **options)
    run.fit(tiny(lr=1e-2, min_lr=1e-2, warmup_fraction=0.0), data)
    assert 0.5 < run.callback_metrics["health/loader_wait"] < 1
    said = [x for x in capsys.readouterr().out.splitlines() if "waits for images" in x]
    assert len(said) == 1 and said[0].startswith("Warning at step")
