"""What timm knows of a model, which no tensor shows."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable, Mapping
from typing import Any

import timm
import torch
from timm.data.config import resolve_data_config
from timm.models import PretrainedCfg
from timm.models.eva import Eva
from torch import nn

from stellar_plugin.encoder import is_plain
from stellar_plugin.vit import RotaryViT

# DINOv3 in timm by its width, and whether its MLPs are gated.
DINOV3 = {
    (192, False): "vit_tiny_patch16_dinov3_qkvb",
    (384, False): "vit_small_patch16_dinov3",
    (384, True): "vit_small_plus_patch16_dinov3",
    (768, False): "vit_base_patch16_dinov3",
    (1024, False): "vit_large_patch16_dinov3",
    (1280, True): "vit_huge_plus_patch16_dinov3",
    (4096, True): "vit_7b_patch16_dinov3",
}
# Arguments of timm's models that tensors show, or that the encoder sets itself.
SHOWN = (
    *("img_size", "embed_dim", "depth", "num_heads", "num_classes", "qkv_bias"),
    *("global_pool", "num_reg_tokens", "dynamic_img_size", "no_embed_class"),
)


def architecture(name: str) -> nn.Module:
    """A model of timm without values and classifier.

    Args:
        name:
            Its name in timm, with or without the tag of its weights.

    Raises:
        FileNotFoundError: If timm has no such model, or no weights of that tag.
    """
    kind, _, tag = name.partition(".")
    if not timm.is_model(kind):
        names = timm.list_models()
        raise FileNotFoundError(
            f"timm knows no model '{kind}'.{_did_you_mean(kind, names)} "
            "timm.list_models() has all."
        )
    of_kind = list(timm.models.get_arch_pretrained_cfgs(kind))
    if tag and name not in of_kind:
        raise FileNotFoundError(
            f"timm has no weights '{tag}' of '{kind}'.{_did_you_mean(name, of_kind)} "
            f"It has: {', '.join(of_kind) or 'none'}."
        )
    with torch.device("meta"):
        return timm.create_model(name, num_classes=0)


def weights_of(name: str) -> PretrainedCfg:
    """Where timm has the weights of a model.

    Args:
        name:
            Its name in timm, with or without the tag of its weights.

    Raises:
        FileNotFoundError: If timm has none.
    """
    cfg = timm.get_pretrained_cfg(name)
    if cfg is None or not cfg.has_weights:
        kind = name.partition(".")[0]
        others = timm.list_pretrained(f"{kind}*")
        raise FileNotFoundError(
            f"timm has no trained weights of '{name}'.{_did_you_mean(name, others)} "
            "timm.list_pretrained() has all; for a file of your own give its path."
        )
    return cfg


def _did_you_mean(name: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1)
    return f" Did you mean '{close[0]}'?" if close else ""


def settings_of(model: nn.Module, name: str) -> dict[str, Any]:
    """What tensors of a ViT do not show, by the names of `Stellar`, and its images.

    Args:
        model:
            A plain ViT of timm.
        name:
            Its name in timm, with or without the tag of its weights.
    """
    vit: Any = model
    block = vit.blocks[0]
    data = resolve_data_config({}, model=vit)
    architecture, _, tag = name.partition(".")
    tag = tag or vit.pretrained_cfg.get("tag") or ""
    table = {"pos_antialias": True, "grid_size": tuple(vit.patch_embed.grid_size)}
    return {
        **(table if vit.pos_embed is not None else {}),
        "model_name": architecture,
        "timm_name": f"{architecture}.{tag}".removesuffix("."),
        "num_heads": block.attn.num_heads,
        "activation": type(block.mlp.act).__name__,
        "norm_eps": block.norm1.eps,
        "rotary": isinstance(vit, Eva | RotaryViT),
        "mean": list(data["mean"]),
        "std": list(data["std"]),
        "interpolation": data["interpolation"],
        "crop_pct": data["crop_pct"],
    }


def described(config: Mapping[str, Any], width: int, depth: int) -> dict[str, Any]:
    """The same from the content of timm's config.json, {} if it names no such model.

    Args:
        config:
            Content of the file.
        width:
            Width of the weights beside it.
        depth:
            Their number of blocks.

    Raises:
        ValueError: If the model cannot be built or is another than that of the weights.
    """
    name = config.get("architecture")
    if not isinstance(name, str) or not timm.is_model(name):
        return {}
    arguments = {"num_classes": 0, **(config.get("model_args") or {})}
    try:
        with torch.device("meta"):
            vit: Any = timm.create_model(name, **arguments)
    except (AssertionError, RuntimeError, TypeError, ArithmeticError) as error:
        raise ValueError(
            f"timm cannot build the '{name}' of config.json with "
            f"{reprlib.repr(arguments)}: {error}"
        ) from error
    if not is_plain(vit):
        raise ValueError(
            f"config.json says '{name}', which is no plain ViT; evaluate it by --model "
            f"timm:{name} --weights FILE"
        )
    hidden = [key for key in arguments if key not in SHOWN]
    if isinstance(vit, Eva) and hidden:
        raise ValueError(
            f"config.json gives '{name}' other {', '.join(hidden)}, which no tensor "
            "shows: build StellarEncoder with them and use load_encoder_weights"
        )
    theirs = vit.embed_dim, len(vit.blocks)
    if theirs != (width, depth):
        raise ValueError(
            f"config.json says '{name}', {theirs[0]} wide with {theirs[1]} blocks, the "
            f"weights are {width} wide with {depth}; take the files of one model"
        )
    cfg = config.get("pretrained_cfg") or {}
    vit.pretrained_cfg = {**vit.pretrained_cfg, "tag": None, **cfg}
    return settings_of(vit, name)


def dinov3(width: int, gated: bool) -> dict[str, Any]:
    """The same of a DINOv3 that nothing but its tensors tells.

    Args:
        width:
            Its width.
        gated:
            Whether its MLPs are gated.

    Raises:
        ValueError: If timm has none of this size.
    """
    name = DINOV3.get((width, gated))
    if name is None:
        raise ValueError(
            f"it has the tensors of DINOv3, and timm has none {width} wide with"
            f"{'' if gated else 'out'} gated MLPs: build StellarEncoder with its sizes "
            "and use load_encoder_weights, or put timm's config.json beside the file"
        )
    settings = settings_of(architecture(name), name)
    return {k: v for k, v in settings.items() if k != "timm_name"}
