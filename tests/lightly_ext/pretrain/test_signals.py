from __future__ import annotations

import errno
import inspect
import os
import signal
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock, call

import pytest
import torch
from lightning_fabric.plugins.environments import SLURMEnvironment
from pytorch_lightning import Callback
from pytorch_lightning.loops.training_epoch_loop import _TrainingEpochLoop

from lightly_ext import checkpoint_io
from lightly_ext.checkpoint_io import DurableCheckpointIO
from lightly_ext.pretrain.checkpoint_files import (
    checkpoint_to_start_from,
)
from lightly_ext.pretrain.checkpoints import RunCheckpoint
from lightly_ext.pretrain.signals import Interrupted, StopSignals
from tests import distributed
from tests.exact_resume import Run, assert_equal_states, write_classes
from tests.pretraining import loader, tiny, trainer

FULL = errno.ENOSPC, "No space left on device"


class Send(Callback):
    """Sends this process a signal in a step, as soon as it begins."""

    def __init__(self, step: int, number: int = signal.SIGTERM) -> None:
        self.step = step
        self.number = number

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.step - 1:
            os.kill(os.getpid(), self.number)


def fit(output: Path, *callbacks: Callback, **kwargs: Any) -> Any:
    """Trains the tiny module; an epoch has eight steps."""
    run = trainer(
        output,
        callbacks=[RunCheckpoint(output), *callbacks],
        plugins=[DurableCheckpointIO()],
        enable_checkpointing=True,
        **kwargs,
    )
    run.fit(tiny(), loader(batch_size=1))
    return run


def saved_step(output: Path) -> int:
    path = checkpoint_to_start_from(output, True)
    assert path is not None
    return torch.load(path, weights_only=True)["global_step"]


class TestStopSignals:
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
    @pytest.mark.parametrize("step", [3, 8])
    @pytest.mark.slow
    def test_fit__saves_behind_the_step(
        self,
        number: signal.Signals,
        step: int,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
        with pytest.raises(Interrupted) as error:
            fit(tmp_path, Send(step, number), max_epochs=2)
        assert error.value.code == 128 + number
        assert saved_step(tmp_path) == step
        (line,) = [
            x for x in capsys.readouterr().err.splitlines() if x.startswith("SIG")
        ]
        config = tmp_path / "config.yaml"
        assert line.startswith(f"{number.name}: step {step} is saved in '{tmp_path}")
        assert line.endswith(f"Go on with: stellar pretrain --config {config} --resume")
        after = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
        assert after == handlers

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "hook, number",
        [
            ("on_train_batch_start", 1),
            ("on_train_batch_start", 3),
            ("on_validation_batch_start", 4),
        ],
    )
    def test_fit__goes_on_exactly(self, hook: str, number: int, tmp_path: Path) -> None:
        # In mid-epoch, in the last step of an epoch and in the validation behind it.
        labelled = str(write_classes(tmp_path / "labelled", 24))
        options: Any = {"data": {"knn_train": labelled, "knn_val": labelled}}
        options |= {"max_epochs": 2, "plugins": [DurableCheckpointIO()]}
        whole = Run(tmp_path, **options)

        begun = 0

        def count(*_: Any) -> None:
            nonlocal begun
            begun += 1
            if begun == number:
                os.kill(os.getpid(), signal.SIGTERM)

        send = Callback()
        setattr(send, hook, count)
        options["enable_checkpointing"] = True
        cut = Run.__new__(Run)
        with pytest.raises(Interrupted):
            cut.__init__(  # type: ignore[misc]
                tmp_path, callbacks=[RunCheckpoint(tmp_path), send], **options
            )
        saved = saved_step(tmp_path)
        assert saved == min(number, 3)
        start = checkpoint_to_start_from(tmp_path, True)
        again = Run(tmp_path, start, callbacks=[RunCheckpoint(tmp_path)], **options)
        # But for the next step, which other callbacks see begin.
        rows = [(step, row) for step, row in cut.rows if step < saved]
        # What the saved step logged is logged again: a kill would have lost it.
        assert rows + [row for row in again.rows if row not in rows] == whole.rows
        assert cut.seen.batches[:saved] + again.seen.batches == whole.seen.batches
        assert_equal_states(again.state, whole.state)

    def test_fit__a_run_that_is_over_ends_well(self, tmp_path: Path) -> None:
        run = fit(tmp_path, Send(8), max_epochs=1)
        assert run.global_step == saved_step(tmp_path) == 8

    def test_fit__accumulated_gradients(self, tmp_path: Path) -> None:
        with pytest.raises(Interrupted):
            fit(tmp_path, Send(2), max_epochs=1, accumulate_grad_batches=3)
        assert saved_step(tmp_path) == 2

    @pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
    def test_fit__slurm_runs_the_job_again(
        self,
        number: signal.Signals,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        scontrol, calls = tmp_path / "bin" / "scontrol", tmp_path / "calls"
        scontrol.parent.mkdir()
        scontrol.write_text(f'#!/bin/sh\necho "$@" >> {calls}\n')
        scontrol.chmod(0o755)
        monkeypatch.setenv("PATH", str(scontrol.parent), prepend=os.pathsep)
        slurm = {"NTASKS": "1", "JOB_ID": "77", "JOB_NAME": "train", "PROCID": "0"}
        for name, value in {**slurm, "LOCALID": "0", "NODEID": "0"}.items():
            monkeypatch.setenv(f"SLURM_{name}", value)
        output = tmp_path / "run"
        with pytest.raises(Interrupted) as error:
            fit(output, Send(3, number), max_epochs=1)
        assert error.value.code == 128 + number
        assert saved_step(output) == 3
        assert not list(output.glob("hpc_ckpt*"))
        if number == signal.SIGUSR1:
            assert calls.read_text() == "requeue 77\n"
            assert "Slurm starts the job again" in capsys.readouterr().err
        else:
            assert not calls.exists()
            assert "--resume" in capsys.readouterr().err
        # The same command, which does not ask to resume.
        with pytest.raises(FileExistsError):
            checkpoint_to_start_from(output, False)
        monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
        start = checkpoint_to_start_from(output, False)
        assert start is not None and start.name.startswith("step_00000003-")
        assert checkpoint_to_start_from(tmp_path / "new", False) is None

    def test_fit__slurm_without_scontrol(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        signals = StopSignals(trainer(tmp_path, plugins=[SLURMEnvironment()]))
        monkeypatch.setenv("SLURM_JOB_ID", "77")
        monkeypatch.setenv("PATH", str(tmp_path))
        with pytest.warns(UserWarning, match="The job 77 is not requeued"):
            assert not signals.requeue(signal.SIGUSR1)

    @pytest.mark.parametrize("auto", [True, False])
    def test_requeue__job_of_an_array(
        self, auto: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        slurm = SLURMEnvironment(auto_requeue=auto)
        signals = StopSignals(trainer(tmp_path, plugins=[slurm]))
        ids = {"JOB_ID": "9", "ARRAY_JOB_ID": "7", "ARRAY_TASK_ID": "3"}
        for name, value in ids.items():
            monkeypatch.setenv(f"SLURM_{name}", value)
        run = Mock()
        monkeypatch.setattr("subprocess.run", run)
        assert signals.requeue(signal.SIGUSR1) == auto
        command = ["scontrol", "requeue", "7_3"]
        assert run.mock_calls == ([call(command, check=True)] if auto else [])

    def test_receive__the_first_counts(self, tmp_path: Path) -> None:
        signals = StopSignals(trainer(tmp_path))
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
            signals._receive(number, None)
        assert signals.received == signal.SIGUSR1

    def test_second_sigint__ends_at_once(self, tmp_path: Path) -> None:
        child = os.fork()
        if child == 0:
            signals = StopSignals(trainer(tmp_path))
            signals.register_signal_handlers()
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGINT

    @pytest.mark.slow
    def test_two_processes__end_together(self, tmp_path: Path) -> None:
        end = partial(end_in_two_processes, tmp_path)
        (tmp_path / "meet").mkdir()
        first, second = distributed.run(end, tmp_path / "meet")
        # A step later than the first signal, so that all have heard of it.
        assert first == [*3 * [(3, 128 + signal.SIGTERM)], "No space left on device"]
        assert second == [*3 * [(3, 0)], "No space left on device"]

    def test_setup__lightning_reads_no_device_in_every_step(self) -> None:
        # Replaced by `RunCheckpoint.setup`; another name would have to be found.
        assert "item()" in inspect.getsource(
            _TrainingEpochLoop._broadcast_sigterm_tensor
        )


def end_in_two_processes(folder: Path, rank: int, world_size: int) -> list[Any]:
    """What ends runs: a signal to one process, the other, both at odds; a full disk.

    Returns:
        Step that was saved and exit status, or the error.
    """
    os.environ |= {"LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}
    results: list[Any] = []
    for number, sent in enumerate(({0: 2}, {1: 2}, {0: 3, 1: 2}, {})):
        callbacks = [Send(sent[rank])] if rank in sent else []
        output = folder / str(number)
        if not sent and rank == 0:
            checkpoint_io._write = Mock(side_effect=OSError(*FULL))
        try:
            fit(output, *callbacks, max_epochs=3, devices=2, strategy="ddp")
        except Interrupted as error:
            results.append((saved_step(output), error.code))
        except OSError as error:
            results.append(FULL[1] if FULL[1] in str(error) else str(error))
    return results
