"""What training decides on of a card: as asked, resumed, cut short, or tested."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stellar_plugin.mmseg.stored import as_stored
from stellar_plugin.protocols import NOT_TOLD

TRAINING_FIELDS = (
    *("train_views", "train_scale", "train_ratio", "backbone", "loss", "optimizer"),
    *("lrs", "batch_sizes", "weight_decay", "clip", "epochs", "iterations"),
    *("warmup", "schedule", "rule"),
)


def of_training(card: Mapping[str, Any]) -> dict[str, Any]:
    """What training decided on of a whole card; of the split its part."""
    fields = {k: card[k] for k in (*TRAINING_FIELDS, "limit") if k in card}
    return {**fields, "split": str(card.get("split", NOT_TOLD)).partition(" / ")[0]}


def resumed(
    before: Mapping[str, Any], now: Mapping[str, Any], iteration: int
) -> str | None:
    """The rule of a run that was resumed, with what was other before.

    Args:
        before:
            The training's fields in the checkpoint, empty where it has none.
        now:
            Those of this run.
        iteration:
            Iterations that the checkpoint was trained for.
    """
    now = as_stored(now)
    if before:
        names = [n for n in TRAINING_FIELDS if before.get(n) != now.get(n)]
        told = ", ".join(f"before it {n} {before.get(n)}" for n in names)
    else:
        told = "how it was trained before is not told"
    rule: str | None = now.get("rule")
    if not told:
        return rule
    return f"{f'{rule}; ' if rule else ''}resumed at iteration {iteration}, {told}"


def reached(
    card: Mapping[str, Any], steps: int | str, epochs: int | str
) -> dict[str, Any]:
    """The fields of a training that may be cut short.

    Args:
        card:
            The training's fields as asked for.
        steps:
            Steps of the optimiser that are done.
        epochs:
            Epochs that are done.
    """
    card = dict(card)
    for name, done in (("iterations", steps), ("epochs", epochs)):
        asked = card.get(name)
        if isinstance(asked, int) and isinstance(done, int) and done < asked:
            card["schedule"] = f"{card['schedule']}, stopped after {done} of {asked}"
            card[name] = done
    return card
