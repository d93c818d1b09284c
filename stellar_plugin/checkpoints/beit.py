"""From the names of BEiT's files to those of its network."""

from __future__ import annotations

from typing import Any

from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models.beit import gen_relative_position_index

from stellar_plugin.checkpoints.checkpoint import Architecture, Checkpoint
from stellar_plugin.checkpoints.files import RawCheckpoint
from stellar_plugin.checkpoints.layouts import BEIT
from stellar_plugin.checkpoints.methods import Files
from stellar_plugin.checkpoints.names import Names, State, check_index, shape_of
from stellar_plugin.checkpoints.readers import as_mapping
from stellar_plugin.checkpoints.sizes import mlp_ratio
from stellar_plugin.networks.beit import CLS_ROWS, BEiT
from stellar_plugin.networks.relative_bias import TABLE, side_of
from stellar_plugin.state_dict import shown

SHARED_TABLE = f"rel_pos_bias.{TABLE}"
INDEX = "relative_position_index"
# What training and classification have beside the network.
UNUSED = ("mask_token", "lm_head.", "head.")
BACKBONE = ("blocks", "cls_token", "fc_norm", "norm", "patch_embed", "rel_pos_bias")


def read_beit(raw: RawCheckpoint, state: State, files: Files | None) -> Checkpoint:
    """Reads a ViT with relative position biases, of all blocks or of each.

    Raises:
        ValueError: If the tensors that tell its sizes are not there, or not alike.
    """
    names = _renamed(state)
    images = {**(files.images() if files else {}), **_images(raw)}
    usual = {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}
    return Checkpoint(
        raw.path,
        BEIT,
        names.state,
        network=Architecture(BEiT, _sizes(names.state, state)),
        config=images,
        assumed={k: v for k, v in usual.items() if k not in images},
        num_queries=0,
        unexpected=tuple(names.unexpected),
        ignored=tuple(names.ignored),
    )


def _renamed(state: State) -> Names:
    names = Names()
    # A classifier has a norm behind its pooling, or that of all tokens.
    unused = (*UNUSED, "fc_norm.") if "norm.weight" in state else UNUSED
    for name, tensor in state.items():
        if name.endswith(INDEX) or name.startswith(unused):
            names.ignored.append(name)
        elif name == "pos_embed":
            raise ValueError(
                "it has a position table beside relative position biases, which no "
                "published BEiT has; build timm's Beit with both"
            )
        elif name.split(".")[0] in BACKBONE:
            # Where the network keeps it: beside the attention, see `BEiT`.
            new = name.replace(f".attn.{TABLE}", f".rel_pos_bias.{TABLE}")
            names.add(name, new, tensor)
        else:
            names.unexpected.append(name)
    return names


def _sizes(inside: State, state: State) -> dict[str, Any]:
    """Arguments of `BEiT`."""
    width, _, _, patch_size = shape_of(inside, "patch_embed.proj.weight", 4)
    hidden = shape_of(inside, "blocks.0.mlp.fc1.weight", 2)[0]
    blocks = len({name.split(".")[1] for name in inside if name.startswith("blocks.")})
    shared = SHARED_TABLE in inside
    of_blocks = [f"blocks.{i}.{SHARED_TABLE}" for i in range(blocks)]
    tables = [SHARED_TABLE] if shared else of_blocks
    missing = [i for i, name in enumerate(tables) if name not in inside]
    if missing:
        raise ValueError(
            f"of its {blocks} blocks, each with a table of relative position biases, "
            f"{shown(missing)} (from 0) have none: a part of the file is lost"
        )
    shapes = {tuple(shape_of(inside, name, 2)) for name in tables}
    (rows, num_heads), *others = sorted(shapes)
    grid = side_of(rows - CLS_ROWS)
    if others or not grid:
        raise ValueError(
            f"its tables of relative position biases are {shown(sorted(shapes))}, "
            "expected one shape, with (2 h - 1)^2 + 3 rows for h x h patches"
        )
    for name in state:
        if name.endswith(INDEX):
            check_index(name, state[name], gen_relative_position_index((grid, grid)))
    return {
        "img_size": grid * patch_size,
        "patch_size": patch_size,
        "embed_dim": width,
        "depth": blocks,
        "num_heads": num_heads,
        "mlp_ratio": mlp_ratio(hidden, width),
        "shared": shared,
        "global_pool": "token" if "norm.weight" in inside else "avg",
    }


def _images(raw: RawCheckpoint) -> dict[str, Any]:
    """Mean and std of the images by timm's config.json."""
    cfg = as_mapping(raw.config.get("pretrained_cfg"), "pretrained_cfg")
    return {name: cfg[name] for name in ("mean", "std") if name in cfg}
