"""The numbers that a run has logged, across its resumptions."""

from __future__ import annotations

import csv
from pathlib import Path

Series = dict[int, float]


def read_log(folder: Path) -> dict[str, Series]:
    """Reads the logs of a run: `version_0` and what was logged after resuming.

    A resumed run starts from a checkpoint: what an earlier one has logged from that
    step on was lost, and is left out.

    Args:
        folder:
            Folder of the CSVLogger.

    Returns:
        Value by step of every column, steps in order.
    """
    series: dict[str, Series] = {}
    versions = folder.glob("version_*/metrics.csv")
    for path in sorted(versions, key=lambda p: int(p.parent.name.split("_")[1])):
        rows = _rows(path)
        start = min((step for _, step, _ in rows), default=0)
        for points in series.values():
            for step in [step for step in points if step > start]:
                del points[step]
        for name, step, value in rows:
            series.setdefault(name, {})[step] = value
    return {name: points for name, points in series.items() if points}


def _rows(path: Path) -> list[tuple[str, int, float]]:
    """Column, step and value of all that is there; a torn last line is left out."""
    found = []
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            if None in row.values():
                continue
            step = int(row.pop("step"))
            row.pop("epoch", None)
            found += [(k, step, float(v)) for k, v in row.items() if v]
    return found
