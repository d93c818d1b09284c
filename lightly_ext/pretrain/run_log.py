"""The numbers that a run has logged, across its resumptions."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.loggers.csv_logs import ExperimentWriter
from pytorch_lightning.loggers.logger import rank_zero_experiment

from lightly_ext.durable import replace_text

Series = dict[int, float]


class RunLogger(CSVLogger):
    """Lightning's, where a kill in the moment of a new column loses no row."""

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """What writes the file."""
        if self._experiment is None:
            self._experiment = _Writer(self.log_dir)
        return self._experiment


class _Writer(ExperimentWriter):
    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        path = Path(self.metrics_file_path)
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        text = io.StringIO()
        writer = csv.DictWriter(text, fieldnames)
        writer.writeheader()
        writer.writerows(rows)
        replace_text(path, text.getvalue())


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
