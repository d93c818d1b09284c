"""The trained part: one attention-pooling probe on the tokens of a frozen encoder."""

from __future__ import annotations

import torch
from timm.layers import AttentionPoolLatent
from torch import Tensor, nn
from torch.nn import functional as F

from lightly_ext.evaluate.devices import Devices
from lightly_ext.evaluate.features import CachedFeatures, FeatureCache
from lightly_ext.evaluate.frozen_model import FrozenModel, select_tokens
from lightly_ext.evaluate.images import ImageFiles
from stellar_plugin.encoder import Factorization, StellarEncoder
from stellar_plugin.protocols import CropProtocol

TOKENS = "tokens"
HEAD_DIM = 64


class AttentionProbe(nn.Module):
    """Maps the tokens of an image to one unit vector in the space of texts.

    LayerNorm; a learned query that attends over the tokens, and an MLP, as timm has
    them; a linear projection.

    Attributes:
        dim:
            Size of the tokens.
        text_dim:
            Size of the embeddings of texts.
    """

    def __init__(self, dim: int, text_dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.text_dim = text_dim
        most = max(1, dim // HEAD_DIM)
        num_heads = max(n for n in range(1, most + 1) if dim % n == 0)
        self.norm = nn.LayerNorm(dim)
        self.pool = AttentionPoolLatent(
            dim, num_heads=num_heads, norm_layer=nn.LayerNorm
        )
        self.project = nn.Linear(dim, text_dim, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Embeds images.

        Args:
            tokens:
                Tensor with shape (batch_size, num_tokens, dim).

        Returns:
            Unit vectors, float32 with shape (batch_size, text_dim).
        """
        pooled = self.pool(self.norm(tokens))
        return F.normalize(self.project(pooled).float(), dim=-1)


def resolve_tokens(model: FrozenModel, features: str) -> str:
    """Checks the name of features, and says what "auto" is for a set of tokens.

    As elsewhere, except that a CLS token alone is no set: "auto" adds the patches to
    that of a ViT. What another network pools is made of its map, which is taken alone.

    Args:
        model:
            The encoder.
        features:
            "auto" or one of `FEATURES`.

    Raises:
        ValueError: If there are no such features.
    """
    feature = model.resolve_feature(features)
    if features == "auto" and feature == "cls":
        is_vit = isinstance(model.backbone, StellarEncoder)
        return "cls+dense" if is_vit else "dense"
    return feature


def token_set(result: Factorization, feature: str) -> Tensor:
    """Tokens of images, (batch_size, num_tokens, dim); of two features all of them.

    Raises:
        ValueError: If the encoder has no such tokens, or those of two features differ
            in size.
    """
    parts = [select_tokens(result, name) for name in feature.split("+")]
    if len({part.shape[-1] for part in parts}) > 1:
        raise ValueError(
            f"The tokens of '{feature}' differ in size, {parts[0].shape[-1]} and "
            f"{parts[1].shape[-1]}: name cls or dense."
        )
    return torch.cat(parts, dim=1)


def cached_tokens(
    cache: FeatureCache,
    files: ImageFiles,
    protocol: CropProtocol,
    feature: str,
) -> CachedFeatures:
    """Tokens of centre crops, computed once, as the float16 array `TOKENS`.

    Args:
        cache:
            Computes the features, or has them.
        files:
            The images.
        protocol:
            Says how they are cut.
        feature:
            One of `FEATURES`.

    Raises:
        RuntimeError: If tokens are beyond half precision, or too many images are
            unreadable.
    """

    def compute(images: Tensor) -> dict[str, Tensor]:
        tokens = token_set(cache.model(images), feature).half()
        if not tokens.isfinite().all():
            raise RuntimeError(
                f"{feature} tokens are not finite in half precision: the weights are "
                "broken, or name other features."
            )
        return {TOKENS: tokens}

    return cache.features(files, protocol, f"tokens {feature}", compute)


@torch.no_grad()
def embed_images(
    devices: Devices, probe: AttentionProbe, cached: CachedFeatures
) -> Tensor:
    """Embeds the readable images, float32 (num_readable, text_dim), on the device."""
    array, rows = cached.arrays[TOKENS], cached.readable.split(devices.batch_size)
    embeddings = []
    for chosen in devices.progress(rows, "image embeddings", len(rows)):
        tokens = torch.from_numpy(array[chosen.numpy()])
        embeddings.append(probe(devices.fabric.to_device(tokens).float()))
    return torch.cat(embeddings)
