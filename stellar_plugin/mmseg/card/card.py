"""The protocol card of a run, read from what ran.

The model, the optimiser, the loops and the transforms that mmengine built say what was
done, whatever config they come from. Each group of fields is read on its own: what
cannot be read is "not told", with a note that says why, and ends nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmengine.runner import Runner

from stellar_plugin.mmseg.card.built import num_classes
from stellar_plugin.mmseg.card.data import classes_of, limit_of, part_of, smallest
from stellar_plugin.mmseg.card.described import plain
from stellar_plugin.mmseg.card.metric import averaging_of
from stellar_plugin.mmseg.card.model import backbone_of, features_of, head_of, losses_of
from stellar_plugin.mmseg.card.names import data_name, evaluation_names, published
from stellar_plugin.mmseg.card.reading import Readers, Readings, read
from stellar_plugin.mmseg.card.training import (
    batch_size_of,
    clip_of,
    length_of,
    optimizer_of,
    rates_of,
    rule_of,
    schedule_of,
)
from stellar_plugin.mmseg.card.transforms import shortened, test_views, train_views
from stellar_plugin.mmseg.weights import inner
from stellar_plugin.protocols import CARD_FIELDS, NOT_TOLD, SEGMENTATION

# What a config may say of its data, as no built object knows it.
SAID = ("source", "split", "classes")


def read_training(runner: Runner) -> Readings:
    """Reads the fields of a card that training decides on.

    Args:
        runner:
            Runner whose training loop, optimiser and schedulers are built. `split` and
            `limit` are those of the training images, and sizes stand in full.
    """

    def dataset() -> Any:
        return runner.train_loop.dataloader.dataset

    readers: Readers = {
        ("train_views", "train_scale", "train_ratio"): lambda: train_views(dataset()),
        "split": lambda: part_of(dataset()),
        "limit": lambda: limit_of(dataset()),
        "backbone": lambda: backbone_of(runner),
        "loss": lambda: losses_of(inner(runner.model)),
        "optimizer": lambda: optimizer_of(runner),
        ("lrs", "weight_decay"): lambda: rates_of(runner),
        "batch_sizes": lambda: (batch_size_of(runner),),
        "clip": lambda: clip_of(runner),
        ("epochs", "iterations"): lambda: length_of(runner),
        ("warmup", "schedule"): lambda: schedule_of(runner),
        "rule": lambda: rule_of(runner),
    }
    return read(readers)


def read_evaluation(runner: Runner, loop: Any) -> Readings:
    """Reads the fields of a card that evaluation decides on.

    Args:
        runner:
            Runner with the model.
        loop:
            Its loop of validation or test. `split` and `limit` are those of its images.
    """
    model, named = inner(runner.model), published(runner)

    def dataset() -> Any:
        return loop.dataloader.dataset

    readers: Readers = {
        "split": lambda: part_of(dataset()),
        "limit": lambda: limit_of(dataset()),
        "features": lambda: features_of(model),
        "head": lambda: head_of(model),
        "num_classes": lambda: num_classes(model),
        "classes": lambda: classes_of(model, dataset(), named),
        (
            *("resize", "longest", "crop", "stride"),
            *("test_views", "inference", "label_resolution"),
        ): lambda: test_views(model, dataset()),
        ("averaging", "evaluation_batch"): lambda: averaging_of(loop.evaluator.metrics),
    }
    return read(readers)


def make_card(
    runner: Runner, training: Mapping[str, Any], evaluation: Readings
) -> Readings:
    """Puts a card together.

    Args:
        runner:
            Runner with the config, whose `evaluation = dict(model=..., data=...,
            protocol=NAME, changes=...)` gives names: NAME is a constant of
            `stellar_plugin.protocols.segmentation`, and `changes` says of the data what
            cannot be read (source, split, classes).
        training:
            What `read_training` read, here or in the run of a checkpoint.
        evaluation:
            What `read_evaluation` read.
    """
    said, notes = evaluation_names(runner)
    named, fields = published(runner), dict(evaluation.fields)
    data = read({"data": lambda: data_name(runner)})
    changes = said.get("changes")
    changes = dict(changes) if isinstance(changes, Mapping) else {}
    for name in [n for n in changes if n not in SAID]:
        del changes[name]
        notes.append(f"evaluation.changes.{name} is not used: it is read from the run")
    limits = [part.get("limit") for part in (training, fields)]
    limit = NOT_TOLD if NOT_TOLD in limits else smallest(*limits)
    card = {
        "name": named.name if named else SEGMENTATION.name,
        "source": named.source if named else NOT_TOLD,
        **data.fields,
        **fields,
        **training,
        "split": f"{training.get('split', NOT_TOLD)} / {fields['split']}",
        "limit": limit,
    }
    card["train_views"] = shortened(card)
    card = {name: card.get(name) for name in CARD_FIELDS} | changes
    filled = {k: v for k, v in card.items() if v not in (None, "", (), [])}
    return Readings(plain(filled), [*evaluation.notes, *data.notes, *notes])


def differences(runner: Runner, card: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Fields in which a card is not the published one: published and actual value."""
    named = published(runner)
    if named is None:
        return {}
    theirs = named.card()
    names = [name for name in CARD_FIELDS if theirs.get(name) != card.get(name)]
    return {name: [theirs.get(name), card.get(name)] for name in names}
