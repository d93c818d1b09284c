"""The exported model of a run."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from lightly_ext.durable import finish_replacing, partial, replace_folder
from stellar_plugin.checkpoints import HEADS, save_heads


def export_model(module: Any, folder: Path) -> None:
    """Writes the model of a pretraining for `Stellar.from_pretrained`.

    Projection heads are written too, so that training can be continued with them. The
    folder is replaced as a whole, and what killed exports left is removed.

    Args:
        module:
            The `StellarPretraining`.
        folder:
            Where model.safetensors, config.json and heads.safetensors are to be.

    Raises:
        OSError: If they cannot be written; what was there stays.
        SafetensorError: The same, of weights.
    """
    finish_replacing(folder)
    new = partial(folder)
    if new.exists():
        shutil.rmtree(new)
    try:
        module.model.save_pretrained(new)
        heads = {name: getattr(module, name, None) for name in HEADS}
        save_heads({k: head.state_dict() for k, head in heads.items() if head}, new)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    replace_folder(new, folder)
