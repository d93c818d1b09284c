"""From the names of each layout to those of `Stellar`."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from stellar_plugin.checkpoints import methods
from stellar_plugin.checkpoints.checkpoint import Checkpoint
from stellar_plugin.checkpoints.files import (
    HEADS_NAME,
    WEIGHTS_NAME,
    RawCheckpoint,
    checked_config,
)
from stellar_plugin.checkpoints.layouts import OFFICIAL, STELLAR, TIMM, TRANSFORMERS
from stellar_plugin.checkpoints.methods import Files
from stellar_plugin.checkpoints.names import (
    Names,
    State,
    check_dimensions,
    from_timm_like,
    from_transformers,
    part,
)
from stellar_plugin.checkpoints.positions import PREFIX_TOKENS
from stellar_plugin.checkpoints.sizes import depth
from stellar_plugin.checkpoints.timm_models import described, dinov3
from stellar_plugin.state_dict import unwrapped
from stellar_plugin.vit import STELLAR_NORM_EPS
from stellar_plugin.weight_files import CONFIG_NAME, METADATA_KEY, read_tensors

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
    "hidden_act": "activation",
}
OFFICIAL_CONFIG = {**TRANSFORMERS_CONFIG, "decoder_num_heads": "decoder_num_heads"}
TIMM_CONFIG = (
    *("model_name", "num_heads", "activation", "norm_eps", "pos_antialias"),
    *("mean", "std"),
)
# What exports of this package say beyond that.
EXPORTED = ("pos_embed", "final_norm")
TRANSFORMERS_UNUSED = ("embeddings.mask_token", "pooler.", "classifier.")
OFFICIAL_UNUSED = ("embeddings.mask_token", "pooler.")
OFFICIAL_UNUSED_DECODER = ("embeddings.", "pooler.")
HEADS = ("sparse_head", "cls_head")


def read_own(
    raw: RawCheckpoint, inside: State, outside: State, left: list[str]
) -> Checkpoint:
    """Reads a model, or a training checkpoint, of this package."""
    file = raw.path.parent / HEADS_NAME
    beside = raw.path.name == WEIGHTS_NAME and file.is_file()
    in_head = tuple(f"{name}." for name in HEADS)
    tensors: Mapping[str, Any] = inside | outside
    unexpected: list[str] = []
    if beside:
        tensors = unwrapped(read_tensors(file)[0])
        unexpected = [k for k in tensors if not k.startswith(in_head)]
    heads = {name: part(tensors, f"{name}.") for name in HEADS}
    # Checkpoints of training keep the arguments of the model themselves.
    settings = raw.content.get("hyper_parameters")
    config = settings.get("model") if isinstance(settings, Mapping) else None
    if config is None and raw.config:
        config = checked_config(raw.config, raw.path.parent / CONFIG_NAME)
    config = as_mapping(config, "hyper_parameters.model")
    method = methods.of_own(config.pop("method", raw.content.get("method", "STELLAR")))
    if method.name != "STELLAR":
        return _own_encoder(raw, inside, outside, config, method)
    if config and not any(name.startswith("decoder.") for name in inside):
        config["target"] = None  # trained without reconstruction
    for prefix, name in (("encoder.vit.", "depth"), ("decoder.", "decoder_depth")):
        blocks = depth(part(inside, prefix))
        if blocks and config.get(name, blocks) != blocks:
            raise ValueError(
                f"it has {blocks} blocks, its config says {name}="
                f"{reprlib.repr(config[name])}"
            )
    return Checkpoint(
        raw.path,
        STELLAR,
        {k: v for k, v in inside.items() if not k.startswith(in_head)},
        heads={name: head for name, head in heads.items() if head},
        config=config,
        num_queries=config.get("num_queries", 16) if config else None,
        unexpected=tuple(unexpected),
        ignored=(*(k for k in outside if not k.startswith(in_head)), *left),
    )


def _own_encoder(
    raw: RawCheckpoint,
    inside: State,
    outside: State,
    config: dict[str, Any],
    method: methods.Method,
) -> Checkpoint:
    """An encoder that another method trained, alone or in a training checkpoint."""
    state = {k: v for k, v in inside.items() if k.startswith("encoder.")}
    return Checkpoint(
        raw.path,
        STELLAR,
        state,
        method=method,
        rule=f"its {CONFIG_NAME}" if raw.config else "its training checkpoint",
        config={**config, "num_queries": 0, "target": None},
        num_queries=0,
        ignored=(*(k for k in inside if k not in state), *outside),
    )


def read_official(raw: RawCheckpoint, state: State, files: Files | None) -> Checkpoint:
    """Reads the official layout."""
    encoder = from_transformers(part(state, "encoder."), ignored=OFFICIAL_UNUSED)
    decoder = from_transformers(
        part(state, "decoder."), ignored=OFFICIAL_UNUSED_DECODER
    )
    result: State = {f"encoder.vit.{k}": v for k, v in encoder.state.items()}
    result |= {f"decoder.{name}": v for name, v in decoder.state.items()}
    heads: dict[str, State] = {}
    unexpected: list[str] = []
    ignored = [f"encoder.{n}" for n in encoder.ignored]
    ignored += [f"decoder.{n}" for n in decoder.ignored]
    for name, tensor in state.items():
        if name == "sparse_tokens":
            check_dimensions(name, tensor, 2)
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
        heads=heads,
        config={
            **(files.numerics() if files else {}),
            **_transformers_config(raw.config, OFFICIAL_CONFIG),
        },
        num_queries=0 if queries is None else len(queries),
        grid_size=_transformers_grid(raw.config),
        prefixes=(1,),
        unexpected=tuple(unexpected),
        ignored=tuple(ignored),
    )


def read_transformers(
    raw: RawCheckpoint, state: State, files: Files | None
) -> Checkpoint:
    """Reads a ViT of transformers, or of a method whose names are close to its."""
    if "embeddings.register_tokens" in state and "layer.0.norm1.weight" in state:
        raise ValueError(
            "it is DINOv3 by the names of transformers; take timm's file of the same "
            "weights, as by 'timm:vit_small_patch16_dinov3', or Meta's own"
        )
    # transformers gives its ViTs the same epsilon as the released STELLAR models.
    files = files or Files(TRANSFORMERS, norm_eps=STELLAR_NORM_EPS)
    unused = (*TRANSFORMERS_UNUSED, *files.ignored)
    names = from_transformers(state, files.renamed, unused)
    config = files.numerics()
    config |= _transformers_config(raw.config, TRANSFORMERS_CONFIG)
    _check_sizes(raw.config, names.state)
    grid_size = _transformers_grid(raw.config)
    return _plain(raw, TRANSFORMERS, names, config, grid_size=grid_size)


def read_timm_like(raw: RawCheckpoint, state: State, files: Files | None) -> Checkpoint:
    """Reads a ViT of timm or of one of the methods whose names are close to timm's."""
    files = files or Files(ignored=methods.ignored(TIMM), pos_antialias=None)
    exported = as_mapping(
        json.loads(raw.metadata.get(METADATA_KEY, "{}")), METADATA_KEY
    )
    # What lightly-train notes, what timm knows of its own models, and what our exports
    # say of themselves.
    run = as_mapping(raw.content.get("lightly_train"), "lightly_train")
    normalize = as_mapping(run.get("normalize_args"), "lightly_train.normalize_args")
    settings = {**normalize, **_timm_config(raw.config, state), **exported}
    rotary = settings.get("rotary", _is_dinov3(state))
    _check_copy(state)
    names = from_timm_like(state, files.renamed, files.ignored, rotary)
    if rotary and "model_name" not in settings:
        settings |= _of_dinov3(state, names.state)
    known = {name: settings[name] for name in TIMM_CONFIG if name in settings}
    known |= {name: exported[name] for name in EXPORTED if name in exported}
    if known.get("pos_embed") == "sincos" and "pos_embed" in names.state:
        del names.state["pos_embed"]  # made anew for every grid
        names.ignored.append("pos_embed")
    config = {**files.numerics(), **known}
    if "norm_pre.weight" in state and "norm_eps" not in known:
        del config["norm_eps"]  # CLIP's ViTs come with several
    images = {k: settings[k] for k in ("interpolation", "crop_pct") if k in settings}
    usual = {"norm_eps": 1e-5, "pos_antialias": True, "activation": "GELU"}
    if rotary and "pos_embed" not in names.state:
        del usual["pos_antialias"]
    grid = settings.get("grid_size")
    result = _plain(
        raw,
        TIMM,
        names,
        config,
        grid_size=None if grid is None else (int(grid[0]), int(grid[1])),
        assumed={k: v for k, v in usual.items() if k not in config},
        images=images,
        rotary=rotary,
        num_queries=exported.get("num_queries", 0),
    )
    method = methods.of_timm(settings.get("timm_name", ""))
    rule = f"timm's name {settings.get('timm_name')}" if method else ""
    prefixes = (0,) if exported else result.prefixes
    return replace(result, method=method, rule=rule, prefixes=prefixes)


def _check_copy(state: State) -> None:
    """Raises a ValueError if SiameseIM's weights and their average differ in depth."""
    blocks, copies = depth(state), depth(part(state, "mm_"))
    if copies and blocks != copies:
        raise ValueError(
            f"it has {blocks} blocks and the average of {copies}, so it was cut: take "
            "it as it was published"
        )


def _is_dinov3(state: State) -> bool:
    """Whether a ViT has registers and the LayerScale of DINOv3, and no position table.

    Everything else that only rotates is told by a name of timm.
    """
    registers = "storage_tokens" in state or (
        "reg_token" in state and "blocks.0.gamma_2" in state
    )
    return registers and "pos_embed" not in state


def _of_dinov3(state: State, vit: State) -> dict[str, Any]:
    """Settings of a DINOv3 that has neither name nor config.

    Args:
        state:
            Tensors of the file; that of Meta has the periods of the rotation.
        vit:
            Those by timm's names.
    """
    width = len(vit.get("norm.weight", ()))
    settings = dinov3(width, gated="blocks.0.mlp.fc1_g.weight" in vit)
    periods = state.get("rope_embed.periods")
    count = width // settings["num_heads"] // 4
    usual = 100 ** (torch.arange(count) / count)
    # Meta's are rounded to bfloat16.
    if periods is not None and (
        periods.shape != usual.shape
        or not torch.allclose(periods.to(usual), usual, rtol=2**-7)
    ):
        raise ValueError(
            f"its rotation has the periods {reprlib.repr(periods.tolist())}, DINOv3's "
            f"of {settings['num_heads']} heads are {reprlib.repr(usual.tolist())}"
        )
    return settings


def _timm_config(config: Mapping[str, Any], vit: State) -> dict[str, Any]:
    """Settings as `read_source` gives them, or in a config.json of timm."""
    if "schema_version" in config:
        return {}  # it belongs to a model of this package that lies in the same folder
    nested = as_mapping(config.get("pretrained_cfg"), "pretrained_cfg")
    kernel = vit.get("patch_embed.proj.weight", torch.empty(0))
    built = described(config, len(kernel), depth(vit))
    return {**config, **nested, **built}


def as_mapping(value: Any, name: str) -> dict[str, Any]:
    """A value of a file as dictionary, an empty one for None.

    Raises:
        ValueError: If it is something else, or has keys that are no text.
    """
    if value is None:
        return {}
    if not isinstance(value, Mapping) or not all(isinstance(k, str) for k in value):
        raise ValueError(f"{name} must be a dictionary, got {reprlib.repr(value)}")
    return dict(value)


def _plain(
    raw: RawCheckpoint,
    layout: str,
    names: Names,
    config: dict[str, Any],
    **known: Any,
) -> Checkpoint:
    """Checkpoint of a ViT without STELLAR's parts."""
    vit = names.state
    cls, registers = (
        vit[name].shape[1] if name in vit else 0 for name in PREFIX_TOKENS
    )
    arguments = {"num_queries": 0, "prefixes": (cls, cls + registers), **known}
    return Checkpoint(
        raw.path,
        layout,
        {f"encoder.vit.{name}": tensor for name, tensor in vit.items()},
        config=config,
        unexpected=tuple(names.unexpected),
        ignored=tuple(names.ignored),
        **arguments,
    )


def _transformers_config(
    config: Mapping[str, Any], names: Mapping[str, str]
) -> dict[str, Any]:
    """What a config.json tells that tensors do not, by the names of `Stellar`."""
    if "schema_version" in config:
        return {}  # it belongs to a model of this package that lies in the same folder
    found = {new: config[old] for old, new in names.items() if old in config}
    if found.get("activation") == "gelu":
        found["activation"] = "GELU"  # the name of torch's class
    return found


def _transformers_grid(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """Patch grid by a config.json of transformers, None if it does not tell."""
    if "schema_version" in config:
        return None
    image, patch = (
        size if isinstance(size, (list, tuple)) else (size, size)
        for size in (config.get("image_size"), config.get("patch_size"))
    )
    try:
        return image[0] // patch[0], image[1] // patch[1]
    except (TypeError, ZeroDivisionError, IndexError):
        return None


def _check_sizes(config: Mapping[str, Any], vit: State) -> None:
    """Raises a ValueError if a config.json of transformers is of another model."""
    width, blocks = len(vit.get("norm.weight", ())), depth(vit)
    told = {} if "schema_version" in config else config
    theirs = told.get("hidden_size", width), told.get("num_hidden_layers", blocks)
    if width and blocks and theirs != (width, blocks):
        raise ValueError(
            f"config.json says a width of {theirs[0]} and {theirs[1]} blocks, the "
            f"weights have {width} and {blocks}; take the files of one model"
        )


def _renamed(name: str, modules: Mapping[str, str]) -> str:
    for old, new in modules.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name
