"""Pretraining of STELLAR as a LightningModule."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from pytorch_lightning.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from lightly_ext.data import ViewBatch
from lightly_ext.loss import (
    CLSViews,
    SparseViews,
    STELLARLoss,
    STELLARLossTerms,
    TeacherTargets,
)
from lightly_ext.modules import STELLARProjectionHead, random_focal_mask
from lightly_ext.pretrain.checks import check_views
from lightly_ext.pretrain.health import training_figures
from lightly_ext.pretrain.optimization import LRScaling
from lightly_ext.pretrain.pretraining import Pretraining
from lightly_ext.pretrain.teacher import MomentumTeacher
from lightly_ext.transforms import (
    STELLARColorAugment,
    STELLARTransform,
    STELLARViews,
)
from stellar_plugin import Factorization, Stellar
from stellar_plugin.arguments import check_arguments
from stellar_plugin.checkpoints import (
    HEADS,
    Checkpoint,
    inherited,
    load_encoder_weights,
    load_head_weights,
    load_model_weights,
    numerics,
    read_checkpoint,
)
from stellar_plugin.provenance import origin
from stellar_plugin.tokenizer import TOKENIZER_FILE, WHERE_TO_GET_IT, tokenizer_sizes
from stellar_plugin.visualize import Uint8Array, reconstruction_rows

# The frozen tokenizer is left out of training checkpoints if it has a file of its own.
TOKENIZER_PREFIX = "model.tokenizer."


class StellarPretraining(Pretraining):
    """Pretrains STELLAR [0]: views in, loss terms out, weights by AdamW.

    Expects batches of uncoloured uint8 views as `StellarDataModule` makes them, with
    shapes (batch_size, num_views, 3, size, size): `ViewBatch`, or `(global_views,
    local_views)` without seeds; `local_views` may be None.

    - [0]: STELLAR, 2026, https://arxiv.org/abs/2602.01905

    Attributes:
        model:
            Arguments of `stellar_plugin.Stellar`. Without `model_name` the encoder is
            that of `prior`, else a ViT-B/16.
        head:
            Arguments of each `STELLARProjectionHead`, for example num_prototypes. With
            None there, tokens are compared with the teacher's tokens of the batch in
            place of prototypes (not in the paper; short runs learn more by it).
        loss:
            Arguments of `STELLARLoss`.
        augment:
            Arguments of `STELLARColorAugment`.
        prior:
            Checkpoint of any layout that the encoder starts from: a file, a folder, a
            hub repository, or "timm:NAME". Its LayerNorm epsilon, its way of resampling
            positions, its mean and std are used unless `model` names others. None
            starts from random weights.
        weights:
            STELLAR checkpoint that training continues from, with decoder, heads and
            prototypes as far as it has them: a folder of ours, or released weights.
            Takes the place of `prior`.
        tokenizer:
            File of the frozen tokenizer, see `MaskGITVQGAN.from_pretrained`, for models
            with the target "tokens". None takes the one inside `weights`.
        mask_ratio:
            Share of patches hidden in masked views.
        focal_prob:
            Probability that the kept patches of a view gather around one place.
        teacher_momentum:
            Momentum of a teacher that makes the targets from global view 1 (for random
            weights, stage 1), in [0, 1). None trains without teacher.
        head_warmup_steps:
            Number of optimiser steps, from the start of the run, in which the encoder
            (ViT, queries, localization) stays as it is and only what reads it learns:
            heads, prototypes and decoder. For weights that come without heads.
        lr:
            Learning rate, above 0.
        lr_scaling:
            How `lr` follows the global batch size relative to 2048: not at all, by its
            square root, or linearly.
        min_lr:
            Learning rate at the end of the cosine, from 0 to `lr`.
        warmup_fraction:
            Share of steps with linear warm-up, in [0, 1].
        weight_decay:
            Weight decay, of matrices other than queries and position table.
        betas:
            Coefficients of AdamW.
        compile:
            Whether torch compiles the transformer blocks for training: the first step
            takes longer, the others less time. "auto" compiles them on a CUDA device,
            if there is a compiler.
        grad_checkpointing:
            Whether the backward pass computes the transformer blocks of encoder and
            decoder once more, instead of keeping what it needs of them: much less
            memory, and a third more operations. The gradients are the same.
        on_nonfinite:
            What to do in a step whose loss or gradient is not finite: "stop" training,
            or "skip" the step. Neither lets it reach a weight.
        nonfinite_limit:
            Number of such steps in a row at which "skip" ends training, too.

    Raises:
        FileNotFoundError: If a file to start from, or the tokenizer's, does not exist.
        ValueError: If a value is out of range, or the target is "tokens" and there is
            no tokenizer.
    """

    METHOD = "stellar"
    GROUPS = {
        "model": (Stellar, set()),
        "head": (STELLARProjectionHead, {"input_dim"}),
        "loss": (STELLARLoss, {"target"}),
        "augment": (STELLARColorAugment, {"mean", "std"}),
    }
    PARTS = {
        "teacher.": ("model.teacher_momentum",),
        "sparse_head.": (
            "model.loss.clustering_weight",
            "model.loss.alignment_weight",
        ),
        "cls_head.": (
            "model.loss.cls_clustering_weight",
            "model.loss.cls_alignment_weight",
        ),
        "model.decoder.": ("model.loss.reconstruction_weight",),
    }
    CAPTION = (
        "above, what it reconstructs of them; below, each patch in the colour of its "
        "strongest token, the same for a token in every image and at every step"
    )

    def __init__(
        self,
        model: dict[str, Any],
        head: dict[str, Any] | None = None,
        loss: dict[str, Any] | None = None,
        augment: dict[str, Any] | None = None,
        prior: str | None = None,
        weights: str | None = None,
        tokenizer: str | None = None,
        mask_ratio: float = 0.8,
        focal_prob: float = 0.5,
        teacher_momentum: float | None = None,
        head_warmup_steps: int = 0,
        lr: float = 1.5e-4,
        lr_scaling: LRScaling = "none",
        min_lr: float = 1e-6,
        warmup_fraction: float = 0.1,
        weight_decay: float = 0.04,
        betas: tuple[float, float] = (0.9, 0.999),
        compile: bool | Literal["auto"] = "auto",
        grad_checkpointing: bool = False,
        on_nonfinite: Literal["stop", "skip"] = "stop",
        nonfinite_limit: int = 10,
    ) -> None:
        super().__init__()
        if head_warmup_steps < 0:
            raise ValueError(
                f"head_warmup_steps must be 0 or more, got {head_warmup_steps}."
            )
        if prior is not None and weights is not None:
            raise ValueError(
                "Give prior (weights of the encoder) or weights (those of encoder, "
                "decoder and heads), not both."
            )
        self.save_hyperparameters()
        self.watch_run()
        start = weights or prior
        checkpoint = None if start is None else read_checkpoint(start)
        if checkpoint is not None:
            told = numerics(checkpoint) if weights else inherited(checkpoint, model)
            model = {**told, **model}
            self.hparams["model"] = model
        check_arguments(head or {}, STELLARProjectionHead, taken=("input_dim",))
        check_arguments(loss or {}, STELLARLoss, taken=("target",))
        check_arguments(augment or {}, STELLARColorAugment, taken=("mean", "std"))
        target: Any = model.get("target") or "pixels"
        self.criterion = STELLARLoss(target=target, **(loss or {}))
        if teacher_momentum is not None and not self.criterion.uses_sparse_head:
            raise ValueError(
                "A momentum teacher makes targets for sparse tokens: give "
                "clustering_weight or alignment_weight of the loss, or no "
                "teacher_momentum."
            )
        if not self.criterion.uses_reconstruction:
            model = {**model, "target": None}
        elif target == "tokens" and checkpoint and weights and tokenizer is None:
            model = {**model, "tokenizer": _tokenizer_inside(checkpoint)}
            self.hparams["model"] = model
        self.model: Stellar = Stellar(**model)
        if self.criterion.uses_reconstruction:
            self._load_tokenizer(tokenizer)
        self.augment = STELLARColorAugment(
            mean=self.model.mean, std=self.model.std, **(augment or {})
        )
        width = self.model.encoder.embed_dim
        self.sparse_head = self.cls_head = None
        if self.criterion.uses_sparse_head:
            self.sparse_head = STELLARProjectionHead(width, **(head or {}))
        if self.criterion.uses_cls_head:
            self.cls_head = STELLARProjectionHead(width, **(head or {}))
        if checkpoint is not None:
            self._start_from(checkpoint, encoder_only=weights is None)
            self.started_from = origin(checkpoint, start or checkpoint.path)
        self.teacher = self._teacher(teacher_momentum)
        self.model.set_grad_checkpointing(grad_checkpointing)

    def forward(self, images: Tensor) -> Factorization:
        """Factorizes normalised images, see `StellarEncoder.forward`."""
        return self.model(images)

    def normalize(self, images: Tensor) -> Tensor:
        """As the augmentation does."""
        return self.augment.normalize(images)

    def features(self, images: Tensor) -> Tensor:
        """Pooled sparse tokens."""
        return self.model(images).sparse.mean(dim=1)

    def check_views(self, transform: STELLARTransform) -> None:
        """Checks sizes, blur, masks and what a teacher reads."""
        check_views(self, transform)

    def export(self, folder: Path, provenance: Mapping[str, Any] | None = None) -> None:
        """Writes the model and, so that training can be continued, its heads."""
        heads = {name: getattr(self, name) for name in HEADS}
        self.model.heads = {k: head.state_dict() for k, head in heads.items() if head}
        self.model.provenance = dict(provenance or {})
        self.model.save_pretrained(folder)
        self.model.heads = {}  # of shards, these are whole copies

    def sample_rows(self, images: Tensor) -> list[Uint8Array]:
        """Reconstructions, and the strongest token of each patch."""
        return reconstruction_rows(self.model, images)

    @property
    def draws_samples(self) -> bool:
        """Without reconstruction a model has no localization either."""
        return self.criterion.uses_reconstruction

    def setup(self, stage: str) -> None:
        """Checks the trainer of a fit; warns of a teacher that rounding holds back."""
        super().setup(stage)
        if self.teacher is not None and self.trainer.precision == "bf16-true":
            rank_zero_warn(
                "--trainer.precision bf16-true rounds away most of what a step moves "
                "the momentum teacher by: it stays behind. Use bf16-mixed."
            )

    def compile_parts(self) -> None:
        """Compiles the blocks and, for a device that they do not bind, the colours."""
        super().compile_parts()
        if self.device.type == "cuda":
            self.augment.compile()

    def training_step(
        self, batch: ViewBatch | tuple[Tensor, Tensor | None], batch_idx: int
    ) -> Tensor:
        """Draws colours and masks, computes the loss and logs its terms."""
        global_views, local_views, seeds, indices = ViewBatch(*batch)
        generator = None
        if seeds is not None:
            # For what is drawn once for the batches of all processes.
            generator = torch.Generator().manual_seed(self._batch_seed(batch_idx))
        views: STELLARViews = self.augment(global_views, local_views, generator, seeds)
        size, num_views = views.global_views.shape[:2]
        height, width = views.global_views.shape[-2:]
        patch = self.model.encoder.patch_size
        keep = random_focal_mask(
            size * num_views,
            (height // patch, width // patch),
            self.hparams["mask_ratio"],
            self.hparams["focal_prob"],
            device=self.device,
            seeds=seeds,
        )
        keep = keep.unflatten(0, (size, num_views))
        local_views = views.local_views
        views = views._replace(  # where the weights are in half precision
            target=views.target.to(self.dtype),
            global_views=views.global_views.to(self.dtype),
            local_views=None if local_views is None else local_views.to(self.dtype),
        )
        terms, sparse, target = self.loss_terms(views, keep)
        self._watch(terms, sparse, target, indices)
        return terms.total

    def loss_terms(
        self, views: STELLARViews, keep: Tensor
    ) -> tuple[STELLARLossTerms, SparseViews, Factorization]:
        """Encodes all views and computes the loss.

        Args:
            views:
                Views as `STELLARColorAugment` makes them.
            keep:
                Patches that each masked view keeps, int64 with shape
                (batch_size, num_views, num_kept).

        Returns:
            Terms of the loss; the sparse tokens and embeddings behind them; the
            factorization of the target view.
        """
        size, num_views = views.global_views.shape[:2]
        target = self.model(views.target)
        masked = self.model(views.global_views.flatten(0, 1), keep.flatten(0, 1))
        sparse = SparseViews(
            target.sparse, masked.sparse.unflatten(0, (size, num_views))
        )
        teacher = self._teacher_targets(views)
        if self.sparse_head is not None:
            sparse = sparse._replace(
                embeddings=self.sparse_head(sparse.tokens),
                view_embeddings=self.sparse_head(sparse.view_tokens),
                prototypes=_prototypes(
                    self.sparse_head, teacher and teacher.prototypes
                ),
            )
        terms = self.criterion.terms(
            sparse=sparse,
            cls=self._cls_views(target, masked, views, teacher),
            teacher=teacher,
            **self._reconstruction(target, views),
        )
        return terms, sparse, target

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Keeps the encoder as it is while the heads warm up.

        Its gradients are dropped after the backward pass and before clipping. AdamW
        passes over parameters without gradient (no step, no decay, no moments), and
        distributed training, which waits for every gradient, still gets them all.
        """
        if self.global_step < self.hparams["head_warmup_steps"]:
            for parameter in self.model.encoder.parameters():
                parameter.grad = None

    def optimizer_made(self, optimizer: Optimizer) -> None:
        """Lets the teacher follow, and says where prototypes are many."""
        if self.teacher is not None:
            # A hook of the optimiser: mixed precision that skips a step skips it too.
            optimizer.register_step_post_hook(self._update_teacher)
        if self.sparse_head is None or self.sparse_head.prototypes is None:
            return
        loader: Any = self.trainer.train_dataloader
        images = loader.batch_size * self.trainer.world_size
        rows = images * self.model.encoder.num_queries
        prototypes = self.sparse_head.prototypes.out_features
        if rows < prototypes:
            self.print(
                f"{rows} tokens per step are balanced over {prototypes} prototypes: "
                "fewer rows than prototypes. Lower num_prototypes or raise the batch "
                "size."
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leaves out a tokenizer that has a file of its own."""
        super().on_save_checkpoint(checkpoint)
        if self.hparams["tokenizer"] is None:
            return  # one that the weights brought has no other file then
        checkpoint["state_dict"] = {
            name: tensor
            for name, tensor in checkpoint["state_dict"].items()
            if not name.startswith(TOKENIZER_PREFIX)
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds it again."""
        for name, tensor in self.state_dict().items():
            if name.startswith(TOKENIZER_PREFIX):
                checkpoint["state_dict"].setdefault(name, tensor)
        super().on_load_checkpoint(checkpoint)

    def _load_tokenizer(self, path: str | None) -> None:
        if path is not None:
            self.model.load_tokenizer(path)
        elif self.model.target == "tokens" and self.model.tokenizer is None:
            raise ValueError(
                "The target 'tokens' needs tokenizer, the file of the frozen tokenizer,"
                f" for example '{TOKENIZER_FILE}'. {WHERE_TO_GET_IT}."
            )

    def _start_from(self, checkpoint: Checkpoint, encoder_only: bool) -> None:
        if encoder_only:
            try:
                load_encoder_weights(self.model.encoder, checkpoint)
            except ValueError as error:
                raise ValueError(
                    f"{error} Where neither recipe nor options name a model_name, the "
                    "encoder is that of the prior."
                ) from error
            return
        load_model_weights(self.model, checkpoint)
        heads = {"sparse_head": self.sparse_head, "cls_head": self.cls_head}
        load_head_weights({k: v for k, v in heads.items() if v is not None}, checkpoint)

    def _teacher(self, momentum: float | None) -> MomentumTeacher | None:
        if momentum is not None:
            return MomentumTeacher(self._student_parts(), momentum)
        heads = (self.sparse_head, self.cls_head)
        if any(head is not None and head.prototypes is None for head in heads):
            raise ValueError(
                "Without prototypes tokens are compared with those of a momentum "
                "teacher: give teacher_momentum, or head.num_prototypes."
            )
        return None

    def _student_parts(self) -> dict[str, nn.Module]:
        parts: dict[str, nn.Module | None] = {
            "encoder": self.model.encoder,
            "sparse_head": self.sparse_head,
            "cls_head": self.cls_head,
        }
        return {name: part for name, part in parts.items() if part is not None}

    def _update_teacher(self, *_: Any) -> None:
        assert self.teacher is not None
        if not self.nonfinite.dropped:
            self.teacher.follow(self._student_parts(), self.nonfinite.found_inf)

    def _teacher_targets(self, views: STELLARViews) -> TeacherTargets | None:
        if self.teacher is None:
            return None
        if views.global_views.shape[1] < 2:
            raise ValueError(
                "The momentum teacher reads global view 1: set num_global_views to 2 "
                "or more."
            )
        return self.teacher.targets(
            views.global_views[:, 1], self.criterion.gather_distributed
        )

    def _reconstruction(
        self, target: Factorization, views: STELLARViews
    ) -> dict[str, Tensor]:
        """What the reconstruction term compares, by the names of `STELLARLoss`."""
        if not self.criterion.uses_reconstruction:
            return {}
        images = views.images
        if self.model.target == "tokens":
            logits = self.model.predict_codes(target.lowrank, target.grid_size)
            return {"reconstruction": logits, "codes": self.model.target_codes(images)}
        decoded = self.model.decode(target.lowrank, target.grid_size)
        return {"reconstruction": decoded, "images": images}

    def _cls_views(
        self,
        target: Factorization,
        masked: Factorization,
        views: STELLARViews,
        teacher: TeacherTargets | None,
    ) -> CLSViews | None:
        if self.cls_head is None:
            return None
        local = None
        if views.local_views is not None and self.criterion.uses_local_views:
            local = self.model(views.local_views.flatten(0, 1)).cls
            local = self.cls_head(local).unflatten(0, views.local_views.shape[:2])
        view_embeddings = self.cls_head(masked.cls)
        return CLSViews(
            embeddings=self.cls_head(target.cls),
            view_embeddings=view_embeddings.unflatten(0, views.global_views.shape[:2]),
            local_embeddings=local,
            prototypes=_prototypes(self.cls_head, teacher and teacher.cls_prototypes),
        )

    def _watch(
        self,
        terms: STELLARLossTerms,
        sparse: SparseViews,
        target: Factorization,
        indices: Tensor | None,
    ) -> None:
        """Logs the terms, and in steps that are logged the figures of health."""
        tokens = [sparse.tokens, sparse.view_tokens]
        if not self.log_losses(terms.losses(), tokens, indices):
            return
        figures = training_figures(
            terms,
            sparse,
            target.localization if self.criterion.uses_reconstruction else None,
            self._num_cls_prototypes(sparse),
        )
        self.log_figures(figures)

    def _num_cls_prototypes(self, sparse: SparseViews) -> int | None:
        if self.cls_head is None:
            return None
        if self.cls_head.prototypes is not None:
            return self.cls_head.prototypes.out_features
        assert sparse.prototypes is not None
        return len(sparse.prototypes) // self.model.encoder.num_queries


def _prototypes(head: STELLARProjectionHead, of_teacher: Tensor | None) -> Tensor:
    """Prototypes of a head; where it has none, what the teacher says in their place."""
    if head.prototypes is not None:
        return head.prototypes.weight
    assert of_teacher is not None
    return of_teacher


def _tokenizer_inside(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """Sizes of the tokenizer that weights bring along, None if they do not."""
    prefix = "tokenizer."
    state = {
        name.removeprefix(prefix): tensor
        for name, tensor in checkpoint.state.items()
        if name.startswith(prefix)
    }
    return tokenizer_sizes(state, str(checkpoint.path)) if state else None
