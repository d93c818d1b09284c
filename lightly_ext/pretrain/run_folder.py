"""The folder of a run: taken back where the start failed."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

from pytorch_lightning import Callback
from pytorch_lightning.utilities.rank_zero import rank_zero_only


class FailedStart(Callback):
    """Takes back what a start has written that ends before its first gradient.

    A context around everything that writes, and a callback of the trainer in it. What
    lay in the folder before stays.

    Attributes:
        folder:
            Folder of the run, which need not exist.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._begun = False
        self._before: set[Path] = set()

    def __enter__(self) -> FailedStart:
        """Notes what there is."""
        self._before = {*self.folder.rglob("*"), *self._existing_parents()}
        return self

    def on_before_optimizer_step(self, *_: Any) -> None:
        """Training has begun: from now on everything stays."""
        self._begun = True

    @rank_zero_only
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Removes what is new, if the start has failed."""
        if error is None or self._begun:
            return
        folders = [self.folder, *self.folder.parents]
        inside = sorted(self.folder.rglob("*"), reverse=True)
        for path in (path for path in [*inside, *folders] if path not in self._before):
            if path.is_symlink() or not path.is_dir():
                path.unlink(missing_ok=True)
            elif not any(path.iterdir()):
                path.rmdir()

    def _existing_parents(self) -> set[Path]:
        return {p for p in [self.folder, *self.folder.parents] if p.exists()}
