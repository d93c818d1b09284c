"""What the pretraining of every method has as a LightningModule."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from lightly.utils.scheduler import CosineWarmupScheduler
from pytorch_lightning import Callback, LightningModule
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.optim import AdamW, Optimizer

from lightly_ext.data import StellarDataModule
from lightly_ext.pretrain.checks import check_optimization, check_trainer
from lightly_ext.pretrain.compilation import (
    CompilationReport,
    compile_blocks,
    compiler_error,
)
from lightly_ext.pretrain.continuation import Continuation
from lightly_ext.pretrain.health import HealthMonitor
from lightly_ext.pretrain.knn import OnlineKNN
from lightly_ext.pretrain.nonfinite import NonFiniteGuard
from lightly_ext.pretrain.optimization import parameter_groups, scaled_lr
from lightly_ext.pretrain.processes import check_alike
from lightly_ext.pretrain.resume import STARTS, refuse_changes
from lightly_ext.pretrain.sharding import shard
from lightly_ext.randomness import mix_seeds, run_seed
from lightly_ext.transforms import STELLARTransform
from stellar_plugin.visualize import Uint8Array


class Pretraining(LightningModule):
    """Optimises a model in steps that can be continued, and are watched.

    A method saves its hyper-parameters, calls `watch_run`, makes `model` and defines
    what is abstract here. Those of AdamW, of its schedule and of what watches over
    steps are read here.

    Attributes:
        METHOD:
            Name of the method, for the option `method` of recipes.
        GROUPS:
            Options that are passed on to a class, by their names: the class, and the
            arguments that the method sets itself.
        PARTS:
            Parts of the module that only some options make, by the start of their
            weights' names.
        CAPTION:
            What the pictures of `sample_rows` show.
        model:
            Has an `encoder`, and as `config` its resolved arguments.
        started_from:
            What is known of the weights that it started from, None for random ones.
    """

    METHOD: ClassVar[str]
    GROUPS: ClassVar[dict[str, tuple[type, set[str | int]]]]
    PARTS: ClassVar[dict[str, tuple[str, ...]]] = {}
    CAPTION: ClassVar[str]
    model: Any
    started_from: dict[str, Any] | None = None

    @abstractmethod
    def normalize(self, images: Tensor) -> Tensor:
        """Normalises images (batch_size, 3, height, width) in [0, 1] for the model."""

    @abstractmethod
    def features(self, images: Tensor) -> Tensor:
        """Features (batch_size, dim) of normalised images, for online kNN."""

    @abstractmethod
    def check_views(self, transform: STELLARTransform) -> None:
        """Raises a ValueError if there is nothing to learn from what it makes."""

    @abstractmethod
    def export(self, folder: Path, provenance: Mapping[str, Any] | None = None) -> None:
        """Writes weights and config into a new folder.

        Args:
            folder:
                The folder.
            provenance:
                What is recorded of the run, for the model card and for later runs.
        """

    @abstractmethod
    def sample_rows(self, images: Tensor) -> list[Uint8Array]:
        """Normalised images, and rows of pictures of what the model makes of them."""

    @property
    def draws_samples(self) -> bool:
        """Whether there is something to draw."""
        return True

    def watch_run(self) -> None:
        """Checks what is shared by all methods, and makes what watches over steps.

        Raises:
            ValueError: If a hyper-parameter is out of range.
        """
        given = self.hparams
        names = ("lr", "min_lr", "warmup_fraction", "weight_decay", "betas")
        check_optimization(**{name: given[name] for name in names})
        self.continuation = Continuation()
        self.health = HealthMonitor()
        self.compilation = CompilationReport()
        self.nonfinite = NonFiniteGuard(given["on_nonfinite"], given["nonfinite_limit"])

    def setup(self, stage: str) -> None:
        """Checks the trainer of a fit, and that all processes begin alike."""
        if stage == "fit":
            check_trainer(self.trainer)
            check_alike(self.trainer)

    def configure_model(self) -> None:
        """Shards the weights, where `ShardedStrategy` has made a mesh for them."""
        if self.device_mesh is not None and not isinstance(self, FSDPModule):
            shard(self, self.device_mesh["data_parallel"])

    def on_fit_start(self) -> None:
        """Compiles the transformer blocks, those of a teacher too, and says so."""
        choice = self.hparams["compile"]
        if not choice or (choice == "auto" and self.device.type != "cuda"):
            return
        error = compiler_error(self.device)
        if error is None:
            self.compile_parts()
            self.compilation.wanted = True
            self.print("Transformer blocks are compiled: the first step takes longer.")
        elif choice == "auto":
            self.print(f"Transformer blocks are not compiled. {error}")
        else:
            raise RuntimeError(
                f"Transformer blocks cannot be compiled on {self.device.type}, which "
                "needs Triton on a GPU, and a C++ compiler. Install them, or set "
                f"--model.compile=false. {error}"
            )

    def compile_parts(self) -> None:
        """Compiles what takes the time of a step."""
        compile_blocks(self)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Makes what draws from torch's generators a function of step and process.

        That is dropout, and all draws for batches without seeds.
        """
        torch.manual_seed(self._batch_seed(batch_idx, 1 + self.global_rank))

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Looks whether the step is finite, and clips by the norm that this takes.

        Lightning's mixed precision refuses to clip with fused optimisers: they must not
        clip what a scaler scales. Ours is not fused where there is one.
        """
        norm = self.nonfinite.check(self, optimizer)
        if self._is_logged():
            self.log("health/gradient_norm", norm)
            self.health.note({"gradient_norm": norm})
        parameters = list(self.trainer.precision_plugin.main_params(optimizer))
        if gradient_clip_val and gradient_clip_algorithm == "value":
            nn.utils.clip_grad_value_(parameters, gradient_clip_val)
        elif gradient_clip_val:
            nn.utils.clip_grads_with_norm_(parameters, gradient_clip_val, norm)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW with linear warm-up and a cosine to `min_lr`, stepped every batch."""
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        if isinstance(data, StellarDataModule):
            # Behind `refuse_changes`, which tells of another patch size in its words.
            self.check_views(data.transform)
        hparams, lr = self.hparams, self._scaled_lr()
        total_steps = self.continuation.total_steps(self.trainer)
        groups = parameter_groups(self, hparams["weight_decay"])
        # The scaler of fp16 leaves unscaling to a fused optimiser, too late to clip.
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        # On a CPU it wins a hundredth of a step, and rounds so that parameters of which
        # the gradient is noise part between one process and two.
        fused = self.device.type == "cuda" and scaler is None
        betas = tuple(hparams["betas"])
        optimizer = AdamW(groups, lr=lr, betas=betas, fused=fused or None)
        self.optimizer_made(optimizer)
        scheduler = CosineWarmupScheduler(
            optimizer,
            warmup_epochs=int(hparams["warmup_fraction"] * total_steps),
            max_epochs=total_steps,
            end_value=hparams["min_lr"] / lr,
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def optimizer_made(self, optimizer: Optimizer) -> None:
        """Called once for the optimiser of a training."""

    def validation_step(
        self, batch: tuple[Tensor, Tensor], batch_idx: int, dataloader_idx: int = 0
    ) -> dict[str, Tensor]:
        """Returns features of plain uint8 views, and their labels."""
        images, labels = batch
        images = self.normalize(images.float() / 255)
        # Each size of these batches would be compiled for itself.
        with torch.compiler.set_stance("force_eager"):
            features = self.features(images.to(self.dtype)).float()
        return {"features": features, "labels": labels}

    def configure_callbacks(self) -> list[Callback]:
        """What reads validation steps and figures, and goes on after a restart."""
        own = [self.continuation, self.nonfinite, self.health, self.compilation]
        return [OnlineKNN(), *own]

    def on_train_batch_end(self, *_: Any) -> None:
        """Lets the figures be read, behind all callbacks."""
        self.health.step_ended(self)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Makes a checkpoint loadable without the files that training started from."""
        self.nonfinite.settle()
        checkpoint["method"] = self.METHOD
        given = checkpoint["hyper_parameters"]
        given |= {name: None for name in STARTS if name in given}
        checkpoint["started_from"] = self.started_from  # a licence may be inherited

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Checks the options of a run that goes on, and tells what it began with."""
        self.started_from = checkpoint.get("started_from", self.started_from)
        if self._trainer is not None and self.trainer.training:
            refuse_changes(self.trainer, checkpoint)

    def log_losses(
        self, losses: dict[str, Tensor], tokens: list[Tensor], indices: Tensor | None
    ) -> bool:
        """Logs the terms of a batch and lets the guard see them.

        Args:
            losses:
                Terms of the loss by name, scalars, "total" first.
            tokens:
                Tokens of the images with shapes (batch_size, ...).
            indices:
                Numbers of the images, int64 with shape (batch_size,), if known.

        Returns:
            Whether Lightning logs this step, so that figures are wanted.
        """
        self.nonfinite.add_batch(losses, tokens, indices)
        logged = self._is_logged()
        if logged and self.trainer.world_size > 1:
            mean = torch.stack(list(losses.values()))
            dist.all_reduce(mean)  # Lightning's own would wait for all before
            mean /= self.trainer.world_size
            losses = dict(zip(losses, mean.unbind(), strict=True))
        self.log("loss", losses["total"])
        self.log_dict({f"train/{name}": value for name, value in losses.items()})
        return logged

    def log_figures(self, figures: dict[str, Tensor]) -> None:
        """Logs the figures of health of this step, scalars, and has them judged."""
        self.log_dict({f"health/{name}": value for name, value in figures.items()})
        self.health.note(figures)

    def _batch_seed(self, *numbers: int) -> int:
        return mix_seeds(run_seed(), self.current_epoch, *numbers)

    def _is_logged(self) -> bool:
        """Whether Lightning logs this step."""
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        return every > 0 and (self.global_step + 1) % every == 0

    def _scaled_lr(self) -> float:
        """Learning rate for the global batch size; says what it is."""
        trainer, hparams = self.trainer, self.hparams
        trainer.fit_loop.setup_data()  # not yet done where max_steps is given
        loader: Any = trainer.train_dataloader
        batch_size = loader.batch_size * trainer.world_size
        batch_size *= trainer.accumulate_grad_batches
        lr = scaled_lr(hparams["lr"], hparams["lr_scaling"], batch_size)
        starts = (trainer.ckpt_path, *(hparams.get(name) for name in STARTS))
        start = next(filter(None, starts), "random weights")
        self.print(
            f"Global batch {batch_size}, learning rate {lr:.3g} "
            f"(lr_scaling: {hparams['lr_scaling']}), starts from {start}."
        )
        return lr
