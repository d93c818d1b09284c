from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from benchmarks.collectives import OPTIONS
from benchmarks.processes import measure


@pytest.mark.slow
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two CPU cores")
def test_measure__all_three_ways(tmp_path: Path) -> None:
    small = [o for o in OPTIONS if o.startswith(("--model", "--data.transform"))]
    found = measure(tmp_path, small, batch_size=2, steps=2, rounds=1)
    assert list(found) == ["alone", "apart", "together"]
    for seconds in found.values():
        assert 0 < seconds.cpu <= seconds.wall + 0.1
    runs = sorted(path.name for path in tmp_path.glob("*_0*"))
    assert runs == ["alone_0", "apart_0", "apart_0_2", "together_0"]
    # Five steps of two images, and of one run with both processes' images.
    seen = {
        name: json.loads((tmp_path / name / "run.json").read_text())["images_seen"]
        for name in runs
    }
    assert seen == {name: 20 if name == "together_0" else 10 for name in runs}
