"""Names of a Vision Transformer's tensors in transformers and in timm's relatives."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor

State = dict[str, Tensor]

_LAYER = re.compile(r"(?:encoder\.layer|layers)\.(\d+)\.(.+)\.(weight|bias)")
# Names of transformers 4.x and 5.x, to timm's.
_QKV = {
    "attention.attention.query": 0,
    "attention.attention.key": 1,
    "attention.attention.value": 2,
    "attention.q_proj": 0,
    "attention.k_proj": 1,
    "attention.v_proj": 2,
}
_LAYER_PARTS = {
    "attention.output.dense": "attn.proj",
    "attention.o_proj": "attn.proj",
    "intermediate.dense": "mlp.fc1",
    "mlp.fc1": "mlp.fc1",
    "output.dense": "mlp.fc2",
    "mlp.fc2": "mlp.fc2",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
}
_TOP = {
    "embeddings.cls_token": "cls_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
    "embeddings.patch_embeddings.projection.bias": "patch_embed.proj.bias",
    "layernorm.weight": "norm.weight",
    "layernorm.bias": "norm.bias",
}
_BACKBONE = ("embeddings.", "encoder.", "layers.", "layernorm.")

# DINOv2 trains blocks in chunks.
_CHUNK = re.compile(r"blocks\.\d+\.(\d+)\.")
# LayerScale of BEiT, DeiT III and others, which timm's Eva calls so too.
_TIMM_RENAMED = {".gamma_1": ".ls1.gamma", ".gamma_2": ".ls2.gamma"}
# DINOv3's names of what timm has in its Eva, and what serves its training alone; the
# periods of the rotation are timm's own.
_EVA_RENAMED = {
    "storage_tokens": "reg_token",
    ".ls1.gamma": ".gamma_1",
    ".ls2.gamma": ".gamma_2",
    ".mlp.w1.": ".mlp.fc1_g.",
    ".mlp.w2.": ".mlp.fc1_x.",
    ".mlp.w3.": ".mlp.fc2.",
}
_EVA_UNUSED = ("rope_embed.", "local_cls_norm.")
# Classifiers behind the features.
_CLASSIFIERS = ("fc.", "fc_norm.", "head.", "head_dist.", "pre_logits.")
_TIMM_BACKBONE = (
    "blocks",
    "cls_norm",
    "cls_token",
    "dist_token",
    "norm",
    "norm_pre",
    "patch_embed",
    "pos_embed",
    "reg_token",
    "rel_pos_bias",
    "rope",
)


# Of tensors whose sizes are read before they are compared with those of a model.
_DIMENSIONS = {
    "cls_token": 3,
    "reg_token": 3,
    "pos_embed": 3,
    "patch_embed.proj.weight": 4,
    "blocks.0.mlp.fc1.weight": 2,
    "blocks.0.mlp.fc2.weight": 2,
}


def check_dimensions(name: str, tensor: Tensor, dimensions: int) -> None:
    """Raises ValueError if a tensor has another number of dimensions."""
    if tensor.ndim != dimensions:
        raise ValueError(
            f"{name} is {tuple(tensor.shape)}, which should have {dimensions} "
            "dimensions"
        )


def shape_of(state: Mapping[str, Tensor], name: str, dimensions: int) -> list[int]:
    """Shape of a tensor that tells sizes.

    Raises:
        ValueError: If it is not there, has another number of dimensions, or is empty.
    """
    if name not in state:
        raise ValueError(f"it has no {name}, which tells the sizes")
    check_dimensions(name, state[name], dimensions)
    if not state[name].numel():
        raise ValueError(f"{name} is empty: {tuple(state[name].shape)}")
    return list(state[name].shape)


def check_index(name: str, index: Tensor, expected: Tensor) -> None:
    """Raises ValueError if the indices of a table of biases are others than timm's."""
    same = index.shape == expected.shape
    if not same or not (index.is_meta or index.cpu().equal(expected.to(index.dtype))):
        raise ValueError(
            f"{name}, {tuple(index.shape)}, does not number the pairs of positions of "
            f"the table, of which there are {tuple(expected.shape)}"
        )


class Names:
    """Tensors under their new names, and what became of the others.

    Attributes:
        state:
            Tensors by timm's names.
        unexpected:
            Names that the layout does not have.
        ignored:
            Names of the layout that features do not depend on.
    """

    def __init__(self) -> None:
        self.state: State = {}
        self.unexpected: list[str] = []
        self.ignored: list[str] = []

    def add(self, old: str, new: str, tensor: Tensor) -> None:
        """Adds a tensor.

        Raises:
            ValueError: If two tensors get the same name, or it has another number of
                dimensions.
        """
        if new in self.state:
            raise ValueError(
                f"two tensors are {new}, one of them '{old}': the file mixes layouts"
            )
        check_dimensions(old, tensor, _DIMENSIONS.get(new, tensor.ndim))
        self.state[new] = tensor


def from_transformers(
    state: State,
    renamed: Mapping[str, str] | None = None,
    ignored: tuple[str, ...] = (),
) -> Names:
    """Renames a ViT of transformers 4.x or 5.x, query, key and value fused.

    Args:
        state:
            Tensors by names close to those of transformers' ViTModel.
        renamed:
            Parts of names of this method -> parts of transformers'.
        ignored:
            Beginnings of names that are not used.

    Raises:
        ValueError: If one of query, key and value is missing, or names collide.
    """
    names = Names()
    qkv: dict[str, dict[int, Tensor]] = defaultdict(dict)
    for old, tensor in state.items():
        name = _replaced(old, renamed or {})
        layer = _LAYER.fullmatch(name)
        if old.startswith(ignored):
            names.ignored.append(old)
        elif name in _TOP:
            names.add(old, _TOP[name], tensor)
        elif layer and layer[2] in _QKV:
            fused = qkv[f"blocks.{layer[1]}.attn.qkv.{layer[3]}"]
            if _QKV[layer[2]] in fused:
                raise ValueError(f"'{old}' is there under two names")
            fused[_QKV[layer[2]]] = tensor
        elif layer and layer[2] in _LAYER_PARTS:
            new = f"blocks.{layer[1]}.{_LAYER_PARTS[layer[2]]}.{layer[3]}"
            names.add(old, new, tensor)
        elif name.startswith(_BACKBONE):
            names.add(old, name, tensor)  # refused where the encoder is loaded
        else:
            names.unexpected.append(old)
    partial = [name for name, parts in qkv.items() if len(parts) < 3]
    if partial:
        raise ValueError(f"query, key or value is missing for {', '.join(partial)}")
    for name, parts in qkv.items():
        names.add(name, name, _fused(name, [parts[i] for i in range(3)]))
    return names


def to_transformers(state: State) -> State:
    """Renames a plain ViT from timm's names to those of transformers 4.x.

    Args:
        state:
            Tensors by timm's names, without registers and LayerScale.
    """
    back = {new: old for old, new in _TOP.items()}
    parts: dict[str, str] = {}
    for old, new in _LAYER_PARTS.items():
        parts.setdefault(new, old)
    result = {}
    for name, tensor in state.items():
        if name in back:
            result[back[name]] = tensor
            continue
        _, layer, part, kind = re.split(
            r"blocks\.(\d+)\.(.+)\.(weight|bias)", name, maxsplit=1
        )[:4]
        prefix = f"encoder.layer.{layer}."
        if part == "attn.qkv":
            for key, piece in zip(_QKV, tensor.chunk(3), strict=False):
                result[f"{prefix}{key}.{kind}"] = piece.clone()
        else:
            result[f"{prefix}{parts[part]}.{kind}"] = tensor
    return result


def from_timm_like(
    state: State,
    renamed: Mapping[str, str] | None = None,
    ignored: tuple[str, ...] = (),
    rotary: bool = False,
) -> Names:
    """Renames what methods call differently than timm.

    Args:
        state:
            Tensors by names close to those of timm's VisionTransformer, or of its Eva.
        renamed:
            Parts of names of this method -> parts of timm's.
        ignored:
            Beginnings of names of this method that are not used.
        rotary:
            Whether it is an Eva.

    Raises:
        ValueError: If the ViT has a structure that the encoder cannot represent, or
            names collide.
    """
    foreign = [n for n in state if "relative_position" in n or "rel_pos_bias" in n]
    if foreign:
        raise ValueError(
            f"it has relative position biases ({foreign[0]}) and no table of them "
            "where BEiT has it, for all blocks or in block 0: a part of the file is "
            "lost, or it is a ViT of timm; name that as 'timm:NAME'"
        )
    names = Names()
    state = _with_split_bias(state) if rotary else _with_fused_bias(state)
    parts = {**(_EVA_RENAMED if rotary else _TIMM_RENAMED), **(renamed or {})}
    unused = (*_CLASSIFIERS, *(_EVA_UNUSED if rotary else ()), *ignored)
    for name, tensor in state.items():
        new = _replaced(_CHUNK.sub(r"blocks.\1.", name), parts)
        if name.startswith(unused):
            names.ignored.append(name)
        elif new.split(".")[0] in _TIMM_BACKBONE:
            names.add(name, new, tensor)
        else:
            names.unexpected.append(name)
    return names


def _replaced(name: str, parts: Mapping[str, str]) -> str:
    for old, new in parts.items():
        name = name.replace(old, new)
    return name


def _with_fused_bias(state: State) -> State:
    """BEiT has a bias for queries and values, none for keys."""
    result = {}
    for name, tensor in state.items():
        value = state.get(name.replace(".q_bias", ".v_bias"))
        if name.endswith(".q_bias") and value is not None:
            new = name.replace(".q_bias", ".qkv.bias")
            result[new] = _fused(new, [tensor, torch.zeros_like(tensor), value])
        elif not (name.endswith(".v_bias") and name.replace(".v_", ".q_") in state):
            result[name] = tensor
    return result


def _with_split_bias(state: State) -> State:
    """DINOv3 masks the bias of keys; where all are zero, timm has none."""
    result: State = {}
    biases: State = {}
    for name, tensor in state.items():
        mask = state.get(f"{name}_mask")
        if name.endswith(".qkv.bias") and mask is not None:
            query, key, value = (tensor * mask).chunk(3)
            if len(mask) != len(tensor) or key.any():
                raise ValueError(f"'{name}_mask' leaves a bias of keys, timm has none")
            start = name.removesuffix("qkv.bias")
            biases |= {f"{start}q_bias": query, f"{start}v_bias": value}
        elif not name.endswith(".qkv.bias_mask"):
            result[name] = tensor
    return result | (biases if any(bias.any() for bias in biases.values()) else {})


def _fused(name: str, parts: list[Tensor]) -> Tensor:
    kinds = {(tensor.dtype, tensor.shape, tensor.layout) for tensor in parts}
    if len(kinds) > 1 or not parts[0].ndim:
        shapes = [tuple(tensor.shape) for tensor in parts]
        raise ValueError(f"query, key and value of {name} differ: {shapes}")
    return torch.cat(parts)


def part(state: Mapping[str, Tensor], prefix: str) -> State:
    """Tensors whose names begin with `prefix`, without it."""
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
