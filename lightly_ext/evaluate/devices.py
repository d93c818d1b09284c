"""Where an evaluation runs: processes, devices, precision, and what they print."""

from __future__ import annotations

import math
import multiprocessing
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, Protocol, TypeVar

import torch
from lightning_fabric import Fabric
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table
from torch.utils.data import DataLoader, Subset

from lightly_ext.data import num_cpus
from lightly_ext.evaluate.options import check_positive

T = TypeVar("T")
Item = TypeVar("Item", covariant=True)


class Items(Protocol[Item]):
    """A data set with a length."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: Any) -> Item: ...


class Devices:
    """Where an evaluation runs.

    Args:
        batch_size:
            Number of images that a device computes at once; changes no score.
        num_workers:
            Processes that read images, per device. None takes as many as the CPU cores
            of a device, beside an encoder on the CPU half.
        accelerator:
            "auto", "cpu" or "cuda".
        devices:
            Number of devices; each computes a share of the images.
        precision:
            Precision of the encoder.
        seed:
            Decides on everything random.

    Raises:
        ValueError: If an option is impossible.
    """

    def __init__(
        self,
        batch_size: int = 64,
        num_workers: int | None = None,
        accelerator: str = "auto",
        devices: int = 1,
        precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true",
        seed: int = 0,
    ) -> None:
        check_positive(batch_size=batch_size, devices=devices)
        if num_workers is not None and num_workers < 0:
            raise ValueError(f"num_workers must be at least 0, got {num_workers}.")
        if not 0 <= seed < 2**32:
            raise ValueError(f"seed must be in 0 to {2**32 - 1}, got {seed}.")
        self.batch_size = batch_size
        self.precision = precision
        self.seed = seed
        self.console = Console()
        self.fabric = Fabric(
            accelerator=accelerator,
            devices=devices,
            strategy="ddp" if devices > 1 else "auto",
            precision=precision,
        )
        self.fabric.launch()
        self.fabric.seed_everything(seed, verbose=False)
        cores = max(1, num_cpus() // devices)
        on_cpu = self.device.type == "cpu"
        if num_workers is None:
            num_workers = max(1, cores // 2) if on_cpu else cores
        self.num_workers = num_workers
        if on_cpu:
            # The encoder takes many times as long as the readers: with cores of their
            # own most of these would rest. Threads beyond the cores would wait for
            # each other; OMP_NUM_THREADS may ask for fewer.
            torch.set_num_threads(min(cores, torch.get_num_threads()))

    @property
    def device(self) -> torch.device:
        """Device of this process."""
        return self.fabric.device

    @property
    def rank(self) -> int:
        """Number of this process."""
        return self.fabric.global_rank

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self.fabric.world_size

    def loader(
        self,
        images: Items[T],
        chosen: Sequence[Any] | None = None,
        batch_size: int | None = None,
        start_method: Literal["fork", "spawn"] | None = None,
    ) -> DataLoader[T]:
        """Loads images in the given order; batches are their items with tensors.

        Args:
            images:
                The images.
            chosen:
                Numbers of the images to load, of views their keys. None loads the share
                of this process, every `world_size`-th image.
            batch_size:
                Images in a batch, `self.batch_size` by default.
            start_method:
                How reading processes begin. None takes that of the system.
        """
        if chosen is None:
            chosen = range(self.rank, len(images), self.world_size)
        dataset: Any = images
        batch_size = batch_size or self.batch_size
        num_batches = math.ceil(len(chosen) / batch_size)
        num_workers = min(self.num_workers, num_batches) if num_batches > 1 else 0
        return DataLoader(
            Subset(dataset, chosen),
            batch_size=batch_size,
            num_workers=num_workers,
            multiprocessing_context=start_method if num_workers else None,
            worker_init_fn=_end_without_parent,
            pin_memory=self.device.type == "cuda",
        )

    def of_first(self, compute: Callable[[], T]) -> T:
        """What the first process computes, in all processes."""
        found: Any = compute() if self.rank == 0 else None
        return self.fabric.broadcast(found)

    def progress(self, steps: Iterable[T], text: str, total: int) -> Iterable[T]:
        """Shows a progress bar in the first process."""
        return track(
            steps,
            description=text,
            total=total,
            console=self.console,
            disable=self.rank > 0,
        )

    def say(self, text: str) -> None:
        """Prints in the first process."""
        if self.rank == 0:
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def say_table(self, rows: Sequence[Sequence[str]]) -> None:
        """Prints a table in the first process, the head first; none without rows."""
        if self.rank > 0 or len(rows) < 2:
            return
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
        for i, name in enumerate(rows[0]):
            table.add_column(name, justify="right" if i else "left", overflow="fold")
        for row in rows[1:]:
            table.add_row(*map(escape, row))
        self.console.print(table, highlight=False)


def _end_without_parent(_: int) -> None:
    """Ends a reading process whose parent was killed before; torch sees later kills."""
    parent = multiprocessing.parent_process()
    if parent is not None and os.getppid() != parent.pid:
        os._exit(1)
