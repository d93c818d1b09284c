"""The sizes of STELLAR, registered with timm.

A STELLAR encoder is a timm `VisionTransformer` whose register tokens are the latent
queries (method: https://arxiv.org/abs/2602.01905, section 3). Importing this module
makes `timm.create_model("stellar_vit_base_patch16_224")` work.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer
from torch.nn import LayerNorm

# LayerNorm epsilon of the released weights.
STELLAR_NORM_EPS = 1e-12


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


default_cfgs = generate_default_cfgs(
    {
        "stellar_vit_tiny_patch16_224": _cfg(),
        "stellar_vit_small_patch16_224": _cfg(),
        "stellar_vit_base_patch16_224": _cfg(),
        "stellar_vit_large_patch16_224": _cfg(),
        "stellar_vit_huge_patch14_224": _cfg(),
    }
)


def _stellar_vit(variant: str, pretrained: bool, **kwargs: Any) -> VisionTransformer:
    defaults: dict[str, Any] = {
        "reg_tokens": 16,
        "no_embed_class": True,
        "num_classes": 0,
        "norm_layer": partial(LayerNorm, eps=STELLAR_NORM_EPS),
    }
    return build_model_with_cfg(
        VisionTransformer,
        variant,
        pretrained,
        feature_cfg={"out_indices": 3, "feature_cls": "getter"},
        **{**defaults, **kwargs},
    )


@register_model
def stellar_vit_tiny_patch16_224(
    pretrained: bool = False, **kwargs: Any
) -> VisionTransformer:
    """ViT-Ti/16 with 16 latent queries."""
    model_args = {"patch_size": 16, "embed_dim": 192, "depth": 12, "num_heads": 3}
    return _stellar_vit(
        "stellar_vit_tiny_patch16_224", pretrained, **{**model_args, **kwargs}
    )


@register_model
def stellar_vit_small_patch16_224(
    pretrained: bool = False, **kwargs: Any
) -> VisionTransformer:
    """ViT-S/16 with 16 latent queries."""
    model_args = {"patch_size": 16, "embed_dim": 384, "depth": 12, "num_heads": 6}
    return _stellar_vit(
        "stellar_vit_small_patch16_224", pretrained, **{**model_args, **kwargs}
    )


@register_model
def stellar_vit_base_patch16_224(
    pretrained: bool = False, **kwargs: Any
) -> VisionTransformer:
    """ViT-B/16 with 16 latent queries, STELLAR-B of the paper."""
    model_args = {"patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12}
    return _stellar_vit(
        "stellar_vit_base_patch16_224", pretrained, **{**model_args, **kwargs}
    )


@register_model
def stellar_vit_large_patch16_224(
    pretrained: bool = False, **kwargs: Any
) -> VisionTransformer:
    """ViT-L/16 with 16 latent queries, STELLAR-L of the paper."""
    model_args = {"patch_size": 16, "embed_dim": 1024, "depth": 24, "num_heads": 16}
    return _stellar_vit(
        "stellar_vit_large_patch16_224", pretrained, **{**model_args, **kwargs}
    )


@register_model
def stellar_vit_huge_patch14_224(
    pretrained: bool = False, **kwargs: Any
) -> VisionTransformer:
    """ViT-H/14 with 16 latent queries, STELLAR-H of the paper."""
    model_args = {"patch_size": 14, "embed_dim": 1280, "depth": 32, "num_heads": 16}
    return _stellar_vit(
        "stellar_vit_huge_patch14_224", pretrained, **{**model_args, **kwargs}
    )
