from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from lightly_ext import durable
from lightly_ext.durable import (
    finish_replacing,
    partial,
    remove_partial,
    replace_folder,
    replace_link,
    replace_text,
    replacing,
)


@pytest.fixture(params=["exchange", "two renames"])
def exchange(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Whether the system swaps two names in one step."""
    if request.param == "two renames":
        monkeypatch.setattr(durable, "_exchange", lambda *_: False)
    return request.param


def write(folder: Path, text: str) -> Path:
    folder.mkdir()
    (folder / "text").write_text(text)
    return folder


class TestReplaceFolder:
    def test_replace_folder(self, exchange: str, tmp_path: Path) -> None:
        folder = tmp_path / "model"
        for text in ("first", "second"):
            replace_folder(write(partial(folder), text), folder)
            assert (folder / "text").read_text() == text
            assert os.listdir(tmp_path) == ["model"]

    def test_exchange__is_one_step(self, tmp_path: Path) -> None:
        a, b = write(tmp_path / "a", "a"), write(tmp_path / "b", "b")
        numbers = a.stat().st_ino, b.stat().st_ino
        if not durable._exchange(a, b):
            pytest.skip("this file system cannot swap names")
        assert (b.stat().st_ino, a.stat().st_ino) == numbers

    def test_exchange__other_errors(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError):
            durable._exchange(tmp_path / "a", tmp_path / "b")

    @pytest.mark.parametrize(
        "names, kept",
        [(("new",), None), (("new", "old"), "new"), (("old", "model"), "model")],
    )
    def test_finish_replacing(
        self, names: tuple[str, ...], kept: str | None, tmp_path: Path
    ) -> None:
        # What a kill before, between and after the renames leaves.
        folder = tmp_path / "model"
        places = {"new": partial(folder), "model": folder}
        places["old"] = durable._replaced(folder)
        for name in names:
            write(places[name], name)
        finish_replacing(folder)
        remove_partial(tmp_path)
        assert os.listdir(tmp_path) == (["model"] if kept else [])
        assert kept is None or (folder / "text").read_text() == kept


class TestReplaceLink:
    def test_replace_link__relative(self, tmp_path: Path) -> None:
        for text in ("first", "second"):
            (tmp_path / text).write_text(text)
            replace_link(tmp_path / "last", tmp_path / text)
            assert os.readlink(tmp_path / "last") == text

    def test_replace_link__copy_where_there_are_no_links(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def no_links(*_: Any) -> None:
            raise OSError(errno.EPERM, "no links here")

        monkeypatch.setattr(os, "symlink", no_links)
        (tmp_path / "file").write_text("text")
        replace_link(tmp_path / "last", tmp_path / "file")
        assert not (tmp_path / "last").is_symlink()
        assert (tmp_path / "last").read_text() == "text"
        assert sorted(os.listdir(tmp_path)) == ["file", "last"]

    def test_replace_link__other_errors(self, tmp_path: Path) -> None:
        partial(tmp_path / "last").touch()
        with pytest.raises(FileExistsError):
            replace_link(tmp_path / "last", tmp_path / "file")


class TestReplaceText:
    def test_replace_text__the_old_one_stays_until_the_new_one_is_whole(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "text"
        replace_text(path, "old")
        assert os.listdir(tmp_path) == ["text"]
        full = OSError(errno.ENOSPC, "full")
        monkeypatch.setattr(os, "fsync", Mock(side_effect=full))
        with pytest.raises(OSError, match="full"):
            replace_text(path, "new")
        assert path.read_text() == "old" and os.listdir(tmp_path) == ["text"]
        monkeypatch.undo()
        replace_text(path, "new \udcff")
        assert path.read_text() == "new \\udcff"


def test_replacing__two_at_once(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with replacing(path) as first, replacing(path) as second:
        first.write_text("first")
        second.write_text("second")
        # What a kill leaves here is taken for no weights, and away.
        assert not list(tmp_path.glob("*.safetensors"))
    assert path.read_text() == "first" and os.listdir(tmp_path) == [path.name]
    (tmp_path / first.name).touch()
    remove_partial(tmp_path)
    assert os.listdir(tmp_path) == [path.name]


def test_replace__names_are_on_the_disk_behind_each_move(
    exchange: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[Any] = []  # inodes that are synced, and "moved"

    def synced(descriptor: int) -> None:
        events.append(os.fstat(descriptor).st_ino)

    def noted(function: Callable[..., Any]) -> Callable[..., Any]:
        def moved(*paths: Path) -> Any:
            result = function(*paths)
            if result is not False:
                events.append("moved")
            return result

        return moved

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", noted(os.replace))
    monkeypatch.setattr(durable, "_exchange", noted(durable._exchange))
    folder, parent = tmp_path / "model", tmp_path.stat().st_ino
    replace_folder(write(partial(folder), "first"), folder)
    second = write(partial(folder), "second")
    inodes = [path.stat().st_ino for path in (second / "text", second)]
    replace_folder(second, folder)
    moves = 1 if exchange == "exchange" else 2
    assert events[2:] == ["moved", parent, *inodes, *["moved", parent] * moves]
    events.clear()
    replace_text(tmp_path / "text", "text")
    inode = (tmp_path / "text").stat().st_ino
    replace_link(tmp_path / "last", tmp_path / "text")
    assert events == [inode, "moved", parent, "moved", parent]
