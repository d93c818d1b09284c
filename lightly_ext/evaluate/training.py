"""Lightning on the devices of an evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightly.utils.scheduler import CosineWarmupScheduler
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from lightly_ext.checkpoint_io import DurableCheckpointIO
from lightly_ext.evaluate.devices import Devices
from stellar_plugin.protocols import TrainedProtocol

# Of a batch that is cut: a prime number of images could only be computed one by one.
DIVISOR = 8
LAST_CHECKPOINT = Path("checkpoints", "last.ckpt")


def fitting_batch(
    devices: Devices, batch_size: int, num_images: int, multiple: int = DIVISOR
) -> int:
    """Cuts a batch to the number of images, and says so.

    The number of devices does not decide, as it does not on a result.

    Args:
        devices:
            Where it runs.
        batch_size:
            What is wanted.
        num_images:
            What there is.
        multiple:
            What the cut batch is a multiple of, where there are that many images; 1
            where devices do not share a batch.

    Raises:
        ValueError: If there is no image, or the devices cannot share the cut batch.
    """
    if batch_size <= num_images:
        return batch_size
    cut = num_images // multiple * multiple or num_images
    if not cut or (multiple > 1 and cut % devices.world_size):
        raise ValueError(
            f"A batch of {cut}, of {num_images} images to train on, cannot be shared "
            f"by {devices.world_size} devices: name more images, or fewer --devices."
        )
    devices.say(
        f"A batch of {batch_size} is cut to {cut}: there are {num_images} images to "
        "train on."
    )
    return cut


def make_trainer(
    devices: Devices, protocol: TrainedProtocol, folder: Path, **options: Any
) -> Trainer:
    """A trainer with a log and the last checkpoint in a folder.

    Args:
        devices:
            Where it runs. The sampler has to deal out images to the processes.
        protocol:
            Says `epochs` and `clip`.
        folder:
            Folder for log and checkpoints.
        options:
            Of the trainer, beside or instead of these.
    """
    path = folder / LAST_CHECKPOINT
    checkpoint = ModelCheckpoint(path.parent, path.stem, enable_version_counter=False)
    values: dict[str, Any] = {
        "accelerator": devices.device.type,
        "devices": devices.world_size,
        "strategy": "ddp" if devices.world_size > 1 else "auto",
        "precision": devices.precision,
        "max_epochs": protocol.epochs,
        "gradient_clip_val": protocol.clip,
        "use_distributed_sampler": False,
        "enable_model_summary": False,
        "default_root_dir": folder,
        "logger": CSVLogger(folder, name="log"),
        "callbacks": [checkpoint],
        "plugins": [DurableCheckpointIO()],
    }
    return Trainer(**{**values, **options})


def with_warmup_and_cosine(
    trainer: Trainer, optimizer: Optimizer, warmup: float
) -> OptimizerLRScheduler:
    """An optimiser with a learning rate for each step: a warm-up, a cosine to 0.

    Args:
        trainer:
            Knows the number of steps.
        optimizer:
            The optimiser.
        warmup:
            Fraction of the steps in which the rate grows.
    """
    steps = int(trainer.estimated_stepping_batches)
    scheduler = CosineWarmupScheduler(
        optimizer, round(warmup * steps), steps, end_value=0.0
    )
    return {
        "optimizer": optimizer,
        "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
    }


def fit(
    devices: Devices,
    module: LightningModule,
    protocol: TrainedProtocol,
    folder: Path,
    loader: DataLoader[Any],
    held_out: DataLoader[Any] | None = None,
    **options: Any,
) -> None:
    """Trains to the end, from where an earlier run in the folder was interrupted.

    Args:
        devices:
            Where it runs; the module is left there.
        module:
            What is trained.
        protocol:
            Says how long.
        folder:
            Folder for log and checkpoints.
        loader:
            Loads what is trained on, in the order of a sampler with `set_epoch`.
        held_out:
            Loads what is watched after every epoch.
        options:
            Of the trainer.

    Raises:
        RuntimeError: If training was interrupted.
    """
    trainer = make_trainer(devices, protocol, folder, **options)
    last = folder / LAST_CHECKPOINT
    resumes = last.exists()
    if resumes:
        devices.say(f"Continues the training in {folder}.")
        # Lightning starts the workers of a continued run before it sets the epoch.
        sampler: Any = loader.sampler
        sampler.set_epoch(torch.load(last, weights_only=True)["epoch"] + 1)
    devices.fabric.barrier()  # nobody writes before everybody has looked
    trainer.fit(module, loader, held_out, ckpt_path=last if resumes else None)
    module.to(devices.device)  # Lightning leaves it on the CPU
    if trainer.current_epoch != protocol.epochs:
        raise RuntimeError(f"Training was interrupted; run again to continue {folder}.")
