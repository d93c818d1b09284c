"""The whole network as a classifier, for Lightning."""

from __future__ import annotations

import copy
from typing import Any

import torch
from pytorch_lightning import LightningModule
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW, Optimizer
from torch.utils.data import DataLoader

from lightly_ext.data import EpochSampler, SeededViews
from lightly_ext.evaluate.classification.guesses import (
    Guesses,
    best_guesses,
    collect_guesses,
)
from lightly_ext.evaluate.classification.split import Split
from lightly_ext.evaluate.devices import Devices
from lightly_ext.evaluate.features import check_unreadable
from lightly_ext.evaluate.frozen_model import FrozenModel, pool
from lightly_ext.evaluate.images import (
    EvaluationImages,
    ImageFiles,
    Sample,
    centre_crop,
    train_crop,
)
from lightly_ext.evaluate.training import with_warmup_and_cosine
from stellar_plugin.protocols import FINETUNE_WARMUP, AugmentedClassifierProtocol


class FineTuning(LightningModule):
    """An encoder whose pooled tokens go through LayerNorm and a linear layer.

    All parameters that reach the output are trained, by AdamW with a linear warm-up and
    a cosine to 0; nothing is dropped at random. lightly's `FinetuneClassifier` trains a
    bare linear layer by SGD, so this is a module of its own.

    Attributes:
        model:
            Gives the encoder, which is copied, and how images are normalised.
        feature:
            One of `FEATURES`.
        protocol:
            Says optimiser and sizes.
        devices:
            Where it runs.
        split:
            Images to train on, and to watch after every epoch.
        files:
            Images to train on.
        unreadable:
            Numbers of those that could not be read so far, ascending.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        model: FrozenModel,
        feature: str,
        protocol: AugmentedClassifierProtocol,
        devices: Devices,
        split: Split,
    ) -> None:
        super().__init__()
        self.backbone = copy.deepcopy(model.backbone)
        _drop_nothing(self.backbone)
        self.register_buffer("mean", model.mean.clone(), persistent=False)
        self.register_buffer("std", model.std.clone(), persistent=False)
        self._interpolation = model.origin.interpolation
        self.feature = feature
        self.protocol = protocol
        self.devices = devices
        self.split = split
        self.unreadable: list[int] = []
        dim = _unfreeze(self.backbone, feature, protocol.crop, model.mean.device)
        with torch.random.fork_rng(devices=[]):
            torch.random.default_generator.manual_seed(devices.seed)
            linear = nn.Linear(dim, split.num_classes)
        self.head = nn.Sequential(nn.LayerNorm(dim), linear)
        self.files = split.data.train[split.kept.tolist()]
        self._labels = self.files.label_tensor
        self._unreadable = torch.zeros(len(self.files), dtype=torch.int64)
        self._finite = torch.tensor(1.0)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of images.

        Args:
            images:
                uint8 tensor with shape (batch_size, 3, height, width).

        Returns:
            Tensor with shape (batch_size, num_classes).
        """
        images = (images.to(self.mean.dtype) / 255 - self.mean) / self.std
        return self.head(pool(self.backbone(images), self.feature))

    def train_dataloader(self) -> DataLoader[Sample]:
        """Loads random crops, in shares that together make the protocol's batches."""
        devices, protocol = self.devices, self.protocol
        crop = train_crop(protocol, self._interpolation)
        images = SeededViews(EvaluationImages(self.files, crop), devices.seed)
        sampler = EpochSampler(
            images, devices.rank, devices.world_size, protocol.batch_sizes[0]
        )
        # Lightning starts the first loader of a continued run before it sets the epoch.
        sampler.set_epoch(self.current_epoch)
        return DataLoader(
            images,
            batch_size=images_at_once(devices, protocol.batch_sizes[0]),
            sampler=sampler,
            num_workers=devices.num_workers,
            pin_memory=devices.device.type == "cuda",
            drop_last=True,
        )

    def on_fit_start(self) -> None:
        """Moves what belongs to no module."""
        self._labels = self._labels.to(self.device)
        self._unreadable[self.unreadable] = 1
        self._unreadable = self._unreadable.to(self.device)

    def on_train_epoch_start(self) -> None:
        """Starts to look at the loss."""
        self._finite = torch.tensor(1.0, device=self.device)

    def training_step(self, batch: Sample, batch_idx: int) -> Tensor:
        """Mean cross-entropy, 0 for unreadable images.

        So they change the weight of no other, however a batch is cut and shared.
        """
        readable: Any = batch.readable
        losses = F.cross_entropy(
            self(batch.image), self._labels[batch.number], reduction="none"
        )
        loss = torch.where(readable, losses, 0).mean()
        self._unreadable[batch.number] = (~readable).long()
        self._finite *= loss.detach().isfinite()
        self.log("loss", loss, prog_bar=True)
        return loss

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Stops all processes together if the loss of one is not finite.

        Raises:
            RuntimeError: If it is not.
        """
        if self._reduced(self._finite) < self.devices.world_size:
            raise RuntimeError(
                f"The loss is not finite in epoch {self.current_epoch + 1}, step "
                f"{self.global_step + 1}. Lower --lr or, with 16-mixed, use "
                "--precision bf16-mixed or 32-true."
            )

    def on_train_epoch_end(self) -> None:
        """Logs the accuracy on held-out images.

        Raises:
            RuntimeError: If more than 5 % of the training images are unreadable.
        """
        found = self._reduced(self._unreadable).nonzero().flatten()
        self.unreadable = found.tolist()
        check_unreadable(len(self.unreadable), self.files)
        files = self.split.data.train[self.split.held_out.tolist()]
        accuracy = self.guess(files).scores["accuracy"]
        self.log("held_out_accuracy", accuracy, prog_bar=True)
        self.log("unreadable", float(len(self.unreadable)))

    def guess(self, files: ImageFiles) -> Guesses:
        """Guesses of centre crops, each image in one process.

        Raises:
            RuntimeError: If more than 5 % are unreadable, or logits are not finite.
        """
        devices = self.devices
        crop = centre_crop(self.protocol, self._interpolation)
        if devices.world_size > 1:
            for buffer in self.buffers():  # of batch norm, where each has its own
                torch.distributed.broadcast(buffer, src=0)
        self.eval()
        found = []
        with torch.no_grad(), devices.fabric.autocast():
            for batch in devices.loader(EvaluationImages(files, crop)):
                numbers = batch.number[batch.readable]
                if len(numbers):
                    images = devices.fabric.to_device(batch.image[batch.readable])
                    found.append((numbers, best_guesses(self(images))))
        self.train()
        guesses = collect_guesses(devices, files, found)
        check_unreadable(len(guesses.unreadable), files)
        return guesses

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW, with a learning rate for each step."""
        protocol = self.protocol
        trained = [p for p in self.parameters() if p.requires_grad]
        optimizer = AdamW(
            trained, lr=protocol.lrs[0], weight_decay=protocol.weight_decay
        )
        return with_warmup_and_cosine(self.trainer, optimizer, FINETUNE_WARMUP)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Notes which images could not be read."""
        checkpoint["unreadable"] = self.unreadable

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Remembers which images could not be read."""
        self.unreadable = checkpoint["unreadable"]

    def _reduced(self, value: Tensor) -> Tensor:
        total: Any = self.trainer.strategy.reduce(value.clone(), reduce_op="sum")
        return total


def images_at_once(devices: Devices, batch_size: int) -> int:
    """Images that a device computes at once.

    The most that fit `devices.batch_size` and make up batches of `batch_size` images
    over all devices, by accumulating gradients.
    """
    per_device = batch_size // devices.world_size
    fitting = range(1, min(per_device, devices.batch_size) + 1)
    return max(n for n in fitting if per_device % n == 0)


def _drop_nothing(backbone: nn.Module) -> None:
    """Some networks of timm drop paths by default, which no protocol names."""
    for module in backbone.modules():
        if isinstance(module, DropPath):
            module.drop_prob = 0.0
        elif isinstance(module, nn.Dropout):
            module.p = 0.0


def _unfreeze(
    backbone: nn.Module, feature: str, size: int, device: torch.device
) -> int:
    """Lets train what reaches the feature, and nothing else.

    Distributed training waits for the gradient of every parameter that is trained, so
    those that get none, such as STELLAR's localization, stay frozen.

    Returns:
        Width of the feature.

    Raises:
        ValueError: If nothing of it can be trained.
    """
    if not any(True for _ in backbone.parameters()):
        raise ValueError(
            "There is nothing to fine-tune: without a network only the head would "
            "learn, which `stellar evaluate linear` does."
        )
    backbone.requires_grad_(True)
    images = torch.zeros(1, 3, size, size, device=device)
    pooled = pool(backbone(images), feature)
    pooled.sum().backward()
    for parameter in backbone.parameters():
        parameter.requires_grad_(parameter.grad is not None)
        parameter.grad = None
    return pooled.shape[1]
