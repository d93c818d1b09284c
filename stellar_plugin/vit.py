"""The sizes of STELLAR, registered with timm.

A STELLAR encoder is a timm `VisionTransformer` whose register tokens are the latent
queries (method: https://arxiv.org/abs/2602.01905, section 3). Importing this module
makes `timm.create_model("stellar_vit_base_patch16_224")` work.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import resample_abs_pos_embed
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.nn import LayerNorm

# LayerNorm epsilon of the released weights.
STELLAR_NORM_EPS = 1e-12


class ViT(VisionTransformer):
    """timm's, which says how positions are brought to images of another size.

    Attributes:
        pos_antialias:
            Whether they are resampled with antialiasing, as timm's own always are.
    """

    pos_antialias = False

    def _pos_embed(self, x: Tensor) -> Tensor:
        if self.pos_embed is None or not self.dynamic_img_size or self.pos_antialias:
            return super()._pos_embed(x)
        table, prefix = self.pos_embed, 0 if self.no_embed_class else 1
        prefix *= self.num_prefix_tokens
        position = resample_position(
            table[:, prefix:],
            self.patch_embed.grid_size,
            (x.shape[1], x.shape[2]),
            self.pos_antialias,
        )
        tokens = [t for t in (self.cls_token, self.reg_token) if t is not None]
        size = x.shape[0]  # not len(x), which a traced export would take for a constant
        first = [token.expand(size, -1, -1) for token in tokens]
        if prefix:
            first = [torch.cat(first, 1) + table[:, :prefix]]
        return self.pos_drop(torch.cat([*first, x.flatten(1, 2) + position], 1))


def resample_position(
    table: Tensor,
    old_grid: tuple[int, int],
    new_grid: tuple[int, int],
    antialias: bool,
) -> Tensor:
    """Position embedding of another grid, bicubic.

    Args:
        table:
            Positions with shape (1, num_patches, embed_dim), row-major over `old_grid`.
        old_grid:
            Height and width of its grid, in patches.
        new_grid:
            Height and width of the wanted grid.
        antialias:
            Whether to smooth where the grid gets smaller.
    """
    if old_grid == new_grid:  # timm's own check is off in a traced export
        return table
    return resample_abs_pos_embed(
        table, list(new_grid), list(old_grid), num_prefix_tokens=0, antialias=antialias
    )


class Size(NamedTuple):
    """A size of ViT.

    Attributes:
        name: timm's name of the plain ViT.
        patch_size: Side of a patch in px.
        embed_dim: Width.
        depth: Number of blocks.
        num_heads: Number of attention heads.
    """

    name: str
    patch_size: int
    embed_dim: int
    depth: int
    num_heads: int


_BASE = Size("vit_base_patch16_224", 16, 768, 12, 12)
SIZES = (
    Size("vit_tiny_patch16_224", 16, 192, 12, 3),
    Size("vit_small_patch16_224", 16, 384, 12, 6),
    _BASE,
    Size("vit_large_patch16_224", 16, 1024, 24, 16),
    Size("vit_huge_patch14_224", 14, 1280, 32, 16),
)
# A wrong number of heads fits all shapes and gives wrong features.
HEADS_OF_WIDTH = {size.embed_dim: size.num_heads for size in SIZES}


def size_of_width(width: int) -> Size:
    """The size of a width, ViT-B for widths that are none of theirs."""
    return next((size for size in SIZES if size.embed_dim == width), _BASE)


def _cfg() -> dict[str, Any]:
    return {
        "input_size": (3, 224, 224),
        "num_classes": 0,
        "interpolation": "bicubic",
        "crop_pct": 0.875,
        "fixed_input_size": True,
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "license": "mit",
    }


default_cfgs = generate_default_cfgs({f"stellar_{size.name}": _cfg() for size in SIZES})


def _stellar_vit(name: str, pretrained: bool, **kwargs: Any) -> VisionTransformer:
    size = next(size for size in SIZES if f"stellar_{size.name}" == name)
    defaults: dict[str, Any] = {
        "patch_size": size.patch_size,
        "embed_dim": size.embed_dim,
        "depth": size.depth,
        "num_heads": size.num_heads,
        "reg_tokens": 16,
        "no_embed_class": True,
        "num_classes": 0,
        "norm_layer": partial(LayerNorm, eps=STELLAR_NORM_EPS),
    }
    return build_model_with_cfg(
        ViT,
        name,
        pretrained,
        feature_cfg={"out_indices": 3, "feature_cls": "getter"},
        **{**defaults, **kwargs},
    )


@register_model
def stellar_vit_tiny_patch16_224(
    pretrained: bool = False, **kwargs: Any
) -> VisionTransformer:
    """ViT-Ti/16 with 16 latent queries."""
    return _stellar_vit("stellar_vit_tiny_patch16_224", pretrained, **kwargs)


@register_model
def stellar_vit_small_patch16_224(
    pretrained: bool = False, **kwargs: Any
) -> VisionTransformer:
    """ViT-S/16 with 16 latent queries."""
    return _stellar_vit("stellar_vit_small_patch16_224", pretrained, **kwargs)


@register_model
def stellar_vit_base_patch16_224(
    pretrained: bool = False, **kwargs: Any
) -> VisionTransformer:
    """ViT-B/16 with 16 latent queries, STELLAR-B of the paper."""
    return _stellar_vit("stellar_vit_base_patch16_224", pretrained, **kwargs)


@register_model
def stellar_vit_large_patch16_224(
    pretrained: bool = False, **kwargs: Any
) -> VisionTransformer:
    """ViT-L/16 with 16 latent queries, STELLAR-L of the paper."""
    return _stellar_vit("stellar_vit_large_patch16_224", pretrained, **kwargs)


@register_model
def stellar_vit_huge_patch14_224(
    pretrained: bool = False, **kwargs: Any
) -> VisionTransformer:
    """ViT-H/14 with 16 latent queries, STELLAR-H of the paper."""
    return _stellar_vit("stellar_vit_huge_patch14_224", pretrained, **kwargs)
