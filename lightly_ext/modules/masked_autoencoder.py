from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from lightly.models import utils
from lightly.models.modules.masked_vision_transformer_decoder_timm import (
    MaskedVisionTransformerDecoderTIMM,
)
from lightly.models.modules.masked_vision_transformer_timm import (
    MaskedVisionTransformerTIMM,
)
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import checkpoint_seq
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from stellar_plugin import StellarEncoder
from stellar_plugin.arguments import check_arguments

# Epsilon of MAE's LayerNorms.
NORM_EPS = 1e-6


class MaskedPrediction(NamedTuple):
    """What a masked autoencoder says of images of which it sees some patches.

    Attributes:
        patches:
            Predicted patches with shape (batch_size, num_patches, 3 * patch_size**2),
            row-major, of normalised pixels.
        tokens:
            All tokens of the encoder, (batch_size, num_prefix_tokens + k, embed_dim).
    """

    patches: Tensor
    tokens: Tensor


class MaskedAutoencoder(nn.Module):
    """Encoder and decoder of MAE [0], by lightly's masked transformers.

    The encoder is a `StellarEncoder` without queries that embeds only the patches that
    are kept; lightly's `MaskedVisionTransformerTIMM` gives it MAE's initial weights,
    and its fixed positions are sines and cosines.

    - [0]: Masked Autoencoders Are Scalable Vision Learners, 2021,
      https://arxiv.org/abs/2111.06377

    Attributes:
        model_name:
            Name of a timm VisionTransformer, see `StellarEncoder`.
        decoder_dim:
            Width of the decoder, a multiple of 4 and of `decoder_num_heads`.
        decoder_depth:
            Number of decoder blocks.
        decoder_num_heads:
            Number of attention heads of the decoder.
        mean:
            Per-channel mean that images are normalised with, of [0, 1] intensities.
        std:
            Per-channel standard deviation that images are normalised with.
        norm_eps:
            Epsilon of the encoder's LayerNorms.
        pos_antialias:
            How the positions are resampled later, see `StellarEncoder`.
        vit_kwargs:
            Passed on to timm, for example img_size, patch_size, embed_dim, depth.

    Raises:
        ValueError: If an argument is unknown, of another type or out of range, or the
            image is no square of whole patches.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        model_name: str = "stellar_vit_base_patch16_224",
        *,
        decoder_dim: int = 512,
        decoder_depth: int = 8,
        decoder_num_heads: int = 16,
        mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
        std: Sequence[float] = IMAGENET_DEFAULT_STD,
        norm_eps: float = NORM_EPS,
        pos_antialias: bool = False,
        **vit_kwargs: Any,
    ) -> None:
        super().__init__()
        sizes = {
            "decoder_dim": decoder_dim,
            "decoder_depth": decoder_depth,
            "decoder_num_heads": decoder_num_heads,
        }
        given = {
            "model_name": model_name,
            "norm_eps": norm_eps,
            "pos_antialias": pos_antialias,
            **vit_kwargs,
        }
        images = {"mean": list(mean), "std": list(std)}
        self.config: dict[str, Any] = {**given, **sizes, **images}
        check_arguments(self.config, MaskedAutoencoder, VisionTransformer)
        if decoder_dim % decoder_num_heads or decoder_dim % 4:
            raise ValueError(
                f"decoder_dim {decoder_dim} must be a multiple of 4 and of "
                f"decoder_num_heads, which is {decoder_num_heads}."
            )
        self.encoder = StellarEncoder(num_queries=0, **given)
        _check_grid(self.encoder)
        _initialise(self.encoder)
        width, patch_size = self.encoder.embed_dim, self.encoder.patch_size
        self.embed = nn.Linear(width, decoder_dim)
        self.decoder = MaskedVisionTransformerDecoderTIMM(
            self.encoder.vit.patch_embed.num_patches,
            decoder_dim,
            decoder_depth,
            decoder_num_heads,
            num_prefix_tokens=self.encoder.vit.num_prefix_tokens,
        )
        self.predict = nn.Linear(decoder_dim, 3 * patch_size**2)
        self.grad_checkpointing = False
        for layer in (self.embed, self.predict):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        for name, value in images.items():
            channels = torch.tensor(value, dtype=torch.float32).view(3, 1, 1)
            self.register_buffer(name, channels, persistent=False)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trades computation for memory, see `Stellar.set_grad_checkpointing`."""
        self.encoder.set_grad_checkpointing(enable)
        self.grad_checkpointing = enable

    def normalize(self, images: Tensor) -> Tensor:
        """Normalises images (..., 3, height, width) in [0, 1]."""
        return (images - self.mean) / self.std

    def forward(self, images: Tensor, keep: Tensor) -> MaskedPrediction:
        """Predicts the patches of images.

        Args:
            images:
                Normalised images with shape (batch_size, 3, height, width), of the size
                that the encoder was made for.
            keep:
                Indices of the patches that the encoder sees, int64 with shape
                (batch_size, k), row-major over the grid.
        """
        tokens = self.encoder.forward_features(images, keep)
        seen = self.embed(tokens)
        prefix = self.decoder.num_prefix_tokens
        first = torch.arange(prefix, device=keep.device).expand(len(keep), -1)
        index = torch.cat([first, keep + prefix], dim=1)
        size = (len(images), self.decoder.sequence_length)
        x = utils.repeat_token(self.decoder.mask_token, size).to(seen.dtype)
        x = self._decode(utils.set_at_index(x, index, seen))
        return MaskedPrediction(self.predict(x[:, prefix:]), tokens)

    def _decode(self, x: Tensor) -> Tensor:
        if not (self.grad_checkpointing and torch.is_grad_enabled()):
            return self.decoder(x)
        decoder = self.decoder
        return decoder.norm(checkpoint_seq(decoder.blocks, decoder.preprocess(x)))


def _check_grid(encoder: StellarEncoder) -> None:
    """Raises a ValueError unless images are squares of whole patches."""
    height, width = encoder.vit.patch_embed.img_size
    if height != width or height % encoder.patch_size:
        raise ValueError(
            f"MAE needs square images of whole patches: img_size {height} x {width} "
            f"with patches of {encoder.patch_size} px is none."
        )
    if encoder.embed_dim % 4 or encoder.vit.pos_embed is None:
        raise ValueError(
            "MAE's positions are sines and cosines of rows and columns: the ViT needs "
            f"a position table, and an embed_dim ({encoder.embed_dim}) that is a "
            "multiple of 4."
        )


def _initialise(encoder: StellarEncoder) -> None:
    MaskedVisionTransformerTIMM(encoder.vit, pos_embed_initialization="skip")
    # The position table of the encoder has no rows but those of patches.
    utils.initialize_2d_sine_cosine_positional_embedding(
        encoder.vit.pos_embed, num_prefix_tokens=0
    )
