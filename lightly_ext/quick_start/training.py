"""The two pretrainings of a try, each within a time."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import shutil
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lightly_ext.pretrain import cli as pretrain_cli
from lightly_ext.pretrain.derived import flat
from lightly_ext.pretrain.recipes import RUN_RECIPE
from lightly_ext.pretrain.run_log import Series, read_log
from lightly_ext.pretrain.story import RECORD
from lightly_ext.quick_start.deadline import Deadline
from lightly_ext.quick_start.files import BANK, TESTS, PhotoSets

PRIOR, STELLAR = "prior", "stellar"
RECIPES = {PRIOR: "photos_prior", STELLAR: "photos"}
# Online kNN is computed so many times in a stage, at most, and before it; it takes at
# most this part of the time.
POINTS, KNN_SHARE = 6, 0.1
# So many times the steps that fit by the trial, at most: the time ends a run, also on a
# machine that is faster then.
SPARE = 1.5
ENDLESS = 10**6
# One process, and no compiler: it takes minutes, of ten.
COMMON = (
    *("--trainer.max_epochs=-1", "--trainer.devices=1", "--model.compile=false"),
    "--trainer.enable_model_summary=false",
)


@dataclass(frozen=True)
class Stage:
    """A pretraining that is done.

    Attributes:
        folder:
            Folder of the run.
        log:
            Value by step of everything that was logged.
        record:
            What `run.json` holds.
        options:
            Its options by their full names.
    """

    folder: Path
    log: Mapping[str, Series]
    record: Mapping[str, Any]
    options: Mapping[str, Any]

    @property
    def minutes(self) -> float:
        """Time of training."""
        return self.record["seconds"] / 60

    @property
    def knn(self) -> dict[int, float]:
        """Online kNN accuracy by step, from before the first one."""
        before = self.record["knn"].get("untrained")
        # Lightning counts steps from 0: what is logged with 9 is known after 10.
        after = {k + 1: v for k, v in self.log.get("knn_top1", {}).items()}
        return after if before is None else {0: before, **after}


@dataclass(frozen=True)
class Trial:
    """What a short run tells of the long one.

    Attributes:
        stage:
            The short run.
        per_step:
            Seconds of a step.
        start:
            Seconds of a run beside its steps.
    """

    stage: Stage
    per_step: float
    start: float


@dataclass(frozen=True)
class Steps:
    """Steps of a run within a time.

    Attributes:
        number:
            What fits, by a trial.
        interval:
            Steps from one computation of online kNN to the next.
        most:
            What is done at most, a multiple of the interval.
    """

    number: int
    interval: int
    most: int


class Pretrainings:
    """Runs of `stellar pretrain` on the photos of a try.

    Attributes:
        photos:
            The copies.
        output:
            Folder of the try.
        seed:
            Decides on weights and views.
        options:
            More options of `stellar pretrain` by the names in `RECIPES`.
    """

    def __init__(
        self,
        photos: PhotoSets,
        output: Path,
        seed: int,
        options: Mapping[str, Sequence[str]],
    ) -> None:
        self.photos = photos
        self.output = output
        self.seed = seed
        self.options = options

    def attempt(self, name: str, seconds: float, prior: Path) -> Trial:
        """Trains for some seconds, silently, in `trial/NAME`, which is replaced.

        Args:
            name:
                `PRIOR` or `STELLAR`.
            seconds:
                How long.
            prior:
                Model that STELLAR starts from.
        """
        folder, start = self.output / "trial" / name, time.monotonic()
        shutil.rmtree(folder, ignore_errors=True)
        with _silence():
            pretrain_cli.main(
                [
                    *self._common(name, prior),
                    f"--output={folder}",
                    f"--trainer.max_steps={ENDLESS}",
                    f"--trainer.max_time={{seconds: {max(1, round(seconds))}}}",
                    "--trainer.log_every_n_steps=1",
                    "--trainer.enable_progress_bar=false",
                ]
            )
        whole = time.monotonic() - start
        stage = read_stage(folder)
        per_step = stage.record["seconds"] / stage.record["step"]
        # Without the first step, in which loaders start.
        if speeds := stage.log.get("images_per_s"):
            images = stage.record["sessions"][0]["global_batch"]
            per_step = images / statistics.harmonic_mean(list(speeds.values()))
        return Trial(stage, per_step, whole - per_step * stage.record["step"])

    def train(self, name: str, end: float, steps: Steps) -> Stage:
        """Trains in the folder NAME, which is replaced.

        Args:
            name:
                `PRIOR`, or `STELLAR`, which starts from it.
            end:
                When the last step ends, by `time.monotonic`.
            steps:
                How many steps fit.
        """
        folder = self.output / name
        shutil.rmtree(folder, ignore_errors=True)
        pretrain_cli.main(
            [
                *self._common(name, self.output / PRIOR / "model"),
                f"--output={folder}",
                f"--trainer.max_steps={steps.most}",
                f"--trainer.val_check_interval={steps.interval}",
                "--trainer.check_val_every_n_epoch=null",
                *self._knn(),
            ],
            Deadline(end),
        )
        return read_stage(folder)

    def _common(self, name: str, prior: Path) -> list[str]:
        return [
            f"--config={RECIPES[name]}",
            f"--seed_everything={self.seed}",
            f"--data.path={self.photos.train.root}",
            *COMMON,
            *([f"--model.prior={prior}"] if name == STELLAR else []),
            *self.options.get(name, ()),
        ]

    def _knn(self) -> list[str]:
        if self.photos.unlabelled:
            return []
        root = self.photos.train.root.parent
        return [f"--data.knn_train={root / BANK}", f"--data.knn_val={root / TESTS[0]}"]


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keeps prints, warnings and Lightning's log to itself."""
    loggers = [logging.getLogger(n) for n in ("pytorch_lightning", "lightning_fabric")]
    levels = [logger.level for logger in loggers]
    nowhere = io.StringIO()
    with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def steps_within(seconds: float, per_step: float, per_point: float) -> Steps:
    """How many steps fit into a time.

    Args:
        seconds:
            The time.
        per_step:
            Seconds of a step.
        per_point:
            Seconds of online kNN, 0 without.
    """
    points = POINTS
    if per_point:
        points = max(1, min(points, int(KNN_SHARE * seconds / per_point)))
    number = max(1, int((seconds - points * per_point) / per_step))
    interval = max(1, number // points)
    return Steps(number, interval, interval * math.ceil(SPARE * number / interval))


def read_stage(folder: Path) -> Stage:
    """Reads the files of a run."""
    record = json.loads((folder / RECORD).read_text())
    options = dict(flat(yaml.safe_load((folder / RUN_RECIPE).read_text())))
    return Stage(folder, read_log(folder / "csv"), record, options)
