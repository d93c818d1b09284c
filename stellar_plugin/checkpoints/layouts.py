"""Which layout a checkpoint has, and its tensors by the names of `Stellar`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import isqrt
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from stellar_plugin.checkpoints.files import (
    HEADS_NAME,
    WEIGHTS_NAME,
    RawCheckpoint,
    checked_config,
    read_source,
)
from stellar_plugin.checkpoints.names import (
    Names,
    State,
    from_timm_like,
    from_transformers,
)
from stellar_plugin.vit import STELLAR_NORM_EPS

STELLAR, OFFICIAL, TRANSFORMERS = "stellar", "official STELLAR", "transformers ViT"
KNOWN_LAYOUTS = (
    "STELLAR of this package (encoder.vit.blocks.0...)",
    "official STELLAR (sparse_tokens, encoder.encoder.layer.0... or "
    "encoder.layers.0...)",
    "transformers ViT and ViT-MAE (embeddings..., encoder.layer.0...)",
    "timm, MAE, DINO, iBOT, MoCo v3, DINOv2, I-JEPA (blocks.0.attn.qkv...)",
)
# An error with thousands of keys helps nobody.
MAX_KEYS_SHOWN = 8

# Dictionaries that hold the weights, the one to prefer first: evaluation reads the
# average of the weights where there is one.
WRAPPERS = (
    "teacher",
    "target_encoder",
    "state_dict_ema",
    "model_ema",
    "state_dict",
    "model",
    "student",
    "encoder",
)
PREFERRED = ("teacher", "target_encoder", "base_encoder")
# Our own training checkpoints hold a model, and maybe its teacher.
PREFERRED_OWN = ("model",)
ANCHORS = {
    STELLAR: ("encoder.vit.patch_embed.proj.weight", "encoder.vit.cls_token"),
    OFFICIAL: (
        "sparse_tokens",
        "encoder.embeddings.patch_embeddings.projection.weight",
    ),
    TRANSFORMERS: (
        "embeddings.patch_embeddings.projection.weight",
        "embeddings.cls_token",
    ),
    "timm": ("patch_embed.proj.weight", "blocks.0.norm1.weight", "cls_token"),
}
OFFICIAL_MODULES = {
    "dense_proj.": "encoder.dense_proj.",
    "sparse_proj.": "encoder.sparse_proj.",
    "decoder_proj.": "decoder.proj.",
    "reconstruction_head.": "decoder.head.",
    "tokenizer.": "tokenizer.",
}
OFFICIAL_FREQUENCIES = "position_embedding.positional_encoding_gaussian_matrix"
OFFICIAL_HEADS = {
    "clustering_head.": "sparse_head",
    "cls_cluster_head.": "cls_head",
}
OFFICIAL_HEAD_PARTS = {"layer.": "prototypes.", "predictor.layers.": "layers."}
TRANSFORMERS_CONFIG = {
    "num_attention_heads": "num_heads",
    "num_heads": "num_heads",
    "layer_norm_eps": "norm_eps",
}
OFFICIAL_CONFIG = {**TRANSFORMERS_CONFIG, "decoder_num_heads": "decoder_num_heads"}
OFFICIAL_UNUSED = ("embeddings.mask_token", "pooler.")
OFFICIAL_UNUSED_DECODER = ("embeddings.", "pooler.")
HEADS = ("sparse_head", "cls_head")


@dataclass(frozen=True)
class Checkpoint:
    """Weights of any layout by the names of `Stellar`.

    Attributes:
        path:
            The weight file, or timm's name of the model.
        layout:
            What the file was recognised as.
        state:
            Tensors by their names in `Stellar`; the CLS position is in the CLS token,
            query, key and value are fused.
        heads:
            States of the `STELLARProjectionHead`s "sparse_head" and "cls_head", as far
            as they are there.
        config:
            What is known for sure of the arguments of `Stellar`: all of them for models
            of this package, else num_heads, norm_eps, pos_antialias and the like.
        num_queries:
            How many of the register tokens are queries, None if nothing says so.
        grid_size:
            Patch grid of the position table, None if it does not say.
        unexpected:
            Names that the layout does not have.
        ignored:
            Names of the layout that nothing depends on.
    """

    path: Path
    layout: str
    state: State
    heads: dict[str, State] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    num_queries: int | None = None
    grid_size: tuple[int, int] | None = None
    unexpected: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()


def read_checkpoint(
    source: str | Path, *, variant: str | None = None, **hub_kwargs: Any
) -> Checkpoint:
    """Reads a checkpoint of any known layout.

    Args:
        source:
            File, folder, "stellar-b16" and its like, hub repository ("owner/name") or
            timm model ("timm:NAME"). An existing path wins.
        variant:
            Which file of a hub repository, for example "b16" of "microsoft/STELLAR".
        hub_kwargs:
            revision, cache_dir, token, local_files_only, force_download.

    Raises:
        FileNotFoundError: If there is nothing of that name.
        ValueError: If the file cannot be read, is of no known layout or mixes several.
    """
    return parse(read_source(source, variant, **hub_kwargs))


def parse(raw: RawCheckpoint) -> Checkpoint:
    """Recognises the layout from the names, and renames.

    Args:
        raw:
            What a source holds.

    Raises:
        ValueError: If the layout is not known or the tensors do not fit it.
    """
    tensors, wrappers, left = _unwrap(raw.content)
    layout, prefix = _recognise(tensors, raw.path)
    inside = {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
    outside = {k: v for k, v in tensors.items() if not k.startswith(prefix)}
    try:
        if layout == STELLAR:
            return _parse_own(raw, inside, outside, left)
        if layout == OFFICIAL:
            result = _parse_official(raw, inside)
        elif layout == TRANSFORMERS:
            result = _parse_transformers(raw, inside)
        else:
            result = _parse_timm_like(raw, inside, [*wrappers, *prefix.split(".")])
    except ValueError as error:
        raise ValueError(f"'{raw.path}' cannot be used: {error}.") from error
    return replace(result, ignored=(*result.ignored, *outside, *left))


def shown(names: list[str] | tuple[str, ...]) -> str:
    """The first names, and how many more there are."""
    more = len(names) - MAX_KEYS_SHOWN
    return ", ".join(names[:MAX_KEYS_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _unwrap(content: Mapping[str, Any]) -> tuple[State, list[str], list[str]]:
    """Tensors, the dictionaries around them, and the names of what is beside those."""
    wrappers: list[str] = []
    left: list[str] = []
    while True:
        inner = [w for w in WRAPPERS if isinstance(content.get(w), Mapping)]
        if not inner:
            break
        left += [name for name in content if name != inner[0]]
        wrappers.append(inner[0])
        content = content[inner[0]]
    tensors = {k: v for k, v in content.items() if isinstance(v, Tensor)}
    left += [name for name in content if name not in tensors]
    return tensors, wrappers, left


def _recognise(tensors: State, path: Path) -> tuple[str, str]:
    """Layout, and what stands in front of its names."""
    for layout, anchors in ANCHORS.items():
        for anchor in anchors:
            prefixes = [
                name.removesuffix(anchor)
                for name in tensors
                if name == anchor or name.endswith(f".{anchor}")
            ]
            if prefixes:
                words = PREFERRED_OWN if layout == STELLAR else PREFERRED
                return layout, _preferred(prefixes, words, path)
    raise ValueError(
        f"'{path}' is of no known layout. Its names: "
        f"{shown(list(tensors)) or 'none, it holds no tensors'}. Known layouts: "
        f"{'; '.join(KNOWN_LAYOUTS)}."
    )


def _preferred(prefixes: list[str], words: tuple[str, ...], path: Path) -> str:
    if len(prefixes) == 1:
        return prefixes[0]
    for word in words:
        chosen = [prefix for prefix in prefixes if word in prefix.split(".")]
        if len(chosen) == 1:
            return chosen[0]
    raise ValueError(
        f"'{path}' mixes several ViTs, under {prefixes}; save the one you want alone."
    )


def _parse_own(
    raw: RawCheckpoint, inside: State, outside: State, left: list[str]
) -> Checkpoint:
    heads = {name: _part(inside | outside, f"{name}.") for name in HEADS}
    file = raw.path.parent / HEADS_NAME
    if raw.path.name == WEIGHTS_NAME and file.is_file():
        tensors = load_file(file)
        heads = {name: _part(tensors, f"{name}.") for name in HEADS}
    in_head = tuple(f"{name}." for name in HEADS)
    # Checkpoints of training keep the arguments of the model themselves.
    config = raw.content.get("hyper_parameters", {}).get("model")
    if config is None and raw.config:
        config = checked_config(raw.config, raw.path.parent / "config.json")
    config = dict(config or {})
    return Checkpoint(
        raw.path,
        STELLAR,
        {k: v for k, v in inside.items() if not k.startswith(in_head)},
        heads={name: head for name, head in heads.items() if head},
        config=config,
        num_queries=config.get("num_queries", 16) if config else None,
        ignored=(*(k for k in outside if not k.startswith(in_head)), *left),
    )


def _parse_official(raw: RawCheckpoint, state: State) -> Checkpoint:
    encoder = from_transformers(_part(state, "encoder."), OFFICIAL_UNUSED)
    decoder = from_transformers(_part(state, "decoder."), OFFICIAL_UNUSED_DECODER)
    result: State = {f"encoder.vit.{k}": v for k, v in _folded(encoder.state).items()}
    result |= {f"decoder.{name}": v for name, v in decoder.state.items()}
    heads: dict[str, State] = {}
    unexpected: list[str] = []
    ignored = [f"encoder.{n}" for n in encoder.ignored]
    ignored += [f"decoder.{n}" for n in decoder.ignored]
    for name, tensor in state.items():
        if name == "sparse_tokens":
            result["encoder.vit.reg_token"] = tensor[None]
        elif name == OFFICIAL_FREQUENCIES:
            result["decoder.position.frequencies"] = tensor
        elif name.startswith(tuple(OFFICIAL_MODULES)):
            result[_renamed(name, OFFICIAL_MODULES)] = tensor
        elif name.startswith(tuple(OFFICIAL_HEADS)):
            old, rest = name.split(".", 1)
            head = heads.setdefault(OFFICIAL_HEADS[f"{old}."], {})
            head[_renamed(rest, OFFICIAL_HEAD_PARTS)] = tensor
        elif name.startswith("teacher_"):
            ignored.append(name)
        elif not name.startswith(("encoder.", "decoder.")):
            unexpected.append(name)
    unexpected += [f"encoder.{n}" for n in encoder.unexpected]
    unexpected += [f"decoder.{n}" for n in decoder.unexpected]
    queries = state.get("sparse_tokens")
    return Checkpoint(
        raw.path,
        OFFICIAL,
        result,
        heads,
        config={
            "norm_eps": STELLAR_NORM_EPS,
            "pos_antialias": False,
            **_transformers_config(raw.config, OFFICIAL_CONFIG),
        },
        num_queries=0 if queries is None else len(queries),
        grid_size=_grid(result.get("encoder.vit.pos_embed")),
        unexpected=tuple(unexpected),
        ignored=tuple(ignored),
    )


def _parse_transformers(raw: RawCheckpoint, state: State) -> Checkpoint:
    unused = ("embeddings.mask_token", "pooler.", "classifier.", "decoder.")
    names = from_transformers(state, unused)
    # transformers gives its ViTs the same epsilon as the released STELLAR models.
    config = {"norm_eps": STELLAR_NORM_EPS, "pos_antialias": False}
    config |= _transformers_config(raw.config, TRANSFORMERS_CONFIG)
    return _plain(raw, TRANSFORMERS, names, config)


def _parse_timm_like(
    raw: RawCheckpoint, state: State, wrappers: list[str]
) -> Checkpoint:
    layout = _timm_relative(state, wrappers)
    names = from_timm_like(state)
    config: dict[str, Any] = {"norm_eps": 1e-6}
    if "norm_pre.weight" in state:
        config = {}  # CLIP's ViTs come with several
    if layout != "timm":
        # DINOv2 with registers was released with antialiasing.
        config["pos_antialias"] = "register_tokens" in state
    if layout == "MoCo v3":
        config["num_heads"] = 12  # its ViT-S too
    known = ("num_heads", "norm_eps", "pos_antialias", "mean", "std")
    config |= {name: raw.config[name] for name in known if name in raw.config}
    result = _plain(raw, layout, names, config, raw.config.get("grid_size"))
    return replace(result, num_queries=int(raw.metadata.get("num_queries", 0)))


def _timm_relative(state: State, wrappers: list[str]) -> str:
    if {"base_encoder", "momentum_encoder"} & set(wrappers):
        return "MoCo v3"
    if "target_encoder" in wrappers:
        return "I-JEPA"
    if any(name.endswith(".q_bias") for name in state):
        return "BEiT"
    if any(name.startswith("decoder_") for name in state):
        return "MAE"
    if {"register_tokens", "mask_token"} & set(state):
        return "DINOv2"
    if {"teacher", "student", "state_dict"} & set(wrappers):
        return "DINO or iBOT"
    return "MAE" if "model" in wrappers else "timm"


def _plain(
    raw: RawCheckpoint,
    layout: str,
    names: Names,
    config: dict[str, Any],
    grid_size: tuple[int, int] | None = None,
) -> Checkpoint:
    """Checkpoint of a ViT without STELLAR's parts."""
    state = _folded(names.state, grid_size)
    return Checkpoint(
        raw.path,
        layout,
        {f"encoder.vit.{name}": tensor for name, tensor in state.items()},
        config=config,
        num_queries=0,
        grid_size=grid_size or _grid(state.get("pos_embed")),
        unexpected=tuple(names.unexpected),
        ignored=tuple(names.ignored),
    )


def _folded(state: State, grid_size: tuple[int, int] | None = None) -> State:
    """Moves the positions of CLS token and registers into the tokens themselves."""
    table = state.get("pos_embed")
    if table is None or table.ndim != 3:
        return state
    tokens = [name for name in ("cls_token", "reg_token") if name in state]
    counts = [state[name].shape[1] for name in tokens]
    prefix = _prefix_rows(table.shape[1], counts, grid_size)
    result = {**state, "pos_embed": table[:, prefix:].contiguous()}
    start = 0
    for name, count in zip(tokens, counts, strict=True):
        if start + count <= prefix:
            result[name] = state[name] + table[:, start : start + count]
        start += count
    return result


def _prefix_rows(
    rows: int, counts: list[int], grid_size: tuple[int, int] | None
) -> int:
    """How many rows of a position table come before those of the patches."""
    options = [sum(counts[:i]) for i in (1, 2, 0) if i <= len(counts)]
    for prefix in options:
        patches = rows - prefix
        if grid_size is not None:
            if patches == grid_size[0] * grid_size[1]:
                return prefix
        elif patches > 0 and isqrt(patches) ** 2 == patches:
            return prefix
    return options[0]


def _grid(table: Tensor | None) -> tuple[int, int] | None:
    if table is None or table.ndim != 3:
        return None
    side = isqrt(table.shape[1])
    return (side, side) if side * side == table.shape[1] else None


def _transformers_config(
    config: Mapping[str, Any], names: Mapping[str, str]
) -> dict[str, Any]:
    """What a config.json tells that tensors do not, by the names of `Stellar`."""
    if "schema_version" in config:
        return {}  # it belongs to a model of this package that lies in the same folder
    return {new: config[old] for old, new in names.items() if old in config}


def _part(state: State, prefix: str) -> State:
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def _renamed(name: str, modules: Mapping[str, str]) -> str:
    for old, new in modules.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name
