"""Signals that end a run: it saves behind the step they come in."""

from __future__ import annotations

import os
import signal
import subprocess
from types import FrameType
from typing import Any

from lightning_fabric.plugins.environments import SLURMEnvironment
from pytorch_lightning.trainer.connectors.signal_connector import _SignalConnector
from pytorch_lightning.utilities.rank_zero import rank_zero_warn

AGAIN = b"\nSaving behind this step; once more ends at once, without saving.\n"


class Interrupted(SystemExit):
    """Ends a run that has saved; the status is 128 + the number of the signal.

    That of the first process: Lightning kills all where another ends with one.

    Attributes:
        signal:
            The signal.
        requeued:
            Whether Slurm runs the job again.
    """

    def __init__(self, number: int, first: bool, requeued: bool) -> None:
        super().__init__(128 + number if first else 0)
        self.signal = signal.Signals(number)
        self.requeued = requeued


class StopSignals(_SignalConnector):
    """Remembers signals until the callback that saves reads them.

    It takes the place of Lightning's handlers, which talk to other processes in the
    middle of whatever a process does, end a run without saving, or save in the middle
    of a step. A second SIGINT ends the process at once.

    Attributes:
        received:
            Number of the signal, 0 for none.
    """

    received = 0
    _interrupted = False

    def register_signal_handlers(self) -> None:
        """Called by Lightning when training starts; `teardown` takes it back."""
        self.received, self._interrupted = 0, False
        self._original_handlers = self._get_current_signal_handlers()
        for number in (signal.SIGTERM, signal.SIGINT, self.requeue_signal):
            self._register_signal(number, self._receive)

    @property
    def requeue_signal(self) -> signal.Signals:
        """The signal that Slurm sends before it takes the machine away."""
        slurm = self._slurm()
        return (slurm and slurm.requeue_signal) or signal.SIGUSR1

    def requeue(self, number: int) -> bool:
        """Puts the job back into Slurm's queue, for signals for which Lightning would.

        Args:
            number:
                Number of the signal.

        Returns:
            Whether the job will run again.
        """
        slurm = self._slurm()
        if slurm is None or not slurm.auto_requeue or number != self.requeue_signal:
            return False
        job = os.environ["SLURM_JOB_ID"]
        if "SLURM_ARRAY_JOB_ID" in os.environ:
            job = "{SLURM_ARRAY_JOB_ID}_{SLURM_ARRAY_TASK_ID}".format(**os.environ)
        try:
            subprocess.run(["scontrol", "requeue", job], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            rank_zero_warn(f"The job {job} is not requeued: {error}.")
            return False
        return True

    def _slurm(self) -> SLURMEnvironment | None:
        environment: Any = self.trainer._accelerator_connector.cluster_environment
        return environment if isinstance(environment, SLURMEnvironment) else None

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._interrupted:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self._interrupted |= number == signal.SIGINT
        if number == signal.SIGINT and self.trainer.is_global_zero:
            os.write(2, AGAIN)  # print may be what was interrupted
        self.received = self.received or number


def was_requeued() -> bool:
    """Whether Slurm runs this job again, with the same command."""
    return int(os.environ.get("SLURM_RESTART_COUNT") or 0) > 0
