"""From the names of AIM's files to timm's."""

from __future__ import annotations

from typing import Any

from stellar_plugin.checkpoints.checkpoint import Checkpoint
from stellar_plugin.checkpoints.files import RawCheckpoint
from stellar_plugin.checkpoints.layouts import AIM
from stellar_plugin.checkpoints.methods import Files
from stellar_plugin.checkpoints.names import Names, State

RENAMED = {
    "preprocessor.patchifier.": "patch_embed.",
    "trunk.post_trunk_norm.": "norm.",
    "trunk.blocks.": "blocks.",
}
IN_BLOCKS = {".norm_1.": ".norm1.", ".norm_2.": ".norm2."}
HEAD_WIDTH = 128
# Widths of 600M and 1B.
PUBLISHED_WIDTHS = (1536, 2048)


def read_aim(raw: RawCheckpoint, state: State, files: Files | None) -> Checkpoint:
    """Reads AIM's trunk, without the head of its attention probe.

    Raises:
        ValueError: If names collide.
    """
    files = files or Files(AIM)
    names = _renamed(state, files.ignored)
    kernel = names.state.get("patch_embed.proj.weight")
    width = 0 if kernel is None else len(kernel)
    config: dict[str, Any] = {**files.numerics(), "activation": "GELU"}
    assumed = {}
    if width in PUBLISHED_WIDTHS:
        config["num_heads"] = width // HEAD_WIDTH
    elif width and width % HEAD_WIDTH == 0:
        assumed["num_heads"] = width // HEAD_WIDTH
    return Checkpoint(
        raw.path,
        AIM,
        {f"encoder.vit.{name}": tensor for name, tensor in names.state.items()},
        config=config,
        assumed=assumed,
        num_queries=0,
        unexpected=tuple(names.unexpected),
        ignored=tuple(names.ignored),
    )


def _renamed(state: State, ignored: tuple[str, ...]) -> Names:
    names = Names()
    for old, tensor in state.items():
        start = next((start for start in RENAMED if old.startswith(start)), None)
        if old.startswith(ignored):
            names.ignored.append(old)
        elif start is None:
            names.unexpected.append(old)
        else:
            new = RENAMED[start] + old.removeprefix(start)
            for theirs, ours in IN_BLOCKS.items():
                new = new.replace(theirs, ours)
            names.add(old, new, tensor)
    return names
