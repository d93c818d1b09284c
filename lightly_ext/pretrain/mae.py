"""Pretraining of a masked autoencoder, the prior of STELLAR."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from lightly.models import utils
from torch import Tensor

from lightly_ext.data import ViewBatch
from lightly_ext.loss import masked_patch_loss, normalized_patches
from lightly_ext.modules import MaskedAutoencoder, random_focal_mask
from lightly_ext.pretrain.checks import check_crop
from lightly_ext.pretrain.optimization import LRScaling
from lightly_ext.pretrain.pretraining import Pretraining
from lightly_ext.transforms import STELLARTransform
from stellar_plugin.checkpoints import (
    inherited,
    load_encoder_weights,
    read_checkpoint,
    save_encoder,
)
from stellar_plugin.provenance import origin, write_provenance
from stellar_plugin.visualize import Uint8Array, denormalize

# Intensity of hidden patches in pictures.
GREY = 0.5


class MAEPretraining(Pretraining):
    """Pretrains a ViT as the encoder of a masked autoencoder [0].

    Takes batches as `StellarPretraining` does, of one global view per image. The
    defaults are those of the paper, its learning rate of 1.5e-4 for 256 images brought
    to the 2048 of `lr_scaling`.

    - [0]: Masked Autoencoders Are Scalable Vision Learners, 2021,
      https://arxiv.org/abs/2111.06377

    Attributes:
        model:
            Arguments of `MaskedAutoencoder`. Without `model_name` the encoder is that
            of `weights`, else a ViT-B/16.
        weights:
            Checkpoint of any layout that the encoder starts from, without queries, such
            as the `model/` of another run; with its LayerNorm epsilon, its mean and
            std, and its way of resampling positions, unless `model` names others. None
            starts from random weights; the decoder always does.
        mask_ratio:
            Share of patches that are hidden, above 0 and below 1.
        lr:
            Learning rate, above 0.
        lr_scaling:
            How `lr` follows the global batch size relative to 2048, see
            `StellarPretraining`.
        min_lr:
            Learning rate at the end of the cosine, from 0 to `lr`.
        warmup_fraction:
            Share of steps with linear warm-up, in [0, 1].
        weight_decay:
            Weight decay of matrices.
        betas:
            Coefficients of AdamW.
        compile:
            Whether torch compiles the transformer blocks, see `StellarPretraining`.
        grad_checkpointing:
            Whether the backward pass computes them once more, see the same.
        on_nonfinite:
            What to do in a step that is not finite: "stop" or "skip".
        nonfinite_limit:
            Number of such steps in a row at which "skip" ends training, too.

    Raises:
        FileNotFoundError: If there are no such weights.
        ValueError: If a value is out of range, or the weights do not fit.
    """

    METHOD = "mae"
    GROUPS = {"model": (MaskedAutoencoder, set())}
    CAPTION = (
        "above, what it sees of them; below, how it fills the hidden patches, whose "
        "mean and contrast, which it does not learn, are those of the image"
    )

    def __init__(
        self,
        model: dict[str, Any],
        weights: str | None = None,
        mask_ratio: float = 0.75,
        lr: float = 1.2e-3,
        lr_scaling: LRScaling = "linear",
        min_lr: float = 0.0,
        warmup_fraction: float = 0.05,
        weight_decay: float = 0.05,
        betas: tuple[float, float] = (0.9, 0.95),
        compile: bool | Literal["auto"] = "auto",
        grad_checkpointing: bool = False,
        on_nonfinite: Literal["stop", "skip"] = "stop",
        nonfinite_limit: int = 10,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.watch_run()
        if not 0 < mask_ratio < 1:
            raise ValueError(
                f"mask_ratio must be above 0 and below 1, got {mask_ratio}."
            )
        checkpoint = None if weights is None else read_checkpoint(weights)
        if checkpoint is not None:
            if checkpoint.num_queries:
                raise ValueError(
                    f"'{weights}' ({checkpoint.read_as}) has latent queries, which an "
                    "MAE does not train: name weights of a plain ViT, or go on with "
                    "--method stellar."
                )
            model = {**inherited(checkpoint, model), **model}
        self.model = MaskedAutoencoder(**model)
        # Complete, for whoever reads the encoder of a training checkpoint.
        self.hparams["model"] = self.model.config
        if checkpoint is not None:
            load_encoder_weights(self.model.encoder, checkpoint)
            self.started_from = origin(checkpoint, weights or checkpoint.path)
        self.model.set_grad_checkpointing(grad_checkpointing)

    def normalize(self, images: Tensor) -> Tensor:
        """As the model says."""
        return self.model.normalize(images)

    def features(self, images: Tensor) -> Tensor:
        """The mean of the patches, where the objective acts."""
        return self.model.encoder(images).dense.mean(dim=1)

    def check_views(self, transform: STELLARTransform) -> None:
        """Checks that there is one view, of the model's size, to hide a part of."""
        views = transform.num_global_views, transform.num_local_views
        if views != (1, 0):
            raise ValueError(
                "MAE reads one global view per image: set num_global_views to 1 and "
                f"num_local_views to 0, got {views[0]} and {views[1]}."
            )
        check_crop(self.model.encoder, "global_crop_size", transform.global_crop_size)
        side = transform.global_crop_size
        made_for = max(self.model.encoder.vit.patch_embed.img_size)
        if side != made_for:
            raise ValueError(
                f"MAE's decoder is made for one size: global_crop_size is {side}, the "
                f"model's img_size {made_for}. Set both to the same."
            )
        self._masks(1, torch.zeros(1, dtype=torch.int64))

    def export(self, folder: Path, provenance: Mapping[str, Any] | None = None) -> None:
        """Writes the encoder, with what tells readers that MAE trained it."""
        config = self.model.config
        config = {k: v for k, v in config.items() if not k.startswith("decoder_")}
        save_encoder(self.model.encoder, config, "MAE", folder)
        write_provenance(folder, provenance or {})

    def training_step(
        self, batch: ViewBatch | tuple[Tensor, Tensor | None], batch_idx: int
    ) -> Tensor:
        """Hides patches, computes the loss of those and logs it."""
        global_views, _, seeds, indices = ViewBatch(*batch)
        images = self.normalize(global_views[:, 0].float() / 255)
        keep = self._masks(len(images), seeds)
        prediction = self.model(images.to(self.dtype), keep)
        targets = normalized_patches(images, self.model.encoder.patch_size)
        loss = masked_patch_loss(prediction.patches, targets, keep)
        if self.log_losses({"total": loss}, [prediction.tokens], indices):
            # The best that says nothing of a patch is its mean, which is zero.
            of_mean = masked_patch_loss(torch.zeros_like(targets), targets, keep)
            self.log_figures({"reconstruction_over_mean": loss.detach() / of_mean})
        return loss

    def sample_rows(self, images: Tensor) -> list[Uint8Array]:
        """What is seen, and how the rest is filled; the same masks at every step."""
        size, patch = len(images), self.model.encoder.patch_size
        keep = self._masks(size, torch.arange(size))
        patches = utils.patchify(images.float(), patch)
        deviation, mean = torch.std_mean(patches, dim=2, keepdim=True)
        filled = self.model(images, keep).patches.float() * deviation + mean
        hidden = torch.ones_like(mean).scatter(1, keep[..., None], 0.0)
        grey = utils.patchify(
            self.normalize(torch.full_like(images, GREY)).float(), patch
        )
        rows = [patches + hidden * (other - patches) for other in (grey, filled)]
        pictures = [images, *(utils.unpatchify(row, patch) for row in rows)]
        config = self.model.config
        return [denormalize(x, config["mean"], config["std"]) for x in pictures]

    def _masks(self, size: int, seeds: Tensor | None) -> Tensor:
        """Patches to keep (size, k), drawn uniformly, for each image by its seed."""
        return random_focal_mask(
            size,
            self.model.encoder.grid_size,
            self.hparams["mask_ratio"],
            focal_prob=0.0,
            device=self.device,
            seeds=seeds,
        )
