"""A run on shards from the command line: broken images, cut short, gone on with."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lightly_ext.pretrain import cli
from lightly_ext.pretrain.checkpoint_files import step_checkpoints
from tests.lightly_ext.data.streams.shard_files import encoded_images, write_shards


def options(folder: Path, workers: int) -> list[str]:
    return [
        "--config=digit_boards",
        f"--data.path={folder}/shards/*.parquet",
        f"--output={folder / 'run'}",
        "--data.batch_size=1",
        f"--data.num_workers={workers}",
        "--model.head.num_prototypes=8",
        "--trainer.enable_progress_bar=false",
        "--save_every_steps=5",
    ]


def write(folder: Path) -> Path:
    """Twelve images in two files, of which one is broken."""
    images = encoded_images(12, size=(60, 60))
    write_shards(folder / "shards", "parquet", [images[:7], [b"no", *images[8:]]])
    return folder / "shards" / "001.parquet"


@pytest.mark.slow
class TestStreams:
    def test_main__interrupted_and_gone_on_with(self, tmp_path: Path) -> None:
        write(tmp_path)
        command = [sys.executable, "-m", "stellar_cli", "pretrain"]
        process = subprocess.Popen(
            [*command, *options(tmp_path, 2), "--trainer.max_steps=1000"],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            cwd=Path(__file__).parents[3],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        folder = tmp_path / "run" / "checkpoints"
        while not (folder / "last.ckpt").exists():
            assert process.poll() is None, process.communicate()
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGINT)
        output, errors = process.communicate(timeout=60)
        assert process.returncode == 128 + signal.SIGINT, errors
        assert "Traceback" not in errors
        assert "Reads 12 images in 2 files (" in output
        # Moved, and gone on with to the end of an epoch.
        (tmp_path / "shards").rename(tmp_path / "moved")
        step = int(step_checkpoints(folder)[0].name[5:13])
        steps = (step // 12 + 2) * 12
        given = [o for o in options(tmp_path, 0) if not o.startswith("--data.path")]
        trainer = cli.main(
            [
                *(*given, f"--data.path={tmp_path}/moved/*.parquet"),
                *("--resume", f"--trainer.max_steps={steps}"),
            ]
        )
        assert trainer.global_step == steps
        record = json.loads((tmp_path / "run" / "run.json").read_text())
        assert record["data"]["path"] == str(tmp_path / "moved")
        assert record["data"]["images"] == 12
        assert record["unreadable_images"] == 1
        listed = (tmp_path / "run" / "unreadable.txt").read_text()
        assert listed == f"{tmp_path}/moved/001.parquet/row 0\n"
        samples = record["samples"]["images"]
        assert samples[0] == "000.parquet/row 0"

    @pytest.mark.parametrize("workers", [0, 2])
    def test_main__shard_that_breaks_in_the_run(
        self, workers: int, tmp_path: Path
    ) -> None:
        path = write(tmp_path)
        data = path.read_bytes()
        path.write_bytes(data[:4] + bytes(5000) + data[5004:])
        with pytest.raises(OSError, match=r"001\.parquet cannot be read: "):
            cli.main([*options(tmp_path, workers), "--trainer.max_steps=12"])
