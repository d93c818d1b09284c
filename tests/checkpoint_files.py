"""Weight files of other methods: each layout's own names."""

from __future__ import annotations

import argparse
from collections import OrderedDict
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from stellar_plugin import StellarEncoder

State = dict[str, Tensor]
SIZES = {
    "img_size": 64,
    "patch_size": 16,
    "embed_dim": 48,
    "depth": 2,
    "num_heads": 3,
    "num_classes": 0,
    "global_pool": "",
}
NAME = "vit_tiny_patch16_224"


def timm_vit(sines: bool = False, **kwargs: Any) -> VisionTransformer:
    """A timm ViT with random numbers everywhere, its class token with a position.

    With `sines` the positions are sines and cosines of row and column, as MAE has them.
    """
    torch.manual_seed(0)
    vit = VisionTransformer(**{**SIZES, **kwargs})
    for parameter in vit.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    if sines:
        height, width = vit.patch_embed.grid_size
        angles = torch.arange(1, vit.embed_dim // 4 + 1) / 4
        row, column = (
            torch.cat([(n[:, None] * angles).sin(), (n[:, None] * angles).cos()], dim=1)
            for n in (torch.arange(height), torch.arange(width))
        )
        row = row[:, None].expand(height, width, -1)
        table = torch.cat([column.expand(height, width, -1), row], dim=2)
        vit.pos_embed.data[0, -height * width :] = table.flatten(0, 1)
    return vit.eval()


def encoder_for(vit: VisionTransformer, **kwargs: Any) -> StellarEncoder:
    sizes = {k: v for k, v in SIZES.items() if k not in ("num_classes", "global_pool")}
    return StellarEncoder(NAME, **{"num_queries": 0, **sizes, **kwargs}).eval()


def transformers_names(state: State, version: int) -> State:
    """A timm state by the names of transformers' ViT."""
    layer = {4: "encoder.layer", 5: "layers"}[version]
    parts = {
        4: {
            "attn.proj": "attention.output.dense",
            "mlp.fc1": "intermediate.dense",
            "mlp.fc2": "output.dense",
            "norm1": "layernorm_before",
            "norm2": "layernorm_after",
        },
        5: {
            "attn.proj": "attention.o_proj",
            "mlp.fc1": "mlp.fc1",
            "mlp.fc2": "mlp.fc2",
            "norm1": "layernorm_before",
            "norm2": "layernorm_after",
        },
    }[version]
    qkv = {
        4: [f"attention.attention.{n}" for n in ("query", "key", "value")],
        5: [f"attention.{n}_proj" for n in "qkv"],
    }[version]
    top = {
        "cls_token": "embeddings.cls_token",
        "pos_embed": "embeddings.position_embeddings",
        "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
        "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
        "norm.weight": "layernorm.weight",
        "norm.bias": "layernorm.bias",
    }
    result = {}
    for name, tensor in state.items():
        if name in top:
            result[top[name]] = tensor
            continue
        _, number, rest = name.split(".", 2)
        part, kind = rest.rsplit(".", 1)
        start = f"{layer}.{number}."
        if part == "attn.qkv":
            for new, piece in zip(qkv, tensor.chunk(3), strict=True):
                result[f"{start}{new}.{kind}"] = piece.clone()
        else:
            result[f"{start}{parts[part]}.{kind}"] = tensor
    return result


def prefixed(state: State, prefix: str) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def save(content: Any, path: Path) -> Path:
    if path.suffix == ".safetensors":
        save_file({k: v.contiguous() for k, v in content.items()}, path)
    else:
        torch.save(content, path)
    return path


def write_hub_cache(
    name: str, state: State, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """Makes of a folder the hub's cache, with timm's weights, and takes the network.

    Returns:
        The weight file.
    """
    cfg = timm.get_pretrained_cfg(name)
    assert cfg is not None and cfg.hf_hub_id is not None
    repo, commit = folder / f"models--{cfg.hf_hub_id.replace('/', '--')}", "0" * 40
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    path = repo / "snapshots" / commit / "model.safetensors"
    path.parent.mkdir(parents=True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return save(state, path)


def assert_same_tokens(
    encoder: StellarEncoder, vit: VisionTransformer, images: Tensor | None = None
) -> None:
    if images is None:
        images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(
            encoder.forward_features(images),
            vit.forward_features(images),
            rtol=0,
            atol=1e-5,
        )


# Of timm's test_vit.
IMAGENET_HEAD = {"head.weight": torch.zeros(1000, 64), "head.bias": torch.zeros(1000)}
HEAD = {"head.weight": torch.zeros(5, 48), "head.bias": torch.zeros(5)}
MLP_HEAD = {"mlp.0.weight": torch.zeros(4, 48), "last_layer.weight_g": torch.zeros(4)}
MAE_DECODER = {
    "mask_token": torch.zeros(1, 1, 32),
    "decoder_embed.weight": torch.zeros(32, 48),
    "decoder_pos_embed": torch.zeros(1, 17, 32),
    "decoder_blocks.0.norm1.weight": torch.zeros(32),
    "decoder_pred.weight": torch.zeros(768, 32),
}
# Whose file it is -> what it holds, for a state by timm's names.
FILES = {
    "timm": lambda s: s,
    "a classifier": lambda s: s | HEAD,
    "a classifier, in training": lambda s: {
        "epoch": 3,
        "arch": "vit_tiny_patch16_224",
        "state_dict": s | HEAD,
        "optimizer": {"state": {}},
        "version": 2,
    },
    "timm, wrapped": lambda s: {"model": s},
    "timm, in training": lambda s: {"state_dict": OrderedDict(s), "epoch": 3},
    "MAE or SemMAE": lambda s: {"model": s},
    "MAE or SemMAE, full": lambda s: {
        "model": s | MAE_DECODER,
        "epoch": 799,
        "args": argparse.Namespace(lr=1.0),
    },
    "DINO or iBOT": lambda s: {
        "student": prefixed(s, "module.backbone.") | prefixed(MLP_HEAD, "module.head."),
        "teacher": prefixed(s, "backbone.") | prefixed(MLP_HEAD, "head."),
        "optimizer": {"state": {}},
        "args": argparse.Namespace(arch="vit_small"),
    },
    "MoCo v3": lambda s: {
        "state_dict": prefixed(
            s | {"head.0.weight": HEAD["head.weight"]}, "module.base_encoder."
        )
        | prefixed({k: v + 1 for k, v in s.items()}, "module.momentum_encoder.")
        | prefixed(MLP_HEAD, "module.predictor."),
        "arch": "vit_small",
    },
}
