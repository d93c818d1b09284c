"""One loop for all methods, that ends when its time is over."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.learning_runs.method import Method
from benchmarks.learning_runs.options import Options
from benchmarks.learning_runs.photos import Photos
from lightly_ext.pretrain.optimization import parameter_groups

# A GPU may lag behind the clock by this many steps.
STEPS_AHEAD = 10
# Steps before one is captured as a graph.
GRAPH_AFTER = 5
LOSSES_PER_STAGE = 50
LR_BATCH = 64


@dataclass
class Clock:
    """What a run has used: seconds of training, without those of scoring.

    Attributes:
        unit:
            "cpu" counts seconds of this process, so that a busy machine is fair; "wall"
            those of the clock (a GPU); "steps" counts steps and "tflop" 10^12
            operations of matrix products, which repeat exactly.
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
    tflop: float = 0.0
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
        if self.unit in ("steps", "tflop"):
            return float(getattr(self, self.unit))
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
    device = photos.images.device
    step = Step(method, photos, options, bf16)
    batches = _batches(len(photos.labels), options.batch_size, device)
    points, logged = list(stage.points), -1.0
    method.train()
    tflop = _tflop_per_step(method, photos, options) if clock.unit == "tflop" else 0.0
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
            step.set_lr(learning_rate(options, progress))
            method.before_step(progress)
            index = next(batches)
            losses = step(index, progress)
            clock.steps += 1
            clock.tflop += tflop
            clock.images += len(index)
            if progress - logged >= 1 / LOSSES_PER_STAGE:
                logged = progress
                stage.log(progress, _floats(losses))


class Step:
    """A step of training; a GPU replays what it did once, as a CUDA graph.

    A small model's step takes longer to launch than to compute.

    Args:
        method:
            What is trained.
        photos:
            Photos on its device.
        options:
            Options of the run.
        bf16:
            Whether to compute in bfloat16 where autocast does.
    """

    def __init__(
        self, method: Method, photos: Photos, options: Options, bf16: bool
    ) -> None:
        self.method, self.photos = method, photos
        self.clip, self.bf16 = options.clip, bf16
        device = photos.images.device
        on_cuda = device.type == "cuda"
        groups = optimizer_groups(method, options)
        self.parameters = [p for group in groups for p in group["params"]]
        for group in groups:  # a tensor of its own, which a graph reads
            group["lr"] = torch.tensor(options.lr, device=device)
        self.optimizer = AdamW(
            groups, betas=(0.9, 0.95), fused=True, capturable=on_cuda
        )
        self.is_graphed = on_cuda and method.is_static()
        self.calls = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        size = min(options.batch_size, len(photos.labels))
        self.index = torch.zeros(size, dtype=torch.long, device=device)
        self.losses: dict[str, Tensor] = {}

    def set_lr(self, lr: float) -> None:
        """Sets the learning rate, each group's by its factor."""
        for group in self.optimizer.param_groups:
            group["lr"].fill_(lr * group["scale"])

    def __call__(self, index: Tensor, progress: float) -> dict[str, Tensor]:
        """Trains on the photos with these numbers, and returns the losses."""
        self.index.copy_(index)
        self.calls += 1
        if self.is_graphed and self.calls == GRAPH_AFTER:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self._carry_out(progress)
        if self.graph is not None:
            self.graph.replay()
        elif self.is_graphed:  # not on the stream of everything else
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self._carry_out(progress)
            torch.cuda.current_stream().wait_stream(stream)
        else:
            self._carry_out(progress)
        return self.losses

    def _carry_out(self, progress: float) -> None:
        images, labels = (part[self.index] for part in self.photos[:2])
        with torch.autocast(
            images.device.type,
            torch.bfloat16,
            enabled=self.bf16,
            cache_enabled=not self.is_graphed,
        ):
            losses = self.method.losses(images, labels)
        self.optimizer.zero_grad()
        losses["total"].backward()
        self.method.before_update(progress)
        nn.utils.clip_grad_norm_(self.parameters, self.clip, foreach=True)
        self.optimizer.step()
        self.method.after_update()
        self.losses = {name: value.detach() for name, value in losses.items()}


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


def _tflop_per_step(method: Method, photos: Photos, options: Options) -> float:
    """10^12 operations of matrix products in a step, which is not carried out."""
    size = min(options.batch_size, len(photos.labels))
    state = copy.deepcopy(method.state_dict())
    with torch.random.fork_rng(), FlopCounterMode(display=False) as counter:
        method.losses(photos.images[:size], photos.labels[:size])["total"].backward()
    method.load_state_dict(state)
    method.zero_grad()
    return counter.get_total_flops() / 1e12


def _batches(number: int, size: int, device: torch.device) -> Iterator[Tensor]:
    """Numbers of images, each once in an epoch; what is left over is not used."""
    size = min(size, number)
    while True:
        order = torch.randperm(number, device=device)
        yield from order[: number // size * size].split(size)


def _floats(losses: dict[str, Tensor]) -> dict[str, float]:
    values = torch.stack([value.detach().float() for value in losses.values()])
    return dict(zip(losses, values.tolist(), strict=True))
