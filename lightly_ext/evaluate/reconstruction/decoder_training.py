"""A decoder trained on a frozen latent, with Lightning; stored beside the result."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import LightningModule
from torch import Tensor
from torch.optim import AdamW, Optimizer
from torch.utils.data import DataLoader

from lightly_ext.data import EpochSampler, SeededViews
from lightly_ext.durable import replace_weights
from lightly_ext.evaluate.devices import Devices
from lightly_ext.evaluate.images import EvaluationImages, ImageFiles, Sample, train_crop
from lightly_ext.evaluate.reconstruction.autoencoder import FrozenAutoencoder
from lightly_ext.evaluate.reconstruction.decoder_files import (
    check_same,
    load_decoder,
    read_config,
    write_config,
)
from lightly_ext.evaluate.reduction import count_unreadable
from lightly_ext.evaluate.training import fit
from stellar_plugin.checkpoints import CONFIG_NAME, WEIGHTS_NAME
from stellar_plugin.protocols import RandomCropProtocol, TrainedProtocol

# All else of a checkpoint is frozen and has files of its own.
TRAINED = "autoencoder.decoder."
UNREADABLE = "unreadable"


class DecoderTraining(LightningModule):
    """Trains the decoder of an autoencoder.

    Expects batches of `Sample`. An unreadable image has no part in the loss.

    Attributes:
        autoencoder:
            Encoder and tokenizer stay as they are.
        protocol:
            Says learning rate and weight decay.
        unreadable:
            Which images could not be read, by any process after a whole epoch; bool
            with shape (num_images,).
    """

    def __init__(
        self, autoencoder: FrozenAutoencoder, protocol: TrainedProtocol, num_images: int
    ) -> None:
        super().__init__()
        self.strict_loading = False  # checkpoints hold what is trained
        self.autoencoder = autoencoder
        self.autoencoder.decoder.requires_grad_(True)
        self.protocol = protocol
        # No buffer: those of the first process replace those of the others.
        self.unreadable = torch.zeros(num_images, dtype=torch.bool)

    def training_step(self, batch: Sample, batch_idx: int) -> Tensor:
        """Returns the mean loss, 0 for unreadable images.

        So they change the weight of no other, however a batch is shared.
        """
        images, number, readable, _ = batch
        assert isinstance(number, Tensor) and isinstance(readable, Tensor)
        self.unreadable[number] |= ~readable
        loss = (self.autoencoder.losses(images) * readable).mean()
        self.log(
            "loss",
            loss,
            on_step=True,
            on_epoch=True,
            prog_bar=True,
            batch_size=len(images),
            sync_dist=self.trainer.world_size > 1,
        )
        return loss

    def on_fit_start(self) -> None:
        """Moves what is no buffer."""
        self.unreadable = self.unreadable.to(self.device)

    def on_train_batch_end(self, outputs: Any, batch: Sample, batch_idx: int) -> None:
        """Puts together what the processes could not read, behind each epoch.

        Not at its end, where the progress bar of one process waits for the others.
        """
        if self.trainer.is_last_batch:
            found = self.unreadable.float()
            total: Any = self.trainer.strategy.reduce(found, reduce_op="sum")
            self.unreadable = total > 0

    def configure_optimizers(self) -> Optimizer:
        """AdamW with a constant learning rate."""
        return AdamW(
            self.autoencoder.decoder.parameters(),
            lr=self.protocol.lrs[0],
            weight_decay=self.protocol.weight_decay,
        )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leaves out what is frozen, adds what could not be read."""
        checkpoint[UNREADABLE] = self.unreadable
        checkpoint["state_dict"] = {
            name: tensor
            for name, tensor in checkpoint["state_dict"].items()
            if name.startswith(TRAINED)
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restores what could not be read."""
        self.unreadable = checkpoint[UNREADABLE]


def train_decoder(
    devices: Devices,
    autoencoder: FrozenAutoencoder,
    files: ImageFiles,
    protocol: RandomCropProtocol,
    folder: Path,
    identity: dict[str, Any],
) -> int:
    """Trains the decoder and stores it, or continues, or takes what is there.

    Args:
        devices:
            Where it runs.
        autoencoder:
            Its decoder is changed in place.
        files:
            Training images.
        protocol:
            Says how to train.
        folder:
            Place for checkpoints, logs and the trained decoder.
        identity:
            What tells this training from others.

    Returns:
        Number of unreadable training images.

    Raises:
        ValueError: If the folder holds another training, or the batch is no multiple of
            the number of devices.
        RuntimeError: If training was interrupted, or too many images are unreadable.
    """
    config = {**identity, "seed": devices.seed}
    if (folder / CONFIG_NAME).exists():
        check_same(read_config(folder), config, folder)
    if (folder / WEIGHTS_NAME).exists():
        devices.say(f"The trained decoder is in {folder} already.")
        load_decoder(autoencoder, folder)
        return int(read_config(folder)["num_unreadable"])
    if devices.rank == 0:
        write_config(folder, config, autoencoder)
    devices.fabric.barrier()
    module = DecoderTraining(autoencoder, protocol, len(files))
    loader = _loader(devices, files, protocol)
    # They are meant to be: the encoder and the tokenizer.
    warnings.filterwarnings("ignore", r"Found .* module\(s\) in eval mode")
    steps = min(10, len(loader))
    fit(devices, module, protocol, folder, loader, log_every_n_steps=steps)
    num_unreadable = count_unreadable(
        devices, files, module.unreadable.nonzero().flatten().tolist()
    )
    if devices.rank == 0:
        write_config(folder, {**config, "num_unreadable": num_unreadable}, autoencoder)
        replace_weights(folder / WEIGHTS_NAME, autoencoder.decoder)
    devices.fabric.barrier()
    return num_unreadable


def _loader(
    devices: Devices, files: ImageFiles, protocol: RandomCropProtocol
) -> DataLoader[Sample]:
    batch_size, rest = divmod(protocol.batch_sizes[0], devices.world_size)
    if rest:
        raise ValueError(
            f"A batch of {protocol.batch_sizes[0]} images cannot be shared by "
            f"{devices.world_size} devices: choose another number of devices."
        )
    images = EvaluationImages(files, train_crop(protocol, "bicubic"))
    views = SeededViews(images, devices.seed)
    sampler = EpochSampler(views, devices.rank, devices.world_size)
    return DataLoader(
        views,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=devices.num_workers if len(files) > batch_size else 0,
        pin_memory=devices.device.type == "cuda",
    )
