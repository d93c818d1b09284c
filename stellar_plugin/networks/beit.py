"""BEiT: a ViT whose attention adds a bias by relative position."""

from __future__ import annotations

from functools import partial
from typing import Any

from timm.models.beit import Beit
from torch import nn

from stellar_plugin.networks.network import TimmNetwork


class BEiT(TimmNetwork):
    """timm's `Beit` with its class token, and patches after the final norm.

    Args:
        img_size:
            Side of the images in px.
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
            Whether all blocks share one table of biases.
    """

    def __init__(
        self,
        img_size: int = 224,
        patch_size: int = 16,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        shared: bool = True,
    ) -> None:
        norm_layer: Any = partial(nn.LayerNorm, eps=1e-6)
        model = Beit(
            img_size=img_size,
            patch_size=patch_size,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            init_values=0.1,
            num_classes=0,
            global_pool="token",  # else the final norm would be left out
            use_abs_pos_emb=False,
            use_rel_pos_bias=not shared,
            use_shared_rel_pos_bias=shared,
            norm_layer=norm_layer,
        )
        super().__init__(model)
        self.image_size = (img_size, img_size)
