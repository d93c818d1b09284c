"""One loop for all methods, that ends when its time is over."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from benchmarks.learning_runs.method import Method
from benchmarks.learning_runs.options import Options
from benchmarks.learning_runs.photos import Photos
from lightly_ext.pretrain.optimization import parameter_groups

# A GPU may lag behind the clock by this many steps.
STEPS_AHEAD = 10
LOSSES_PER_STAGE = 50
LR_BATCH = 64


@dataclass
class Clock:
    """What a run has used: seconds of training, without those of scoring.

    Attributes:
        unit:
            "cpu" counts seconds of this process, so that a busy machine is fair; "wall"
            those of the clock (a GPU); "steps" counts steps, which repeats exactly.
        used:
            Amount used so far, where it is not running.
        deadline:
            Time of `time.time` at which training ends, whatever is left.
    """

    unit: str
    used: float = 0.0
    deadline: float = float("inf")
    steps: int = 0
    images: int = 0
    _start: float | None = field(default=None, repr=False)

    def now(self) -> float:
        """Amount used by now."""
        running = 0.0 if self._start is None else self._read() - self._start
        return self.used + running

    @property
    def is_late(self) -> bool:
        """Whether the deadline is over."""
        return time.time() > self.deadline

    @contextmanager
    def running(self) -> Iterator[None]:
        """Counts what happens inside."""
        self._start = self._read()
        try:
            yield
        finally:
            self.used, self._start = self.now(), None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves out what happens inside, while it is running."""
        self.used, self._start = self.now(), None
        try:
            yield
        finally:
            self._start = self._read()

    def _read(self) -> float:
        if self.unit == "steps":
            return float(self.steps)
        return time.process_time() if self.unit == "cpu" else time.perf_counter()


@dataclass(frozen=True)
class Stage:
    """A part of a run.

    Attributes:
        start, end:
            Amounts on the clock.
        points:
            Shares of the stage, ascending, behind which `score` is called; it is called
            at the end, too.
        score:
            Called with the share, and whether the stage is over.
        log:
            Called with the share and the losses, now and then.
    """

    start: float
    end: float
    points: Sequence[float]
    score: Callable[[float, bool], None]
    log: Callable[[float, dict[str, float]], None]


def train(
    method: Method,
    photos: Photos,
    options: Options,
    clock: Clock,
    stage: Stage,
    bf16: bool,
) -> None:
    """Trains a method on photos of its device until the stage is over."""
    groups = optimizer_groups(method, options)
    device = photos.images.device
    optimizer = AdamW(groups, lr=options.lr, betas=(0.9, 0.95), fused=True)
    parameters = [p for group in groups for p in group["params"]]
    batches = _batches(len(photos.labels), options.batch_size, device)
    points, logged = list(stage.points), -1.0
    method.train()
    with clock.running():
        while True:
            if device.type == "cuda" and clock.steps % STEPS_AHEAD == 0:
                torch.cuda.synchronize()
            progress = (clock.now() - stage.start) / (stage.end - stage.start)
            is_over = progress >= 1 or clock.is_late
            if is_over or (points and progress >= points[0]):
                points = [point for point in points if point > progress]
                if device.type == "cuda":
                    torch.cuda.synchronize()
                with clock.paused():
                    stage.score(min(progress, 1.0), is_over)
            if is_over:
                return
            _set_lr(optimizer, options, progress)
            method.before_step(progress)
            index = next(batches)
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                losses = method.losses(photos.images[index], photos.labels[index])
            optimizer.zero_grad()
            losses["total"].backward()
            method.before_update(progress)
            nn.utils.clip_grad_norm_(parameters, options.clip, foreach=True)
            optimizer.step()
            method.after_update()
            clock.steps += 1
            clock.images += len(index)
            if progress - logged >= 1 / LOSSES_PER_STAGE:
                logged = progress
                stage.log(progress, _floats(losses))


def optimizer_groups(method: Method, options: Options) -> list[dict[str, Any]]:
    """Trainable parameters by weight decay and by factor of the learning rate."""
    names = {id(p): name for name, p in method.named_parameters()}
    scales = method.lr_scales()
    groups = []
    for group in parameter_groups(method, options.weight_decay):
        by_scale: dict[float, list[Any]] = {}
        for parameter in group["params"]:
            scale = scales.get(names[id(parameter)], 1.0)
            by_scale.setdefault(scale, []).append(parameter)
        groups += [{**group, "params": p, "scale": s} for s, p in by_scale.items()]
    return groups


def learning_rate(options: Options, progress: float) -> float:
    """Linear warm-up, then a cosine, by the share of the stage that is over."""
    peak = options.lr * (options.batch_size / LR_BATCH) ** 0.5
    if progress < options.warmup:
        return peak * progress / options.warmup
    share = (progress - options.warmup) / (1 - options.warmup)
    cosine = 0.5 + 0.5 * math.cos(share * math.pi)
    return options.min_lr + (peak - options.min_lr) * cosine


def _set_lr(optimizer: AdamW, options: Options, progress: float) -> None:
    lr = learning_rate(options, progress)
    for group in optimizer.param_groups:
        group["lr"] = lr * group["scale"]


def _batches(number: int, size: int, device: torch.device) -> Iterator[Tensor]:
    """Numbers of images, each once in an epoch; what is left over is not used."""
    size = min(size, number)
    while True:
        order = torch.randperm(number, device=device)
        yield from order[: number // size * size].split(size)


def _floats(losses: dict[str, Tensor]) -> dict[str, float]:
    values = torch.stack([value.detach().float() for value in losses.values()])
    return dict(zip(losses, values.tolist(), strict=True))
