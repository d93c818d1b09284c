"""The STELLAR stage, made of what `stellar pretrain` is made of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
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
    TeacherTargets,
    assign_prototypes,
    contract_targets,
)
from lightly_ext.modules import random_focal_mask
from lightly_ext.pretrain.module import StellarPretraining
from lightly_ext.pretrain.teacher import MomentumTeacher
from lightly_ext.transforms import STELLARViews
from stellar_plugin import StellarEncoder

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

    def __init__(
        self, options: Options, prior: Mapping[str, Tensor] | None = None
    ) -> None:
        super().__init__(options)
        module = _Module(**_recipe(options))
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
        if options.head_norm:
            for head in self._heads():
                first, activation, last = head.layers
                head.layers = nn.Sequential(
                    *(first, TokenNorm(options.head_hidden), activation),
                    *(last, TokenNorm(options.head_output, affine=False)),
                )
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
        if options.memory is not None:
            module.criterion = MemoryLoss(module.criterion, options.memory)
        elif options.queue:
            module.criterion = QueuedLoss(module.criterion, options.queue)

    @property
    def scored(self) -> StellarEncoder:
        """The teacher's encoder, if it is asked for."""
        if self.options.teacher_scored:
            encoder: StellarEncoder = self.module.teacher["encoder"]
            return encoder
        return self.encoder

    def is_static(self, options: Options) -> bool:
        """Unless something follows a schedule in Python."""
        return options.target_temperature_start is None and not options.heads_first

    @torch.no_grad()
    def prepare(self, images: Tensor) -> None:
        """Standardises what the heads make of the images, if it is asked for."""
        if self.options.head_init == "random":
            return
        result = self.encoder(normalized(images.float() / 255))
        inputs = {"sparse_head": result.sparse.flatten(0, 1), "cls_head": result.cls}
        for name, x in inputs.items():
            if name in self.student:
                standardise(self.student[name], x, self.options)
                if self.module.teacher is not None:
                    state = self.student[name].state_dict()
                    self.module.teacher[name].load_state_dict(state)

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
        number = options.global_views
        own = options.teacher_view == "own"
        crops = self.views.crops(images, number + own, options.size, scale)
        if own:
            view = normalized(self.views.coloured(crops[:, number:]))
            self.module.teacher_view, crops = view[:, 0], crops[:, :number]
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
        return [head for head in heads if head is not None]

    @torch.no_grad()
    def _normalize_prototypes(self) -> None:
        if self.options.unit_prototypes:
            for head in self._heads():
                weight = head.prototypes.weight
                weight.div_(weight.norm(dim=1, keepdim=True))


class _Module(StellarPretraining):
    """With a view of the teacher's own, if there is one."""

    teacher_view: Tensor | None = None

    def _teacher_targets(self, views: STELLARViews) -> TeacherTargets | None:
        if self.teacher_view is None or self.teacher is None:
            return super()._teacher_targets(views)
        return self.teacher.targets(self.teacher_view)


class TokenNorm(nn.BatchNorm1d):
    """Batch normalisation of tokens (..., dim)."""

    def __init__(self, dim: int, affine: bool = True) -> None:
        super().__init__(dim, affine=affine, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        """Normalises each of the last dimension over all others."""
        return super().forward(x.flatten(0, -2)).view_as(x)


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


class MemoryLoss(QueuedLoss):
    """Compares with the teacher's embeddings of this and of earlier batches.

    They take the place of the prototypes, which are not read.
    """

    def _target(
        self, embeddings: Tensor, source_prototypes: Tensor, prototypes: Tensor
    ) -> PrototypeTarget:
        rows = embeddings.detach().flatten(0, -2)
        earlier = self.earlier.get(embeddings.ndim)
        if earlier is None:
            earlier = F.normalize(torch.randn_like(rows.repeat(self.batches, 1)), dim=1)
            self.earlier[embeddings.ndim] = earlier
        every = torch.cat([rows, earlier])
        assignments = assign_prototypes(
            rows, every, self.target_temperature, self.sinkhorn_iterations
        )
        earlier.copy_(every[: len(earlier)])
        self.current = every
        return contract_targets(
            assignments.unflatten(0, embeddings.shape[:-1]), every
        )

    def _cross_entropy(
        self, embeddings: Tensor, prototypes: Tensor, target: PrototypeTarget
    ) -> Tensor:
        return super()._cross_entropy(embeddings, self.current, target)


def standardise(head: Any, x: Tensor, options: Options) -> None:
    """Makes hidden units and embeddings of some tokens vary about zero.

    Args:
        head:
            A `STELLARProjectionHead`, changed in place.
        x:
            Tokens with shape (N, width).
        options:
            Of the run: "standard" scales each unit, "white" turns the embeddings into
            principal components of equal variance.
    """
    first, last = (m for m in head.layers if isinstance(m, nn.Linear))
    hidden = first(x)
    mean, std = hidden.mean(dim=0), hidden.std(dim=0) + 1e-6
    first.weight.div_(std[:, None])
    first.bias.copy_((first.bias - mean) / std)
    hidden = F.gelu(first(x))
    if options.head_init == "white":
        centred = (hidden - hidden.mean(dim=0)).double()
        covariance = centred.T @ centred / len(centred)
        values, vectors = torch.linalg.eigh(covariance)
        count = len(last.weight)
        values, vectors = values[-count:], vectors[:, -count:]
        floor = values[-1] * options.head_floor
        last.weight.copy_((vectors / (values + floor).sqrt()).T)
    out = hidden @ last.weight.T
    mean, std = out.mean(dim=0), out.std(dim=0) + 1e-6
    last.weight.div_(std[:, None] if options.head_init == "standard" else 1)
    last.bias.copy_(-mean / std if options.head_init == "standard" else -mean)
    if options.prototype_init == "samples":
        embeddings = head(x)
        chosen = embeddings[torch.randperm(len(x), device=x.device)]
        count = len(head.prototypes.weight)
        chosen = chosen.repeat(-(-count // len(chosen)), 1)[:count]
        norm = head.prototypes.weight.norm(dim=1).mean()
        head.prototypes.weight.copy_(norm * chosen)


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
        "target_view_fraction": options.target_fraction,
    }


def _set_queries(encoder: Any, options: Options) -> None:
    """Draws the queries anew, as the encoder does, where another scale is wanted."""
    std = options.query_std or options.width**-0.5
    nn.init.normal_(encoder.vit.reg_token.data, std=std)
