"""The STELLAR stage, made of what `stellar pretrain` is made of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.learning_runs.method import (
    GLOBAL_ALL,
    Method,
    encoder_arguments,
    initialise,
)
from benchmarks.learning_runs.options import Options
from benchmarks.learning_runs.views import normalized
from lightly_ext.loss import (
    PrototypeTarget,
    STELLARLoss,
    assign_prototypes,
    contract_targets,
)
from lightly_ext.modules import random_focal_mask
from lightly_ext.pretrain.module import StellarPretraining
from lightly_ext.pretrain.teacher import MomentumTeacher
from lightly_ext.transforms import STELLARViews

# Share of the stage in which the temperature of the targets falls.
SOFT_START = 1 / 3


class STELLAR(Method):
    """STELLAR from a prior, or from MAE's initialisation.

    Args:
        options:
            Options of the run.
        prior:
            Weights of a plain ViT, by `StellarEncoder`'s names, or None.
    """

    no_inf: Tensor

    def __init__(
        self, options: Options, prior: Mapping[str, Tensor] | None = None
    ) -> None:
        super().__init__(options)
        module = StellarPretraining(**_recipe(options))
        self.module = module
        self.encoder = module.model.encoder
        initialise(self.encoder)
        _set_queries(self.encoder, options)
        self.from_prior: set[str] = set()
        if prior is not None:
            self.encoder.load_state_dict(prior, strict=False)
            names = dict(self.encoder.named_parameters())
            self.from_prior = names.keys() & prior.keys()
        if not options.final_norm:
            self.encoder.vit.norm = nn.Identity()
            self.from_prior -= {"vit.norm.weight", "vit.norm.bias"}
        for head in self._heads():
            with torch.no_grad():
                head.prototypes.weight.mul_(options.prototype_std)
        self._normalize_prototypes()
        # With it the teacher moves in place.
        self.register_buffer("no_inf", torch.zeros(()))
        parts = {"encoder": self.encoder, "sparse_head": module.sparse_head}
        parts["cls_head"] = module.cls_head
        self.student: dict[str, Any] = {k: v for k, v in parts.items() if v is not None}
        if options.teacher is not None:  # the first copied what was there before
            module.teacher = MomentumTeacher(self.student, options.teacher)
        if options.queue:
            module.criterion = QueuedLoss(module.criterion, options.queue)

    def is_static(self) -> bool:
        """Unless something follows a schedule in Python."""
        options = self.options
        return options.target_temperature_start is None and not options.heads_first

    def before_step(self, progress: float) -> None:
        """Follows the schedule of the temperature."""
        start, end = (
            self.options.target_temperature_start,
            self.options.target_temperature,
        )
        if start is not None:
            share = min(progress / SOFT_START, 1)
            self.module.criterion.target_temperature = start + (end - start) * share

    def losses(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Terms of the loss, as in a step of `stellar pretrain`."""
        views = self._stellar_views(images)
        size, number = views.global_views.shape[:2]
        keep = random_focal_mask(
            size * number,
            self.encoder.grid_size,
            self.options.mask_ratio,
            self.options.focal_prob,
            device=images.device,
        )
        keep = keep.unflatten(0, (size, number))
        terms, *_ = self.module.loss_terms(views, keep)
        return {
            name: value for name, value in terms._asdict().items() if value is not None
        }

    def before_update(self, progress: float) -> None:
        """Drops the gradients of the prior's weights while the rest warms up."""
        if progress < self.options.heads_first:
            for name, parameter in self.encoder.named_parameters():
                if name in self.from_prior:
                    parameter.grad = None

    def after_update(self) -> None:
        """Moves the teacher."""
        self._normalize_prototypes()
        if self.module.teacher is not None:
            self.module.teacher.follow(self.student, self.no_inf)

    def lr_scales(self) -> Mapping[str, float]:
        """Shortens the steps of what comes from the prior, the more the earlier."""
        options = self.options
        scales = {}
        for name in self.from_prior:
            layers = options.depth
            if name.startswith("vit.blocks."):
                layers = options.depth - 1 - int(name.split(".")[2])
            elif name.startswith("vit.norm."):
                layers = 0
            scale = options.encoder_lr_scale * options.layer_decay**layers
            scales[f"module.model.encoder.{name}"] = scale
        return scales

    def _stellar_views(self, images: Tensor) -> STELLARViews:
        options = self.options
        scale = (options.global_scale, GLOBAL_ALL)
        crops = self.views.crops(images, options.global_views, options.size, scale)
        target = crops[:, :1]
        if options.target == "coloured":
            target = self.views.coloured(target)
        return STELLARViews(
            target=normalized(target[:, 0]),
            global_views=normalized(self.views.coloured(crops)),
            local_views=self.local_views(images) if options.local_views else None,
            images=target[:, 0],
        )

    def _heads(self) -> list[Any]:
        heads = (self.module.sparse_head, self.module.cls_head)
        return [head for head in heads if head is not None and head.prototypes]

    @torch.no_grad()
    def _normalize_prototypes(self) -> None:
        if self.options.unit_prototypes:
            for head in self._heads():
                weight = head.prototypes.weight
                weight.div_(weight.norm(dim=1, keepdim=True))


class QueuedLoss(STELLARLoss):
    """Balances assignments over embeddings of earlier batches, too.

    Args:
        criterion:
            The loss without queue, whose settings are taken.
        batches:
            Number of earlier batches.
    """

    def __init__(self, criterion: STELLARLoss, batches: int) -> None:
        super().__init__()
        self.__dict__.update(criterion.__dict__)
        self.batches = batches
        # Sparse tokens have three dimensions, CLS tokens two.
        self.earlier: dict[int, Tensor] = {}

    def _target(
        self, embeddings: Tensor, source_prototypes: Tensor, prototypes: Tensor
    ) -> PrototypeTarget:
        rows = embeddings.detach().flatten(0, -2)
        earlier = self.earlier.get(embeddings.ndim)
        if earlier is None:  # as if the batches before had been the same
            earlier = rows.repeat(self.batches, 1)
            self.earlier[embeddings.ndim] = earlier
        every = torch.cat([rows, earlier])
        assignments = assign_prototypes(
            every, source_prototypes, self.target_temperature, self.sinkhorn_iterations
        )
        earlier.copy_(every[: len(earlier)])
        assignments = assignments[: len(rows)].unflatten(0, embeddings.shape[:-1])
        return contract_targets(assignments, prototypes)


def _recipe(options: Options) -> dict[str, Any]:
    """Arguments of `StellarPretraining`."""
    return {
        "model": {
            **encoder_arguments(options),
            "num_queries": options.queries,
            "decoder_dim": options.width,
            "decoder_depth": options.decoder_depth,
            "decoder_num_heads": options.heads,
        },
        "head": {
            "hidden_dim": options.head_hidden,
            "output_dim": options.head_output,
            "num_prototypes": options.prototypes,
            "batch_norm": options.head_norm,
        },
        "loss": {
            "reconstruction_weight": options.reconstruction,
            "clustering_weight": options.clustering,
            "alignment_weight": options.alignment,
            "cls_clustering_weight": options.cls,
            "cls_alignment_weight": options.cls,
            "koleo_weight": options.koleo,
            "prediction_temperature": options.prediction_temperature,
            "target_temperature": options.target_temperature,
            "sinkhorn_iterations": options.sinkhorn_iterations,
            "matching": options.matching,
        },
        "teacher_momentum": options.teacher,
    }


def _set_queries(encoder: Any, options: Options) -> None:
    """Draws the queries anew, as the encoder does, where another scale is wanted."""
    std = options.query_std or options.width**-0.5
    nn.init.normal_(encoder.vit.reg_token.data, std=std)
