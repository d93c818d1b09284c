"""The exported model of a run."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from lightly_ext.durable import finish_replacing, partial, replace_folder
from lightly_ext.pretrain.story import RunStory


def run_facts(module: Any) -> dict[str, Any]:
    """What is recorded of a run, for whoever gets its weights.

    Args:
        module:
            The `Pretraining`; in its training the story of the run is told, too.
    """
    facts = {"method": module.METHOD, "settings": dict(module.hparams)}
    if module.started_from:
        facts["started_from"] = module.started_from
    trainer = module._trainer
    callbacks = trainer.callbacks if trainer is not None else []
    story = next((c for c in callbacks if isinstance(c, RunStory)), None)
    if story is None or not story.record["sessions"]:
        return facts
    return {**facts, **story.facts(trainer)}


def export_model(module: Any, folder: Path) -> None:
    """Writes the model of a pretraining for all commands that take one.

    The folder is replaced as a whole, and what killed exports left is removed.

    Args:
        module:
            The `Pretraining`.
        folder:
            Where weights and config.json are to be.

    Raises:
        OSError: If they cannot be written; what was there stays.
        SafetensorError: The same, of weights.
    """
    finish_replacing(folder)
    new = partial(folder)
    if new.exists():
        shutil.rmtree(new)
    try:
        module.export(new, run_facts(module))
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    replace_folder(new, folder)
