"""Runs: what is tried, how one is carried out, and many at a time."""

from __future__ import annotations

import hashlib
import json
import math
import multiprocessing
import os
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.learning_runs.baselines import (
    DINO,
    MAE,
    SimCLR,
    Supervised,
    SwaV,
    Untrained,
)
from benchmarks.learning_runs.method import Method
from benchmarks.learning_runs.options import Options
from benchmarks.learning_runs.photos import Photos, PhotoSets
from benchmarks.learning_runs.scores import Scores, encoder_scores, raw_scores
from benchmarks.learning_runs.stellar import STELLAR
from benchmarks.learning_runs.training import Clock, Stage, train

BASELINES = {"mae": MAE, "simclr": SimCLR, "dino": DINO, "swav": SwaV}
METHODS = ("raw", "untrained", "supervised", *BASELINES, "stellar")
# Of the time of a run: where features are scored.
POINTS = (0.2, 0.4, 0.6, 0.8)
RESULTS, LOSSES = "results.jsonl", "losses.jsonl"
# Options that decide on a prior.
PRIOR_OPTIONS = (
    *("width", "depth", "heads", "patch", "size", "decoder_depth", "batch_size", "lr"),
    *("min_lr", "warmup", "weight_decay", "clip", "global_scale"),
    *("prior_share", "prior_mask_ratio"),
)


@dataclass(frozen=True)
class Run:
    """A method with a seed and changed options.

    Attributes:
        name:
            Name in tables; runs that differ by their seed alone share it.
        method:
            One of `METHODS`.
        seed:
            Seed of weights, views and order.
        changes:
            Options by name.
        prior:
            Options that differ in the prior of STELLAR.
    """

    name: str
    method: str
    seed: int = 0
    changes: Mapping[str, Any] = field(default_factory=dict)
    prior: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {METHODS}, got '{self.method}'.")

    @property
    def options(self) -> Options:
        """All options."""
        return Options().changed(self.changes)

    @property
    def of_prior(self) -> Run:
        """The run that learns the prior."""
        return Run("prior", "mae", self.seed, {**self.changes, **self.prior})


@dataclass(frozen=True)
class Setting:
    """What all runs of a call have in common.

    Attributes:
        output:
            Folder of the results.
        priors:
            Folder of priors, which runs that start alike share.
        photos:
            Hash of the photos to learn from: a prior of others is not taken.
        device:
            "cpu" or "cuda".
        unit:
            Unit of `amount`, see `Clock`.
        amount:
            What a run may use, its prior included.
        bf16:
            Whether training computes in bfloat16 where autocast does.
        deadline:
            Time of `time.time` at which all training ends.
    """

    output: Path
    priors: Path
    device: str
    unit: str
    amount: float
    photos: str = ""
    bf16: bool = False
    deadline: float = float("inf")


def read_runs(path: Path) -> list[Run]:
    """Reads a JSON list of {"name", "method", "seeds", "set", "prior"}, best first.

    All first seeds come before all second ones.
    """
    entries = json.loads(path.read_text())
    seeds = max(len(entry.get("seeds", [0])) for entry in entries)
    return [
        Run(
            entry["name"],
            entry["method"],
            entry["seeds"][i],
            entry.get("set", {}),
            entry.get("prior", {}),
        )
        for i in range(seeds)
        for entry in ({"seeds": [0], **entry} for entry in entries)
        if i < len(entry["seeds"])
    ]


def with_priors(runs: Sequence[Run], setting: Setting) -> list[Run]:
    """Adds the priors that are not there yet, ahead of the first run they are for."""
    planned: list[Run] = []
    seen: set[Path] = set()
    for run in runs:
        path = prior_path(run, setting)
        if path is not None and path not in seen and not path.exists():
            planned.append(run.of_prior)
        if path is not None:
            seen.add(path)
    return planned + list(runs)


def prior_path(run: Run, setting: Setting) -> Path | None:
    """File of the prior that a run starts from, None if there is none."""
    if run.method != "stellar" or run.options.prior_share <= 0:
        return None
    return _file_of_prior(run.of_prior, setting)


def _file_of_prior(prior: Run, setting: Setting) -> Path:
    options = prior.options
    key = [getattr(options, name) for name in PRIOR_OPTIONS]
    key += [setting.photos, prior.seed, setting.device, setting.unit, setting.amount]
    key += [setting.bf16]
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    return setting.priors / f"{name}.pt"


def run_all(
    runs: Sequence[Run], sets: PhotoSets, setting: Setting, jobs: int = 1
) -> None:
    """Carries runs out, several at a time, in order; one that fails stops no other.

    Every score is appended to a file of the output folder as soon as it is known.
    """
    setting.output.mkdir(parents=True, exist_ok=True)
    setting.priors.mkdir(parents=True, exist_ok=True)
    planned = with_priors(runs, setting)
    for failed in setting.priors.glob("*.failed"):  # they are tried again
        failed.unlink()
    if jobs == 1:
        for run in planned:
            carry_out(run, sets, setting)
        return
    photos = setting.priors / "photos.pt"
    torch.save([tuple(of_set) for of_set in sets], photos)
    # A process of its own for each, that has not seen the device before.
    context = multiprocessing.get_context("spawn")
    waiting, active = list(planned), list[Any]()
    while waiting or active:
        while waiting and len(active) < jobs:
            process = context.Process(
                target=_carry_out_apart, args=(waiting.pop(0), photos, setting)
            )
            process.start()
            active.append(process)
        active[0].join(0.5)
        active = [process for process in active if process.is_alive()]


def carry_out(run: Run, sets: PhotoSets, setting: Setting) -> None:
    """Trains and scores one run, on one core of the CPU; tells what went wrong."""
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high")  # of a GPU alone
    torch.manual_seed(run.seed)
    log = _Log(run, setting)
    try:
        if run.method == "raw":
            log.scores(raw_scores(sets), Clock(setting.unit), 1.0)
            return
        placed = PhotoSets(*(photos.to(setting.device) for photos in sets))
        if run.name == "prior":
            _learn_prior(run, placed, setting, log)
        else:
            _learn(run, placed, setting, log)
    except Exception:
        log.line(RESULTS, {"error": traceback.format_exc(limit=-4)})
        if run.name == "prior":
            _file_of_prior(run, setting).with_suffix(".failed").touch()


def _carry_out_apart(run: Run, photos: Path, setting: Setting) -> None:
    sets = PhotoSets(*(Photos(*parts) for parts in torch.load(photos)))
    carry_out(run, sets, setting)


def _learn(run: Run, sets: PhotoSets, setting: Setting, log: _Log) -> None:
    options = run.options
    clock = Clock(setting.unit, deadline=setting.deadline)
    method: Method
    if run.method == "stellar":
        prior = None
        path = prior_path(run, setting)
        if path is not None:
            prior = _awaited(path, setting.deadline)
            clock.used, clock.images = prior["used"], prior["images"]
            log.scores(prior["scores"], clock, clock.used / setting.amount)
        method = STELLAR(options, prior and prior["encoder"])
    elif run.method == "supervised":
        method = Supervised(options, int(sets.train.labels.max()) + 1)
    elif run.method == "untrained":
        encoder = Untrained(options).to(setting.device).encoder
        log.scores(encoder_scores(encoder, sets, maps=True), clock, 0.0)
        return
    else:
        method = BASELINES[run.method](options)
    method.to(setting.device)
    stage = _stage(method, sets, setting.amount, clock, log)
    # Two runs from one prior that differ in one option draw the same batches.
    torch.manual_seed(run.seed)
    train(method, sets.train, options, clock, stage, setting.bf16)


def _learn_prior(run: Run, sets: PhotoSets, setting: Setting, log: _Log) -> None:
    path = _file_of_prior(run, setting)
    options = run.options
    clock = Clock(setting.unit, deadline=setting.deadline)
    method = MAE(options).to(setting.device)
    stage = _stage(method, sets, options.prior_share * setting.amount, clock, log)
    torch.manual_seed(run.seed)
    train(method, sets.train, options, clock, stage, setting.bf16)
    if clock.used < stage.end:
        raise RuntimeError("The deadline came before the prior's end.")
    prior = {
        "encoder": {k: v.cpu() for k, v in method.encoder.state_dict().items()},
        "scores": log.last,
        "used": clock.used,
        "images": clock.images,
    }
    # Seen by those who wait, and by later calls, only when it is complete.
    torch.save(prior, path.with_suffix(".part"))
    path.with_suffix(".part").rename(path)


def _stage(
    method: Method, sets: PhotoSets, end: float, clock: Clock, log: _Log
) -> Stage:
    start, amount = clock.used, log.setting.amount

    def fraction(share: float) -> float:
        return (start + share * (end - start)) / amount

    return Stage(
        start=start,
        end=end,
        points=[
            share
            for point in POINTS
            if 0 < (share := (point * amount - start) / (end - start)) < 0.99
        ],
        score=lambda share, last: log.scores(
            encoder_scores(method.encoder, sets, last), clock, fraction(share)
        ),
        log=lambda share, losses: log.line(
            LOSSES, {"fraction": round(fraction(share), 4), **losses}
        ),
    )


def _awaited(path: Path, deadline: float) -> dict[str, Any]:
    parent = multiprocessing.parent_process()
    while not path.exists():
        is_lost = path.with_suffix(".failed").exists() or time.time() > deadline
        if is_lost or (parent is not None and not parent.is_alive()):
            raise RuntimeError(f"The prior {path} did not come.")
        time.sleep(0.2)
    prior: dict[str, Any] = torch.load(path)
    return prior


class _Log:
    """Lines of a run in files that other processes write to as well."""

    def __init__(self, run: Run, setting: Setting) -> None:
        self.run, self.setting = run, setting
        self.last: Scores = {}

    def scores(self, scores: Scores, clock: Clock, fraction: float) -> None:
        """Writes scores, and what they took."""
        self.last = {k: v for k, v in scores.items() if not math.isnan(v)}
        self.line(
            RESULTS,
            {
                "fraction": round(fraction, 4),
                "used": round(clock.used, 3),
                "images": clock.images,
                "scores": {k: round(v, 5) for k, v in self.last.items()},
            },
        )

    def line(self, file: str, values: dict[str, Any]) -> None:
        """Appends a line of JSON in one piece."""
        run = asdict(self.run)
        head = {"run": run["name"], "method": run["method"], "seed": run["seed"]}
        if file == RESULTS:
            head |= {"set": run["changes"], "unit": self.setting.unit}
            head |= {"amount": self.setting.amount, "device": self.setting.device}
        text = json.dumps({**head, **values}) + "\n"
        handle = os.open(
            self.setting.output / file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644
        )
        try:
            os.write(handle, text.encode())
        finally:
            os.close(handle)
