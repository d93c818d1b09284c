"""From the names of Swin's files to those of timm's."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from timm.models.swin_transformer import get_relative_position_index

from stellar_plugin.checkpoints.checkpoint import Architecture, Checkpoint
from stellar_plugin.checkpoints.files import RawCheckpoint
from stellar_plugin.checkpoints.layouts import SWIN
from stellar_plugin.checkpoints.methods import Files
from stellar_plugin.checkpoints.names import Names, State, check_index, shape_of
from stellar_plugin.checkpoints.sizes import mlp_ratio
from stellar_plugin.networks.relative_bias import TABLE, side_of
from stellar_plugin.networks.swin import Swin
from stellar_plugin.state_dict import shown

# What training and classification have beside the network.
UNUSED = ("mask_token", "decoder.", "head.")
INDEX, MASK = "relative_position_index", "attn_mask"
BACKBONE = ("layers", "norm", "patch_embed")
_BLOCK = re.compile(r"layers\.(\d+)\.blocks\.(\d+)\.")
_MERGING = re.compile(r"layers\.(\d+)\.downsample\.")


def read_swin(raw: RawCheckpoint, state: State, files: Files | None) -> Checkpoint:
    """Reads a Swin of its own code, of SimMIM or of timm.

    Raises:
        ValueError: If the tensors that tell its sizes are not there, or not alike.
    """
    names = _renamed(state)
    return Checkpoint(
        raw.path,
        SWIN,
        names.state,
        network=Architecture(Swin, _sizes(names.state, state)),
        config=files.images() if files else {},
        num_queries=0,
        unexpected=tuple(names.unexpected),
        ignored=tuple(names.ignored),
    )


def _renamed(state: State) -> Names:
    names = Names()
    # timm merges patches at the beginning of a stage, Swin's own code at the end.
    moved = any(name.startswith("layers.0.downsample.") for name in state)
    for name, tensor in state.items():
        if name.endswith((INDEX, MASK)) or name.startswith(UNUSED):
            names.ignored.append(name)
        elif name == "absolute_pos_embed":
            raise ValueError(
                "it is a Swin with a position table, which no published one has; "
                "build it in its own code"
            )
        elif name.split(".")[0] in BACKBONE:
            new = _MERGING.sub(_next_stage, name) if moved else name
            names.add(name, new, tensor)
        else:
            names.unexpected.append(name)
    return names


def _next_stage(merging: re.Match[str]) -> str:
    return f"layers.{int(merging[1]) + 1}.downsample."


def _sizes(inside: State, state: State) -> dict[str, Any]:
    """Arguments of `Swin`."""
    width, _, _, patch_size = shape_of(inside, "patch_embed.proj.weight", 4)
    blocks = {b.groups() for name in inside if (b := _BLOCK.match(name))}
    depths = Counter(int(stage) for stage, _ in blocks)
    stages = sorted(depths)
    heads = [
        shape_of(inside, f"layers.{stage}.blocks.0.attn.{TABLE}", 2)[1]
        for stage in stages
    ]
    tables = [name for name in inside if name.endswith(TABLE)]
    rows = sorted({shape_of(inside, name, 2)[0] for name in tables})
    window = side_of(rows[0])
    if len(rows) > 1 or not window:
        raise ValueError(
            f"its tables of relative position biases have {shown(rows)} rows, expected "
            "(2 w - 1)^2 for one window of w x w tokens"
        )
    index = get_relative_position_index(window, window)
    for name in state:
        if name.endswith(INDEX):
            check_index(name, state[name], index)
    hidden = shape_of(inside, "layers.0.blocks.0.mlp.fc1.weight", 2)[0]
    return {
        "img_size": window * patch_size * 2 ** (len(stages) - 1),
        "patch_size": patch_size,
        "embed_dim": width,
        "depths": [depths[stage] for stage in stages],
        "num_heads": heads,
        "mlp_ratio": mlp_ratio(hidden, width),
    }
