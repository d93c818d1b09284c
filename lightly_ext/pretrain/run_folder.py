"""The folder of a run: taken back where the start failed or was ended."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from traceback import walk_tb
from types import FrameType, TracebackType
from typing import Any

import torch
from pytorch_lightning import Callback
from pytorch_lightning.utilities.rank_zero import rank_zero_only

from lightly_ext.pretrain.checkpoint_files import LAST
from lightly_ext.pretrain.checkpoints import resume_command
from lightly_ext.pretrain.processes import LAUNCH

# What a start writes into the folder of a run, and the folders around it. Checkpoints
# and the exported model are never taken back, nor what others have in the folder.
WRITTEN = (
    *("csv/version_*", "tensorboard/version_*", "samples/*.jpg"),
    *("config.yaml", "run.json", "index.html", "summary.md"),
    *("unreadable.txt", "nonfinite.txt", LAUNCH),
)
FOLDERS = ("csv", "tensorboard", "samples", "checkpoints")

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@contextlib.contextmanager
def signals_end_start() -> Iterator[None]:
    """Ends by an exception where a signal comes, until training has its own handlers.

    Raises:
        SystemExit: After a signal, with the status 128 + its number.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: signal.getsignal(number) for number in ENDING}
    for number, handler in handlers.items():
        if handler is not signal.SIG_IGN:  # as of jobs in the background
            signal.signal(number, _end_start)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _end_start(number: int, frame: FrameType | None) -> None:
    _say_stopped(signal.Signals(number).name)
    raise SystemExit(128 + number)


@rank_zero_only
def _say_stopped(name: str) -> None:
    os.write(2, f"\n{name}: stopped before the first step.\n".encode())


class FailedStart(Callback):
    """Takes back what a start has written that ends before its first gradient or save.

    A context around everything that writes, and a callback of the trainer in it. What
    lay in the folder before stays, and so does what is not of this run. The folder
    itself is that of `RunLock`. Later errors of other packages get a note that says how
    to go on.

    Attributes:
        folder:
            Folder of the run, which need not exist.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # Training may be in processes that are started later, the context is in ours.
        self._begun = torch.zeros(1, dtype=torch.bool).share_memory_()
        self._before: set[Path] = set()

    def __enter__(self) -> FailedStart:
        """Notes what there is."""
        self._before = self._found()
        return self

    def on_before_optimizer_step(self, *_: Any) -> None:
        """Training has begun: from now on everything stays."""
        self._begun.fill_(True)

    def on_save_checkpoint(self, *_: Any) -> None:
        """There is something to go on from: everything stays."""
        self._begun.fill_(True)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Removes what is new if the start has failed, else says how to go on."""
        if error is not None and not self._begun.item():
            self._take_back()
        elif isinstance(error, Exception) and not _is_ours(traceback):
            last = self.folder / "checkpoints" / LAST
            saved = f"'{last.resolve().name}' was saved last"
            if not last.exists():
                saved = "No checkpoint was saved yet"
            # As add_note does, which Python 3.10 lacks.
            notes = vars(error).setdefault("__notes__", [])
            notes.append(f"{saved}; go on with: {resume_command(self.folder)}")

    @rank_zero_only
    def _take_back(self) -> None:
        # Files before the folders that they are in.
        for path in sorted(self._found() - self._before, reverse=True):
            if path.is_symlink() or not path.is_dir():
                path.unlink(missing_ok=True)
            elif path.name not in FOLDERS:
                shutil.rmtree(path)
            elif not any(path.iterdir()):
                path.rmdir()

    def _found(self) -> set[Path]:
        return {p for name in (*WRITTEN, *FOLDERS) for p in self.folder.glob(name)}


def _is_ours(traceback: TracebackType | None) -> bool:
    """Whether an error was raised by this package, which then says how to go on."""
    *_, (frame, _) = walk_tb(traceback)
    return str(frame.f_globals.get("__name__")).startswith("lightly_ext.")
