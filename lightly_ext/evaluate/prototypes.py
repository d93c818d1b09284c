"""The prototypes that a checkpoint was trained with."""

from __future__ import annotations

from lightly_ext.evaluate.frozen_model import FrozenModel
from lightly_ext.modules import STELLARProjectionHead
from stellar_plugin.checkpoints import HEADS_NAME, read_checkpoint
from stellar_plugin.checkpoints.export import HEAD_KEYS


def load_sparse_head(model: FrozenModel) -> STELLARProjectionHead:
    """Projection head and prototypes of the tokens, on the device, without gradients.

    Raises:
        ValueError: If the checkpoint has none, or the model is untrained.
    """
    if model.origin.untrained:
        raise ValueError("An untrained model has no prototypes: leave them out.")
    state = read_checkpoint(model.origin.source).heads.get("sparse_head", {})
    problem = None
    if not state:
        problem = f"there is no {HEADS_NAME} beside it, as `stellar pretrain` writes it"
    elif "prototypes.weight" not in state:
        problem = "it was trained without"
    elif state.keys() != HEAD_KEYS:
        problem = "its heads are normalised by the batch"
    if problem is not None:
        raise ValueError(
            f"'{model.origin.source}' has no prototypes that tokens could be compared "
            f"with: {problem}. Leave them out."
        )
    hidden, width = state["layers.0.weight"].shape
    prototypes, output = state["prototypes.weight"].shape
    head = STELLARProjectionHead(width, hidden, output, prototypes)
    head.load_state_dict(state)
    return head.eval().requires_grad_(False).to(model.mean.device)
