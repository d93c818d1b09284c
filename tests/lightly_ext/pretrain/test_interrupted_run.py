"""A run on the command line: interrupted, gone on with, moved, gone on with again."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision.io import write_png

from lightly_ext.pretrain import cli
from lightly_ext.pretrain.checkpoint_files import step_checkpoints
from stellar_plugin import Stellar

STEPS_OF_EPOCH = 12


def options(folder: Path) -> list[str]:
    return [
        "--config=digit_boards",
        f"--data.path={folder / 'images'}",
        f"--output={folder / 'run'}",
        "--data.batch_size=1",
        "--data.num_workers=2",
        "--model.head.num_prototypes=8",
        "--trainer.max_steps=1000",
        "--trainer.enable_progress_bar=false",
        "--save_every_steps=5",
    ]


def write_images(folder: Path) -> None:
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    for i in range(STEPS_OF_EPOCH):
        image = torch.randint(256, (3, 60, 60), generator=generator)
        write_png(image.to(torch.uint8), str(folder / f"{i}.png"))


def start(folder: Path, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "stellar_cli", "pretrain", *options(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        cwd=Path(__file__).parents[3],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # a process group, as a terminal makes one
    )


def wait_for_steps(folder: Path, process: subprocess.Popen[str]) -> None:
    """Waits for the checkpoint of step 5."""
    while not (folder / "run" / "checkpoints" / "last.ckpt").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)


def go_on(command: str, *more: str) -> Any:
    assert command.startswith("stellar pretrain ")
    return cli.main([*shlex.split(command)[2:], "--data.num_workers=0", *more])


@pytest.mark.slow
class TestInterruptedRun:
    def test_main(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        write_images(tmp_path / "images")
        # The system's temporary folder has no place.
        process = start(tmp_path, TMPDIR="/proc")
        wait_for_steps(tmp_path, process)
        with pytest.raises(RuntimeError, match=f"is going on: process {process.pid}"):
            cli.main(options(tmp_path))
        # Ctrl-C, which loader workers get too.
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate()
        assert process.returncode == 128 + signal.SIGINT, errors
        assert "Saving behind this step" in errors
        assert "Traceback" not in errors
        (line,) = [x for x in errors.splitlines() if x.startswith("SIGINT: step ")]
        step = int(line.split()[2])
        assert step >= 5
        folder = tmp_path / "run" / "checkpoints"
        assert step_checkpoints(folder)[0].name.startswith(f"step_{step:08d}-")
        assert (folder / "last.ckpt").resolve() == step_checkpoints(folder)[0].resolve()

        with pytest.raises(FileExistsError, match="--resume"):
            cli.main(options(tmp_path))
        command = line.partition("Go on with: ")[2]
        trainer = go_on(command, f"--trainer.max_steps={step + 3}")
        assert trainer.global_step == step + 3

        # Renamed, with a damaged newest checkpoint, gone on with twice.
        moved = (tmp_path / "run").rename(tmp_path / "moved")
        newest, before = step_checkpoints(moved / "checkpoints")
        newest.write_bytes(newest.read_bytes()[:-1])
        command = f"stellar pretrain --config {moved / 'config.yaml'} --resume"
        capsys.readouterr()
        for more in (4, 5):
            trainer = go_on(
                command, f"--output={moved}", f"--trainer.max_steps={step + more}"
            )
            assert trainer.global_step == step + more
            said = capsys.readouterr().out
            assert (newest.name in said) == (more == 4)
            assert (before.name in said) == (more == 4)
        model = Stellar.from_pretrained(moved / "model").state_dict()
        for name, tensor in trainer.lightning_module.model.state_dict().items():
            assert torch.equal(tensor, model[name]), name
        assert sorted(path.name for path in moved.glob(".*")) == []
