"""The two pretrainings of the demo, within a time."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightly_ext.demo.photos.files import BANK, TESTS, PhotoSets
from lightly_ext.pretrain import cli as pretrain_cli
from lightly_ext.pretrain.run_log import Series, read_log
from lightly_ext.pretrain.story import RECORD

PRIOR, STELLAR = "prior", "stellar"
RECIPES = {PRIOR: "photos_prior", STELLAR: "photos"}
# Parts of the time. Most of what a prior gives, it gives early.
SHARES = {PRIOR: 0.4, STELLAR: 0.6}
# Part of a stage's time in which its speed is measured, and the least, in seconds.
TRIAL_SHARE, TRIAL_SECONDS = 0.05, 2
# Online kNN is computed so many times in a stage, at most, and before it; the images it
# reads are at most this part of those that are trained on, and the rest of the time.
POINTS, READ_SHARE, TRAIN_SHARE = 6, 0.25, 0.8
ENDLESS = 10**6


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
    """

    folder: Path
    log: Mapping[str, Series]
    record: Mapping[str, Any]

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


def pretrain(
    name: str,
    photos: PhotoSets,
    output: Path,
    seed: int,
    minutes: float,
    options: Sequence[str],
) -> Stage:
    """Runs `stellar pretrain` for a time, which a trial turns into a number of steps.

    Args:
        name:
            `PRIOR`, or `STELLAR`, which starts from it.
        photos:
            The copies.
        output:
            Folder of the demo.
        seed:
            Decides on weights and views.
        minutes:
            Time of both pretrainings together.
        options:
            More options of `stellar pretrain`.
    """
    folder, seconds = output / name, 60 * SHARES[name] * minutes
    common = [
        f"--config={RECIPES[name]}",
        f"--seed_everything={seed}",
        f"--data.path={photos.train.root}",
        "--trainer.max_epochs=-1",
        *([f"--model.prior={output / PRIOR / 'model'}"] if name == STELLAR else []),
        *options,
    ]
    trial = max(TRIAL_SECONDS, round(TRIAL_SHARE * seconds))
    images, per_step = _pace(output / "trial", common, trial)
    steps = TRAIN_SHARE * seconds / per_step
    read = len(photos.bank) + len(photos.test)
    points = max(1, min(POINTS, round(steps), int(READ_SHARE * steps * images / read)))
    interval = max(1, round(steps / points))
    shutil.rmtree(folder, ignore_errors=True)
    pretrain_cli.main(
        [
            *common,
            f"--output={folder}",
            f"--trainer.max_steps={points * interval}",
            f"--trainer.val_check_interval={interval}",
            "--trainer.check_val_every_n_epoch=null",
            *_knn_options(photos),
        ]
    )
    return read_stage(folder)


def read_stage(folder: Path) -> Stage:
    """Reads the files of a run."""
    record = json.loads((folder / RECORD).read_text())
    return Stage(folder, read_log(folder / "csv"), record)


def _knn_options(photos: PhotoSets) -> list[str]:
    if photos.unlabelled:
        return []
    root = photos.train.root.parent
    return [f"--data.knn_train={root / BANK}", f"--data.knn_val={root / TESTS[0]}"]


def _pace(folder: Path, options: Sequence[str], seconds: int) -> tuple[int, float]:
    """Images and seconds per step: trains for a time, silently, and leaves nothing."""
    shutil.rmtree(folder, ignore_errors=True)
    with contextlib.redirect_stdout(io.StringIO()):
        pretrain_cli.main(
            [
                *options,
                f"--output={folder}",
                f"--trainer.max_steps={ENDLESS}",
                f"--trainer.max_time={{seconds: {seconds}}}",
                "--trainer.log_every_n_steps=1",
                "--trainer.enable_progress_bar=false",
                "--trainer.enable_model_summary=false",
            ]
        )
    stage = read_stage(folder)
    shutil.rmtree(folder)
    images = stage.record["sessions"][0]["global_batch"]
    # Without the first step, in which loaders start.
    if speeds := stage.log.get("images_per_s"):
        return images, images / statistics.harmonic_mean(list(speeds.values()))
    return images, stage.record["seconds"] / stage.record["step"]
