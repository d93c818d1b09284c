from __future__ import annotations

import errno
import fcntl
import os
import signal
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from lightly_ext.run_lock import RunLock


def hold(folder: Path) -> tuple[int, int]:
    """A process with the lock that has forked another, as loaders fork workers.

    Returns:
        Its id, and the end of a pipe that keeps what it forked alive.
    """
    (told, tell), (wait, keep) = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        os.close(keep)
        with RunLock(folder):
            os.fork()
            os.write(tell, b"x")
            os.read(wait, 1)
            os._exit(0)
    os.read(told, 2)
    os.close(wait)
    return child, keep


class TestRunLock:
    def test_enter__no_folder(self, tmp_path: Path) -> None:
        file, link = tmp_path / "file", tmp_path / "link"
        file.touch()
        link.symlink_to(tmp_path / "nowhere")
        for folder, said in (
            (file, f"'{file}' is a file"),
            (file / "run", f"'{file}' is a file"),
            (link / "run", f"'{link}' is a link to nothing"),
        ):
            with pytest.raises(FileExistsError, match=said), RunLock(folder):
                pass
        assert {*tmp_path.iterdir()} == {file, link}

    def test_enter__refused_while_a_run_is_going_on(self, tmp_path: Path) -> None:
        folder = tmp_path / "run"
        child, keep = hold(folder)
        with (
            pytest.raises(RuntimeError, match=rf"process {child} on \S+ since 2\d+-"),
            RunLock(folder),
        ):
            pass
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        # The forked process lives on; the lock has ended with its owner.
        with RunLock(folder):
            assert f"process {os.getpid()} " in (folder / ".lock").read_text()
        assert list(folder.iterdir()) == []
        os.close(keep)

    def test_enter__waits_for_the_end_of_another(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        child, keep = hold(tmp_path)

        def end(_: float) -> None:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)

        monkeypatch.setattr("lightly_ext.run_lock.time.sleep", end)
        with RunLock(tmp_path, patience=60.0):
            assert f"process {os.getpid()} " in (tmp_path / ".lock").read_text()
        os.close(keep)

    def test_exit__leaves_no_new_folder_without_content(self, tmp_path: Path) -> None:
        with RunLock(tmp_path / "runs" / "a"):
            pass
        assert list(tmp_path.iterdir()) == []
        with RunLock(tmp_path / "runs" / "a"):
            (tmp_path / "runs" / "a" / "file").touch()
        assert [p.name for p in (tmp_path / "runs" / "a").iterdir()] == ["file"]

    def test_enter__a_file_that_its_owner_has_just_removed(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        lock, path = fcntl.lockf, tmp_path / ".lock"

        def removed(*arguments: Any) -> None:
            monkeypatch.setattr(fcntl, "lockf", lock)
            lock(*arguments)
            path.unlink()

        monkeypatch.setattr(fcntl, "lockf", removed)
        with RunLock(tmp_path):
            assert f"process {os.getpid()} " in path.read_text()

    def test_enter__only_the_first_process(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("lightly_ext.run_lock.rank_zero_only.rank", 1)
        with RunLock(tmp_path / "run"):
            assert not (tmp_path / "run").exists()

    def test_enter__where_the_disk_has_no_locks(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        error = OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
        monkeypatch.setattr(fcntl, "lockf", Mock(side_effect=error))
        warns = pytest.warns(UserWarning, match=r"cannot be locked \(No locks avail")
        with warns, RunLock(tmp_path / "run"):
            assert (tmp_path / "run" / ".lock").exists()
