"""What a run may change, one name for each thing."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Options:
    """Options of a run; the defaults are the published STELLAR at a small scale.

    Attributes:
        width, depth, heads, patch, size:
            The ViT, for all methods; patch and image size in px.
        decoder_depth:
            Blocks of the decoder of MAE and STELLAR, as wide as the encoder.
        batch_size, lr, min_lr, warmup, weight_decay, clip:
            Optimisation; `lr` is that of a batch of 64 and follows the square root of
            the batch size, `warmup` is a share of the stage.
        global_scale, local_scale, local_size, global_views, local_views:
            Crops: least area of a global crop, range of a local one, side of a local
            crop in px, number of each per image.
        jitter, gray:
            Strength of the colour jitter relative to STELLAR's, probability of gray.
        prior_share, prior_mask_ratio:
            Share of the time in which STELLAR's prior learns by MAE, and MAE's ratio.
        teacher:
            Momentum of a teacher that is kept throughout, or None.
        target:
            Whether the target view is "clean" or "coloured".
        encoder_lr_scale, layer_decay, heads_first:
            Of the weights that come from the prior: factor of their learning rate, a
            further one per layer from the end, share of the stage in which they rest.
        prototypes, prototype_std, unit_prototypes:
            Number, None for the teacher's tokens of the batch in their place; scale at
            the start; whether rows are normalised after each step.
        head_hidden, head_output, head_norm:
            Widths of the heads; whether both layers have batch normalisation.
        prediction_temperature, target_temperature, target_temperature_start:
            Temperatures; the last one, if given, falls to the second one linearly in
            the first third of the stage.
        sinkhorn_iterations, queue:
            Balance; `queue` is the number of earlier batches that take part in it.
        mask_ratio, focal_prob, queries, query_std, matching, final_norm:
            The STELLAR stage; `query_std` None is that of the encoder.
        reconstruction, clustering, alignment, cls, koleo:
            Weights of the loss.
        dino_prototypes, swav_prototypes, simclr_temperature:
            The other methods.
    """

    width: int = 128
    depth: int = 4
    heads: int = 4
    patch: int = 8
    size: int = 64
    decoder_depth: int = 2
    batch_size: int = 64
    lr: float = 1e-3
    min_lr: float = 1e-6
    warmup: float = 0.05
    weight_decay: float = 0.05
    clip: float = 3.0
    global_scale: float = 0.36
    local_scale: tuple[float, float] = (0.06, 0.36)
    local_size: int = 32
    global_views: int = 2
    local_views: int = 2
    jitter: float = 1.0
    gray: float = 0.2
    prior_share: float = 0.4
    prior_mask_ratio: float = 0.75
    teacher: float | None = None
    target: Literal["clean", "coloured"] = "clean"
    encoder_lr_scale: float = 1.0
    layer_decay: float = 1.0
    heads_first: float = 0.0
    prototypes: int | None = 256
    prototype_std: float = 1.0
    unit_prototypes: bool = False
    head_hidden: int = 512
    head_output: int = 128
    head_norm: bool = False
    prediction_temperature: float = 0.12
    target_temperature: float = 0.06
    target_temperature_start: float | None = None
    sinkhorn_iterations: int = 3
    queue: int = 0
    mask_ratio: float = 0.75
    focal_prob: float = 0.5
    queries: int = 8
    query_std: float | None = None
    matching: Literal["optimal_transport", "identity"] = "optimal_transport"
    final_norm: bool = True
    reconstruction: float = 10.0
    clustering: float = 1.0
    alignment: float = 1.0
    cls: float = 1.0
    koleo: float = 0.1
    dino_prototypes: int = 1024
    swav_prototypes: int = 256
    simclr_temperature: float = 0.2

    def changed(self, changes: Mapping[str, Any]) -> Options:
        """Options with some other values, given as values or as text.

        Raises:
            ValueError: If a name is unknown, or a text no value of its type.
        """
        hints = typing.get_type_hints(Options)
        unknown = changes.keys() - hints.keys()
        if unknown:
            raise ValueError(
                f"Unknown options {sorted(unknown)}; there are {sorted(hints)}."
            )
        values = {
            name: _parsed(name, value, hints[name]) for name, value in changes.items()
        }
        return dataclasses.replace(self, **values)

    def changes(self) -> dict[str, Any]:
        """What differs from the defaults."""
        fields = dataclasses.fields(self)
        values = {field.name: getattr(self, field.name) for field in fields}
        return {f.name: values[f.name] for f in fields if values[f.name] != f.default}


def _parsed(name: str, value: Any, hint: Any) -> Any:
    choices = typing.get_args(hint)
    if isinstance(hint, types.UnionType):
        if value is None or value == "none":
            return None
        hint = choices[0]
    try:
        if typing.get_origin(hint) is Literal:
            if value not in choices:
                raise ValueError(f"one of {choices}")
            return value
        if typing.get_origin(hint) is tuple:
            parts = value.split(",") if isinstance(value, str) else value
            low, high = (float(part) for part in parts)
            return low, high
        if hint is bool:
            return {"true": True, "false": False}[str(value).lower()]
        return hint(value)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{name}={value!r} is no {hint}.") from error
