"""Weights into a model: all fit, or an error says which do not."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stellar_plugin.checkpoints.layouts import (
    KNOWN_LAYOUTS,
    STELLAR,
    Checkpoint,
    read_checkpoint,
    shown,
)
from stellar_plugin.checkpoints.names import State
from stellar_plugin.checkpoints.sizes import (
    HEADS_OF_WIDTH,
    encoder_config,
    part,
)
from stellar_plugin.checkpoints.sizes import heads as heads_of
from stellar_plugin.encoder import StellarEncoder

if TYPE_CHECKING:
    from stellar_plugin.model import Stellar

logger = logging.getLogger(__name__)

POSITION_KEY = "vit.pos_embed"
QUERY_KEY = "vit.reg_token"
PROJECTIONS = ("dense_proj.", "sparse_proj.")


@dataclass(frozen=True)
class LoadReport:
    """What became of the tensors of a checkpoint.

    Attributes:
        path:
            The weight file, or timm's name of the model.
        layout:
            What the file was recognised as.
        config:
            What the checkpoint tells of the arguments of `Stellar`, for example the
            mean and std that images need.
        matched:
            Tensors that were loaded, by our names.
        missing:
            Tensors that the checkpoint lacks and that keep their fresh values. Only
            queries, projections and decoder can be here.
        resized:
            Tensors that were resampled, with both sizes.
        unexpected:
            Tensors of the file that its layout does not have.
        ignored:
            Tensors of the file that nothing depends on.
    """

    path: Path
    layout: str
    config: dict[str, Any]
    matched: tuple[str, ...]
    missing: tuple[str, ...]
    resized: tuple[str, ...]
    unexpected: tuple[str, ...]
    ignored: tuple[str, ...]

    def __str__(self) -> str:
        parts = {
            "missing, so freshly initialised": self.missing,
            "resampled": self.resized,
            "unexpected": self.unexpected,
            "ignored": self.ignored,
        }
        rest = [f"{len(v)} {kind} ({shown(v)})" for kind, v in parts.items() if v]
        found = f"'{self.path}' read as {self.layout}: {len(self.matched)} matched"
        return "; ".join([found, *rest]) + "."


def load_encoder_weights(
    encoder: StellarEncoder,
    source: str | Path | Checkpoint,
    *,
    num_heads: int | None = None,
) -> LoadReport:
    """Loads the encoder's weights of a checkpoint of any layout into an encoder.

    The position embedding of another image size is resampled. Queries and projections
    that the checkpoint does not have keep their values. Both are reported.

    Args:
        encoder:
            Encoder of the checkpoint's architecture; changed in place.
        source:
            As for `read_checkpoint`, or what that returned.
        num_heads:
            Attention heads that the checkpoint was trained with, where its width is
            usual and its number of heads is not.

    Returns:
        What was loaded; its config tells the mean and std that images need.

    Raises:
        FileNotFoundError: If there are no weights.
        ValueError: If a tensor is missing, left over or of another shape, or if the
            checkpoint was trained with another number of heads, LayerNorm epsilon or
            way of resampling positions, none of which a tensor shows.
    """
    checkpoint = source if isinstance(source, Checkpoint) else read_checkpoint(source)
    _check_settings(encoder, checkpoint, num_heads)
    state, missing, resized = _fitted(encoder, checkpoint)
    _check_tensors(encoder, state, checkpoint, "encoder")
    encoder.load_state_dict(state, assign=_on_meta(encoder))
    return _reported(checkpoint, state, missing, resized, prefix="encoder.")


def load_model_weights(
    model: Stellar, source: str | Path | Checkpoint, *, num_heads: int | None = None
) -> LoadReport:
    """Loads encoder, projections and decoder of a STELLAR checkpoint.

    Args:
        model:
            Model of the checkpoint's architecture; changed in place.
        source:
            As for `load_encoder_weights`, with or without decoder.
        num_heads:
            As for `load_encoder_weights`.

    Returns:
        What was loaded, by the names of `Stellar`.

    Raises:
        FileNotFoundError: If there are no weights.
        ValueError: If something does not fit, see `load_encoder_weights`.
    """
    checkpoint = source if isinstance(source, Checkpoint) else read_checkpoint(source)
    _check_settings(model.encoder, checkpoint, num_heads)
    encoder, missing, resized = _fitted(model.encoder, checkpoint)
    _check_tensors(model.encoder, encoder, checkpoint, "encoder")
    state = {f"encoder.{name}": tensor for name, tensor in encoder.items()}
    missing = [f"encoder.{name}" for name in missing]
    for name, module in model.named_children():
        if name == "encoder":
            continue
        found = part(checkpoint.state, f"{name}.")
        if found:
            _check_tensors(module, found, checkpoint, name)
        else:
            found = module.state_dict()
            missing += [f"{name}.{key}" for key in found]
        state |= {f"{name}.{key}": tensor for key, tensor in found.items()}
    model.load_state_dict(state, assign=_on_meta(model))
    return _reported(checkpoint, state, missing, resized)


def create_encoder(
    source: str | Path | Checkpoint, *, num_heads: int | None = None, **kwargs: Any
) -> StellarEncoder:
    """Builds the encoder that a checkpoint of any layout was trained with.

    Args:
        source:
            As for `load_encoder_weights`.
        num_heads:
            Attention heads, where neither a config nor the width tells.
        kwargs:
            Arguments of `StellarEncoder` that shall be others, for example img_size.

    Returns:
        The encoder in evaluation mode, a plain ViT if there are no queries.

    Raises:
        FileNotFoundError: If there are no weights.
        ValueError: If the sizes are not known or do not fit.
    """
    checkpoint = source if isinstance(source, Checkpoint) else read_checkpoint(source)
    if checkpoint.layout == STELLAR:
        encoder = _own_encoder(checkpoint, **kwargs)
    else:
        encoder = StellarEncoder(**{**encoder_config(checkpoint, num_heads), **kwargs})
    load_encoder_weights(encoder, checkpoint, num_heads=num_heads)
    return encoder.eval()


def _own_encoder(checkpoint: Checkpoint, **kwargs: Any) -> StellarEncoder:
    """Encoder of a model of this package, with fresh weights."""
    from stellar_plugin.model import Stellar

    return Stellar(**{**checkpoint.config, **kwargs}).encoder


def _reported(
    checkpoint: Checkpoint,
    loaded: State,
    missing: list[str],
    resized: list[str],
    prefix: str = "",
) -> LoadReport:
    unused = [
        name
        for name in checkpoint.state
        if name.startswith(prefix) and name.removeprefix(prefix) not in loaded
    ]
    report = LoadReport(
        checkpoint.path,
        checkpoint.layout,
        checkpoint.config,
        matched=tuple(name for name in loaded if name not in missing),
        missing=tuple(missing),
        resized=tuple(resized),
        unexpected=checkpoint.unexpected,
        ignored=(*checkpoint.ignored, *unused),
    )
    # A warning is seen where nobody configured logging.
    notable = report.missing or report.resized or report.unexpected
    logger.log(logging.WARNING if notable else logging.INFO, "%s", report)
    return report


def _on_meta(module: nn.Module) -> bool:
    return next(module.parameters()).is_meta


def _check_settings(
    encoder: StellarEncoder, checkpoint: Checkpoint, num_heads: int | None
) -> None:
    ours, theirs = _settings(encoder), _trained_settings(checkpoint, num_heads)
    wrong = [
        f"{name}={ours[name]} (checkpoint: {value})"
        for name, value in theirs.items()
        if ours[name] != value
    ]
    if wrong:
        raise ValueError(
            f"The encoder is not the one '{checkpoint.path}' ({checkpoint.layout}) was "
            f"trained with: {', '.join(wrong)}. Build it with the checkpoint's values."
        )


def _settings(encoder: StellarEncoder) -> dict[str, Any]:
    """What changes the features but no tensor's shape."""
    num_heads = encoder.vit.blocks[0].get_submodule("attn").num_heads
    return {
        "num_queries": encoder.num_queries,
        "patch_size": encoder.patch_size,
        "num_heads": num_heads,
        "norm_eps": encoder.vit.norm.eps,
        "pos_antialias": encoder.pos_antialias,
    }


def _trained_settings(checkpoint: Checkpoint, num_heads: int | None) -> dict[str, Any]:
    """The same of the checkpoint, as far as it is known."""
    if checkpoint.layout == STELLAR:
        if not checkpoint.config:
            return {}
        with torch.device("meta"):
            return _settings(_own_encoder(checkpoint))
    names = ("num_heads", "norm_eps", "pos_antialias")
    known = {k: checkpoint.config[k] for k in names if k in checkpoint.config}
    if checkpoint.num_queries:
        known["num_queries"] = checkpoint.num_queries
    norm = checkpoint.state.get("encoder.vit.norm.weight")
    if num_heads or (norm is not None and len(norm) in HEADS_OF_WIDTH):
        known["num_heads"] = heads_of(checkpoint, num_heads)
    return known


def _fitted(
    encoder: StellarEncoder, checkpoint: Checkpoint
) -> tuple[State, list[str], list[str]]:
    """State for the encoder, what of it is fresh, and what was resampled."""
    state = part(checkpoint.state, "encoder.")
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
        registers = [state[QUERY_KEY].to(queries)] if QUERY_KEY in state else []
        state[QUERY_KEY] = torch.cat([*registers, queries], dim=1)
        missing.append(QUERY_KEY)
    resized = _resample_position(encoder, state, checkpoint)
    return state, missing, resized


def _resample_position(
    encoder: StellarEncoder, state: State, checkpoint: Checkpoint
) -> list[str]:
    """Brings the position embedding of another image size to the encoder's grid."""
    table = state.get(POSITION_KEY)
    if table is None or table.ndim != 3 or encoder.vit.pos_embed is None:
        return []
    old_grid = checkpoint.grid_size or _trained_grid(checkpoint, table)
    # A table of no known grid is left to the check of shapes.
    if old_grid == encoder.grid_size or old_grid[0] * old_grid[1] != table.shape[1]:
        return []
    antialias = checkpoint.config.get("pos_antialias", encoder.pos_antialias)
    state[POSITION_KEY] = _resized(table, old_grid, encoder.grid_size, antialias)
    (old_h, old_w), (new_h, new_w) = old_grid, encoder.grid_size
    return [f"{POSITION_KEY} from {old_h} x {old_w} to {new_h} x {new_w} patches"]


def _trained_grid(checkpoint: Checkpoint, table: Tensor) -> tuple[int, int]:
    if checkpoint.layout == STELLAR and checkpoint.config:
        with torch.device("meta"):
            return _own_encoder(checkpoint).grid_size
    side = isqrt(table.shape[1])
    return side, side


def _resized(
    table: Tensor,
    old_grid: tuple[int, int],
    new_grid: tuple[int, int],
    antialias: bool,
) -> Tensor:
    grid = table.float().unflatten(1, old_grid).permute(0, 3, 1, 2)
    grid = F.interpolate(
        grid, size=new_grid, mode="bicubic", antialias=antialias, align_corners=False
    )
    return grid.flatten(2).mT.to(table.dtype)


def _check_tensors(
    module: nn.Module, state: State, checkpoint: Checkpoint, what: str
) -> None:
    expected = module.state_dict()
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
    found = [f"{kind}: {shown(names)}" for kind, names in problems.items() if names]
    if found:
        raise ValueError(
            f"'{checkpoint.path}' does not fit the {what}; {'; '.join(found)}. Build "
            f"the {what} with the checkpoint's sizes{_sizes_hint(checkpoint)}. It was "
            f"read as {checkpoint.layout}; known layouts: {'; '.join(KNOWN_LAYOUTS)}."
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
