"""Runs that are ended anywhere and resumed equal runs that were never ended."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_killed_runs_equal_straight_ones(tmp_path: Path) -> None:
    # A process of its own, without threads: it forks.
    command = [sys.executable, "-m", "benchmarks.killed_runs", "--trials", "7"]
    command += ["--folder", str(tmp_path / "work")]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        command, cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "tried: 7" in result.stdout
    assert "right: 7" in result.stdout
