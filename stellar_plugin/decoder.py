"""The decoders: low-rank latent -> pixels, or -> codes of a tokenizer."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from timm.models import checkpoint_seq
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from stellar_plugin.vit import STELLAR_NORM_EPS


class FourierPositionEncoding(nn.Module):
    """Random Fourier code of patch centres, fixed and saved with the weights.

    The centre `(x, y)` in [0, 1] of a patch gives `v = 2 pi (2 (x, y) - 1) G`; the code
    interleaves `sin v_k` and `cos v_k`.

    Attributes:
        dim:
            Width of the code, even.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        if dim % 2:
            raise ValueError(f"The Fourier code needs an even width, got {dim}.")
        self.frequencies: Tensor
        self.register_buffer("frequencies", torch.randn(2, dim // 2))

    def forward(self, grid_size: tuple[int, int]) -> Tensor:
        """Code of every patch, float32 with shape (height * width, dim), row-major."""
        height, width = grid_size
        device = self.frequencies.device
        y = (torch.arange(height, device=device) + 0.5) / height
        x = (torch.arange(width, device=device) + 0.5) / width
        rows, columns = torch.meshgrid(y, x, indexing="ij")
        centres = 2 * torch.stack([columns, rows], dim=-1).flatten(0, 1) - 1  # (n, 2)
        # Explicit products: a matmul would be rounded by autocast, and the code is
        # a phase.
        frequencies = self.frequencies.float()
        phase = centres[:, :1] * frequencies[0] + centres[:, 1:] * frequencies[1]
        phase = 2 * math.pi * phase
        return torch.stack([phase.sin(), phase.cos()], dim=-1).flatten(1)


class LatentDecoder(nn.Module):
    """Transformer over the low-rank latent (section 3.3 of the paper), without head.

    Attributes:
        embed_dim:
            Width of the latent.
        decoder_dim:
            Width of the decoder.
        depth:
            Number of transformer blocks.
        num_heads:
            Number of attention heads.
        mlp_ratio:
            MLP width over decoder width.

    Raises:
        ValueError: If `decoder_dim` is odd or no multiple of `num_heads`.
    """

    def __init__(
        self,
        embed_dim: int,
        decoder_dim: int = 512,
        depth: int = 6,
        num_heads: int = 8,
        mlp_ratio: float = 4.0,
    ) -> None:
        super().__init__()
        if decoder_dim % num_heads:
            raise ValueError(
                f"decoder_dim {decoder_dim} is no multiple of num_heads {num_heads}."
            )
        norm_layer = partial(nn.LayerNorm, eps=STELLAR_NORM_EPS)
        self.proj = nn.Linear(embed_dim, decoder_dim)
        self.position = FourierPositionEncoding(decoder_dim)
        self.blocks = nn.Sequential(
            *[
                Block(
                    decoder_dim,
                    num_heads,
                    mlp_ratio,
                    qkv_bias=True,
                    norm_layer=norm_layer,  # type: ignore[arg-type] # any factory
                )
                for _ in range(depth)
            ]
        )
        self.norm = norm_layer(decoder_dim)
        self.grad_checkpointing = False

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trades computation for memory: block activations are recomputed."""
        self.grad_checkpointing = enable

    def forward_features(self, lowrank: Tensor, grid_size: tuple[int, int]) -> Tensor:
        """What the head reads, (batch_size, height * width, decoder_dim).

        Args:
            lowrank:
                Latent Z with shape (batch_size, height * width, embed_dim), row-major.
            grid_size:
                Height and width of the patch grid.

        Raises:
            ValueError: If the number of patches is not height * width.
        """
        if lowrank.shape[1] != math.prod(grid_size):
            raise ValueError(
                f"A grid of {grid_size[0]} x {grid_size[1]} patches needs "
                f"{math.prod(grid_size)} latent vectors, got {lowrank.shape[1]}."
            )
        x = self.proj(lowrank)
        x = x + self.position(grid_size).to(x.dtype)
        if self.grad_checkpointing and torch.is_grad_enabled():
            return self.norm(checkpoint_seq(self.blocks, x))
        return self.norm(self.blocks(x))


class PixelDecoder(LatentDecoder):
    """Reconstructs an image from its low-rank latent.

    Attributes:
        embed_dim:
            Width of the latent.
        patch_size:
            Patch size in pixels.
        kwargs:
            Sizes of the transformer, see `LatentDecoder`.
    """

    def __init__(self, embed_dim: int, patch_size: int, **kwargs: Any) -> None:
        super().__init__(embed_dim, **kwargs)
        width = self.proj.out_features
        self.head = nn.ConvTranspose2d(width, 3, patch_size, patch_size)
        self.apply(_init_linear)

    def forward(self, lowrank: Tensor, grid_size: tuple[int, int]) -> Tensor:
        """Decodes a latent, arguments as for `forward_features`.

        Returns:
            Images in raw [0, 1] intensities, unclamped, with shape
            (batch_size, 3, height * patch_size, width * patch_size).
        """
        x = self.forward_features(lowrank, grid_size)
        return self.head(x.mT.unflatten(2, grid_size))


class TokenDecoder(LatentDecoder):
    """Predicts the tokenizer's code of each patch from the low-rank latent.

    Attributes:
        embed_dim:
            Width of the latent.
        num_codes:
            Size of the tokenizer's codebook.
        kwargs:
            Sizes of the transformer, see `LatentDecoder`.
    """

    def __init__(self, embed_dim: int, num_codes: int = 1024, **kwargs: Any) -> None:
        super().__init__(embed_dim, **kwargs)
        self.head = nn.Linear(self.proj.out_features, num_codes)
        self.apply(_init_linear)

    def forward(self, lowrank: Tensor, grid_size: tuple[int, int]) -> Tensor:
        """Decodes a latent, arguments as for `forward_features`.

        Returns:
            Logits over the codes with shape (batch_size, height * width, num_codes).
        """
        return self.head(self.forward_features(lowrank, grid_size))


def _init_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
