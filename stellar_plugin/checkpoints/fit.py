"""Whether the tensors of a checkpoint fit a model, and how they are made to."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from stellar_plugin.checkpoints import methods
from stellar_plugin.checkpoints.checkpoint import Checkpoint
from stellar_plugin.checkpoints.layouts import STELLAR
from stellar_plugin.checkpoints.names import State
from stellar_plugin.checkpoints.positions import Grid
from stellar_plugin.checkpoints.sizes import encoder_config, encoder_state
from stellar_plugin.checkpoints.sizes import heads as heads_of
from stellar_plugin.encoder import StellarEncoder
from stellar_plugin.state_dict import misfits
from stellar_plugin.vit import HEADS_OF_WIDTH, RotaryViT, resample_position

POSITION_KEY = "vit.pos_embed"
QUERY_KEY = "vit.reg_token"
PROJECTIONS = ("dense_proj.", "sparse_proj.")


def fitted(
    encoder: StellarEncoder, checkpoint: Checkpoint, num_heads: int | None
) -> tuple[State, list[str], list[str]]:
    """State for the encoder, what of it is fresh, and what was resampled.

    Raises:
        ValueError: If the checkpoint was trained with other settings, or a tensor is
            missing, left over or of another shape.
    """
    checkpoint.require_vit()
    _check_settings(encoder, checkpoint, num_heads)
    if checkpoint.layout == STELLAR and checkpoint.config:
        checkpoint = replace(checkpoint, grid_size=_own_encoder(checkpoint).grid_size)
    state, grid = encoder_state(checkpoint, encoder.grid_size)
    fresh = encoder.state_dict()
    missing = []
    projections = [name for name in fresh if name.startswith(PROJECTIONS)]
    if not any(name.startswith(PROJECTIONS) for name in state):
        missing = projections
        state |= {name: fresh[name] for name in missing}
    elif not projections:  # an encoder without localization
        state = {k: v for k, v in state.items() if not k.startswith(PROJECTIONS)}
    if encoder.num_queries and checkpoint.num_queries == 0:
        queries = fresh[QUERY_KEY][:, -encoder.num_queries :]
        registers = state.get(QUERY_KEY, queries[:, :0]).to(queries)
        if registers.shape[::2] == queries.shape[::2]:
            state[QUERY_KEY] = torch.cat([registers, queries], dim=1)
            missing.append(QUERY_KEY)
    resized = _resample_position(encoder, state, grid, checkpoint)
    check_tensors(encoder, state, checkpoint, "encoder")
    return state, missing, resized


def _check_settings(
    encoder: StellarEncoder, checkpoint: Checkpoint, num_heads: int | None
) -> None:
    ours, theirs = encoder_settings(encoder), _trained_settings(checkpoint, num_heads)
    wrong = [
        f"{name}={ours.get(name)} (checkpoint: {str(value)[:50]})"
        for name, value in theirs.items()
        if ours.get(name) != value
        and not (name == "pos_antialias" and encoder.any_antialias)
    ]
    if wrong:
        raise ValueError(
            f"The encoder is not the one '{checkpoint.path}' ({checkpoint.read_as}) "
            f"was trained with: {', '.join(wrong)}. Build it with the "
            "checkpoint's values."
        )


def encoder_settings(encoder: StellarEncoder) -> dict[str, Any]:
    """What changes the features but no tensor's shape."""
    block: Any = encoder.vit.blocks[0]
    rotary = isinstance(encoder.vit, RotaryViT)
    return {
        **({"rotation": encoder.vit.rotation} if rotary else {}),
        **({"pos_embed": "sincos"} if encoder.vit.sincos else {}),
        "num_queries": encoder.num_queries,
        "patch_size": encoder.patch_size,
        "num_heads": block.attn.num_heads,
        "activation": type(block.mlp.act).__name__,
        "norm_eps": block.norm1.eps,
        "pos_antialias": encoder.pos_antialias,
    }


def untold_settings(
    encoder: StellarEncoder, checkpoint: Checkpoint, num_heads: int | None
) -> list[str]:
    """What changes the features and nothing tells, as the encoder has it."""
    names = [n for n in checkpoint.assumed if n != "num_heads" or num_heads is None]
    if checkpoint.layout == STELLAR:
        names += [] if checkpoint.config else list(encoder_settings(encoder))
    elif num_heads is None and "num_heads" not in (*names, *checkpoint.config):
        names.append("num_heads")  # by the width
    settings = encoder_settings(encoder)
    texts = [f"{name}={settings[name]}" for name in names]
    known = checkpoint.grid_size or checkpoint.layout == STELLAR
    if encoder.vit.pos_embed is not None and not known:
        height, width = encoder_state(checkpoint, encoder.grid_size)[1] or (0, 0)
        texts.append(f"positions of {height} x {width} patches")
    return texts


def _trained_settings(checkpoint: Checkpoint, num_heads: int | None) -> dict[str, Any]:
    """The same of the checkpoint, as far as it is known."""
    if checkpoint.layout == STELLAR:
        if not checkpoint.config:
            return {}
        settings = encoder_settings(_own_encoder(checkpoint))
        if not checkpoint.num_queries:
            del settings["num_queries"]  # a plain ViT, which may get some
        return settings
    names = ("num_heads", "activation", "norm_eps", "pos_antialias")
    known = {k: checkpoint.config[k] for k in names if k in checkpoint.config}
    known["pos_embed"] = checkpoint.config.get("pos_embed")
    if checkpoint.num_queries:
        known["num_queries"] = checkpoint.num_queries
    if checkpoint.rotary:
        named = _own_encoder(checkpoint, num_heads)
        known["rotation"] = encoder_settings(named)["rotation"]
    kernel = checkpoint.state.get("encoder.vit.patch_embed.proj.weight")
    if num_heads or (kernel is not None and len(kernel) in HEADS_OF_WIDTH):
        known["num_heads"] = heads_of(checkpoint, num_heads)
    return known


def _resample_position(
    encoder: StellarEncoder, state: State, grid: Grid | None, checkpoint: Checkpoint
) -> list[str]:
    """Brings the position embedding of another image size to the encoder's grid."""
    if grid in (None, encoder.grid_size) or encoder.vit.pos_embed is None:
        return []
    known = {**checkpoint.assumed, **checkpoint.config}
    antialias = encoder.pos_antialias
    if encoder.any_antialias:
        antialias = known.get("pos_antialias", antialias)
    state[POSITION_KEY] = resample_position(
        state[POSITION_KEY], grid, encoder.grid_size, antialias
    )
    (old_h, old_w), (new_h, new_w) = grid, encoder.grid_size
    return [f"{POSITION_KEY} from {old_h} x {old_w} to {new_h} x {new_w} patches"]


def _own_encoder(
    checkpoint: Checkpoint, num_heads: int | None = None
) -> StellarEncoder:
    config = encoder_config(checkpoint, num_heads)
    with checkpoint.building(), torch.device("meta"):
        return StellarEncoder(**config)


def check_tensors(
    module: nn.Module, state: State, checkpoint: Checkpoint, what: str
) -> None:
    """Compares names and shapes.

    Raises:
        ValueError: If a tensor is missing, left over or of another shape.
    """
    found = misfits(module.state_dict(), state)
    if found:
        raise ValueError(
            f"'{checkpoint.path}' does not fit the {what}; {found}. Build "
            f"the {what} with the checkpoint's sizes{_sizes_hint(checkpoint)}. It was "
            f"read as {checkpoint.read_as}; known layouts: {methods.known_layouts()}."
        )


def _sizes_hint(checkpoint: Checkpoint) -> str:
    if checkpoint.layout == STELLAR:
        config = checkpoint.config
    else:
        try:
            config = encoder_config(checkpoint, num_heads=0)
        except ValueError:
            return ""
    shown_config = {k: v for k, v in config.items() if k != "num_heads" or v}
    text = ", ".join(f"{name}={value!r}" for name, value in shown_config.items())
    return f" ({text})" if text else ""
