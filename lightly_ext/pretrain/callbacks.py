"""What a pretraining run shows and leaves behind, beside Lightning's own callbacks."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer

from lightly_ext.data import printable
from lightly_ext.durable import replace_text
from stellar_plugin.wording import counted


class ImagesPerSecond(Callback):
    """Logs the throughput of all processes.

    Averaged over the steps since it was last logged; the first step, which warms up,
    is left out.
    """

    def __init__(self) -> None:
        self._start: float | None = None
        self._steps = 0

    def on_train_epoch_start(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> None:
        """Forgets the time between epochs."""
        self._start = None

    def on_train_batch_end(
        self,
        trainer: Any,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Counts the images of a step."""
        now = time.perf_counter()
        if self._start is None:
            self._start, self._steps = now, 0
            return
        self._steps += 1
        # Lightning copies the number to the device, for which the host waits.
        if trainer.global_step % trainer.log_every_n_steps:
            return
        images = len(batch[0]) * trainer.world_size * self._steps
        pl_module.log("images_per_s", images / (now - self._start))
        self._start, self._steps = now, 0


class ReportUnreadable(Callback):
    """Says after every epoch which images could not be read, and lists them.

    Images to train on and those of online kNN are counted, by all processes, each once.

    Attributes:
        file:
            Where to write their paths, one per line, once there are any. Line breaks
            and bytes that are no text are escaped.
    """

    def __init__(self, file: str | Path) -> None:
        self.file = Path(file)

    def on_train_epoch_end(self, trainer: Any, pl_module: LightningModule) -> None:
        """Logs the count, and prints it if there are any."""
        data = trainer.datamodule
        datasets = [data.train_dataset, *data.knn_datasets]
        names = []
        for dataset in datasets:
            found = dataset.unreadable.int().to(pl_module.device)
            found = trainer.strategy.reduce(found, reduce_op="sum").nonzero().flatten()
            names += [printable(dataset.file(index)) for index in found.tolist()]
        pl_module.log("unreadable_images", float(len(names)))
        if names:
            images = counted(sum(map(len, datasets)), "image")
            some = ", ".join(names[:3])
            pl_module.print(
                f"Skipped {len(names)} unreadable of {images} so far: {some}"
                f"{', ...' if len(names) > 3 else ''}. They are listed in {self.file}."
            )
        if names and trainer.is_global_zero:
            replace_text(self.file, "\n".join(names) + "\n")
