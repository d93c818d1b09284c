from __future__ import annotations

import errno
import hashlib
import os
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from lightly_ext import checkpoint_io
from lightly_ext.checkpoint_io import DurableCheckpointIO


def save(folder: Path, step: int, **changes: Any) -> Path:
    io = DurableCheckpointIO()
    content = {"state_dict": {"weight": torch.full((1000,), float(step))}, **changes}
    path = folder / "checkpoints" / f"step_{step:08d}-{{sha256}}.ckpt"
    io.save_checkpoint(content, path)
    return io.written


class TestDurableCheckpointIO:
    def test_save_checkpoint__name_is_the_checksum(self, tmp_path: Path) -> None:
        path = save(tmp_path, 7)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        assert path.name == f"step_00000007-{digest[:16]}.ckpt"
        loaded = DurableCheckpointIO().load_checkpoint(path)
        assert torch.equal(loaded["state_dict"]["weight"], torch.full((1000,), 7.0))
        assert os.listdir(path.parent) == [path.name]

    def test_save_checkpoint__without_the_temporary_folder(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "full"))
        assert zipfile.ZipFile(save(tmp_path, 1)).testzip() is None

    def test_save_checkpoint__permissions_are_the_umasks(self, tmp_path: Path) -> None:
        path = save(tmp_path, 1)
        (tmp_path / "other").touch()
        assert path.stat().st_mode == (tmp_path / "other").stat().st_mode

    @pytest.mark.parametrize("limit", [0, 100, 4000, 5500])
    def test_save_checkpoint__full_disk(
        self, limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first, written = save(tmp_path, 1), 0
        write = checkpoint_io._Hashed.write

        def limited(file: Any, data: Any) -> int:
            nonlocal written
            written += len(data)
            if written > limit:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return write(file, data)

        monkeypatch.setattr(checkpoint_io._Hashed, "write", limited)
        with pytest.raises(OSError, match="No space left") as error:
            save(tmp_path, 2)
        assert error.value.errno == errno.ENOSPC
        assert os.listdir(first.parent) == [first.name]

    @pytest.mark.parametrize(
        "changes, name",
        [
            ({"state_dict": {"a.weight": torch.tensor([1, -torch.inf])}}, "a.weight"),
            (
                {
                    "optimizer_states": [
                        {"state": {3: {"exp_avg": torch.tensor(torch.nan)}}}
                    ]
                },
                "optimizer_states.0.state.3.exp_avg",
            ),
        ],
    )
    def test_save_checkpoint__non_finite(
        self, changes: dict[str, Any], name: str, tmp_path: Path
    ) -> None:
        first = save(tmp_path, 1)
        with pytest.raises(RuntimeError, match=rf"'\S*{name}' is not finite"):
            save(tmp_path, 2, **changes)
        assert os.listdir(first.parent) == [first.name]
