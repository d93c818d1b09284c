"""Online kNN: how good the features are, while they are learned."""

from __future__ import annotations

from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor

from lightly_ext.metrics import knn_accuracy


class OnlineKNN(Callback):
    """Logs `knn_top1`, the kNN accuracy of a module's features, at every validation.

    The module has two validation loaders, bank (0) and queries (1), and its
    `validation_step` returns "features", with shape (batch_size, dim), and "labels",
    int64 with shape (batch_size,).
    """

    def __init__(self) -> None:
        self._outputs: list[list[Any]] = [[], []]

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Collects features and labels."""
        self._outputs[dataloader_idx].append(outputs)

    def on_validation_epoch_end(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> None:
        """Logs the accuracy of the queries among the bank."""
        bank, queries = (self._dataset(trainer, i) for i in (0, 1))
        accuracy = knn_accuracy(*bank, *queries)
        pl_module.log("knn_top1", accuracy, prog_bar=True, rank_zero_only=True)

    def _dataset(self, trainer: Trainer, index: int) -> tuple[Tensor, Tensor]:
        """Features and labels of a dataset, in its order, without repeated samples."""
        outputs, self._outputs[index] = self._outputs[index], []
        features = torch.cat([output["features"] for output in outputs])
        labels = torch.cat([output["labels"] for output in outputs])
        if trainer.world_size == 1:
            return features, labels
        # The sampler deals samples out in turn and repeats some at the end.
        loaders: Any = trainer.val_dataloaders
        count = len(loaders[index].dataset)
        gathered: Any = trainer.lightning_module.all_gather((features, labels))
        features, labels = (x.transpose(0, 1).flatten(0, 1)[:count] for x in gathered)
        return features, labels
