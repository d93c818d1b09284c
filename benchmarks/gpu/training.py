"""Real training through `stellar pretrain`, with its loader on photos."""

from __future__ import annotations

import argparse
import math
import os
import statistics
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import yaml
from pytorch_lightning import Callback
from torch import Tensor
from torchvision.io import write_jpeg
from torchvision.transforms.v2 import functional as F

from benchmarks.gpu.flops import mfu, total_flops
from benchmarks.gpu.measure import host_syncs, peak_gib
from benchmarks.gpu.results import Report
from benchmarks.gpu.sizes import base
from benchmarks.step import Sizes
from lightly_ext.data import num_cpus
from lightly_ext.pretrain import cli
from lightly_ext.pretrain.run_log import read_log

NEXT_BATCH = "[_TrainingEpochLoop].train_dataloader_next"
# Steps in which the host's waits are counted; Lightning logs at multiples of 50.
COUNTED = range(20, 25)


class StepWatch(Callback):
    """Notes when steps end, and counts the host's waits in a few of them."""

    def __init__(self, device: str, counted: tuple[int, int]) -> None:
        self.device, self.counted = device, range(*counted)
        self.ends: list[float] = []
        self.syncs: Counter[str] = Counter()
        self._open = ExitStack()

    def on_train_batch_start(self, *arguments: Any) -> None:
        """Begins to count."""
        if len(self.ends) == self.counted.start:
            self.syncs = self._open.enter_context(host_syncs(self.device))

    def on_train_batch_end(self, *arguments: Any) -> None:
        """Notes the time."""
        self.ends.append(time.perf_counter())
        if len(self.ends) == self.counted.stop:
            self._open.close()


def run(arguments: argparse.Namespace, report: Report) -> None:
    """Trains for some time and reports images per second and the loader's share."""
    sizes, batch_sizes = base(arguments.tiny)
    step = report.results.values("b")
    batch_size = step.get("batch_size", batch_sizes[0])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        photos = arguments.photos
        if photos is None:
            photos = folder / "photos"
            num, copies = (16, 1) if arguments.tiny else (1024, 100)
            start = time.perf_counter()
            write_photos(photos, num, copies)
            report.values(photos_s=time.perf_counter() - start)
        # What is left of the part's time, less the start and the end of training.
        seconds = min(arguments.seconds, arguments.limit - 40)
        _write_recipe(folder, photos, sizes, batch_size, seconds, arguments)
        start = time.perf_counter()
        trainer: Any = cli.main([f"--config={folder / 'recipe.yaml'}"])
        wall = time.perf_counter() - start
        logged = read_log(folder / "run" / "csv").get("health/loader_wait", {})
    watch = next(c for c in trainer.callbacks if isinstance(c, StepWatch))
    _report(trainer, watch, wall, logged, sizes, batch_size, report)


def write_photos(folder: Path, num: int, copies: int) -> None:
    """Writes JPEG photos of 500 x 375 pixels, each under several names."""
    folder.mkdir()

    def write(number: int) -> None:
        path = folder / f"{number:05d}.jpg"
        write_jpeg(_photo(number), str(path), quality=90)
        for copy in range(1, copies):
            os.link(path, folder / f"{number:05d}_{copy:03d}.jpg")

    with ThreadPoolExecutor(num_cpus()) as pool:
        list(pool.map(write, range(num)))


def _photo(seed: int, height: int = 375, width: int = 500) -> Tensor:
    """A smooth picture with some noise, uint8 (3, height, width)."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(3, 24, 32, generator=generator)
    smooth = F.resize(coarse, [height, width])
    noise = torch.randn(3, height, width, generator=generator)
    return (255 * smooth + 8 * noise).clamp(0, 255).to(torch.uint8)


def _write_recipe(
    folder: Path,
    photos: Path,
    sizes: Sizes,
    batch_size: int,
    seconds: float,
    arguments: argparse.Namespace,
) -> None:
    """STELLAR-B's own recipe, or with tiny sizes, for some seconds."""
    tiny = arguments.tiny
    watch = {
        "class_path": f"{__name__}.{StepWatch.__name__}",
        "init_args": {
            "device": arguments.device,
            "counted": [1, 2] if tiny else [COUNTED.start, COUNTED.stop],
        },
    }
    trainer = {"accelerator": arguments.device, "profiler": "simple"}
    trainer["max_time"] = f"00:00:{int(seconds) // 60:02d}:{int(seconds) % 60:02d}"
    recipe: dict[str, Any] = {
        "output": str(folder / "run"),
        "trainer": {**trainer, "callbacks": [watch]},
        "model": {"model": sizes.recipe["model"], "head": sizes.recipe["head"]},
        "data": {"path": str(photos), "batch_size": batch_size},
    }
    if tiny:
        recipe["trainer"] |= {"max_epochs": 1, "log_every_n_steps": 2}
        recipe["data"] |= {
            "num_workers": 1,
            "transform": {
                "class_path": "lightly_ext.transforms.STELLARTransform",
                "init_args": {
                    "num_global_views": sizes.views,
                    "num_local_views": sizes.views,
                    "global_crop_size": sizes.image,
                    "local_crop_size": sizes.local_image,
                },
            },
        }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))


def _report(
    trainer: Any,
    watch: StepWatch,
    wall: float,
    loader_wait: dict[int, float],
    sizes: Sizes,
    batch_size: int,
    report: Report,
) -> None:
    steps = len(watch.ends)
    # Without the start: workers, allocator, first kernels.
    later = watch.ends[steps // 3 :]
    if len(later) < 2:
        raise RuntimeError(
            f"There is no time but for {steps} steps, as compilation takes most of it: "
            "give more --seconds and a larger --limit."
        )
    seconds = later[-1] - later[0]
    ms = 1000 * seconds / (len(later) - 1)
    # Of the host, which may be ahead of its device; `loader_wait` is the device's.
    waits = trainer.profiler.recorded_durations[NEXT_BATCH]
    late = [x for step, x in loader_wait.items() if step >= steps // 3]
    report.values(
        steps=steps,
        wall_s=wall,
        images_per_s=1000 * batch_size / ms,
        step_ms=ms,
        loader_wait_percent=100 * statistics.mean(late or [math.nan]),
        loader_wait_median_ms=1000 * statistics.median(waits),
        loader_wait_largest_ms=1000 * max(waits[1:]),
        first_batch_s=waits[0],
        mfu_percent=mfu(total_flops(sizes, batch_size), ms),
        peak_gib=peak_gib(),
        host_syncs_per_step=watch.syncs.total() / len(watch.counted),
        workers=trainer.datamodule._workers(),
    )
    report.table(
        f"What makes the host wait in steps {watch.counted.start} to "
        f"{watch.counted.stop - 1}",
        ["line", "times"],
        [[line, count] for line, count in watch.syncs.most_common(20)],
    )
    longest = sorted(
        trainer.profiler.recorded_durations.items(), key=lambda item: -sum(item[1])
    )
    report.table(
        "Lightning's profile: time of the host",
        ["action", "s", "number"],
        [[action, sum(times), len(times)] for action, times in longest[:20]],
    )
    known = report.known()
    report.headline(
        f"{known['images_per_s']:.0f} images/s, loader wait "
        f"{known['loader_wait_percent']:.1f} %, MFU {known['mfu_percent']:.1f} %, "
        f"{known['host_syncs_per_step']:.1f} host syncs a step"
    )
