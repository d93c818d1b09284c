from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from lightly_ext.checkpoint_io import DurableCheckpointIO
from lightly_ext.durable import replace_link
from lightly_ext.pretrain.checkpoint_files import (
    checkpoint_to_start_from,
    newest_complete,
)

HYPER_PARAMETERS: dict[str, Any] = {"model": {}, "head": {}, "loss": {}}


def content(value: float = 1.0) -> dict[str, Any]:
    return {
        "state_dict": {"weight": torch.full((1000,), value)},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(3)}}}],
        "hyper_parameters": HYPER_PARAMETERS,
    }


def save(folder: Path, step: int, **changes: Any) -> Path:
    """A checkpoint of a run, without links."""
    io = DurableCheckpointIO()
    io.save_checkpoint(
        {**content(step), **changes},
        folder / "checkpoints" / f"step_{step:08d}-{{sha256}}.ckpt",
    )
    return io.written


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


class TestNewestComplete:
    @pytest.fixture
    def files(self, tmp_path: Path) -> list[Path]:
        """Checkpoints of steps 10, 9 and 100; last.ckpt names that of step 100."""
        files = [save(tmp_path, step) for step in (9, 10, 100)]
        replace_link(files[0].with_name("last.ckpt"), files[2])
        return files

    def test_newest_complete__last(
        self, files: list[Path], capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder = files[0].parent
        assert newest_complete(folder) == files[2]
        # The link decides: a save that was killed left a newer one behind.
        replace_link(folder / "last.ckpt", files[1])
        assert newest_complete(folder) == files[1]
        assert capsys.readouterr().out == ""

    def test_newest_complete__moved_folder(
        self, files: list[Path], tmp_path: Path
    ) -> None:
        moved = (tmp_path / "checkpoints").rename(tmp_path / "moved")
        assert newest_complete(moved) == moved / files[2].name

    @pytest.mark.parametrize(
        "harm, said",
        [
            (flip_a_bit, "is damaged (its SHA-256 does not start"),
            (truncate, "is damaged (its SHA-256 does not start"),
            (Path.unlink, "does not exist"),
        ],
    )
    def test_newest_complete__damaged(
        self,
        harm: Any,
        said: str,
        files: list[Path],
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        harm(files[2])
        assert newest_complete(files[2].parent) == files[1]
        (line,) = capsys.readouterr().out.splitlines()
        last = files[2].with_name("last.ckpt")
        assert line.startswith(f"Resumes from '{files[1]}'")
        assert f"'{last}', a link to '{files[2].name}', {said}" in line

    def test_newest_complete__two_damaged(
        self, files: list[Path], capsys: pytest.CaptureFixture[str]
    ) -> None:
        files[2].unlink()
        flip_a_bit(files[1])
        assert newest_complete(files[0].parent) == files[0]
        assert str(files[1]) in capsys.readouterr().out

    def test_newest_complete__all_damaged(self, files: list[Path]) -> None:
        for path in files:
            flip_a_bit(path)
        with pytest.raises(ValueError, match="No checkpoint is complete") as error:
            newest_complete(files[0].parent)
        for name in (
            *(str(path) for path in files[:2]),
            "last.ckpt",
            "--model.weights",
        ):
            assert name in str(error.value)

    def test_newest_complete__no_last(
        self, files: list[Path], capsys: pytest.CaptureFixture[str]
    ) -> None:
        files[0].with_name("last.ckpt").unlink()
        assert newest_complete(files[0].parent) == files[2]
        assert "there is no" in capsys.readouterr().out

    def test_newest_complete__two_of_a_step(self, files: list[Path]) -> None:
        # A run that was resumed with other options comes to the same step again.
        files[2].with_name("last.ckpt").unlink()
        others = [save(files[0].parents[1], 100, changes=i) for i in range(3)]
        for seconds, path in enumerate((others[1], files[2], others[2], others[0])):
            os.utime(path, (seconds, seconds))
        assert newest_complete(files[0].parent) == others[0]

    def test_newest_complete__plain_file(self, files: list[Path]) -> None:
        # As where there are no links: the zip has checksums of its own.
        last = files[2].with_name("last.ckpt")
        last.unlink()
        shutil.copy(files[1], last)
        assert newest_complete(last.parent) == last
        flip_a_bit(last)
        assert newest_complete(last.parent) == files[2]

    def test_newest_complete__nothing(self, tmp_path: Path) -> None:
        assert newest_complete(tmp_path / "checkpoints") is None


class TestCheckpointToStartFrom:
    def test_resume(self, tmp_path: Path) -> None:
        assert checkpoint_to_start_from(tmp_path, False) is None
        path = save(tmp_path, 3)
        assert checkpoint_to_start_from(tmp_path, True) == path

    @pytest.mark.parametrize("name", ["config.yaml", "checkpoints", "model"])
    def test_new_run_over_another(self, name: str, tmp_path: Path) -> None:
        (tmp_path / name).mkdir()
        with pytest.raises(FileExistsError, match=rf"{name}.*--resume.*--output"):
            checkpoint_to_start_from(tmp_path, False)

    def test_killed_before_the_first_checkpoint(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "config.yaml").touch()
        assert checkpoint_to_start_from(tmp_path, True) is None
        assert "starts at step 0" in capsys.readouterr().out

    @pytest.mark.parametrize("names", [(), ("config.yaml", "model")])
    def test_nothing_to_resume(self, names: tuple[str, ...], tmp_path: Path) -> None:
        # A finished run without its checkpoints must not be trained over.
        for name in names:
            (tmp_path / name).mkdir()
        with pytest.raises(FileNotFoundError, match="Nothing to resume"):
            checkpoint_to_start_from(tmp_path, True)

    @pytest.mark.parametrize(
        "changes",
        [
            {"hyper_parameters": {"lr": 1.0}},
            {"hyper_parameters": 3},
            {"hyper_parameters": Path("an object")},
        ],
    )
    def test_of_another_program(self, changes: dict[str, Any], tmp_path: Path) -> None:
        path = save(tmp_path, 1, **changes)
        with pytest.raises(ValueError, match=r"is whole, but.*Choose the --output"):
            checkpoint_to_start_from(tmp_path, True)
        assert path.exists()

    def test_model_between_two_renames(self, tmp_path: Path) -> None:
        save(tmp_path, 1)
        for name in (".model.partial", ".model.replaced"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "name").write_text(name)
        checkpoint_to_start_from(tmp_path, True)
        assert (tmp_path / "model" / "name").read_text() == ".model.partial"
        assert sorted(os.listdir(tmp_path)) == ["checkpoints", "model"]
