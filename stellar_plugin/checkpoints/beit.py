"""From the names of BEiT's files to those of timm's Beit."""

from __future__ import annotations

from stellar_plugin.checkpoints.checkpoint import Architecture, Checkpoint
from stellar_plugin.checkpoints.files import RawCheckpoint
from stellar_plugin.checkpoints.layouts import BEIT
from stellar_plugin.checkpoints.methods import Files
from stellar_plugin.checkpoints.names import State
from stellar_plugin.checkpoints.sizes import depth
from stellar_plugin.networks.beit import BEiT

SHARED_TABLE = "rel_pos_bias.relative_position_bias_table"
BLOCK_TABLE = "blocks.0.attn.relative_position_bias_table"


def read_beit(raw: RawCheckpoint, state: State, files: Files | None) -> Checkpoint:
    """Reads a ViT with relative position biases.

    Raises:
        ValueError: If the tensors that tell its sizes are not there, or not alike.
    """
    ignored = (*(files.ignored if files else ()), "mask_token", "lm_head.")
    unused = [
        name
        for name in state
        if name.startswith(ignored) or name.endswith("relative_position_index")
    ]
    tensors = {name: tensor for name, tensor in state.items() if name not in unused}
    shared = SHARED_TABLE in tensors
    rows, num_heads = tensors[SHARED_TABLE if shared else BLOCK_TABLE].shape
    side = (round((rows - 3) ** 0.5) + 1) // 2
    kernel = tensors["patch_embed.proj.weight"]
    hidden = len(tensors["blocks.0.mlp.fc1.weight"])
    sizes = {
        "img_size": side * kernel.shape[-1],
        "patch_size": kernel.shape[-1],
        "embed_dim": len(kernel),
        "depth": depth(tensors),
        "num_heads": num_heads,
        "mlp_ratio": hidden / len(kernel),
        "shared": shared,
    }
    return Checkpoint(
        raw.path,
        BEIT,
        tensors,
        network=Architecture(BEiT, sizes),
        config=files.numerics() if files else {},
        num_queries=0,
        ignored=tuple(unused),
    )
