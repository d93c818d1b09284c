"""What the training loop asks of a method, and the encoder that all methods share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightly.models.modules.masked_vision_transformer_timm import (
    MaskedVisionTransformerTIMM,
)
from lightly.models.utils import get_2d_sine_cosine_positional_embedding
from torch import Tensor, nn

from benchmarks.learning_runs.options import Options
from benchmarks.learning_runs.views import Views, normalized
from stellar_plugin import StellarEncoder

GLOBAL_ALL = 1.0


class Method(nn.Module):
    """A method of pretraining: images in, losses out.

    Attributes:
        encoder:
            What is scored.
    """

    encoder: StellarEncoder

    def __init__(self, options: Options) -> None:
        super().__init__()
        self.options = options
        self.views = Views(options.jitter, options.gray)

    def is_static(self) -> bool:
        """Whether every step does the same, in the same places."""
        return False

    def losses(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Losses of a batch, "total" among them.

        Args:
            images:
                uint8 tensor with shape (B, 3, S, S).
            labels:
                Class indices with shape (B,).
        """
        raise NotImplementedError

    def before_step(self, progress: float) -> None:
        """Called ahead of a batch with the share of the stage that is over."""

    def before_update(self, progress: float) -> None:
        """Called between the backward pass and the optimiser."""

    def after_update(self) -> None:
        """Called behind the optimiser."""

    def lr_scales(self) -> Mapping[str, float]:
        """Factors of the learning rate by names of parameters, 1 for all others."""
        return {}

    def global_views(self, images: Tensor, colour: bool = True) -> Tensor:
        """Normalised global crops (B, V, 3, S, S)."""
        options = self.options
        scale = (options.global_scale, GLOBAL_ALL)
        crops = self.views.crops(images, options.global_views, options.size, scale)
        return normalized(self.views.coloured(crops) if colour else crops)

    def local_views(self, images: Tensor) -> Tensor:
        """Normalised coloured local crops (B, U, 3, s, s)."""
        options = self.options
        crops = self.views.crops(
            images, options.local_views, options.local_size, options.local_scale
        )
        return normalized(self.views.coloured(crops))


def encoder_arguments(options: Options) -> dict[str, Any]:
    """Arguments of `StellarEncoder` but for the queries."""
    return {
        "model_name": "stellar_vit_tiny_patch16_224",
        "img_size": options.size,
        "patch_size": options.patch,
        "embed_dim": options.width,
        "depth": options.depth,
        "num_heads": options.heads,
    }


def new_encoder(options: Options, queries: int = 0) -> StellarEncoder:
    """An encoder with MAE's initialisation, from which every method starts."""
    encoder = StellarEncoder(num_queries=queries, **encoder_arguments(options))
    initialise(encoder)
    return encoder


def initialise(encoder: StellarEncoder) -> None:
    """MAE's initialisation, by lightly: Xavier, sine-cosine positions (learned on)."""
    masked_vit(encoder)
    table = get_2d_sine_cosine_positional_embedding(
        encoder.embed_dim, encoder.grid_size[0], num_prefix_tokens=0
    )
    positions: Any = encoder.vit.pos_embed
    with torch.no_grad():
        positions.copy_(torch.from_numpy(table))


def masked_vit(
    encoder: StellarEncoder, weight_initialization: str = ""
) -> MaskedVisionTransformerTIMM:
    """Wraps the encoder's own ViT in lightly's masked one."""
    return MaskedVisionTransformerTIMM(
        encoder.vit,
        weight_initialization=weight_initialization,
        pos_embed_initialization="skip",
    )
