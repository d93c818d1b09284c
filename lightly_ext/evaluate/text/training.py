"""Contrastive training of the probe, with Lightning."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from open_clip import ClipLoss
from pytorch_lightning import LightningModule
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn
from torch.optim import AdamW
from torch.utils.data import DataLoader, Dataset, Sampler

from lightly_ext.data import epoch_order
from lightly_ext.evaluate.devices import Devices
from lightly_ext.evaluate.text.probe import AttentionProbe
from lightly_ext.evaluate.text.retrieval import recalls
from lightly_ext.evaluate.training import fitting_batch, with_warmup_and_cosine
from stellar_plugin.protocols import (
    ALIGN_TEXT_MOST_SCALE,
    ALIGN_TEXT_WARMUP,
    AlignTextProtocol,
)

# Images and texts of a batch.
Batch = tuple[Tensor, Tensor]
# Enough for a recall, few enough to look at in every epoch.
MOST_HELD_OUT = 5000


@dataclass(frozen=True)
class TrainingPairs:
    """Tokens and embeddings of captions, and which images train.

    Attributes:
        tokens:
            Of all images, float16 (num_images, num_tokens, dim).
        texts:
            Unit vectors of all captions, image by image, float32 (num_texts, text_dim).
        starts:
            Number of the first caption of each image, int64 (num_images + 1,), with the
            number of captions as last.
        train:
            Numbers of the images to train on, int64.
        held_out:
            Numbers of the images that are watched, int64.
    """

    tokens: NDArray[np.generic]
    texts: NDArray[np.float32]
    starts: Tensor
    train: Tensor
    held_out: Tensor

    def texts_of(self, images: Tensor) -> Batch:
        """All captions of images, float32 (num, text_dim), and whose they are."""
        counts = self.starts[images + 1] - self.starts[images]
        owners = torch.repeat_interleave(torch.arange(len(images)), counts)
        # Number of a caption among those of its image.
        order = torch.arange(len(owners)) - (counts.cumsum(0) - counts)[owners]
        rows = self.starts[images][owners] + order
        return torch.from_numpy(self.texts[rows.numpy()]), owners


class PairBatches(Dataset[Batch]):
    """Reads whole batches: an index is a tensor of image and caption numbers."""

    def __init__(self, pairs: TrainingPairs) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        """Returns the number of images that train."""
        return len(self.pairs.train)

    def __getitem__(self, chosen: Tensor) -> Batch:
        """Reads a batch.

        Args:
            chosen:
                Numbers of images and captions, int64 (batch_size, 2).

        Returns:
            Tokens, float16 (batch_size, num_tokens, dim), and texts, float32
            (batch_size, text_dim).
        """
        images, texts = chosen.numpy().T
        return (
            torch.from_numpy(self.pairs.tokens[images]),
            torch.from_numpy(self.pairs.texts[texts]),
        )


class PairSampler(Sampler[Tensor]):
    """Shuffles images, draws a caption of each anew in every epoch, deals out batches.

    The batches follow from seed and epoch, whatever the number of processes. What
    remains behind the last full batch of an epoch is not used.

    Attributes:
        pairs: The images and captions.
        batch_size: Pairs of all processes in an optimiser step.
        seed: Decides on order and captions.
        rank: Number of this process.
        world_size: Number of processes; divides `batch_size`.
    """

    def __init__(
        self,
        pairs: TrainingPairs,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.pairs = pairs
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses order and captions; Lightning calls it."""
        self._epoch = epoch

    def __len__(self) -> int:
        """Number of batches in an epoch."""
        return len(self.pairs.train) // self.batch_size

    def __iter__(self) -> Iterator[Tensor]:
        """Yields the share of this process of each batch, int64 (num, 2)."""
        train, starts = self.pairs.train, self.pairs.starts
        images = train[epoch_order(len(train), self.seed, self._epoch)]
        rng = np.random.default_rng((self.seed, self._epoch))
        drawn = torch.from_numpy(rng.random(len(images)))
        counts = starts[images + 1] - starts[images]
        texts = starts[images] + (drawn * counts).long()
        batches = torch.stack([images, texts], dim=1).split(self.batch_size)
        for batch in batches[: len(self)]:
            yield batch[self.rank :: self.world_size]


class Alignment(LightningModule):
    """Trains the probe with the loss of CLIP against embeddings that stay as they are.

    Attributes:
        probe:
            The probe.
        log_scale:
            Logarithm of the inverse temperature.
        protocol:
            Says how to train.
        pairs:
            The held-out ones are scored after every epoch.
        recalls:
            Recall of the held-out images and captions, after the last epoch.
    """

    def __init__(
        self,
        probe: AttentionProbe,
        protocol: AlignTextProtocol,
        pairs: TrainingPairs,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__()
        self.probe = probe
        self.log_scale = nn.Parameter(torch.tensor(-math.log(protocol.temperature)))
        self.protocol = protocol
        self.pairs = pairs
        self.recalls: dict[str, float] = {}
        # Each process has its rows of the similarities; all images and texts of the
        # others are negatives, with gradients.
        self._loss = ClipLoss(
            local_loss=True, gather_with_grad=True, rank=rank, world_size=world_size
        )
        self._embedded: list[Tensor] = []

    def contrast(self, tokens: Tensor, texts: Tensor) -> Tensor:
        """Symmetric InfoNCE over the batch of all processes."""
        images = self.probe(tokens.float())
        # Similarities times 100 are too coarse in half precision.
        with torch.autocast(self.device.type, enabled=False):
            return self._loss(images, texts, self.log_scale.exp())

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Returns the loss of a batch."""
        loss = self.contrast(*batch)
        several = self.trainer.world_size > 1
        self.log(
            "loss", loss, on_epoch=True, prog_bar=True, batch_size=1, sync_dist=several
        )
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Keeps the inverse temperature at 100 or below, as CLIP does."""
        with torch.no_grad():
            self.log_scale.clamp_(max=math.log(ALIGN_TEXT_MOST_SCALE))

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Embeds held-out images."""
        self._embedded.append(self.probe(batch[0].float()))

    def on_validation_epoch_end(self) -> None:
        """Scores the held-out pairs; every process has all of them."""
        images = torch.cat(self._embedded)
        self._embedded.clear()
        texts, owners = self.pairs.texts_of(self.pairs.held_out)
        self.recalls = recalls(images, texts.to(self.device), owners.to(self.device))
        self.log_dict({f"held_out_{k}": v for k, v in self.recalls.items()})

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW with warm-up and cosine; decay on matrices only."""
        groups = param_groups_weight_decay(
            self,
            self.protocol.weight_decay,
            no_weight_decay_list=("probe.pool.latent",),
        )
        optimizer = AdamW(groups, lr=self.protocol.lrs[0])
        return with_warmup_and_cosine(self.trainer, optimizer, ALIGN_TEXT_WARMUP)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the recall of the held-out pairs."""
        checkpoint["recalls"] = self.recalls

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restores it."""
        self.recalls = checkpoint["recalls"]


def training_loader(
    devices: Devices, pairs: TrainingPairs, batch_size: int
) -> DataLoader[Batch]:
    """Loads this process' share of the batches.

    Raises:
        ValueError: If the devices cannot share a batch.
    """
    # Unreadable images may have left fewer than were counted on.
    batch_size = fitting_batch(devices, batch_size, len(pairs.train))
    sampler = PairSampler(
        pairs, batch_size, devices.seed, devices.rank, devices.world_size
    )
    return _loader(devices, pairs, sampler, len(sampler))


def held_out_loader(
    devices: Devices, pairs: TrainingPairs, batch_size: int
) -> DataLoader[Batch]:
    """Loads all held-out images, in order, each with its first caption."""
    images = pairs.held_out
    rows = torch.stack([images, pairs.starts[images]], dim=1).split(batch_size)
    return _loader(devices, pairs, rows, len(rows))


def _loader(
    devices: Devices, pairs: TrainingPairs, batches: Any, num_batches: int
) -> DataLoader[Batch]:
    return DataLoader(
        PairBatches(pairs),
        batch_size=None,
        sampler=batches,
        num_workers=devices.num_workers if num_batches > 1 else 0,
        pin_memory=devices.device.type == "cuda",
    )
