from __future__ import annotations

import pickle
from pathlib import Path

import pytest
from torch import multiprocessing

from lightly_ext.pretrain.checkpoints import RunCheckpoint
from lightly_ext.pretrain.run_folder import FailedStart
from lightly_ext.pretrain.story import RunStory

OURS = (
    *("csv/version_0/metrics.csv", "tensorboard/version_0/events.out", "run.json"),
    *("samples/step_00000000.jpg", "config.yaml", "nonfinite.txt"),
)
# Another run below, one of the same name as a folder of ours, and what is precious.
OTHERS = (
    *("a/csv/version_0/metrics.csv", "a/checkpoints/step_1.ckpt", "csv/notes.txt"),
    *("checkpoints/step_00000001.ckpt", "model/config.json", "notes.txt"),
)


def write(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


def files(folder: Path) -> set[str]:
    found = (p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix() for p in found}


class TestFailedStart:
    def test_exit__takes_back_its_own_files_alone(self, tmp_path: Path) -> None:
        (tmp_path / "csv" / "version_1").mkdir(parents=True)  # of an earlier session
        write(tmp_path, "csv/version_1/metrics.csv", "config.yaml")
        with pytest.raises(ValueError, match="early"), FailedStart(tmp_path):
            write(tmp_path, *OURS, *OTHERS)
            raise ValueError("early")
        earlier = {"csv/version_1/metrics.csv", "config.yaml"}
        assert files(tmp_path) == {*OTHERS, *earlier}
        assert not (tmp_path / "tensorboard").exists()
        assert not (tmp_path / "samples").exists()

    def test_exit__nothing_is_left_of_nothing(self, tmp_path: Path) -> None:
        with pytest.raises(KeyboardInterrupt), FailedStart(tmp_path):
            write(tmp_path, *OURS)
            (tmp_path / "checkpoints").mkdir()
            raise KeyboardInterrupt
        assert list(tmp_path.iterdir()) == []

    def test_exit__a_start_that_has_saved(self, tmp_path: Path) -> None:
        with pytest.raises(SystemExit), FailedStart(tmp_path) as start:
            write(tmp_path, *OURS)
            start.on_save_checkpoint()
            raise SystemExit(143)
        assert files(tmp_path) == set(OURS)

    def test_exit__training_in_another_process(self, tmp_path: Path) -> None:
        with pytest.raises(OSError, match="late"), FailedStart(tmp_path) as start:
            write(tmp_path, *OURS)
            process = multiprocessing.get_context("fork").Process(
                target=start.on_before_optimizer_step
            )
            process.start()
            process.join()
            assert process.exitcode == 0
            raise OSError("late")
        assert files(tmp_path) == set(OURS)


class TestWayOn:
    def test_exit__an_error_of_others(self, tmp_path: Path) -> None:
        command = f"stellar pretrain --config {tmp_path}/config.yaml --resume"
        for saved in ("No checkpoint was saved yet", "'step_1.ckpt' was saved last"):
            with pytest.raises(RuntimeError) as found, FailedStart(tmp_path) as start:
                start.on_before_optimizer_step()
                raise RuntimeError("Connection closed by peer")
            assert found.value.__notes__ == [f"{saved}; go on with: {command}"]
            if not (tmp_path / "checkpoints").exists():
                write(tmp_path, "checkpoints/step_1.ckpt")
                (tmp_path / "checkpoints" / "last.ckpt").symlink_to("step_1.ckpt")

    def test_exit__an_error_of_ours_or_before_training(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="positive") as found:  # noqa: SIM117
            with FailedStart(tmp_path) as start:
                start.on_before_optimizer_step()
                RunCheckpoint(tmp_path, every_steps=0)
        assert not hasattr(found.value, "__notes__")
        with pytest.raises(ValueError, match="early") as found, FailedStart(tmp_path):
            raise ValueError("early")
        assert not hasattr(found.value, "__notes__")


def test_pickle__as_processes_are_spawned(tmp_path: Path) -> None:
    with FailedStart(tmp_path) as start, RunStory(tmp_path, ["--resume"]) as story:
        for callback in (start, story):
            assert type(pickle.loads(pickle.dumps(callback))) is type(callback)
