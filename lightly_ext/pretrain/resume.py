"""What a continued run does otherwise than before: said in one line, or refused."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from pytorch_lightning.utilities.rank_zero import rank_zero_only

from lightly_ext.data import StellarDataModule
from lightly_ext.data.streams import StreamDataset
from lightly_ext.pretrain.recipes import RUN_RECIPE
from lightly_ext.randomness import run_seed
from stellar_plugin.checkpoints import NUMERICS

# Options that name weights to begin with, the stronger one first.
STARTS = ("weights", "prior")
# Options that name files or change nothing that is learned.
_LEFT_OUT = (
    *(*STARTS, "tokenizer", "compile", "grad_checkpointing"),
    *("on_nonfinite", "nonfinite_limit"),
)
_TRAINER = (
    *("max_epochs", "max_steps", "accumulate_grad_batches", "limit_train_batches"),
    *("precision", "gradient_clip_val", "gradient_clip_algorithm"),
)
_SIZES = ("model.model.", "model.head.")
# Ends of the names of those that no weight knows: what is dropped in training.
_DROPPED = "_rate"


def options(trainer: Any) -> dict[str, Any]:
    """Resolved options that decide on what is learned.

    Args:
        trainer:
            Trainer of a `Pretraining`.

    Returns:
        Values that JSON knows, by their names on the command line.
    """
    module, data = trainer.lightning_module, trainer.datamodule
    given, kinds = module.hparams, module.GROUPS
    groups = {
        **{f"model.{k}.": _arguments(kinds[k][0], given[k]) for k in kinds},
        "model.model.": module.model.config,
        "model.": {k: v for k, v in given.items() if k not in (*_LEFT_OUT, *kinds)},
        "trainer.": {
            **{name: getattr(trainer, name) for name in _TRAINER},
            "max_steps": module.continuation.max_steps(trainer),
        },
        "": {"processes": trainer.world_size, "seed_everything": run_seed()},
    }
    if isinstance(data, StellarDataModule):
        groups["data."] = {
            "path": data.path,
            "images": data.train_dataset.fingerprint,
            "batch_size": data.batch_size,
            "max_pixels": data.max_pixels,
        }
        if isinstance(data.train_dataset, StreamDataset):
            groups["data."]["shuffle_buffer"] = data.shuffle_buffer
        groups["data.transform."] = {
            name: value
            for name, value in vars(data.transform).items()
            if name not in ("transforms", "color_augment")
        }
    named = {start + k: v for start, group in groups.items() for k, v in group.items()}
    resolved: dict[str, Any] = json.loads(json.dumps(named, default=str))
    return resolved


def refuse_changes(trainer: Any, checkpoint: dict[str, Any]) -> None:
    """Refuses to continue with options that need, or would have made, other weights.

    Args:
        trainer:
            Trainer of a `Pretraining`.
        checkpoint:
            Of the run to continue.

    Raises:
        ValueError: If such an option has changed, with its name and values, or the
            checkpoint does not say what its options were.
    """
    if "options" not in checkpoint:
        raise ValueError(
            "The checkpoint was written by an earlier version, which did not note what "
            "its options were. Start a new run, with --model.weights=the run's model/ "
            "folder to begin with what was learned."
        )
    changed = _changed(checkpoint["options"], options(trainer))
    module = trainer.lightning_module
    old, new = checkpoint["state_dict"], module.state_dict()
    for part, names in module.PARTS.items():
        if _has(old, part) != _has(new, part):
            _refuse({name: changed[name] for name in names if name in changed})
    shapes = [{k: v.shape for k, v in state.items()} for state in (old, new)]
    _refuse(
        {
            name: values
            for name, values in changed.items()
            if name.startswith(_SIZES) and not name.endswith(_DROPPED)
        },
        "its weights would not fit"
        if shapes[0] != shapes[1]
        else "its weights were learned with it",
    )


def changes(trainer: Any, checkpoint: dict[str, Any]) -> str:
    """What is otherwise than before, in words; empty if nothing is."""
    changed = _changed(checkpoint["options"], options(trainer))
    return ", ".join(f"{k} {old} -> {new}" for k, (old, new) in changed.items())


def without_start(model: Any, checkpoint: Path) -> dict[str, Any]:
    """Takes from a checkpoint what the weights that a run began with had told.

    Says which other weights are asked for, in vain.

    Args:
        model:
            Arguments of a `Pretraining`; changed in place: neither `prior` nor
            `weights` are read again.
        checkpoint:
            Of the run to continue.

    Returns:
        What the run began with, by the names of these arguments.
    """
    recipe = checkpoint.parent.parent / RUN_RECIPE
    began = yaml.safe_load(recipe.read_text())["model"] if recipe.is_file() else model
    starts = {name: began.get(name) for name in STARTS if name in model}
    for name in starts:
        if model[name] not in (None, starts[name]):
            rank_zero_only(print)(
                f"--model.{name} {model[name]} is not read: the run goes on from its "
                "checkpoint."
            )
        model[name] = None
    content = torch.load(checkpoint, "cpu", weights_only=True, mmap=True)
    told = content["hyper_parameters"]["model"]
    if "model_name" in model["model"]:
        told = {k: v for k, v in told.items() if k in (*NUMERICS, "tokenizer")}
    model["model"] = {**told, **model["model"]}
    return starts


def _arguments(
    function: Callable[..., Any], given: Mapping[str, Any] | None
) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    return {**defaults, **(given or {})}


def _changed(old: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    return {
        name: (old.get(name), new.get(name))
        for name in {**new, **old}
        if old.get(name) != new.get(name)
    }


def _has(state: dict[str, Any], start: str) -> bool:
    return any(name.startswith(start) for name in state)


def _refuse(
    changed: dict[str, tuple[Any, Any]], reason: str = "its weights would not fit"
) -> None:
    if not changed:
        return
    texts = [f"--{name} from {old} to {new}" for name, (old, new) in changed.items()]
    raise ValueError(
        f"A continued run cannot change {', '.join(texts)}: {reason}. "
        "Set it back, or start a new run with another --output; there --model.weights "
        "may name the model/ folder of this one, to begin with what was learned."
    )
