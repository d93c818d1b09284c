"""Weights from a file into an encoder: all fit, or an error says which do not."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor

from stellar_plugin.encoder import StellarEncoder
from stellar_plugin.model import CONFIG_NAME, WEIGHTS_NAME, Stellar, read_config

logger = logging.getLogger(__name__)

ENCODER_PREFIX = "encoder."
POSITION_KEY = "vit.pos_embed"
# An error with thousands of keys helps nobody.
MAX_KEYS_SHOWN = 8


@dataclass(frozen=True)
class EncoderCheckpoint:
    """The encoder's part of a checkpoint.

    Attributes:
        path:
            The weight file.
        state:
            Tensors by their names in `StellarEncoder`.
        config:
            What `Stellar` was built with, None where the weights came without it.
    """

    path: Path
    state: dict[str, Tensor]
    config: dict[str, Any] | None


def read_encoder_checkpoint(path: str | Path) -> EncoderCheckpoint:
    """Reads the encoder's tensors of a checkpoint, leaving the decoder's.

    Args:
        path:
            Folder that `Stellar.save_pretrained` wrote, or the weight file in it. A
            config.json beside the weights is read too.

    Raises:
        FileNotFoundError: If there are no weights.
        ValueError: If the file is no safetensors file, or holds no STELLAR encoder.
    """
    path = Path(path)
    weights = path / WEIGHTS_NAME if path.is_dir() else path
    if not weights.is_file():
        raise FileNotFoundError(
            f"There is no checkpoint '{weights}'. Give a folder that save_pretrained "
            f"wrote ({WEIGHTS_NAME} and {CONFIG_NAME}), or a .safetensors file."
        )
    try:
        tensors = safetensors.torch.load_file(weights)
    except SafetensorError as error:
        raise ValueError(f"'{weights}' is no safetensors file: {error}.") from error
    state = {
        name.removeprefix(ENCODER_PREFIX): tensor
        for name, tensor in tensors.items()
        if name.startswith(ENCODER_PREFIX)
    }
    if not state:
        raise ValueError(
            f"'{weights}' holds no STELLAR encoder: no key starts with "
            f"'{ENCODER_PREFIX}'. Its keys: {_shown(list(tensors))}."
        )
    config = weights.parent / CONFIG_NAME
    return EncoderCheckpoint(
        weights, state, read_config(config) if config.is_file() else None
    )


def load_encoder_weights(
    encoder: StellarEncoder, path: str | Path
) -> EncoderCheckpoint:
    """Loads the encoder's weights of a checkpoint into an encoder.

    The position embedding of another image size is resampled, and that is logged.

    Args:
        encoder:
            Encoder of the checkpoint's architecture; changed in place.
        path:
            As for `read_encoder_checkpoint`.

    Returns:
        What was read; its config tells the mean and std that images need.

    Raises:
        FileNotFoundError: If there are no weights.
        ValueError: If a tensor is missing, left over or of another shape, or if the
            checkpoint was trained with another number of heads, LayerNorm epsilon or
            way of resampling positions, none of which a tensor shows.
    """
    checkpoint = read_encoder_checkpoint(path)
    grid_size = None
    if checkpoint.config is not None:
        with torch.device("meta"):
            trained = Stellar(**checkpoint.config).encoder
        _check_settings(encoder, trained, checkpoint.path)
        grid_size = trained.grid_size
    state = _resample_position(encoder, checkpoint.state, grid_size)
    _check_tensors(encoder, state, checkpoint.path)
    encoder.load_state_dict(state)
    return checkpoint


def _check_settings(
    encoder: StellarEncoder, trained: StellarEncoder, path: Path
) -> None:
    ours, theirs = _settings(encoder), _settings(trained)
    wrong = [
        f"{name}={ours[name]} (checkpoint: {theirs[name]})"
        for name in ours
        if ours[name] != theirs[name]
    ]
    if wrong:
        raise ValueError(
            f"The encoder is not the one '{path}' was trained with: {', '.join(wrong)}."
            " Build it with the checkpoint's values."
        )


def _settings(encoder: StellarEncoder) -> dict[str, object]:
    """What changes the features but no tensor's shape."""
    num_heads = encoder.vit.blocks[0].get_submodule("attn").num_heads
    return {
        "num_queries": encoder.num_queries,
        "patch_size": encoder.patch_size,
        "num_heads": num_heads,
        "norm_eps": encoder.vit.norm.eps,
        "pos_antialias": encoder.pos_antialias,
    }


def _check_tensors(
    encoder: StellarEncoder, state: dict[str, Tensor], path: Path
) -> None:
    expected = encoder.state_dict()
    shapes = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in state and state[name].shape != tensor.shape
    ]
    problems = {
        "missing": [name for name in expected if name not in state],
        "unexpected": [name for name in state if name not in expected],
        "of another shape": shapes,
    }
    found = [f"{kind}: {_shown(names)}" for kind, names in problems.items() if names]
    if found:
        raise ValueError(
            f"'{path}' does not fit the encoder; {'; '.join(found)}. Build the encoder "
            "with the checkpoint's model_name and sizes."
        )


def _resample_position(
    encoder: StellarEncoder,
    state: dict[str, Tensor],
    grid_size: tuple[int, int] | None,
) -> dict[str, Tensor]:
    """Brings the position embedding of another image size to the encoder's grid."""
    table = state.get(POSITION_KEY)
    if table is None or encoder.vit.pos_embed is None:
        return state
    side = isqrt(table.shape[1])
    old_grid = grid_size or (side, side)
    # A table of no known grid is left to the check of shapes.
    if old_grid == encoder.grid_size or old_grid[0] * old_grid[1] != table.shape[1]:
        return state
    # A warning, since that is what is seen where nobody configured logging.
    logger.warning(
        "Position embedding resampled from %d x %d to %d x %d patches.",
        *old_grid,
        *encoder.grid_size,
    )
    return {**state, POSITION_KEY: _resized(encoder, table, old_grid)}


def _resized(
    encoder: StellarEncoder, table: Tensor, old_grid: tuple[int, int]
) -> Tensor:
    grid = table.float().unflatten(1, old_grid).permute(0, 3, 1, 2)
    grid = F.interpolate(
        grid,
        size=encoder.grid_size,
        mode="bicubic",
        antialias=encoder.pos_antialias,
        align_corners=False,
    )
    return grid.flatten(2).mT.to(table.dtype)


def _shown(names: list[str]) -> str:
    more = len(names) - MAX_KEYS_SHOWN
    return ", ".join(names[:MAX_KEYS_SHOWN]) + (f" and {more} more" if more > 0 else "")
