"""One run at a time in a folder."""

from __future__ import annotations

import fcntl
import os
import socket
import time
from pathlib import Path
from types import TracebackType
from typing import IO

from pytorch_lightning.utilities.rank_zero import rank_zero_only, rank_zero_warn

# Seconds for which a file server may keep the lock of a machine that has failed: twice
# those of Linux's NFS.
LEASE = 180.0


class RunLock:
    """Refuses a second run into a folder while one is running.

    A record lock on `.lock` of the folder, which the system releases when the process
    ends in whatever way. Loader workers do not inherit it, which outlive a killed run
    for seconds. Only the first process of a run takes it.

    Attributes:
        folder:
            Folder of the run, which is made if it does not exist.
        patience:
            Seconds to wait for the end of another run.

    Raises:
        RuntimeError: On entering, if another run holds it.
        FileExistsError: On entering, if something else is in the place of the folder.
    """

    def __init__(self, folder: Path, patience: float = 0.0) -> None:
        self.folder = folder
        self.patience = patience
        self._path = folder / ".lock"
        self._new_folders: list[Path] = []
        self._file: IO[str] | None = None
        self._end = 0.0

    @rank_zero_only
    def __enter__(self) -> None:
        """Takes the lock, and writes into the file who has it."""
        folders = [self.folder, *self.folder.parents]
        self._new_folders = [path for path in folders if not path.exists()]
        self._end = time.monotonic() + self.patience
        while self._file is None:
            self._make_folder()
            file = self._path.open("a+")
            self._lock(file)
            if self._is_named(file):
                self._file = file  # else its owner has just removed it
        self._file.truncate(0)
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        where = f"process {os.getpid()} on {socket.gethostname()}"
        self._file.write(f"{where} since {since}\n")
        self._file.flush()

    @rank_zero_only
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Releases the lock; folders that were made for it alone go again."""
        assert self._file is not None
        self._path.unlink(missing_ok=True)
        self._file.close()
        for folder in self._new_folders:
            if folder.exists() and not any(folder.iterdir()):
                folder.rmdir()

    def _make_folder(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            paths = [self.folder, *self.folder.parents]
            found = next(p for p in paths if p.is_symlink() or p.exists())
            what = "a link to nothing" if found.is_symlink() else "a file"
            raise FileExistsError(
                f"--output: '{self.folder}' cannot be a folder: '{found}' is {what}. "
                "Remove it, or choose another --output."
            ) from None

    def _is_named(self, file: IO[str]) -> bool:
        try:
            return os.path.samestat(os.fstat(file.fileno()), self._path.stat())
        except FileNotFoundError:
            return False

    def _lock(self, file: IO[str]) -> None:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            if time.monotonic() < self._end:
                time.sleep(1)
                return self._lock(file)
            file.seek(0)
            raise RuntimeError(
                f"A run into '{self.folder}' is going on: {file.read().strip()}. Wait "
                "for its end, end it, or choose another --output."
            ) from None
        except OSError as error:
            rank_zero_warn(
                f"'{self._path}' cannot be locked ({error.strerror}): a second run "
                "into the folder would not be noticed."
            )
