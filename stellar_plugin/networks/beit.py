"""BEiT: a ViT whose attention adds a bias by relative position."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from timm.models import beit
from torch import Tensor, nn

from stellar_plugin.encoder import Factorization
from stellar_plugin.networks.network import TimmNetwork, unlocalized
from stellar_plugin.networks.relative_bias import TABLE, Grid, resampled, side_of

# Rows of a table behind those of distances: CLS to patch, patch to CLS, CLS to CLS.
CLS_ROWS = 3


class BEiT(TimmNetwork):
    """timm's `Beit`, on images of any multiple of the patch size [0].

    There is no table of positions: every attention adds a bias by the distance of two
    patches, from one table for all blocks or from one per block. A table is resampled
    to the grid of the image as BEiT does it, in steps that grow with the distance.

    - [0]: BEiT: BERT Pre-Training of Image Transformers, 2021,
      https://arxiv.org/abs/2106.08254

    Args:
        img_size:
            Side of the images in px that the tables are for, or height and width.
        patch_size:
            Side of a patch in px.
        embed_dim:
            Width.
        depth:
            Number of blocks.
        num_heads:
            Number of attention heads.
        mlp_ratio:
            Width of the MLPs as a multiple of `embed_dim`.
        shared:
            Whether all blocks share one table.
        global_pool:
            "token": CLS is the class token, and the final norm is of all tokens. "avg":
            CLS is the norm of the mean of patches, as classifiers were trained, and
            patches have no final norm.

    Raises:
        ValueError: If sizes do not fit each other.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        shared: bool = True,
        global_pool: str = "token",
    ) -> None:
        height, width = (img_size,) * 2 if isinstance(img_size, int) else img_size
        if height % patch_size or width % patch_size:
            raise ValueError(
                f"img_size {height} x {width} is no multiple of patch_size {patch_size}"
            )
        if embed_dim % num_heads:
            raise ValueError(
                f"embed_dim {embed_dim} is no multiple of num_heads {num_heads}"
            )
        norm_layer: Any = partial(nn.LayerNorm, eps=1e-6)
        super().__init__(
            beit.Beit(
                img_size=(height, width),
                patch_size=patch_size,
                num_classes=0,
                global_pool=global_pool,
                embed_dim=embed_dim,
                depth=depth,
                num_heads=num_heads,
                mlp_ratio=mlp_ratio,
                norm_layer=norm_layer,
                init_values=0.1,
                use_abs_pos_emb=False,
            )
        )
        self.image_size = (height, width)
        model: Any = self.model
        grid: Grid = model.patch_embed.grid_size
        # The tables stand outside of timm's attention, which knows but its own grid.
        if shared:
            model.rel_pos_bias = RelativePositionBias(grid, num_heads)
        else:
            for block in model.blocks:
                block.rel_pos_bias = RelativePositionBias(grid, num_heads)
        self.shared = shared

    def forward(self, images: Tensor) -> Factorization:
        """Computes the features of normalised images.

        Raises:
            ValueError: If the image is no multiple of the patch size.
        """
        model: Any = self.model
        (height, width), side = images.shape[-2:], self.stride
        if height % side or width % side:
            raise ValueError(
                f"Image size {height} x {width} is no multiple of the patch size {side}"
            )
        grid = (height // side, width // side)
        # (B, d, h, w) -> (B, n, d)
        patches = model.patch_embed.proj(images).flatten(2).mT
        cls = model.cls_token.expand(len(images), -1, -1)
        tokens = torch.cat([cls.to(patches.dtype), patches], dim=1)
        bias = model.rel_pos_bias.of_grid(grid) if self.shared else None
        for block in model.blocks:
            own = bias if self.shared else block.rel_pos_bias.of_grid(grid)
            tokens = block(tokens, shared_rel_pos_bias=own)
        tokens = model.norm(tokens)
        pooled = model.forward_head(tokens, pre_logits=True)
        return unlocalized(pooled, tokens[:, 1:], grid)

    def fitted(
        self, state: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], list[str]]:
        """Resamples tables of square images to the grid of this network."""
        model: Any = self.model
        new: Grid = model.patch_embed.grid_size
        result = dict(state)
        resized = []
        for name, table in state.items():
            side = side_of(len(table) - CLS_ROWS) if name.endswith(TABLE) else 0
            if side and (side, side) != new:
                result[name] = resampled(table, (side, side), new)
                resized.append(
                    f"{name} from {side} x {side} to {new[0]} x {new[1]} patches"
                )
        return result, resized


class RelativePositionBias(beit.RelativePositionBias):
    """timm's table of biases, read on any grid."""

    def of_grid(self, grid_size: Grid) -> Tensor:
        """Biases of the attention of all tokens, CLS first, on a grid.

        Args:
            grid_size:
                Height and width in patches.

        Returns:
            Biases with shape (num_heads, 1 + num_patches, 1 + num_patches).
        """
        if grid_size == self.window_size:
            return self()
        old = self.relative_position_bias_table
        table = resampled(old, self.window_size, grid_size)
        index = beit.gen_relative_position_index(grid_size, device=table.device)
        # (1 + n, 1 + n, heads) -> (heads, 1 + n, 1 + n)
        return table[index].permute(2, 0, 1).contiguous()
