from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path

import pytest

from stellar_cli.__main__ import main as stellar
from tests.distributed import run_as_torchrun
from tests.lightly_ext.data.image_files import write_folder, write_image


def _write_everything(folder: Path) -> list[str]:
    """Twenty good images and much else; returns what is listed and unreadable."""
    write_folder(folder / "good", 17)
    for name in ("a\nb.png", os.fsdecode(b"c\xff.png"), "line.png"):
        write_image(folder / name, size=(20000, 1) if name == "line.png" else (40, 30))
    for name in ("notes.txt", "x.heic", "LICENSE"):
        (folder / name).touch()
    os.mkfifo(folder / "pipe.jpg")
    os.symlink(folder, folder / "good/circle")
    os.symlink("nowhere.jpg", folder / "dangling.jpg")
    os.symlink("self.jpg", folder / "self.jpg")
    header = b"IHDR" + struct.pack(">IIBBBBB", 30_000, 20_000, 8, 2, 0, 0, 0)
    checksum = struct.pack(">I", zlib.crc32(header))
    broken = {
        "bomb.png": b"\x89PNG\r\n\x1a\n\0\0\0\x0d" + header + checksum,
        "empty.tif": b"",
        os.fsdecode(b"text\xff.gif"): b"text",
    }
    for name, data in broken.items():
        (folder / name).write_bytes(data)
    names = ("bomb.png", "dangling.jpg", "empty.tif", r"text\udcff.gif")
    return [rf"{folder}/{name}" for name in names]


@pytest.mark.slow
def test_pretrain__any_folder_in_two_processes(tmp_path: Path) -> None:
    unreadable = _write_everything(tmp_path / "images")
    output = tmp_path / "run"
    command = [
        *("pretrain", "--config=digit_boards", f"--data.path={tmp_path / 'images'}"),
        *(f"--output={output}", "--trainer.enable_progress_bar=false"),
        *("--trainer.max_steps=-1", "--trainer.max_epochs=3"),
        *("--trainer.strategy=ddp", "--trainer.devices=2"),
        *("--data.batch_size=4", "--data.num_workers=1"),
        "--model.head.num_prototypes=8",
    ]
    said, errors = run_as_torchrun(stellar, command, tmp_path)
    assert (output / "unreadable.txt").read_text().splitlines() == unreadable
    assert "Skipped 4 unreadable of 24 images so far: " in said
    others = "1 without suffix, 1 .txt, 1 .heic, pipe.jpg (no file)"
    assert errors.count(others) == 1
