"""Weights into a model: all fit, or an error says which do not."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from stellar_plugin.checkpoints.checkpoint import Checkpoint
from stellar_plugin.checkpoints.fit import check_tensors, fitted, untold_settings
from stellar_plugin.checkpoints.layouts import STELLAR
from stellar_plugin.checkpoints.names import State, part
from stellar_plugin.checkpoints.recognise import read_checkpoint
from stellar_plugin.checkpoints.sizes import encoder_config, numerics
from stellar_plugin.encoder import StellarEncoder
from stellar_plugin.networks import Network
from stellar_plugin.state_dict import shown

if TYPE_CHECKING:
    from stellar_plugin.model import Stellar

logger = logging.getLogger(__name__)

# What is said of how a file was read; results keep it by these names.
READ_AS, TOLD_BY, TAKEN = "read as", "told by", "weights taken"
RESAMPLED, ASSUMED = "resampled", "not told, assumed"
LICENSE = "licence of the published weights"


@dataclass(frozen=True)
class LoadReport:
    """What became of the tensors of a checkpoint.

    Attributes:
        path:
            The weight file, or timm's name of the model.
        layout:
            How the file names its tensors.
        read_as:
            What the file was recognised as, method and layout in words.
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
        rule:
            What told the method that trained the weights, "" if nothing did.
        choice:
            Which weights were taken where the file holds several, "" if it does not.
        untold:
            Settings of the encoder that change features and that nothing tells.
        license:
            Licence of the published weights of the method, "" if none is stated.
    """

    path: Path
    layout: str
    read_as: str
    config: dict[str, Any]
    matched: tuple[str, ...]
    missing: tuple[str, ...]
    resized: tuple[str, ...]
    unexpected: tuple[str, ...]
    ignored: tuple[str, ...]
    rule: str = ""
    choice: str = ""
    untold: tuple[str, ...] = ()
    license: str = ""

    @property
    def facts(self) -> dict[str, str]:
        """How the file was read, in words, for a record of the scores."""
        facts = {
            READ_AS: self.read_as,
            TOLD_BY: self.rule or "nothing",
            TAKEN: self.choice,
            RESAMPLED: ", ".join(self.resized),
            ASSUMED: ", ".join(self.untold),
            LICENSE: self.license,
        }
        return {name: text for name, text in facts.items() if text}

    def __str__(self) -> str:
        parts = {
            "missing, so as initialised": self.missing,
            RESAMPLED: self.resized,
            "unexpected": self.unexpected,
            "ignored": self.ignored,
        }
        rest = [f"{len(v)} {kind} ({shown(v)})" for kind, v in parts.items() if v]
        told = f" ({self.rule})" if self.rule else ""
        found = (
            f"'{self.path}' read as {self.read_as}{told}: {len(self.matched)} matched"
        )
        facts = {
            "taken": self.choice,
            ASSUMED: ", ".join(self.untold),
            LICENSE: self.license,
        }
        rest += [f"{name}: {text}" for name, text in facts.items() if text]
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
    state, missing, resized = fitted(encoder, checkpoint, num_heads)
    encoder.load_state_dict(state, assign=_on_meta(encoder))
    antialias = numerics(checkpoint).get("pos_antialias")
    if encoder.any_antialias and antialias is not None:
        encoder.vit.pos_antialias = antialias
    untold = untold_settings(encoder, checkpoint, num_heads)
    return _reported(checkpoint, state, missing, resized, untold, prefix="encoder.")


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
    state, missing, resized = fitted_model(model, checkpoint, num_heads)
    dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    state = {name: tensor.to(dtypes[name]) for name, tensor in state.items()}
    model.load_state_dict(state, assign=_on_meta(model))
    untold = untold_settings(model.encoder, checkpoint, num_heads)
    return _reported(checkpoint, state, missing, resized, untold)


def fitted_model(
    model: Stellar, checkpoint: Checkpoint, num_heads: int | None
) -> tuple[State, list[str], list[str]]:
    """State for the model, what of it is fresh, and what was resampled.

    Raises:
        ValueError: If something does not fit, see `load_encoder_weights`.
    """
    encoder, missing, resized = fitted(model.encoder, checkpoint, num_heads)
    state = {f"encoder.{name}": tensor for name, tensor in encoder.items()}
    missing = [f"encoder.{name}" for name in missing]
    for name, module in model.named_children():
        if name == "encoder":
            continue
        found = part(checkpoint.state, f"{name}.")
        if found:
            check_tensors(module, found, checkpoint, name)
        else:
            found = module.state_dict()
            missing += [f"{name}.{key}" for key in found]
        state |= {f"{name}.{key}": tensor for key, tensor in found.items()}
    return state, missing, resized


def create_encoder(
    source: str | Path | Checkpoint, *, num_heads: int | None = None, **kwargs: Any
) -> StellarEncoder:
    """Builds the encoder that a checkpoint of any layout was trained with.

    What nothing tells is as timm has it, and is logged, see `load_encoder`.

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
    return load_encoder(source, num_heads=num_heads, **kwargs)[0]


def load_encoder(
    source: str | Path | Checkpoint, *, num_heads: int | None = None, **kwargs: Any
) -> tuple[StellarEncoder, LoadReport]:
    """The same, with the report of what was loaded, and of what nothing told."""
    checkpoint = source if isinstance(source, Checkpoint) else read_checkpoint(source)
    # Without memory first: what a config claims may be larger than the file by far.
    with torch.device("meta"):
        encoder = untrained_encoder(checkpoint, num_heads=num_heads, **kwargs)
    fitted(encoder, checkpoint, num_heads)
    encoder = untrained_encoder(checkpoint, num_heads=num_heads, **kwargs)
    report = load_encoder_weights(encoder, checkpoint, num_heads=num_heads)
    return encoder.eval(), report


def load_network(
    source: str | Path | Checkpoint, **kwargs: Any
) -> tuple[Network, LoadReport]:
    """Builds the network of a checkpoint that is no ViT of `StellarEncoder`.

    Args:
        source:
            As for `load_encoder_weights`.
        kwargs:
            Arguments of its family that shall be others, for example img_size.

    Returns:
        The network in evaluation mode, and the report of what was loaded.

    Raises:
        FileNotFoundError: If there are no weights.
        ValueError: If it is a ViT, or weights and arguments do not fit.
    """
    checkpoint = source if isinstance(source, Checkpoint) else read_checkpoint(source)
    # Without memory first, as for `load_encoder`.
    with torch.device("meta"):
        network = untrained_network(checkpoint, **kwargs)
    state, resized = network.fitted(checkpoint.state)
    check_tensors(network.named, state, checkpoint, "network")
    network = untrained_network(checkpoint, **kwargs)
    network.named.load_state_dict(state)
    untold = [f"{k}={v}" for k, v in checkpoint.assumed.items() if k not in kwargs]
    return network.eval(), _reported(checkpoint, state, [], resized, untold)


def untrained_network(checkpoint: Checkpoint, **kwargs: Any) -> Network:
    """Builds the network of a checkpoint with fresh weights; see `load_network`."""
    if checkpoint.network is None:
        raise ValueError(
            f"'{checkpoint.path}' ({checkpoint.read_as}) holds a ViT: load it by "
            "load_encoder."
        )
    with checkpoint.building():
        return checkpoint.network.build(**kwargs)


def untrained_encoder(
    checkpoint: Checkpoint, *, num_heads: int | None = None, **kwargs: Any
) -> StellarEncoder:
    """Builds the encoder of a checkpoint with fresh weights.

    Args:
        checkpoint:
            What `read_checkpoint` returned.
        num_heads:
            As for `create_encoder`.
        kwargs:
            As for `create_encoder`.

    Raises:
        ValueError: If the sizes are not known.
    """
    config = encoder_config(checkpoint, num_heads, kwargs.get("img_size"))
    with checkpoint.building():
        return StellarEncoder(**{**config, **kwargs})


def _reported(
    checkpoint: Checkpoint,
    loaded: State,
    missing: list[str],
    resized: list[str],
    untold: list[str],
    prefix: str = "",
) -> LoadReport:
    unused = [
        name
        for name in checkpoint.state
        if name.startswith(prefix) and name.removeprefix(prefix) not in loaded
    ]
    # A folder of ours has weights of one's own, also of another's method.
    published = checkpoint.method if checkpoint.layout != STELLAR else None
    report = LoadReport(
        checkpoint.path,
        checkpoint.layout,
        checkpoint.read_as,
        checkpoint.config,
        matched=tuple(name for name in loaded if name not in missing),
        missing=tuple(missing),
        resized=tuple(resized),
        unexpected=checkpoint.unexpected,
        ignored=(*checkpoint.ignored, *unused),
        rule=checkpoint.rule,
        choice=checkpoint.choice,
        untold=tuple(untold),
        license=published.license if published else "",
    )
    # A warning is seen where nobody configured logging.
    notable = report.missing or report.resized or report.unexpected
    logger.log(logging.WARNING if notable else logging.INFO, "%s", report)
    return report


def _on_meta(module: nn.Module) -> bool:
    return next(module.parameters()).is_meta
