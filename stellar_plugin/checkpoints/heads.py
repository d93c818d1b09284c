"""Projection heads and prototypes, in a file of their own beside the model."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from torch import nn

from stellar_plugin.checkpoints.checkpoint import Checkpoint
from stellar_plugin.checkpoints.files import HEADS_NAME
from stellar_plugin.checkpoints.names import State
from stellar_plugin.weight_files import write_tensors

logger = logging.getLogger(__name__)

HEAD_ARGUMENTS = "hidden_dim, output_dim, num_prototypes and batch_norm"


def save_heads(heads: Mapping[str, State], folder: str | Path) -> None:
    """Writes the states of projection heads beside a saved model.

    Args:
        heads:
            States by the names "sparse_head" and "cls_head". Nothing is written if
            there are none.
        folder:
            Folder that `Stellar.save_pretrained` wrote.
    """
    state = {
        f"{name}.{key}": tensor.detach().contiguous()
        for name, head in heads.items()
        for key, tensor in head.items()
    }
    if state:
        write_tensors(state, Path(folder) / HEADS_NAME)


def load_head_weights(
    heads: Mapping[str, nn.Module], checkpoint: Checkpoint
) -> list[str]:
    """Loads projection heads with their prototypes.

    Args:
        heads:
            Heads by the names "sparse_head" and "cls_head"; changed in place.
        checkpoint:
            What `read_checkpoint` returned.

    Returns:
        Names of the heads that the checkpoint does not have, and that stay as they are;
            logged too.

    Raises:
        ValueError: If a head is of another shape.
    """
    for name, head in heads.items():
        state = checkpoint.heads.get(name)
        if state is None:
            continue
        ours = {k: tuple(v.shape) for k, v in head.state_dict().items()}
        theirs = {k: tuple(v.shape) for k, v in state.items()}
        if ours != theirs:
            raise ValueError(
                f"The {name} of '{checkpoint.path}' does not fit: it has {theirs}, "
                f"expected {ours}. Set the head's {HEAD_ARGUMENTS} to the checkpoint's."
            )
        head.load_state_dict(state)
    missing = [name for name in heads if name not in checkpoint.heads]
    if missing:
        logger.warning(
            "'%s' has no %s: freshly initialised.", checkpoint.path, ", ".join(missing)
        )
    return missing
