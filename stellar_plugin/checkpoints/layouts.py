"""What a checkpoint holds, whatever its layout."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stellar_plugin.checkpoints.names import State

STELLAR, OFFICIAL, TRANSFORMERS = "stellar", "official STELLAR", "transformers ViT"
KNOWN_LAYOUTS = (
    "STELLAR of this package (encoder.vit.blocks.0...)",
    "official STELLAR (sparse_tokens, encoder.encoder.layer.0... or "
    "encoder.layers.0...)",
    "transformers ViT and ViT-MAE (embeddings..., encoder.layer.0...)",
    "timm, MAE, DINO, iBOT, MoCo v3, DINOv2, I-JEPA (blocks.0.attn.qkv...)",
)


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
