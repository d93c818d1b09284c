"""lightly's methods by its own modules and losses, and a supervised ceiling."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from lightly.loss import DINOLoss, NTXentLoss, SwaVLoss
from lightly.models import utils
from lightly.models.modules import (
    DINOProjectionHead,
    SimCLRProjectionHead,
    SwaVProjectionHead,
    SwaVPrototypes,
)
from lightly.models.modules.masked_vision_transformer_decoder_timm import (
    MaskedVisionTransformerDecoderTIMM,
)
from lightly.utils.scheduler import cosine_schedule
from torch import Tensor, nn

from benchmarks.learning_runs.method import Method, masked_vit, new_encoder
from benchmarks.learning_runs.options import Options

# DINO: momentum and temperature of the teacher from start to end, share of the warm-up.
DINO_MOMENTUM = (0.99, 1.0)
DINO_TEMPERATURE = (0.04, 0.07)
DINO_WARMUP = 0.3


class Untrained(Method):
    """The encoder as it is drawn, with queries, so that it has maps too."""

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self.encoder = new_encoder(options, options.queries)


class Supervised(Method):
    """Cross-entropy of the labels on the CLS token: a ceiling, not a rival."""

    def __init__(self, options: Options, num_classes: int) -> None:
        super().__init__(options)
        self.encoder = new_encoder(options)
        self.head = nn.Linear(options.width, num_classes)

    def is_static(self) -> bool:
        """Yes."""
        return True

    def losses(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Of one coloured crop per image."""
        logits = self.head(self.encoder(self.global_views(images)[:, 0]).cls)
        return {"total": F.cross_entropy(logits.float(), labels)}


class MAE(Method):
    """Masked autoencoder [0] with normalised patches, of crops without colour change.

    - [0]: Masked Autoencoders Are Scalable Vision Learners, 2021,
      https://arxiv.org/abs/2111.06377
    """

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self.encoder = new_encoder(options)
        masked = masked_vit(self.encoder, weight_initialization="skip")
        masked.mask_token.requires_grad_(False)  # the encoder sees no hidden patch
        self.masked = masked
        self.embed = nn.Linear(options.width, options.width)
        num_patches = self.encoder.grid_size[0] * self.encoder.grid_size[1]
        self.decoder = MaskedVisionTransformerDecoderTIMM(
            num_patches, options.width, options.decoder_depth, options.heads
        )
        self.predict = nn.Linear(options.width, 3 * options.patch**2)

    def is_static(self) -> bool:
        """Yes."""
        return True

    def losses(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Mean squared error of the hidden patches of one crop per image."""
        views = self.global_views(images, colour=False)[:, 0]
        size = (len(views), self.masked.sequence_length)
        keep, hidden = utils.random_token_mask(
            size, self.options.prior_mask_ratio, device=images.device
        )
        tokens = self.embed(self.masked.encode(views, idx_keep=keep))
        x = utils.repeat_token(self.decoder.mask_token, size).to(tokens.dtype)
        x = self.decoder(utils.set_at_index(x, keep, tokens))
        predictions = self.predict(utils.get_at_index(x, hidden))
        patches = utils.patchify(views, self.options.patch)
        targets = utils.get_at_index(patches, hidden - 1)
        targets = utils.normalize_mean_var(targets)
        return {"total": F.mse_loss(predictions.float(), targets)}


class SimCLR(Method):
    """SimCLR on the CLS token of two coloured crops."""

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self.encoder = new_encoder(options)
        self.head = SimCLRProjectionHead(
            options.width, options.head_hidden, options.head_output
        )
        self.criterion = NTXentLoss(options.simclr_temperature)

    def losses(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Contrast of the first two global views."""
        views = self.global_views(images)[:, :2]
        embeddings = self.head(self.encoder(views.flatten(0, 1)).cls)
        first, second = embeddings.float().unflatten(0, views.shape[:2]).unbind(1)
        return {"total": self.criterion(first, second)}


class DINO(Method):
    """DINO on the CLS token of global and local crops."""

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self.encoder = new_encoder(options)
        sizes = (options.head_hidden, options.head_output, options.dino_prototypes)
        self.head, self.teacher_head = (
            DINOProjectionHead(options.width, *sizes) for _ in range(2)
        )
        self.teacher = copy.deepcopy(self.encoder)
        self.teacher_head.load_state_dict(self.head.state_dict())
        utils.deactivate_requires_grad(self.teacher)
        utils.deactivate_requires_grad(self.teacher_head)
        self.criterion = DINOLoss(options.dino_prototypes)
        self.momentum, self.temperature = DINO_MOMENTUM[0], DINO_TEMPERATURE[0]

    def before_step(self, progress: float) -> None:
        """Follows DINO's two schedules."""
        self.momentum = cosine_schedule(int(1000 * progress), 1001, *DINO_MOMENTUM)
        start, end = DINO_TEMPERATURE
        self.temperature = start + (end - start) * min(progress / DINO_WARMUP, 1)

    def losses(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Every view against the teacher's global views."""
        views = self.global_views(images)
        with torch.no_grad():
            targets = _per_view(self.teacher, self.teacher_head, views)
        predictions = _per_view(self.encoder, self.head, views)
        if self.options.local_views:
            local = self.local_views(images)
            predictions += _per_view(self.encoder, self.head, local)
        total = self.criterion(targets, predictions, teacher_temp=self.temperature)
        return {"total": total}

    def after_update(self) -> None:
        """Moves the teacher."""
        utils.update_momentum(self.encoder, self.teacher, self.momentum)
        utils.update_momentum(self.head, self.teacher_head, self.momentum)


class SwaV(Method):
    """SwaV on the CLS token of global and local crops, without queue."""

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self.encoder = new_encoder(options)
        head = SwaVProjectionHead(
            options.width, options.head_hidden, options.head_output
        )
        self.prototypes = SwaVPrototypes(options.head_output, options.swav_prototypes)
        self.head = nn.Sequential(head, _Normalize(), self.prototypes)
        self.criterion = SwaVLoss()

    def losses(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Swapped assignments of the global views, predicted by every view."""
        self.prototypes.normalize()
        high = _per_view(self.encoder, self.head, self.global_views(images))
        low = []
        if self.options.local_views:
            low = _per_view(self.encoder, self.head, self.local_views(images))
        return {"total": self.criterion(high, low).squeeze()}


class _Normalize(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x.float(), dim=1)


def _per_view(encoder: nn.Module, head: nn.Module, views: Tensor) -> list[Tensor]:
    """Head of the CLS token for each view (B, V, 3, s, s)."""
    outputs = head(encoder(views.flatten(0, 1)).cls).float()
    return list(outputs.unflatten(0, views.shape[:2]).unbind(1))
