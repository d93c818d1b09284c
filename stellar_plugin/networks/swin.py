"""Swin: attention in shifted windows, and maps that shrink from stage to stage."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.swin_transformer import (
    SwinTransformer,
    window_partition,
    window_reverse,
)
from torch import Tensor, nn

from stellar_plugin.encoder import Factorization
from stellar_plugin.networks.network import TimmNetwork, unlocalized
from stellar_plugin.networks.relative_bias import TABLE, resampled, side_of

# What masks a pair of tokens, as in Swin's own code.
MASKED = -100.0


class Swin(TimmNetwork):
    """timm's `SwinTransformer`, on images of any multiple of its stride [0].

    The window is that of the last map at `img_size`, which it fills. Maps of other
    images are padded to whole windows, then shifted, as in Swin's code of segmentation
    and mmsegmentation; timm shifts first, which lets opposite edges see each other
    where there is padding. A map no longer than the window is not shifted.

    - [0]: Swin Transformer, 2021, https://arxiv.org/abs/2103.14030

    Args:
        img_size:
            Side of the images in px that the windows are for.
        patch_size:
            Side of a patch in px.
        embed_dim:
            Width of the first stage; it doubles from stage to stage.
        depths:
            Number of blocks by stage.
        num_heads:
            Number of attention heads by stage.
        mlp_ratio:
            Width of the MLPs as a multiple of that of the stage.

    Raises:
        ValueError: If sizes do not fit each other.
    """

    def __init__(
        self,
        img_size: int = 224,
        patch_size: int = 4,
        embed_dim: int = 96,
        depths: tuple[int, ...] = (2, 2, 6, 2),
        num_heads: tuple[int, ...] = (3, 6, 12, 24),
        mlp_ratio: float = 4.0,
    ) -> None:
        if len(depths) != len(num_heads) or not depths:
            raise ValueError(
                f"depths {depths} and num_heads {num_heads} must have one value per "
                "stage"
            )
        widths = [embed_dim * 2**stage for stage in range(len(depths))]
        odd = [
            (w, heads) for w, heads in zip(widths, num_heads, strict=True) if w % heads
        ]
        if odd:
            raise ValueError(
                f"the width {odd[0][0]} of a stage is no multiple of its {odd[0][1]} "
                "heads"
            )
        stride = patch_size * 2 ** (len(depths) - 1)
        if img_size % stride:
            raise ValueError(f"img_size {img_size} is no multiple of {stride}")
        super().__init__(
            SwinTransformer(
                img_size=img_size,
                patch_size=patch_size,
                num_classes=0,
                embed_dim=embed_dim,
                depths=depths,
                num_heads=num_heads,
                window_size=img_size // stride,
                mlp_ratio=mlp_ratio,
                drop_path_rate=0.0,
            )
        )
        self.image_size = (img_size, img_size)

    def forward(self, images: Tensor) -> Factorization:
        """Computes the features of normalised images.

        Raises:
            ValueError: If the image is no multiple of the stride.
        """
        model: Any = self.model
        height, width = images.shape[-2:]
        if height % self.stride or width % self.stride:
            raise ValueError(
                f"Image size {height} x {width} is no multiple of {self.stride}, the "
                "stride of the last map"
            )
        # (B, d, h, w) -> (B, h, w, d)
        x = model.patch_embed.proj(images).permute(0, 2, 3, 1)
        x = model.patch_embed.norm(x)
        for stage in model.layers:
            x = stage.downsample(x)
            for number, block in enumerate(stage.blocks):
                x = x + _attended(block.attn, block.norm1(x), shifted=number % 2 == 1)
                x = x + block.mlp(block.norm2(x))
        x = model.norm(x)
        pooled = model.forward_head(x, pre_logits=True)
        return unlocalized(pooled, x.flatten(1, 2), (x.shape[1], x.shape[2]))

    def fitted(
        self, state: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], list[str]]:
        """Resamples tables of another window to that of this network, as Swin does."""
        model: Any = self.model
        new: tuple[int, int] = model.layers[0].blocks[0].attn.window_size
        result = dict(state)
        olds = {}
        for name, table in state.items():
            side = side_of(len(table)) if name.endswith(TABLE) else 0
            if side not in (0, new[0]):
                result[name] = resampled(table, (side, side), new)
                olds[name] = f"{side} x {side}"
        text = (
            f"{len(olds)} tables of biases from windows of {{}} to {new[0]} x {new[1]}"
        )
        return result, [
            text.format(", ".join(sorted({*olds.values()})))
        ] if olds else []


def _attended(attention: nn.Module, x: Tensor, shifted: bool) -> Tensor:
    """Attention in the windows of a map.

    Args:
        attention:
            timm's `WindowAttention`.
        x:
            Map with shape (batch_size, height, width, channels).
        shifted:
            Whether windows are shifted by half along sides longer than one.

    Returns:
        Map of the same shape.
    """
    windowing: Any = attention
    window: tuple[int, int] = windowing.window_size
    sides = (x.shape[1], x.shape[2])
    shifts = [
        w // 2 if shifted and n > w else 0 for n, w in zip(sides, window, strict=True)
    ]
    below, right = (-n % w for n, w in zip(sides, window, strict=True))
    x = F.pad(x, (0, 0, 0, right, 0, below))
    height, width = x.shape[1:3]
    x = x.roll((-shifts[0], -shifts[1]), dims=(1, 2))
    # (B, h, w, C) -> (B * windows, window h, window w, C) -> (B * windows, n, C)
    parts = window_partition(x, window).flatten(1, 2)
    mask = _mask((height, width), window, shifts, x) if any(shifts) else None
    parts = windowing(parts, mask=mask).unflatten(1, window)
    x = window_reverse(parts, window, height, width)
    x = x.roll((shifts[0], shifts[1]), dims=(1, 2))
    return x[:, : sides[0], : sides[1]]


def _mask(
    sides: tuple[int, int], window: tuple[int, int], shifts: list[int], like: Tensor
) -> Tensor:
    """What is added to attention between tokens that the shift brought together.

    Args:
        sides:
            Height and width of the shifted map, whole windows.
        window:
            Height and width of a window.
        shifts:
            By how many tokens it was shifted up and to the left.
        like:
            Gives dtype and device.

    Returns:
        0 or `MASKED` with shape (num_windows, n, n) for the n tokens of a window.
    """
    down, across = (
        torch.arange(n, device=like.device) >= n - shift
        for n, shift in zip(sides, shifts, strict=True)
    )
    regions = 2 * down.int()[:, None] + across.int()  # which edges a token came from
    parts = window_partition(regions[None, :, :, None], window).flatten(1)
    apart = parts[:, :, None] != parts[:, None, :]
    return torch.zeros_like(apart, dtype=like.dtype).masked_fill(apart, MASKED)
