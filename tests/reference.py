"""Reference numbers of the published implementation, and its weights in our classes.

Files in tests/fixtures: inputs, weights, outputs, losses and gradients of small models.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from stellar_plugin import Stellar

FIXTURES = Path(__file__).parent / "fixtures"

ENCODER_LAYER = {
    "attention.output.dense": "attn.proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
}
MODULES = {
    "encoder.embeddings.patch_embeddings.projection": "encoder.vit.patch_embed.proj",
    "encoder.layernorm": "encoder.vit.norm",
    "dense_proj": "encoder.dense_proj",
    "sparse_proj": "encoder.sparse_proj",
    "decoder_proj": "decoder.proj",
    "decoder.layernorm": "decoder.norm",
    "reconstruction_head": "decoder.head",
}

TEACHER = {
    "teacher_encoder.": "encoder.",
    "teacher_head.": "clustering_head.",
    "teacher_cls_head.": "cls_cluster_head.",
    "teacher_sparse_tokens": "sparse_tokens",
}
HEADS = {"sparse_head": "clustering_head", "cls_head": "cls_cluster_head"}


def load(name: str) -> dict[str, Tensor]:
    return load_file(FIXTURES / f"dev_{name}.safetensors")


def weights() -> dict[str, Tensor]:
    return _with_prefix(load("forward"), "state.")


def teacher_weights() -> dict[str, Tensor]:
    """Weights of the teacher under the names of the student."""
    state = _with_prefix(load("train_teacher"), "state.")
    return {**weights(), **without_teacher(state)}


def without_teacher(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The teacher's tensors by the names that the student's have."""
    result = {}
    for name, tensor in state.items():
        for old, new in TEACHER.items():
            if name.startswith(old):
                result[new + name.removeprefix(old)] = tensor
    return result


def model_arguments() -> dict[str, Any]:
    return {
        "model_name": "stellar_vit_tiny_patch16_224",
        "img_size": 64,
        "embed_dim": 48,
        "depth": 2,
        "num_heads": 3,
        "mlp_ratio": 2,
        "num_queries": 4,
        "decoder_dim": 32,
        "decoder_depth": 2,
        "decoder_num_heads": 4,
        "decoder_mlp_ratio": 2,
    }


def head_arguments() -> dict[str, int]:
    return {"hidden_dim": 64, "output_dim": 16, "num_prototypes": 32}


def stellar(state: dict[str, Tensor] | None = None) -> Stellar:
    model = Stellar(**model_arguments())
    model.load_state_dict(model_state(weights() if state is None else state))
    return model.eval()


def model_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Reference names to ours; also for gradients, except the CLS token's."""
    position = state["encoder.embeddings.position_embeddings"]
    cls_token = state["encoder.embeddings.cls_token"]
    result = {
        "encoder.vit.cls_token": cls_token + position[:, :1],
        "encoder.vit.pos_embed": position[:, 1:],
        "encoder.vit.reg_token": state["sparse_tokens"][None],
        "decoder.position.frequencies": state[
            "position_embedding.positional_encoding_gaussian_matrix"
        ],
    }
    for old, new in MODULES.items():
        for kind in ("weight", "bias"):
            result[f"{new}.{kind}"] = state[f"{old}.{kind}"]
    for old, new in (("encoder", "encoder.vit"), ("decoder", "decoder")):
        for layer in range(2):
            result |= _layer_state(
                _with_prefix(state, f"{old}.encoder.layer.{layer}."),
                f"{new}.blocks.{layer}.",
            )
    return result


def head_state(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """State of a projection head, `clustering_head` or `cls_cluster_head`."""
    layers = _with_prefix(state, f"{name}.predictor.")
    return {**layers, "prototypes.weight": state[f"{name}.layer.weight"]}


def normalized(images: Tensor) -> Tensor:
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    return (images - mean) / std


def _with_prefix(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def _layer_state(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    result = {}
    for kind in ("weight", "bias"):
        qkv = [
            state[f"attention.attention.{n}.{kind}"] for n in ("query", "key", "value")
        ]
        result[f"{prefix}attn.qkv.{kind}"] = torch.cat(qkv)
        for old, new in ENCODER_LAYER.items():
            result[f"{prefix}{new}.{kind}"] = state[f"{old}.{kind}"]
    return result
