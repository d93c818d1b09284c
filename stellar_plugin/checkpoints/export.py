"""Our weights in the official layout and in timm's."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import timm
import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models.eva import Eva
from timm.models.vision_transformer import LayerScale
from torch import Tensor

from stellar_plugin.checkpoints.names import State, part, to_transformers
from stellar_plugin.checkpoints.readers import (
    OFFICIAL_FREQUENCIES,
    OFFICIAL_HEAD_PARTS,
    OFFICIAL_HEADS,
    OFFICIAL_MODULES,
)
from stellar_plugin.encoder import NORMS, StellarEncoder
from stellar_plugin.vit import STELLAR_NORM_EPS, RotaryViT, size_of_width
from stellar_plugin.weight_files import METADATA_KEY

if TYPE_CHECKING:
    from stellar_plugin.model import Stellar

logger = logging.getLogger(__name__)

# Sizes of tensors that the official model stores and does not use: its decoder is a ViT
# for images of 224 pixels in patches of 16, of which only the blocks run.
UNUSED_POSITIONS = 1 + 14 * 14
UNUSED_PATCH_SIZE = 16
# The published heads: tensors, and sizes for a model that comes without.
HEAD_KEYS = {
    *(f"layers.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")),
    "prototypes.weight",
}
HEAD_HIDDEN, HEAD_OUTPUT, NUM_PROTOTYPES = 2048, 256, 16384

VIT_KEYS = ("cls_token", "pos_embed", "patch_embed.proj.", "blocks.", "norm.")
# Tensors that every official model has, and other ViTs may not.
NEEDED_KEYS = (
    *("pos_embed", "norm.weight"),
    *("blocks.0.attn.qkv.bias", "blocks.0.attn.proj.bias"),
)


def to_official(model: Stellar, heads: Mapping[str, State] | None = None) -> State:
    """State of the official STELLAR model, which loads it strictly.

    The CLS token is the sum of token and position, the position of CLS is zero, tensors
    that no output depends on are zero.

    Args:
        model:
            The model.
        heads:
            States of the projection heads "sparse_head" and "cls_head". A head that is
            not given is zero and of the published size.

    Returns:
        Tensors by official names (of transformers 4.x).

    Raises:
        ValueError: If the official model cannot represent this one.
    """
    _check_official(model)
    ours = {k: v.detach() for k, v in model.state_dict().items()}
    encoder = part(ours, "encoder.vit.")
    sparse_tokens = encoder.pop("reg_token")[0]
    table = encoder["pos_embed"]
    encoder["pos_embed"] = torch.cat([torch.zeros_like(table[:, :1]), table], dim=1)
    decoder = part(ours, "decoder.")
    blocks = {k: v for k, v in decoder.items() if k.startswith(("blocks.", "norm."))}
    result = {"sparse_tokens": sparse_tokens}
    result |= {f"encoder.{k}": v for k, v in to_transformers(encoder).items()}
    result |= {f"decoder.{k}": v for k, v in to_transformers(blocks).items()}
    for old, new in OFFICIAL_MODULES.items():
        result |= {old + k: v for k, v in part(ours, new).items()}
    result[OFFICIAL_FREQUENCIES] = decoder["position.frequencies"]
    result |= _unused(table.shape[2], blocks["norm.weight"])
    for old, new in OFFICIAL_HEADS.items():
        result |= {
            old + k: v for k, v in _head(new, heads or {}, sparse_tokens).items()
        }
    return {name: tensor.clone().contiguous() for name, tensor in result.items()}


def to_timm(encoder: StellarEncoder) -> tuple[State, dict[str, str]]:
    """State of a timm ViT whose last registers are the queries.

    Args:
        encoder:
            The encoder; its projections are left out.

    Raises:
        ValueError: If it rotates otherwise than the model of its name, which no tensor
            shows.

    Returns:
        Tensors by timm's names, and metadata that tell `read_checkpoint` what tensors
        do not: which registers are queries, the number of heads, the numerics.
    """
    state = {k: v.detach().clone() for k, v in encoder.vit.state_dict().items()}
    rotary = isinstance(encoder.vit, RotaryViT)
    if encoder.vit.sincos:  # timm has a table, of one image size
        state["pos_embed"] = encoder.vit.position(encoder.grid_size)
    settings = {
        **({"model_name": _rotary_name(encoder.vit)} if rotary else {}),
        **({"pos_embed": "sincos"} if encoder.vit.sincos else {}),
        **({} if isinstance(encoder.vit.norm, NORMS) else {"final_norm": False}),
        "rotary": rotary,
        "num_queries": encoder.num_queries,
        "num_heads": encoder.vit.blocks[0].attn.num_heads,
        "activation": type(encoder.vit.blocks[0].mlp.act).__name__,
        "norm_eps": encoder.vit.blocks[0].norm1.eps,
        "pos_antialias": encoder.pos_antialias,
        "grid_size": encoder.grid_size,
    }
    return state, {"format": "pt", METADATA_KEY: json.dumps(settings)}


def timm_call(encoder: StellarEncoder) -> str:
    """The line of Python that builds the model for `to_timm`."""
    vit = encoder.vit
    rotary = isinstance(vit, RotaryViT)
    name = _rotary_name(vit) if rotary else size_of_width(encoder.embed_dim).name
    with torch.device("meta"):
        usual = _timm_arguments(timm.create_model(name))
    arguments = {k: v for k, v in _timm_arguments(vit).items() if usual[k] != v}
    if not vit.has_class_token:
        arguments |= {"class_token": False, "global_pool": ""}
    if not rotary:
        arguments |= _parts(vit)
    text = "".join(f", {key}={value!r}" for key, value in arguments.items())
    norm = f"partial(LayerNorm, eps={vit.blocks[0].norm1.eps})"
    if isinstance(vit.patch_embed.norm, NORMS):
        text += f", embed_norm_layer={norm}"
    return (
        f"timm.create_model('{name}'{text}, no_embed_class=True, num_classes=0, "
        f"norm_layer={norm})"
    )


def _parts(vit: Any) -> dict[str, Any]:
    """Arguments of timm for parts that a ViT has, or lacks, unlike the usual."""
    block = vit.blocks[0]
    unusual = {
        "init_values": (isinstance(block.ls1, LayerScale), 1e-5),
        "qkv_bias": (block.attn.qkv.bias is None, False),
        "proj_bias": (block.attn.proj.bias is None, False),
        "final_norm": (not isinstance(vit.norm, NORMS), False),
    }
    return {name: value for name, (is_so, value) in unusual.items() if is_so}


def _timm_arguments(vit: Any) -> dict[str, Any]:
    block = vit.blocks[0]
    registers = "num_reg_tokens" if isinstance(vit, Eva) else "reg_tokens"
    patch_size = vit.patch_embed.patch_size[0]
    height, width = (side * patch_size for side in vit.patch_embed.grid_size)
    return {
        "img_size": height if height == width else (height, width),
        "patch_size": patch_size,
        "embed_dim": vit.embed_dim,
        "depth": len(vit.blocks),
        "num_heads": block.attn.num_heads,
        "mlp_ratio": block.mlp.fc2.in_features / vit.embed_dim,
        registers: vit.num_prefix_tokens - (vit.cls_token is not None),
    }


def _rotary_name(vit: Any) -> str:
    """Timm's name of an Eva that rotates as the named one does."""
    name: str = vit.pretrained_cfg["architecture"]
    sizes = ("embed_dim", "depth", "num_heads")
    arguments = {k: v for k, v in _timm_arguments(vit).items() if k in sizes}
    with torch.device("meta"):
        named: Any = timm.create_model(name, dynamic_img_size=True, **arguments)
    named.__class__ = RotaryViT
    if vit.rotation != named.rotation:
        raise ValueError(
            f"The encoder rotates otherwise than timm's '{name}', and no tensor would "
            "tell: save the model by save_pretrained."
        )
    return name


def _check_official(model: Stellar) -> None:
    vit = model.encoder.vit
    height, width = model.encoder.grid_size
    state = vit.state_dict()
    lacking = [name for name in NEEDED_KEYS if name not in state]
    beyond = [n for n in state if n != "reg_token"]
    beyond = [n for n in beyond if not n.startswith(VIT_KEYS) or ".ls" in n]
    problems = {
        "it has no decoder": model.decoder is None,
        "its tokenizer is not loaded": model.target == "tokens"
        and model.tokenizer is None,
        "it has rotary positions": isinstance(vit, RotaryViT),
        "its LayerNorm epsilon is not 1e-12": vit.blocks[0].norm1.eps
        != STELLAR_NORM_EPS,
        "it resamples positions with antialiasing": model.encoder.pos_antialias,
        "it has no CLS token": not vit.has_class_token,
        "it has registers beside its queries": vit.num_reg_tokens
        != model.encoder.num_queries,
        "its patch grid is not square": height != width,
        "its images are not normalised as ImageNet's": (model.mean, model.std)
        != (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
        f"it has no {', '.join(lacking)}": bool(lacking),
        f"it has {', '.join(beyond[:2])}": bool(beyond),
    }
    found = [text for text, wrong in problems.items() if wrong]
    if found:
        raise ValueError(
            f"The official layout cannot hold this model: {'; '.join(found)}. Its "
            "outputs would differ; convert the encoder to timm instead."
        )


def _unused(width: int, like: Tensor) -> State:
    decoder_width = len(like)
    shapes = {
        "encoder.pooler.dense.weight": (width, width),
        "encoder.pooler.dense.bias": (width,),
        "decoder.embeddings.cls_token": (1, 1, decoder_width),
        "decoder.embeddings.position_embeddings": (1, UNUSED_POSITIONS, decoder_width),
        "decoder.embeddings.patch_embeddings.projection.weight": (
            decoder_width,
            3,
            UNUSED_PATCH_SIZE,
            UNUSED_PATCH_SIZE,
        ),
        "decoder.embeddings.patch_embeddings.projection.bias": (decoder_width,),
        "decoder.pooler.dense.weight": (decoder_width, decoder_width),
        "decoder.pooler.dense.bias": (decoder_width,),
    }
    return {name: like.new_zeros(shape) for name, shape in shapes.items()}


def _head(name: str, heads: Mapping[str, State], like: Tensor) -> State:
    head = heads.get(name, {})
    if head.keys() != HEAD_KEYS:
        kind = "comes with another kind of" if head else "comes without"
        logger.warning("The model %s %s; zeros are written.", kind, name)
        head = {
            "layers.0.weight": like.new_zeros(HEAD_HIDDEN, like.shape[1]),
            "layers.0.bias": like.new_zeros(HEAD_HIDDEN),
            "layers.2.weight": like.new_zeros(HEAD_OUTPUT, HEAD_HIDDEN),
            "layers.2.bias": like.new_zeros(HEAD_OUTPUT),
            "prototypes.weight": like.new_zeros(NUM_PROTOTYPES, HEAD_OUTPUT),
        }
    return {
        old + key: tensor
        for old, new in OFFICIAL_HEAD_PARTS.items()
        for key, tensor in part(head, new).items()
    }
