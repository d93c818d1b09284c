"""Damaged and mistaken files: each loads, or is refused by name."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_mutated_checkpoints__all_right() -> None:
    command = [sys.executable, "-m", "benchmarks.mutated_checkpoints"]
    done = subprocess.run(
        [*command, "--count", "80", "--seed", "7"],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    assert "| all | 80 | 80 |" in done.stdout
