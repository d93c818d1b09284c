"""Runs that are saved at every step, and what is logged in them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import LearningRateMonitor
from pytorch_lightning.loggers import Logger
from torch import Tensor
from torchvision.io import write_png

from lightly_ext.data import StellarDataModule
from lightly_ext.transforms import STELLARTransform
from tests.pretraining import tiny, trainer

Rows = list[tuple[int, dict[str, float]]]


class MemoryLogger(Logger):
    """Keeps what is logged, in its order, but for times."""

    def __init__(self) -> None:
        self.rows: Rows = []
        super().__init__()

    name = "memory"
    version = 0

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        exact = {k: float(v) for k, v in metrics.items() if k != "health/loader_wait"}
        self.rows.append((step or 0, exact))

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        pass


class SaveAlways(Callback):
    """Saves where checkpoints may be written: behind every batch and every epoch.

    `saved` says for each how many rows and batches the run that goes on does not have.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.saved: dict[str, tuple[int, int]] = {}
        self._done = (0, 0)

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        batches = trainer.fit_loop.total_batch_idx + 1
        # Gradients are in no checkpoint: a run goes on behind the last step.
        if not trainer.fit_loop._should_accumulate():
            self._done = (len(trainer.logger.rows) + 1, batches)
        self._save(trainer, f"batch-{batches}")

    def on_train_epoch_end(self, trainer: Any, *_: Any) -> None:
        self._done = (len(trainer.logger.rows), trainer.fit_loop.total_batch_idx + 1)
        self._save(trainer, f"epoch-{trainer.current_epoch + 1}")

    def _save(self, trainer: Trainer, name: str) -> None:
        self.saved[name] = self._done
        trainer.save_checkpoint(self.folder / f"{name}.ckpt")


class SeenImages(Callback):
    """Numbers of the images of every batch."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []

    def on_train_batch_start(
        self, trainer: Trainer, module: Any, batch: Any, *_: Any
    ) -> None:
        self.batches.append(batch.indices.tolist())


class Run:
    """A training: what it logs, sees and ends with."""

    def __init__(
        self,
        folder: Path,
        checkpoint: Path | None = None,
        module: dict[str, Any] | None = None,
        data: dict[str, Any] | None = None,
        callbacks: list[Callback] | None = None,
        make: Callable[..., LightningModule] | None = None,
        **arguments: Any,
    ) -> None:
        options = {"lr": 1e-2, "warmup_fraction": 0.2, **(module or {})}
        self.module = (make or partial(tiny, loss=GATHERED))(**options)
        self.data = images(folder / "images", **(data or {}))
        self.logger, self.seen = MemoryLogger(), SeenImages()
        given = [LearningRateMonitor("step"), self.seen, *(callbacks or [])]
        settings = {"num_sanity_val_steps": 0, "log_every_n_steps": 1, **arguments}
        self.trainer = trainer(folder, logger=self.logger, callbacks=given, **settings)
        self.trainer.fit(self.module, datamodule=self.data, ckpt_path=checkpoint)

    @property
    def rows(self) -> Rows:
        return self.logger.rows

    @property
    def state(self) -> dict[str, Tensor]:
        return self.module.state_dict()


# As in the base recipe; nothing is gathered in one process.
GATHERED = {"gather_distributed": True}


def images(folder: Path, **arguments: Any) -> StellarDataModule:
    """Seven images of noise, of which one is broken: three batches of two."""
    if not folder.exists():
        write_classes(folder, 7)
        (folder / "0" / "4.png").write_bytes(b"not an image")
    transform = STELLARTransform(2, 2, global_crop_size=32, local_crop_size=16)
    settings = {"batch_size": 2, "num_workers": 0, "transform": transform}
    return StellarDataModule(**{"path": str(folder), **settings, **arguments})


def write_classes(folder: Path, count: int) -> Path:
    """Images of noise in two subfolders."""
    generator = torch.Generator().manual_seed(0)
    for number in range(count):
        path = folder / str(number % 2) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image = torch.randint(256, (3, 40, 48), generator=generator)
        write_png(image.to(torch.uint8), str(path))
    return folder


def assert_equal_states(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert list(one) == list(other)
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert different == []
